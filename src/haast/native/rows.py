"""Work done row by row: norms, rotary embedding, gated activation, and the likeliest entries of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from haast.native.library import check_tensor, library, thread_count

MOST_TOP = 64  # entries that `top` can list


def rms_norm(x: Tensor, weight: Tensor, eps: float, threads: int | None = None) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension; x (..., dim), weight (dim), both fp32."""
    check_tensor("x", x)
    check_tensor("weight", weight.detach(), 1)
    dim = x.shape[-1]
    if weight.shape[0] != dim:
        raise ValueError(f"weight has {weight.shape[0]} values; x has shape {tuple(x.shape)}")
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty(x.shape)
    places, sizes = (x.data_ptr(), weight.data_ptr(), y.data_ptr()), (x.numel() // dim, dim)
    library().haast_rms_norm_f32(*places, *sizes, eps, threads or thread_count())
    return y


def rotate_(x: Tensor, cosine: Tensor, sine: Tensor, heads: int, threads: int | None = None) -> Tensor:
    """Apply rotary embeddings in place to the first heads of every row, halves paired as Llama pairs them.

    Args:
        x: (rows, nodes, width) fp32, contiguous; heads of size d from the start of each width.
        cosine: (rows or 1, nodes, d) fp32, d even.
        sine: as cosine.
        heads: how many heads to rotate; what stands behind them stays.
        threads: default torch's own count, also inside `sole_threads`.

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
            "expected x (rows, nodes, width) contiguous and twice (rows or 1, nodes, even d), heads * d within width"
        )
    cosine, sine = cosine.contiguous(), sine.contiguous()
    places, sizes = (x.data_ptr(), cosine.data_ptr(), sine.data_ptr()), (rows * nodes, heads, d, width)
    library().haast_rotate_f32(*places, *sizes, angle_rows * nodes, threads or thread_count())
    return x


def swiglu(gate_up: Tensor, threads: int | None = None) -> Tensor:
    """Return silu(gate) * up; gate_up (..., 2 * width) fp32 with the gate first, result (..., width)."""
    check_tensor("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; the last dimension must be even")
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width))
    rows = gate_up.numel() // max(2 * width, 1)
    library().haast_swiglu_f32(gate_up.data_ptr(), y.data_ptr(), rows, width, threads or thread_count())
    return y


def top(logits: Tensor, count: int, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest entries of every row of logits and their log-probabilities, likeliest first.

    Args:
        logits: (..., width) fp32.
        count: 1 to 64, at most the width; of equal logits the smaller place comes first.
        threads: default torch's own count, also inside `sole_threads`.

    Returns:
        log-probabilities (..., count) fp32 and places (..., count) int64.
    """
    check_tensor("logits", logits)
    width = logits.shape[-1]
    if not 1 <= count <= min(MOST_TOP, width):
        raise ValueError(f"count={count} is not allowed: give 1 to {min(MOST_TOP, width)}")
    logits = logits.contiguous()
    shape = (*logits.shape[:-1], count)
    logprobs, places = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    sizes = (logits.numel() // width, width, count)
    library().haast_top(logits.data_ptr(), logprobs.data_ptr(), places.data_ptr(), *sizes, threads or thread_count())
    return logprobs, places
