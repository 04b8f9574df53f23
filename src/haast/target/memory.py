"""Giving memory back to the system. Owns the one call that needs the C library; a no-op where it has none such."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from torch import nn


def give_back() -> None:
    """Return freed memory to the system: glibc keeps the large blocks that packing frees for later use."""
    _trim()(0)


def own_memory(model: nn.Module) -> None:
    """Copy what is left of a model's parameters out of the file that they were mapped from, so that it is let go of."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        library = ctypes.CDLL(None)
        trim: Callable[[int], object] = library.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return lambda _pad: None
    return trim
