"""Verification of drafted trees in one native call: accepted nodes and the sampled tokens after them."""

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
    """Walk down each tree while a child has the token that is sampled from its parent's logits.

    Args:
        logits: (rows, nodes, vocab) fp32, on the CPU.
        tokens: (rows, nodes) int64.
        parents: (rows, nodes) int64, -1 for none; a parent comes before its children.
        live: (rows, nodes) bool.
        placeholder: (rows, nodes) bool, or None.
        temperatures: one per row; 0 takes the most likely token, the first of equals.
        draws: per row, one number in [0, 1) per depth, which samples the token after a node at that depth; trees are
            not deeper.

    Returns:
        (rows, 1 + 3 * depths) int64, the input of `haast.core.Verdict`: number of accepted nodes, then their path, the
        token after each (-1 if no token is possible), and whether the first child was accepted (-1: no child).

    Raises:
        ValueError: tensors of another dtype or device, or of shapes that do not fit together.
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
            f"{rows} temperatures, and for each of {rows} rows one draw per depth"
        )
    c_temperatures = (ctypes.c_float * rows)(*temperatures)
    c_draws = (ctypes.c_double * (rows * width))(*(draw for each in draws for draw in each))
    inputs = [each.contiguous() for each in (logits, tokens, parents, *flags)]
    out = torch.empty(rows, 1 + 3 * width, dtype=torch.int64)
    pointers = (*(each.data_ptr() for each in inputs), *[None] * (5 - len(inputs)))
    sizes = (rows, nodes, vocab, width)
    library().haast_judge(*pointers, c_temperatures, c_draws, out.data_ptr(), *sizes, thread_count())
    return out
