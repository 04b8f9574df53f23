"""Small facts of devices: names, number formats, free memory, and how data gets there without waiting."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_MEMORY = Path("/proc/meminfo")
_UNKNOWN = 4 << 30  # bytes that are taken to be free where the system does not say
_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autograd(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.inference_mode` around a function, unless it is on: switching costs as much as several small operators."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return call


def exact(device: torch.device) -> torch.dtype:
    """float64 for probabilities, where the device has it; MPS has not."""
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def cpu_name() -> str:
    """The CPU's own name for itself where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if _MEMORY.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    if hasattr(os, "sysconf"):  # macOS tells how much there is, not how much is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`.

    A copy from pageable memory to CUDA waits until everything queued there is done; from pinned memory it does not.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
