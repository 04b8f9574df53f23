"""Tree attention: the one place that knows the mask, and the attention function that reads it.

Owns the additive mask of a tree over a cache (past and ancestors, cut by a sliding window where a layer has one) and
the attention function registered with transformers under the name "haast". Stock modules call it through
`AttentionInterface`; nothing is patched. Source: EAGLE (arXiv 2401.15077), section 3.3; SpecInfer (arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from haast import native
from haast.tree import DraftTree

NAME = "haast"


def tree_bias(
    tree: DraftTree, lengths: Sequence[int], dtype: torch.dtype, window: int | None = None, slots: int | None = None
) -> Tensor:
    """The additive mask (rows, 1, nodes, slots): 0 where a node may look, the dtype's minimum elsewhere.

    Slot j of a row is a committed position for j < length, node j - length after that, and nothing beyond its nodes.
    `window` keeps only keys whose position is less than `window` behind the query's. `slots` is how many the mask
    covers; those in use if None.
    """
    bias = in_flight_bias(tree.ancestors, lengths, dtype, slots)
    if window is not None and max(lengths) + tree.nodes > window:
        positions = torch.tensor(lengths, device=bias.device).unsqueeze(1) + tree.depths
        hide_far(bias, lengths, [0] * tree.rows, positions, positions, window)
    return bias


def hide_far(
    bias: Tensor, lengths: Sequence[int], begins: Sequence[int], positions: Tensor, flying: Tensor, window: int
) -> None:
    """Hide, in a mask of `in_flight_bias`, what stands `window` positions or more behind a node.

    Args:
        bias: (rows, 1, nodes, slots), changed in place.
        lengths: committed slots per row.
        begins: the position in each row's slot 0.
        positions: (rows, nodes) of the nodes.
        flying: (rows, in flight) positions of what stands behind the committed slots.
        window: 1 is the node alone.
    """
    key = torch.arange(bias.shape[3], device=bias.device)
    for row, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        place = key + begin  # slots in no use are hidden already
        place[length : length + flying.shape[1]] = flying[row]
        bias[row, 0].masked_fill_(positions[row].unsqueeze(1) - place >= window, torch.finfo(bias.dtype).min)


def in_flight_bias(seen: Tensor, lengths: Sequence[int], dtype: torch.dtype, slots: int | None = None) -> Tensor:
    """The mask of nodes that see all of their row's past, and of what is in flight behind it just what `seen` says.

    Args:
        seen: (rows, nodes, in flight) bool.
        lengths: committed slots per row; what is in flight stands behind them.
        dtype: of the mask.
        slots: that the mask covers; longest length + in flight if None.

    Returns:
        (rows, 1, nodes, slots), 0 or the dtype's minimum.
    """
    rows, nodes, flight = seen.shape
    lowest, longest = torch.finfo(dtype).min, max(lengths)
    bias = torch.zeros(rows, 1, nodes, slots or longest + flight, dtype=dtype, device=seen.device)
    hidden = ~seen
    if min(lengths) == longest:
        bias[:, 0, :, longest : longest + flight].masked_fill_(hidden, lowest)
        bias[:, 0, :, longest + flight :] = lowest
        return bias
    for row, length in enumerate(lengths):
        bias[row, 0, :, length : length + flight].masked_fill_(hidden[row], lowest)
        bias[row, 0, :, length + flight :] = lowest
    return bias


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (rows, heads, nodes, dim) over `key`, `value` (rows, kv_heads, slots, dim).

    Grouped queries share their key head by a reshape, so keys and values are never copied. Returns
    (rows, nodes, heads, dim). Without a mask, or with transformers' own boolean one (the model used outside Haast),
    transformers' sdpa answers.
    """
    if attention_mask is None or attention_mask.dtype is torch.bool or dropout:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if _native_fits(query, value):
        return native.tree_attention(query, key, value, attention_mask, scale, softcap or 0.0), None
    rows, heads, nodes, dim = query.shape
    kv_heads = key.shape[1]
    grouped = (query * scale).reshape(rows, kv_heads, (heads // kv_heads) * nodes, dim)
    scores = grouped @ key.transpose(2, 3)  # (rows, kv_heads, group * nodes, slots)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(rows, kv_heads, heads // kv_heads, nodes, -1) + attention_mask.unsqueeze(1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    output = weights.view(rows, kv_heads, (heads // kv_heads) * nodes, -1) @ value
    return output.view(rows, heads, nodes, value.shape[-1]).transpose(1, 2).contiguous(), None


def _native_fits(query: Tensor, value: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and native.available()
        and query.dtype is torch.float32
        and query.device.type == "cpu"
        and value.shape[-1] == query.shape[-1]
        and not torch.is_grad_enabled()
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
