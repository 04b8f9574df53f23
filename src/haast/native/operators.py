"""Operators of decoder layers: linear layers with packed weights, tree attention, RMS norm, RoPE, SwiGLU, top-k.

Rows are independent: a row has the same bits with any other rows in the batch. Attention sums over the unmasked slots
in slot order, so that a node depends only on the slots that it attends to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from haast.native.library import LANES, check_tensor, huge_bytes, library, thread_count

MOST_TOP = 64  # entries that `top` can list
# Block formats of GGUF files: inputs and bytes of a block. Sizes as in ggml; a block of a K format is a group of 256.
BLOCK_FORMS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
WEIGHT_FORMS = {"f16": 0, **{form: number for number, form in enumerate(BLOCK_FORMS, 1)}}  # enum WeightForm


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
    shape = (-(-out_features // LANES), in_features, LANES)
    packed = huge_bytes(2 * math.prod(shape)).view(torch.int16).view(shape)
    library().haast_pack_f16(source.data_ptr(), packed.data_ptr(), out_features, in_features)
    if not bool(packed.view(torch.float16).isfinite().all()):
        raise ValueError(
            f"weight has values that fp16 cannot hold (largest magnitude {float(source.abs().max()):g}, limit 65504); "
            "leave this layer unpacked"
        )
    return packed


def pack_q8(weight: Tensor) -> Tensor:
    """Round a weight matrix to 8 bits in blocks of 32 inputs with an fp16 scale each (Q8_0), in panels of 16 outputs.

    Args:
        weight: (out_features, in_features) fp32, any strides. The last block of a row may be incomplete.

    Returns:
        (ceil(out_features / 16), bytes of a panel) uint8: the largest magnitude of a block becomes 127.

    Raises:
        ValueError: a value that is not finite, or too large for an fp16 scale.
    """
    check_tensor("weight", weight, 2)
    source = weight.detach().contiguous()
    largest = float(source.abs().max()) if source.numel() else 0.0
    if not largest / 127 < 65504:  # also false for NaN
        raise ValueError(
            f"weight has values that are not finite or too large for 8 bits (largest magnitude {largest:g}); leave "
            "this layer unpacked"
        )
    return _pack_blocks(None, source, "Q8_0", *source.shape)


def pack_blocks(blocks: Tensor, form: str, in_features: int) -> Tensor:
    """Lay out the blocks of a GGUF tensor in panels of 16 outputs; the weights keep their values and bits.

    Args:
        blocks: (out_features, bytes of a row) uint8, as in the file.
        form: one of `BLOCK_FORMS`, e.g. "Q4_K".
        in_features: a multiple of the form's block.

    Returns:
        (ceil(out_features / 16), bytes of a panel) uint8.

    Raises:
        ValueError: an unknown form, or rows that do not have the form's size.
    """
    if form not in WEIGHT_FORMS or form == "f16":
        raise ValueError(f"form={form!r} is unknown: give one of {', '.join(BLOCK_FORMS)}")
    inputs, size = BLOCK_FORMS[form]
    if (
        blocks.dtype is not torch.uint8
        or blocks.dim() != 2
        or in_features % inputs
        or blocks.size(1) != in_features // inputs * size
        or not blocks.is_cpu
    ):
        raise ValueError(
            f"blocks are {blocks.dtype} of shape {tuple(blocks.shape)} on {blocks.device}; {in_features} inputs in "
            f"{form} need uint8 rows of {size} bytes per {inputs} inputs, on the CPU"
        )
    return _pack_blocks(blocks.contiguous(), None, form, blocks.size(0), in_features)


def _pack_blocks(
    blocks: Tensor | None, weight: Tensor | None, form: str, out_features: int, in_features: int
) -> Tensor:
    number = WEIGHT_FORMS[form]
    panels, size = -(-out_features // LANES), panel_bytes(form, in_features)
    packed = huge_bytes(panels * size).view(panels, size)
    sources = [None if each is None else each.data_ptr() for each in (blocks, weight)]
    sizes = (number, out_features, in_features)
    library().haast_pack_blocks(*sources, packed.data_ptr(), *sizes, torch.get_num_threads())
    return packed


def panel_bytes(form: str, in_features: int) -> int:
    """Bytes of a panel of 16 outputs."""
    if form == "f16":
        return 2 * LANES * in_features
    return int(library().haast_panel_bytes(WEIGHT_FORMS[form], in_features))


def unpack_rows(packed: Tensor, form: str, in_features: int, out_features: int, rows: Tensor | None = None) -> Tensor:
    """Outputs of a packed weight matrix as fp32, with exactly the values that its form defines.

    Args:
        packed: of `pack_f16`, `pack_q8` or `pack_blocks`.
        form: "f16" or one of `BLOCK_FORMS`.
        in_features, out_features: sizes of the matrix.
        rows: (...) int64 on the CPU, which outputs; all if None.

    Returns:
        (..., in_features) fp32.

    Raises:
        ValueError: a row outside the matrix, or another dtype or size.
    """
    shape: tuple[int, ...] = (out_features,)
    pointer, count = None, out_features
    if rows is not None:
        if rows.dtype is not torch.int64 or not rows.is_cpu:
            raise ValueError(f"rows are {rows.dtype} on {rows.device}: give int64 on the CPU")
        rows = rows.contiguous()
        shape, pointer, count = tuple(rows.shape), rows.data_ptr(), rows.numel()
    _check_packed(packed, form, in_features)
    if packed.size(0) != -(-out_features // LANES):
        raise ValueError(f"the packed weight has {packed.size(0)} panels for {out_features} outputs")
    out = torch.empty(*shape, in_features)
    sizes = (out_features, count, in_features)
    outside = library().haast_unpack_rows(
        packed.data_ptr(), WEIGHT_FORMS[form], pointer, out.data_ptr(), *sizes, thread_count()
    )
    if outside >= 0:
        assert rows is not None, "all rows are inside"
        number = int(rows.reshape(-1)[outside])
        raise ValueError(f"row {number} does not exist: the matrix has rows 0 to {out_features - 1}")
    return out


def _check_packed(packed: Tensor, form: str, in_features: int) -> None:
    fits = form in WEIGHT_FORMS and packed.nbytes == packed.size(0) * panel_bytes(form, in_features)
    if not fits or not packed.is_contiguous():
        raise ValueError(
            f"a packed weight of {packed.dtype} and shape {tuple(packed.shape)} does not fit {in_features} inputs in "
            f"form {form!r}: give the results of pack_f16, pack_q8 or pack_blocks"
        )


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    form: str = "f16",
) -> Tensor:
    """Multiply rows by a packed weight: y = x W^T + bias.

    fp16 weights: fp32 products and sums. Block weights: a row of x is rounded to 8 bits per 32 inputs, products within
    the inputs that share a scale are exact integers, and all else is fp32.

    Args:
        x: (..., in_features) fp32.
        packed: the packed weight of `pack_f16`, `pack_q8` or `pack_blocks`.
        bias: (out_features) fp32, or None.
        in_features: columns of the weight.
        out_features: rows of the weight before padding.
        form: "f16" or one of `BLOCK_FORMS`.

    Returns:
        (..., out_features) fp32, contiguous.
    """
    if x.dtype is not torch.float32 or not x.is_cpu or x.requires_grad or x.size(-1) != in_features:
        _check_linear(x, in_features)
    if packed.size(0) != -(-out_features // LANES) or (bias is not None and bias.numel() != out_features):
        raise ValueError(
            f"out_features is {out_features}, but the packed weight has {packed.size(0)} panels of {LANES} outputs "
            f"and the bias {'is None' if bias is None else f'has shape {tuple(bias.shape)}'}"
        )
    _check_packed(packed, form, in_features)  # a wrong size would be read beyond its end
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
        WEIGHT_FORMS[form],
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
