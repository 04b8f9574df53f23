"""Tree attention: the tree mask, and the attention function that transformers models call with it.

Owns the additive mask of a tree over a cache (past and ancestors, limited by a layer's sliding window) and the
attention function that is registered with transformers under the name "haast". Stock modules call it through
`AttentionInterface`; nothing is patched. Source: EAGLE (arXiv 2401.15077), section 3.3; SpecInfer (arXiv 2305.09781).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from haast import native

NAME = "haast"


def tree_mask(
    seen: Tensor,
    lengths: Tensor,
    slots: int,
    dtype: torch.dtype,
    *,
    positions: Tensor | None = None,
    flight_positions: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Additive mask for nodes that see all of their row's past, and those uncommitted slots that `seen` marks.

    Slot j of a row is a committed position for j < length. After these come the slots in flight (not yet committed);
    slots beyond them are masked.

    Args:
        seen: (rows, nodes, in flight) bool; the tree's `ancestors` if the nodes are all that is in flight.
        lengths: (rows,) int64 committed slots.
        slots: number of slots that the mask covers.
        dtype: of the mask.
        positions: (rows, nodes) int64 of the nodes; needed with a window or chunks.
        flight_positions: (rows, in flight) int64 of the slots in flight; needed with a window or chunks.
        window: also masks keys `window` positions or more before the query; 1 leaves only the node itself; None is off.
        chunk: also masks keys outside of the query's own `chunk` positions, counted from 0; None is off.

    Returns:
        (rows, 1, nodes, slots): 0 where a node attends, the dtype's minimum elsewhere.
    """
    rows, nodes, flight = seen.shape
    key = torch.arange(slots, device=seen.device)
    offset = key - lengths.unsqueeze(1)  # (rows, slots): index among the slots in flight; negative if committed
    index = offset.clamp(0, flight - 1)
    visible = seen.gather(2, index.unsqueeze(1).expand(rows, nodes, slots))
    visible = (visible & (offset < flight).unsqueeze(1)) | (offset < 0).unsqueeze(1)
    if window is not None or chunk is not None:
        assert positions is not None and flight_positions is not None, "a window and chunks need positions"
        key_positions = torch.where(offset < 0, key, flight_positions.gather(1, index)).unsqueeze(1)
        positions = positions.unsqueeze(2)  # (rows, nodes, 1); key_positions is (rows, 1, slots)
        if window is not None:
            visible &= positions - key_positions < window
        if chunk is not None:
            visible &= positions // chunk == key_positions // chunk
    bias = torch.zeros(visible.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (rows, heads, nodes, dim) over `key`, `value` (rows, kv_heads, slots, dim).

    Reshapes grouped queries instead of repeating keys and values. Returns (rows, nodes, heads, dim). Calls
    transformers' sdpa if there is no mask, or a boolean one: then the model is used outside of Haast. `indices` (rows,
    nodes, n) are the slots that a sparse attention has selected for each query, in addition to the mask.
    """
    if indices is not None and attention_mask is not None:
        attention_mask = _only(indices, attention_mask)
    if attention_mask is None or attention_mask.dtype is torch.bool or dropout:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if _native_fits(query, value, attention_mask):
        return native.tree_attention(query, key, value, attention_mask, scale, softcap or 0.0), None
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        attended = scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=grouped)
        return attended.transpose(1, 2).contiguous(), None
    rows, heads, nodes, dim = query.shape
    kv_heads = key.shape[1]
    grouped_query = (query * scale).reshape(rows, kv_heads, (heads // kv_heads) * nodes, dim)
    scores = torch.tanh(grouped_query @ key.transpose(2, 3) / softcap) * softcap  # (rows, kv_heads, group*nodes, slots)
    scores = scores.view(rows, kv_heads, heads // kv_heads, nodes, -1) + attention_mask.unsqueeze(1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    output = weights.view(rows, kv_heads, (heads // kv_heads) * nodes, -1) @ value
    return output.view(rows, heads, nodes, value.shape[-1]).transpose(1, 2).contiguous(), None


def _only(indices: Tensor, mask: Tensor) -> Tensor:
    """A mask (rows, 1, nodes, slots), boolean or additive, that leaves each query only the slots of `indices`."""
    others = torch.ones_like(mask, dtype=torch.bool).scatter_(3, indices.long().unsqueeze(1), False)
    return mask & ~others if mask.dtype is torch.bool else mask.masked_fill(others, torch.finfo(mask.dtype).min)


def _native_fits(query: Tensor, value: Tensor, mask: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and native.available()
        and query.dtype is torch.float32
        and query.device.type == "cpu"
        and value.shape[-1] == query.shape[-1]
        and mask.shape[1] == 1  # not one per head (Doge)
        and not torch.is_grad_enabled()
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
