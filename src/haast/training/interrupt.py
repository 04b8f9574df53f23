"""Contexts of a long run: Ctrl-C as a flag, and the precision of products. Owns global state for their length only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Below "highest" fp32 products may be rounded to TF32 or bf16 where the hardware multiplies those.

    On x86 it also moves them from MKL to oneDNN, in full fp32 where there is no AMX: measured on two Zen 5 cores, 480
    against 205 GFLOP/s and 1.6 times the views a second.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets a flag, so that a step is never cut in half; a second Ctrl-C interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
