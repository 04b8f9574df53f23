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
) -> Tensor:
    """Additive mask for nodes that see all of their row's past, and those uncommitted slots that `seen` marks.

    Slot j of a row is a committed position for j < length. After these come the slots in flight (not yet committed);
    slots beyond them are masked.

    Args:
        seen: (rows, nodes, in flight) bool; the tree's `ancestors` if the nodes are all that is in flight.
        lengths: (rows,) int64 committed slots.
        slots: number of slots that the mask covers.
        dtype: of the mask.
        positions: (rows, nodes) int64 of the nodes; needed with a window.
        flight_positions: (rows, in flight) int64 of the slots in flight; needed with a window.
        window: also masks keys `window` positions or more before the query; 1 leaves only the node itself; None is off.

    Returns:
        (rows, 1, nodes, slots): 0 where a node attends, the dtype's minimum elsewhere.
    """
    rows, nodes, flight = seen.shape
    key = torch.arange(slots, device=seen.device)
    offset = key - lengths.unsqueeze(1)  # (rows, slots): index among the slots in flight; negative if committed
    index = offset.clamp(0, flight - 1)
    visible = seen.gather(2, index.unsqueeze(1).expand(rows, nodes, slots))
    visible = (visible & (offset < flight).unsqueeze(1)) | (offset < 0).unsqueeze(1)
    if window is not None:
        assert positions is not None and flight_positions is not None, "a window needs positions"
        key_positions = torch.where(offset < 0, key, flight_positions.gather(1, index))  # (rows, slots)
        visible &= positions.unsqueeze(2) - key_positions.unsqueeze(1) < window
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (rows, heads, nodes, dim) over `key`, `value` (rows, kv_heads, slots, dim).

    Reshapes grouped queries instead of repeating keys and values. Returns (rows, nodes, heads, dim). Calls
    transformers' sdpa if there is no mask, or a boolean one: then the model is used outside of Haast.
    """
    if attention_mask is None or attention_mask.dtype is torch.bool or dropout:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if _native_fits(query, value):
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
