"""Find and load the compiled kernels; thread counts and tensor checks for all wrappers.

The library is optional: `why_not()` returns the reason if it is missing. It has its own small thread pool (see pool.h)
and so never loads a second OpenMP runtime into the process. Concurrent calls are safe: one gets the helper threads, the
others run on their own thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

LANES = 16  # outputs in a weight panel
WIDEST = 3  # the widest code path

_ABI = 10
_AVX2_FMA_F16C = 7  # bits of `features`
_NEON = 16
_HUGE = 2 << 20  # bytes of a huge page
_REMEDY = "install a C++ compiler and reinstall Haast (pip install -v shows the compiler's messages)"


# Argument types by letter, and the argument types of each function.
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_ARGUMENTS = {
    "haast_limit_path": "i",
    "haast_pack_f16": "pp nn",
    "haast_panel_bytes": "nn",
    "haast_pack_blocks": "ppp nnn i",
    "haast_unpack_rows": "pnpp nnn i",
    "haast_linear": "ppnpp nnnnn i",
    "haast_tree_attention_f32": "ppppp nnnnnn nnnnnnnnnnn ff i",
    "haast_rms_norm_f32": "ppp nn f i",
    "haast_rotate_f32": "ppp nnnnn i",
    "haast_swiglu_f32": "pp nn i",
    "haast_judge": "pppppppp nnnn i",
    "haast_top": "ppp nnn i",
    "haast_read": "p n p n i",
    "haast_multiply": "n p n i",
    "haast_stack_f32": "pp i",
    "haast_commit": "pp i",
    "haast_draft": "pp i",
    "haast_keep": "ppppp nnnnnnnnn i",
}
# The others return nothing.
_RETURN_INT64 = {
    "haast_panel_bytes",
    "haast_unpack_rows",
    "haast_multiply",
    "haast_stack_f32",
    "haast_commit",
    "haast_draft",
    "haast_keep",
}


def _declare(library: ctypes.CDLL) -> None:
    """Set the argument types once, so that calls can pass plain ints."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [_KINDS[kind] for kind in arguments.replace(" ", "")]
        function.restype = ctypes.c_int64 if name in _RETURN_INT64 else None


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


_loaded, _reason = _load()


class _ThreadState(threading.local):
    """Per thread: its open `sole_threads` blocks."""

    open = 0  # number of nested blocks
    saved = 0  # torch's thread count before the outermost block


_thread_state = _ThreadState()


def library() -> ctypes.CDLL:
    """The loaded kernels. Raises RuntimeError if they are missing."""
    if _loaded is None:
        raise RuntimeError(_reason)
    return _loaded


def available() -> bool:
    """Whether the compiled kernels can be called. They run on any CPU, as they have a portable path."""
    return _loaded is not None


def why_not() -> str:
    """The reason why `available()` is false, in one line; empty if it is true."""
    return _reason


def features() -> int:
    """The CPU's features as a bit mask; 0 without the library.

    1 AVX2, 2 FMA, 4 F16C, 8 AVX-512 F, 16 NEON, 32 AVX-VNNI, 64 AVX-512 VNNI, 128 NEON's dot products.
    """
    return 0 if _loaded is None else int(_loaded.haast_features())


def accelerated() -> bool:
    """Whether the kernels run a vector path on this CPU: AVX2, AVX-512 (the same bits) or NEON."""
    bits = features()
    return bits & _AVX2_FMA_F16C == _AVX2_FMA_F16C or bool(bits & _NEON)


@contextlib.contextmanager
def narrow_path(at_most: int = 0) -> Iterator[None]:
    """Limit the code path inside the block, process wide; for tests.

    0 portable, 1 AVX2 or NEON, 2 the same with dot products of bytes (AVX-VNNI, NEON's), 3 AVX-512.
    """
    kernels = library()
    kernels.haast_limit_path(at_most)
    try:
        yield
    finally:
        kernels.haast_limit_path(WIDEST)


@contextlib.contextmanager
def sole_threads() -> Iterator[None]:
    """Inside the block, run torch in one thread and the kernels in as many as torch had; for the calling thread only.

    torch's idle OpenMP threads spin for milliseconds after each parallel operator, on the cores that the kernels'
    helper threads need. In a decode step torch's operators are too small to gain from threads: measured on two cores, a
    4-node verification took 31 ms with them and 26 ms without.

    OpenMP has a team and a thread count per calling thread, so other threads are not affected, nor are those started
    inside the block. Leave the block in the thread that entered it. Does nothing if torch's count can't be set per
    thread.
    """
    set_count = _omp_set_num_threads()
    if set_count is None:
        yield
        return
    if not _thread_state.open:
        _thread_state.saved = torch.get_num_threads()
        set_count(1)
    _thread_state.open += 1
    try:
        yield
    finally:
        _thread_state.open -= 1
        if not _thread_state.open:
            set_count(_thread_state.saved)


@functools.cache
def _omp_set_num_threads() -> Callable[[int], object] | None:
    """OpenMP's function that sets the calling thread's count; None if it is missing or torch does not follow it.

    `torch.set_num_threads` also changes the count of threads that use torch for the first time later: a thread started
    during a decode step would keep a count of 1.
    """
    try:
        set_count: Callable[[int], object] = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    before = torch.get_num_threads()
    set_count(before + 1)
    follows = torch.get_num_threads() == before + 1
    set_count(before)
    return set_count if follows else None


def thread_count() -> int:
    """Number of threads of a kernel: the calling thread's count in torch, or the saved one inside `sole_threads`."""
    return _thread_state.saved if _thread_state.open else torch.get_num_threads()


def check_tensor(name: str, tensor: Tensor, ndim: int | None = None) -> None:
    """Raise ValueError unless a kernel can read `tensor`: fp32, on the CPU, `ndim` dimensions, no gradient required."""
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; native kernels and packed linear layers need float32 on the "
            "CPU: load the model with dtype=torch.float32 there, or do not pack it"
        )
    if ndim is not None and tensor.dim() != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which native kernels do not compute; use torch.no_grad()")


def huge_bytes(size: int) -> Tensor:
    """An uninitialised uint8 tensor of `size` bytes, on huge pages where the system has them.

    Weights are read once per forward; on 4 kB pages of a large matrix the processor waits for page tables.
    """
    if size < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _HUGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size]
