"""What of a machine decides times. Owns its names; measures nothing."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from haast import native
from haast.native.library import thread_count


@functools.cache
def cpu_name() -> str:
    """The CPU's own name for itself where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine_identity() -> dict[str, Any]:
    """CPU, GPU, thread count and the versions of what does the work; the same inside and outside of a decode step."""
    return {
        "cpu": cpu_name(),
        "cpu_features": native.features(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": thread_count(),
        "torch": str(torch.__version__),
        "haast": _version(),
    }


@functools.cache
def _version() -> str:
    return version("haast")
