"""Finding and loading the compiled kernels, and what every wrapper needs: threads, and checks of tensors.

The library is optional: `why_not()` says why it is missing. It has its own small pool of threads (pool.h says why) and
so never brings a second OpenMP runtime into the process. Concurrent calls are safe: one gets the helpers, the others
run on their own thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

LANES = 16  # outputs in a weight panel

_ABI = 9
_FAST = 7  # AVX2 | FMA | F16C
_NEON = 16
_REMEDY = "reinstall Haast where a C++ compiler is installed (pip install -v shows its messages)"


# Kinds of arguments, and what every function takes of them.
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_TAKES = {
    "haast_limit_path": "i",
    "haast_pack_f16": "pp nn",
    "haast_pack_i8": "ppp nn",
    "haast_linear": "ppppp nnnnn i",
    "haast_tree_attention_f32": "ppppp nnnnnn nnnnnnnnnnn ff i",
    "haast_rms_norm_f32": "ppp nn f i",
    "haast_rotate_f32": "ppp nnnnn i",
    "haast_swiglu_f32": "pp nn i",
    "haast_judge": "pppppppp nnnn i",
    "haast_top": "ppp nnn i",
    "haast_read": "p n p n i",
    "haast_multiply": "n p n i",
    "haast_stack_f32": "pp i",
    "haast_draft": "pp i",
    "haast_keep": "ppppp nnnnnnnnn i",
}
_COUNTING = {"haast_multiply", "haast_stack_f32", "haast_draft", "haast_keep"}  # these return a number


def _declare(library: ctypes.CDLL) -> None:
    """Set the argument types once; ctypes then converts plain ints without looking at them again."""
    for name, takes in _TAKES.items():
        function = getattr(library, name)
        function.argtypes = [_KINDS[kind] for kind in takes.replace(" ", "")]
        function.restype = ctypes.c_int64 if name in _COUNTING else None


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


class _Own(threading.local):
    """What a thread knows of its own blocks of `sole_threads`; no other thread reads or writes it."""

    open = 0
    kept = 0  # the threads that torch had before the outermost one


_own = _Own()


def library() -> ctypes.CDLL:
    """The loaded kernels. Raises RuntimeError where there are none."""
    if _loaded is None:
        raise RuntimeError(_reason)
    return _loaded


def available() -> bool:
    """Whether the compiled kernels can be called at all (on any CPU: they have a portable path)."""
    return _loaded is not None


def why_not() -> str:
    """One line that says why `available()` is false; empty when it is true."""
    return _reason


def features() -> int:
    """CPU features found, a bit mask: 1 AVX2, 2 FMA, 4 F16C, 8 AVX-512 F, 16 NEON; 0 without the library."""
    return 0 if _loaded is None else int(_loaded.haast_features())


def accelerated() -> bool:
    """Whether the kernels run a vector path on this CPU: AVX2, AVX-512 (the same bits) or NEON."""
    found = features()
    return found & _FAST == _FAST or bool(found & _NEON)


@contextlib.contextmanager
def narrow_path(at_most: int = 0) -> Iterator[None]:
    """Inside the block use no wider path than 0 portable, 1 AVX2 or NEON, 2 AVX-512; process wide. For tests."""
    kernels = library()
    kernels.haast_limit_path(at_most)
    try:
        yield
    finally:
        kernels.haast_limit_path(2)


@contextlib.contextmanager
def sole_threads() -> Iterator[None]:
    """Inside the block the kernels keep torch's thread count and torch itself runs on one, in the calling thread only.

    torch's idle OpenMP threads spin for milliseconds after each parallel operator, on the very cores that the kernels'
    helpers want. In a decode step its operators are too small to gain from threads: measured on two cores, a 4-node
    verification took 31 ms with them and 26 ms without.

    Every thread has an OpenMP team and a count of its own, so other threads, and those that start meanwhile, compute as
    ever. Leave the block in the thread that entered it. Where torch's count can't be set for one thread, it stays.
    """
    limit = _limit()
    if limit is None:
        yield
        return
    if not _own.open:
        _own.kept = torch.get_num_threads()
        limit(1)
    _own.open += 1
    try:
        yield
    finally:
        _own.open -= 1
        if not _own.open:
            limit(_own.kept)


@functools.cache
def _limit() -> Callable[[int], object] | None:
    """OpenMP's own call that sets the calling thread's count, once torch is seen to follow it; None elsewhere.

    `torch.set_num_threads` sets the same, but besides what threads get that first use torch later: one born during a
    decode step would keep a count of 1 for good.
    """
    try:
        limit: Callable[[int], object] = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    before = torch.get_num_threads()
    limit(before + 1)
    follows = torch.get_num_threads() == before + 1
    limit(before)
    return limit if follows else None


def thread_count() -> int:
    """Threads that a kernel takes: the calling thread's count in torch, also inside `sole_threads`."""
    return _own.kept if _own.open else torch.get_num_threads()


def check_tensor(name: str, tensor: Tensor, ndim: int | None = None) -> None:
    """Refuse what no kernel reads: other numbers than fp32 on the CPU, `ndim` dimensions, without a gradient.

    Raises ValueError.
    """
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; the native kernels and packed linears take float32 on the "
            "CPU: load the model with dtype=torch.float32 there, or do not pack it"
        )
    if ndim is not None and tensor.dim() != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which native kernels do not compute; use torch.no_grad()")
