"""Return freed memory to the operating system, through glibc's `malloc_trim`; a no-op with other C libraries."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from torch import nn


def release_freed_memory() -> None:
    """Return freed memory to the system: glibc would keep the large blocks that packing frees for later allocations."""
    _malloc_trim()(0)


def copy_parameters(model: nn.Module) -> None:
    """Copy a model's remaining parameters out of the memory-mapped weight file, so that the file is unmapped."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        library = ctypes.CDLL(None)
        trim: Callable[[int], object] = library.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return lambda _pad: None
    return trim
