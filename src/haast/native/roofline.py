"""Peak memory bandwidth and peak fp32 operations of this machine with all threads, for roofline estimates."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from haast.native.library import library, thread_count

_PIECES = 64


def read_bandwidth(megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes per second, the best of `rounds` passes over a buffer larger than the caches."""
    buffer = torch.ones(megabytes * 2**20, dtype=torch.uint8)
    sink = torch.zeros(_PIECES * 8, dtype=torch.int64)

    def read() -> None:
        library().haast_read(buffer.data_ptr(), buffer.numel(), sink.data_ptr(), _PIECES, thread_count())

    return buffer.numel() / _best_seconds(read, rounds)


def multiply_peak(rounds: int = 5) -> float:
    """fp32 operations per second (a multiply-add counts as two), the best of `rounds`."""
    sink = torch.zeros(_PIECES * 16)
    done = 0

    def work() -> None:
        nonlocal done
        done = library().haast_multiply(100_000, sink.data_ptr(), _PIECES, thread_count())

    seconds = _best_seconds(work, rounds)
    return 2 * done / seconds


def _best_seconds(work: Callable[[], None], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds + 1):
        start = perf_counter()
        work()
        best = min(best, perf_counter() - start)
    return best
