"""Tree attention. Sums run over the unmasked slots in slot order, so a node depends on what it may see alone."""

from __future__ import annotations

import torch
from torch import Tensor

from haast.native.library import check_tensor, library, thread_count


def _usable(tensor: Tensor) -> bool:
    """Whether the attention kernel can read the tensor as it is: what nearly every call brings, in few Python steps."""
    return (
        tensor.dtype is torch.float32
        and tensor.is_cpu
        and not tensor.requires_grad
        and tensor.dim() == 4
        and tensor.stride(3) == 1
    )


def _made_usable(name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor, 4)
    return tensor.detach().contiguous()


def _misfit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> ValueError:
    rows, n, slots = q.shape[0], q.shape[2], k.shape[2]
    if mask is not None and (mask.shape[0] not in (1, rows) or mask.shape[1:] != (1, n, slots)):
        return ValueError(f"mask has shape {tuple(mask.shape)}; expected ({rows} or 1, 1, {n}, {slots})")
    return ValueError(
        f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (rows, heads, n, d) "
        "and twice (rows, kv_heads, slots, d), heads a multiple of kv_heads"
    )


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
    threads: int | None = None,
) -> Tensor:
    """Attend with an arbitrary additive mask, grouped queries without repeating K and V.

    Sums run over the unmasked slots in slot order, so a node's result depends on nothing but what it may see.

    Args:
        q: (rows, heads, n, d) fp32.
        k: (rows, kv_heads, slots, d) fp32; any strides as long as d is contiguous (a view of a cache is fine).
        v: as k.
        mask: (rows or 1, 1, n, slots) fp32, added to the scores; -1e30 or less hides the slot. None: all seen.
        scaling: factor on q k^T.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        threads: default torch's own count, also inside `sole_threads`.

    Returns:
        (rows, n, heads, d) fp32, contiguous; zeros where a node sees no slot.
    """
    q = q if _usable(q) else _made_usable("q", q)
    k = k if _usable(k) else _made_usable("k", k)
    v = v if _usable(v) else _made_usable("v", v)
    rows, heads, n, d = q.shape
    k_rows, kv_heads, slots, k_d = k.shape
    fits = k_rows == rows and k_d == d and v.shape == k.shape and kv_heads > 0 and heads % kv_heads == 0
    place, mask_row, mask_node = None, 0, 0
    if mask is not None:
        mask = mask if _usable(mask) else _made_usable("mask", mask)
        mask_rows, one, mask_n, mask_slots = mask.shape
        fits = fits and mask_rows in (1, rows) and one == 1 and mask_n == n and mask_slots == slots
        place, mask_row, mask_node = mask.data_ptr(), 0 if mask_rows == 1 else mask.stride(0), mask.stride(2)
    if not fits:
        raise _misfit(q, k, v, mask)
    out = torch.empty(rows, n, heads, d)
    places = (q.data_ptr(), k.data_ptr(), v.data_ptr(), place, out.data_ptr())
    strides = q.stride()[:3] + k.stride()[:3] + v.stride()[:3]
    how = (mask_row, mask_node, scaling, softcap, threads or thread_count())
    library().haast_tree_attention_f32(*places, rows, heads, kv_heads, n, slots, d, *strides, *how)
    return out
