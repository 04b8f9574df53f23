"""Skinny products with packed weights. Rows are independent: the same bits whatever rows stand beside one."""

from __future__ import annotations

import torch
from torch import Tensor

from haast.native.library import LANES, check_tensor, library, thread_count


def pack_f16(weight: Tensor) -> Tensor:
    """Round a weight matrix to fp16 and lay it out in panels of 16 outputs.

    Args:
        weight: (out_features, in_features) fp32, any strides.

    Returns:
        (ceil(out_features / 16), in_features, 16) int16 holding fp16 bits, the last panel zero padded. The integer type
        keeps `module.float()` and the like from converting it.

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
    """Round a weight matrix to int8 with one factor per output, and lay it out in panels of 16 outputs.

    Args:
        weight: (out_features, in_features) fp32, any strides.

    Returns:
        (ceil(out_features / 16), in_features, 16) int8, zero padded, and factors (out_features) fp32: an output's
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


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    threads: int | None = None,
) -> Tensor:
    """Multiply rows by a packed weight: y = x W^T + bias, 16-bit or int8 weights, fp32 everything else.

    Args:
        x: (..., in_features) fp32.
        packed: what `pack_f16` or `pack_i8` returned.
        scale: the factors that `pack_i8` returned; None with fp16.
        bias: (out_features) fp32, or None.
        out_features: rows of the weight before padding.
        threads: default torch's own count, also inside `sole_threads`.

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
            f"a packed weight of {packed.dtype} does not go with "
            f"{'no factors' if scale is None else f'{scale.numel()} factors'} for {out_features} outputs: give what "
            "pack_f16 or pack_i8 returned"
        )
    # Rows a fixed distance apart are read in place; anything else is copied once.
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
        threads or thread_count(),
    )
    return y


def _empty_rows(x: Tensor, width: int) -> Tensor:
    """Return an uninitialised (..., width) for x (..., any); plain ints spare the usual case 2 us of parsing a Size."""
    if x.dim() == 3:
        return torch.empty(x.size(0), x.size(1), width)
    return torch.empty((*x.shape[:-1], width))


def _check_linear(x: Tensor, in_features: int) -> None:
    check_tensor("x", x)
    if x.size(-1) != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but the packed weight is for {in_features} inputs")
