"""Operators of decoder layers: linear layers with packed weights, tree attention, RMS norm, RoPE, SwiGLU, top-k.

Rows are independent: a row has the same bits with any other rows in the batch. Attention sums over the unmasked slots
in slot order, so that a node depends only on the slots that it attends to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haast.native.library import LANES, check_tensor, library, thread_count

MOST_TOP = 64  # entries that `top` can list


def pack_f16(weight: Tensor) -> Tensor:
    """Round a weight matrix to fp16 and lay it out in panels of 16 outputs.

    Args:
        weight: (out_features, in_features) fp32, any strides.

    Returns:
        (ceil(out_features / 16), in_features, 16) int16 with fp16 bits, the last panel zero padded. The integer type
        prevents `module.float()` and the like from converting it.

    Raises:
        ValueError: a value that fp16 cannot hold.
    """
    check_tensor("weight", weight, 2)
    source = weight.detach().contiguous()
    out_features, in_features = source.shape
    packed = torch.empty((-(-out_features // LANES), in_features, LANES), dtype=torch.int16)
    library().haast_pack_f16(source.data_ptr(), packed.data_ptr(), out_features, in_features)
    if not bool(packed.view(torch.float16).isfinite().all()):
        raise ValueError(
            f"weight has values that fp16 cannot hold (largest magnitude {float(source.abs().max()):g}, limit 65504); "
            "leave this layer unpacked"
        )
    return packed


def pack_i8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8 with one scale per output, and lay it out in panels of 16 outputs.

    Args:
        weight: (out_features, in_features) fp32, any strides.

    Returns:
        (ceil(out_features / 16), in_features, 16) int8, zero padded, and scales (out_features) fp32: an output's
        largest magnitude becomes 127.

    Raises:
        ValueError: a value that is not finite.
    """
    check_tensor("weight", weight, 2)
    source = weight.detach().contiguous()
    if not bool(source.isfinite().all()):
        raise ValueError("weight has values that are not finite; leave this layer unpacked")
    out_features, in_features = source.shape
    packed = torch.empty((-(-out_features // LANES), in_features, LANES), dtype=torch.int8)
    scale = torch.empty(out_features)
    library().haast_pack_i8(source.data_ptr(), packed.data_ptr(), scale.data_ptr(), out_features, in_features)
    return packed, scale


def linear(x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, out_features: int) -> Tensor:
    """Multiply rows by a packed weight: y = x W^T + bias, with 16-bit or int8 weights and fp32 for all else.

    Args:
        x: (..., in_features) fp32.
        packed: the packed weight of `pack_f16` or `pack_i8`.
        scale: the scales of `pack_i8`; None with fp16.
        bias: (out_features) fp32, or None.
        out_features: rows of the weight before padding.

    Returns:
        (..., out_features) fp32, contiguous.
    """
    in_features = packed.size(1)
    if x.dtype is not torch.float32 or not x.is_cpu or x.requires_grad or x.size(-1) != in_features:
        _check_linear(x, in_features)
    if packed.size(0) != -(-out_features // LANES) or (bias is not None and bias.numel() != out_features):
        raise ValueError(
            f"out_features is {out_features}, but the packed weight has {packed.size(0)} panels of {LANES} outputs "
            f"and the bias {'is None' if bias is None else f'has shape {tuple(bias.shape)}'}"
        )
    if (scale is None) != (packed.dtype is torch.int16) or (scale is not None and scale.numel() != out_features):
        raise ValueError(
            f"a packed weight of {packed.dtype} does not fit "
            f"{'no scales' if scale is None else f'{scale.numel()} scales'} for {out_features} outputs: give the "
            "results of pack_f16 or pack_i8"
        )
    # Rows at a fixed stride are read in place; anything else is copied.
    stride = in_features
    if not x.is_contiguous():
        if x.dim() == 2 and x.stride(1) == 1:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    y = _empty_rows(x, out_features)
    library().haast_linear(
        x.data_ptr(),
        packed.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        stride,
        out_features,
        thread_count(),
    )
    return y


def _empty_rows(x: Tensor, width: int) -> Tensor:
    """An uninitialised (..., width) for x (..., any). Plain ints save 2 us of parsing a Size in the usual case."""
    if x.dim() == 3:
        return torch.empty(x.size(0), x.size(1), width)
    return torch.empty((*x.shape[:-1], width))


def _check_linear(x: Tensor, in_features: int) -> None:
    check_tensor("x", x)
    if x.size(-1) != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but the packed weight is for {in_features} inputs")


def _readable(tensor: Tensor) -> bool:
    """Whether the attention kernel can read the tensor as it is; a cheap check that nearly every call passes."""
    return (
        tensor.dtype is torch.float32
        and tensor.is_cpu
        and not tensor.requires_grad
        and tensor.dim() == 4
        and tensor.stride(3) == 1
    )


def _to_readable(name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor, 4)
    return tensor.detach().contiguous()


def _shape_error(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> ValueError:
    rows, n, slots = q.shape[0], q.shape[2], k.shape[2]
    if mask is not None and (mask.shape[0] not in (1, rows) or mask.shape[1:] != (1, n, slots)):
        return ValueError(f"mask has shape {tuple(mask.shape)}; expected ({rows} or 1, 1, {n}, {slots})")
    return ValueError(
        f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (rows, heads, n, d) "
        "and k, v (rows, kv_heads, slots, d), heads a multiple of kv_heads"
    )


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention with an arbitrary additive mask, for grouped queries without repeating K and V.

    Sums run over the unmasked slots in slot order, so a node's result depends only on the slots that it attends to.

    Args:
        q: (rows, heads, n, d) fp32.
        k: (rows, kv_heads, slots, d) fp32; any strides as long as d is contiguous (a view of a cache is fine).
        v: as k.
        mask: (rows or 1, 1, n, slots) fp32, added to the scores; -1e30 or less hides the slot. None: no mask.
        scaling: factor on q k^T.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.

    Returns:
        (rows, n, heads, d) fp32, contiguous; zeros for a node whose slots are all masked.
    """
    q = q if _readable(q) else _to_readable("q", q)
    k = k if _readable(k) else _to_readable("k", k)
    v = v if _readable(v) else _to_readable("v", v)
    rows, heads, n, d = q.shape
    k_rows, kv_heads, slots, k_d = k.shape
    fits = k_rows == rows and k_d == d and v.shape == k.shape and kv_heads > 0 and heads % kv_heads == 0
    mask_pointer, mask_row, mask_node = None, 0, 0
    if mask is not None:
        mask = mask if _readable(mask) else _to_readable("mask", mask)
        mask_rows, one, mask_n, mask_slots = mask.shape
        fits = fits and mask_rows in (1, rows) and one == 1 and mask_n == n and mask_slots == slots
        mask_pointer, mask_row, mask_node = mask.data_ptr(), 0 if mask_rows == 1 else mask.stride(0), mask.stride(2)
    if not fits:
        raise _shape_error(q, k, v, mask)
    out = torch.empty(rows, n, heads, d)
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), mask_pointer, out.data_ptr())
    strides = q.stride()[:3] + k.stride()[:3] + v.stride()[:3]
    more = (mask_row, mask_node, scaling, softcap, thread_count())
    library().haast_tree_attention_f32(*pointers, rows, heads, kv_heads, n, slots, d, *strides, *more)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension; x (..., dim), weight (dim), both fp32."""
    check_tensor("x", x)
    check_tensor("weight", weight.detach(), 1)
    dim = x.shape[-1]
    if weight.shape[0] != dim:
        raise ValueError(f"weight has {weight.shape[0]} values; x has shape {tuple(x.shape)}")
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty(x.shape)
    pointers, sizes = (x.data_ptr(), weight.data_ptr(), y.data_ptr()), (x.numel() // dim, dim)
    library().haast_rms_norm_f32(*pointers, *sizes, eps, thread_count())
    return y


def rotate_(x: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    """Apply rotary embeddings in place to the first heads of every row, halves paired as Llama pairs them.

    Args:
        x: (rows, nodes, width) fp32, contiguous; heads of size d from the start of each width.
        cosine: (rows or 1, nodes, d) fp32, d even.
        sine: as cosine.
        heads: number of heads to rotate; values after them are not changed.

    Returns:
        `x`.
    """
    check_tensor("x", x, 3)
    check_tensor("cosine", cosine, 3)
    check_tensor("sine", sine, 3)
    (rows, nodes, width), (angle_rows, angle_nodes, d) = x.shape, cosine.shape
    fits = sine.shape == cosine.shape and angle_rows in (1, rows) and angle_nodes == nodes
    if not fits or d % 2 or heads * d > width or not x.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, cosine {tuple(cosine.shape)}, sine {tuple(sine.shape)}, heads {heads}; "
            "expected contiguous x (rows, nodes, width), cosine and sine (rows or 1, nodes, even d), heads * d <= width"
        )
    cosine, sine = cosine.contiguous(), sine.contiguous()
    pointers, sizes = (x.data_ptr(), cosine.data_ptr(), sine.data_ptr()), (rows * nodes, heads, d, width)
    library().haast_rotate_f32(*pointers, *sizes, angle_rows * nodes, thread_count())
    return x


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up; gate_up (..., 2 * width) fp32 with the gate first, result (..., width)."""
    check_tensor("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; the last dimension must be even")
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width))
    rows = gate_up.numel() // max(2 * width, 1)
    library().haast_swiglu_f32(gate_up.data_ptr(), y.data_ptr(), rows, width, thread_count())
    return y


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Top-k of each row of logits, most likely first.

    Args:
        logits: (..., width) fp32.
        count: 1 to 64, at most the width; of equal logits the smaller index comes first.

    Returns:
        log-probabilities (..., count) fp32 and indices (..., count) int64.
    """
    check_tensor("logits", logits)
    width = logits.shape[-1]
    if not 1 <= count <= min(MOST_TOP, width):
        raise ValueError(f"count={count} is not allowed: give 1 to {min(MOST_TOP, width)}")
    logits = logits.contiguous()
    shape = (*logits.shape[:-1], count)
    logprobs, indices = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    sizes = (logits.numel() // width, width, count)
    library().haast_top(logits.data_ptr(), logprobs.data_ptr(), indices.data_ptr(), *sizes, thread_count())
    return logprobs, indices
