"""Device helpers: the CPU, dtype of probabilities, free memory, copies that do not block, and inference mode."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
_MEMORY = Path("/proc/meminfo")
_ASSUMED_FREE = 4 << 30  # free bytes to assume if the system does not report them
_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autograd(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: `torch.inference_mode`, unless it is on: entering it takes as long as several small operators."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return call


def exact(device: torch.device) -> torch.dtype:
    """The dtype for probabilities: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def _cpu_field(name: str) -> str | None:
    """The first core's field of /proc/cpuinfo; None without the file or the field."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def cpu_name() -> str:
    """The CPU's model name from /proc/cpuinfo, else from `platform`."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Whether this is an x86 CPU with bf16 products, which are faster than those in fp32 (on Zen 4 2 to 3 times).

    False where the system has no /proc/cpuinfo.
    """
    return not _BF16_FLAGS.isdisjoint((_cpu_field("flags") or "").split())


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes; an estimate where the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if _MEMORY.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    if hasattr(os, "sysconf"):  # macOS reports the total memory but not the free one: assume half of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _ASSUMED_FREE


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from the CPU to CUDA does not wait for queued work.

    It goes through pinned memory: a copy from pageable memory waits until all queued work is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
