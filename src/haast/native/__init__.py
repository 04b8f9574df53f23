"""Typed wrappers of the compiled CPU kernels (kernels.cpp), on torch tensors through ctypes.

Owns: finding and loading the library, checking what is handed to it. Knows no modules and no models.
All tensors are fp32 on the CPU. Every result is row independent: the same bits whatever rows or nodes stand beside it,
whatever the thread count. No function here is differentiable: call them under `torch.no_grad()`.

The library has its own small pool of threads (kernels.cpp says why) and so never brings a second OpenMP runtime into
the process. Concurrent calls are safe: one gets the helpers, the others run on their own thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "LANES",
    "accelerated",
    "available",
    "features",
    "linear_f16",
    "narrow_path",
    "pack_f16",
    "rms_norm",
    "rotate_",
    "swiglu",
    "tree_attention",
    "why_not",
]

LANES = 16  # outputs in a weight panel

_ABI = 3
_FAST = 7  # AVX2 | FMA | F16C
_REMEDY = "reinstall Haast where a C++ compiler is installed (pip install -v shows its messages)"


def _declare(library: ctypes.CDLL) -> None:
    """Set the argument types once; ctypes then converts plain ints without looking at them again."""
    pointer, count, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    signatures = {
        "haast_limit_path": [flag],
        "haast_pack_f16": [pointer] * 2 + [count] * 2,
        "haast_linear_f16": [pointer] * 4 + [count] * 5 + [flag],
        "haast_tree_attention_f32": [pointer] * 5 + [count] * 17 + [number] * 2 + [flag],
        "haast_rms_norm_f32": [pointer] * 3 + [count] * 2 + [number, flag],
        "haast_rotate_f32": [pointer] * 3 + [count] * 5 + [flag],
        "haast_swiglu_f32": [pointer] * 2 + [count] * 2 + [flag],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason."""
    path = Path(__file__).parent / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None, f"the native library {path.name} was not built; {_REMEDY}"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.haast_abi()
    except (OSError, AttributeError) as error:
        return None, f"the native library {path.name} does not load ({error}); {_REMEDY}"
    if abi != _ABI:
        return None, f"the native library {path.name} is stale (ABI {abi}, needed {_ABI}); {_REMEDY}"
    _declare(library)
    return library, ""


_library, _reason = _load()
_kernel_threads: int | None = None  # set inside `sole_threads` alone


def _native() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(_reason)
    return _library


def available() -> bool:
    """Whether the compiled kernels can be called at all (on any CPU: they have a portable path)."""
    return _library is not None


def why_not() -> str:
    """One line that says why `available()` is false; empty when it is true."""
    return _reason


def features() -> int:
    """CPU features found, a bit mask: 1 AVX2, 2 FMA, 4 F16C, 8 AVX-512 F; 0 without the library."""
    return 0 if _library is None else int(_library.haast_features())


def accelerated() -> bool:
    """Whether the kernels run their AVX2 path (or the AVX-512 one, which gives the same bits) on this CPU."""
    return features() & _FAST == _FAST


@contextlib.contextmanager
def narrow_path(at_most: int = 0) -> Iterator[None]:
    """Inside the block use no wider path than 0 portable, 1 AVX2, 2 AVX-512; process wide. For tests."""
    library = _native()
    library.haast_limit_path(at_most)
    try:
        yield
    finally:
        library.haast_limit_path(2)


@contextlib.contextmanager
def sole_threads() -> Iterator[None]:
    """Inside the block the kernels keep torch's thread count and torch itself runs on one.

    torch's idle OpenMP threads spin for milliseconds after each parallel operator, on the very cores that the kernels'
    helpers want. In a decode step its operators are too small to gain from threads: measured on two cores, a 4-node
    verification took 31 ms with them and 26 ms without.
    """
    global _kernel_threads
    before, kept = torch.get_num_threads(), _kernel_threads
    _kernel_threads = kept or before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _kernel_threads = kept


def _threads() -> int:
    return _kernel_threads or torch.get_num_threads()


