"""Sample-and-match in one call: which nodes of drafted trees are kept, and the tokens that follow them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from haast.native.library import check_tensor, library, thread_count


def judge(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    live: Tensor,
    placeholder: Tensor | None,
    *,
    temperatures: Sequence[float],
    draws: Sequence[Sequence[float]],
) -> Tensor:
    """Walk down every tree as long as a child carries the token that its parent's logits give.

    Args:
        logits: (rows, nodes, vocab) fp32, on the CPU.
        tokens: (rows, nodes) int64.
        parents: (rows, nodes) int64, -1 for none; a parent stands before its children.
        live: (rows, nodes) bool.
        placeholder: (rows, nodes) bool, or None.
        temperatures: one per row; 0 takes the likeliest token, the first of equals.
        draws: numbers in [0, 1) per row, for the token after a node at each depth; no node is deeper.

    Returns:
        (rows, 1 + 3 * depths) int64, as `haast.core.Verdict` takes it: how many nodes are kept, then the path,
        the token after each (-1 where no token is possible), and whether the first child was right (-1: no child).

    Raises:
        ValueError: tensors of another kind or of shapes that do not fit together.
    """
    check_tensor("logits", logits, 3)
    rows, nodes, vocab = logits.shape
    flags = (live,) if placeholder is None else (live, placeholder)
    for kind, tensors in ((torch.int64, (tokens, parents)), (torch.bool, flags)):
        for each in tensors:
            if each.shape != (rows, nodes) or each.dtype is not kind or not each.is_cpu:
                raise ValueError(
                    f"a tree has a field {each.dtype} of shape {tuple(each.shape)} on {each.device}; expected {kind} "
                    f"({rows}, {nodes}) on the CPU"
                )
    widths = {len(each) for each in draws}
    width = max(widths, default=0)
    if len(temperatures) != rows or len(draws) != rows or widths != {width or 1}:
        raise ValueError(
            f"{len(temperatures)} temperatures and {len(draws)} times {sorted(widths)} draws are given; expected "
            f"{rows} temperatures, and as many draws for each of {rows} rows as there are depths"
        )
    heat = (ctypes.c_float * rows)(*temperatures)
    points = (ctypes.c_double * (rows * width))(*(draw for each in draws for draw in each))
    given = [each.contiguous() for each in (logits, tokens, parents, *flags)]
    out = torch.empty(rows, 1 + 3 * width, dtype=torch.int64)
    places = (*(each.data_ptr() for each in given), *[None] * (5 - len(given)))
    sizes = (rows, nodes, vocab, width)
    library().haast_judge(*places, heat, points, out.data_ptr(), *sizes, thread_count())
    return out
