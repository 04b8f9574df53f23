"""Tree attention: the one place that knows the mask, and the attention function that reads it.

Owns the additive mask of a tree over a cache (past and ancestors, cut by a sliding window where a layer has one) and
the attention function registered with transformers under the name "haast". Stock modules call it through
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
    """The additive mask of nodes that see all of their row's past, and of what is in flight after it what `seen` says.

    Slot j of a row is a committed position for j < length, node j - length of those in flight after that, and nothing
    beyond them.

    Args:
        seen: (rows, nodes, in flight) bool; of a tree its `ancestors`.
        lengths: (rows,) int64 committed slots.
        slots: that the mask covers.
        dtype: of the mask.
        positions: (rows, nodes) int64 of the nodes; read with a window only.
        flight_positions: (rows, in flight) of what is in flight.
        window: keys `window` positions or more before the query are hidden too; 1 leaves the node alone; None is off.

    Returns:
        (rows, 1, nodes, slots): 0 where a node may look, the dtype's minimum elsewhere.
    """
    rows, nodes, flight = seen.shape
    key = torch.arange(slots, device=seen.device)
    place = key - lengths.unsqueeze(1)  # (rows, slots): number of what is in flight; below 0 is committed
    number = place.clamp(0, flight - 1)
    visible = seen.gather(2, number.unsqueeze(1).expand(rows, nodes, slots))
    visible = (visible & (place < flight).unsqueeze(1)) | (place < 0).unsqueeze(1)
    if window is not None:
        assert positions is not None and flight_positions is not None, "windows go by positions"
        at = torch.where(place < 0, key, flight_positions.gather(1, number))  # (rows, slots)
        visible &= positions.unsqueeze(2) - at.unsqueeze(1) < window
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