def _check(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; the native kernels and packed linears take float32 on the "
            "CPU: load the model with dtype=torch.float32 there, or do not pack it"
        )
    if tensor.dim() != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which native kernels do not compute; use torch.no_grad()")


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
    _check("weight", weight, 2)
    source = weight.detach().contiguous()
    out_features, in_features = source.shape
    packed = torch.empty((-(-out_features // LANES), in_features, LANES), dtype=torch.int16)
    _native().haast_pack_f16(source.data_ptr(), packed.data_ptr(), out_features, in_features)
    if not bool(packed.view(torch.float16).isfinite().all()):
        raise ValueError(
            f"weight has values that fp16 cannot hold (largest magnitude {float(source.abs().max()):g}, limit 65504); "
            "leave this layer unpacked"
        )
    return packed


def linear_f16(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, threads: int | None = None) -> Tensor:
    """Multiply rows by a packed weight: y = x W^T + bias, fp16 weights, fp32 everything else.

    Args:
        x: (..., in_features) fp32.
        packed: what `pack_f16` returned.
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
    # Rows a fixed distance apart are read in place; anything else is copied once.
    stride = in_features
    if not x.is_contiguous():
        if x.dim() == 2 and x.stride(1) == 1:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    y = _empty_rows(x, out_features)
    _native().haast_linear_f16(
        x.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        stride,
        out_features,
        threads or _threads(),
    )
    return y


def _empty_rows(x: Tensor, width: int) -> Tensor:
    """Return an uninitialised (..., width) for x (..., any); plain ints spare the usual case 2 us of parsing a Size."""
    if x.dim() == 3:
        return torch.empty(x.size(0), x.size(1), width)
    return torch.empty((*x.shape[:-1], width))


def _check_linear(x: Tensor, in_features: int) -> None:
    _check("x", x, x.dim())
    if x.size(-1) != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but the packed weight is for {in_features} inputs")


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
    _check(name, tensor, 4)
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
    mask_pointer, mask_row, mask_node = None, 0, 0
    fits = k_rows == rows and k_d == d and v.shape == k.shape and kv_heads > 0 and heads % kv_heads == 0
    if mask is not None:
        mask = mask if _usable(mask) else _made_usable("mask", mask)
        mask_rows, one, mask_n, mask_slots = mask.shape
        fits = fits and mask_rows in (1, rows) and one == 1 and mask_n == n and mask_slots == slots
        mask_row, _, mask_node, _ = mask.stride()
        mask_pointer, mask_row = mask.data_ptr(), 0 if mask_rows == 1 else mask_row
    if not fits:
        raise _misfit(q, k, v, mask)
    (q_row, q_head, q_node, _), (k_row, k_head, k_slot, _), (v_row, v_head, v_slot, _) = (
        q.stride(),
        k.stride(),
        v.stride(),
    )
    out = torch.empty(rows, n, heads, d)
    _native().haast_tree_attention_f32(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        mask_pointer,
        out.data_ptr(),
        rows,
        heads,
        kv_heads,
        n,
        slots,
        d,
        q_row,
        q_head,
        q_node,
        k_row,
        k_head,
        k_slot,
        v_row,
        v_head,
        v_slot,
        mask_row,
        mask_node,
        scaling,
        softcap,
        threads or _threads(),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, threads: int | None = None) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension; x (..., dim), weight (dim), both fp32."""
    _check("x", x, x.dim())
    _check("weight", weight.detach(), 1)
    dim = x.shape[-1]
    if weight.shape[0] != dim:
        raise ValueError(f"weight has {weight.shape[0]} values; x has shape {tuple(x.shape)}")
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty(x.shape)
    threads = threads or _threads()
    rows = x.numel() // dim
    _native().haast_rms_norm_f32(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, dim, eps, threads)
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
    _check("x", x, 3)
    _check("cosine", cosine, 3)
    _check("sine", sine, 3)
    (rows, nodes, width), (angle_rows, angle_nodes, d) = x.shape, cosine.shape
    fits = sine.shape == cosine.shape and angle_rows in (1, rows) and angle_nodes == nodes
    if not fits or d % 2 or heads * d > width or not x.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, cosine {tuple(cosine.shape)}, sine {tuple(sine.shape)}, heads {heads}; "
            "expected x (rows, nodes, width) contiguous and twice (rows or 1, nodes, even d), heads * d within width"
        )
    cosine, sine = cosine.contiguous(), sine.contiguous()
    _native().haast_rotate_f32(
        x.data_ptr(),
        cosine.data_ptr(),
        sine.data_ptr(),
        rows * nodes,
        heads,
        d,
        width,
        angle_rows * nodes,
        threads or _threads(),
    )
    return x


def swiglu(gate_up: Tensor, threads: int | None = None) -> Tensor:
    """Return silu(gate) * up; gate_up (..., 2 * width) fp32 with the gate first, result (..., width)."""
    _check("gate_up", gate_up, gate_up.dim())
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; the last dimension must be even")
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width))
    threads = threads or _threads()
    rows = gate_up.numel() // max(2 * width, 1)
    _native().haast_swiglu_f32(gate_up.data_ptr(), y.data_ptr(), rows, width, threads)
    return y
