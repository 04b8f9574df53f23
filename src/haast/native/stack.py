"""Whole decoder layers in one native call: the C structures of stack.h and the call.

Owns the layout of memory only; `haast.speed.stack` knows modules and checks what is handed in.
"""

from __future__ import annotations

import ctypes

from haast.native.library import library, thread_count

_Pointer, _Count, _Number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CWeight(ctypes.Structure):
    """struct Weight."""

    _fields_ = (
        ("packed", _Pointer),
        ("scale", _Pointer),
        ("bias", _Pointer),
        ("inputs", _Count),
        ("outputs", _Count),
    )


class CLayer(ctypes.Structure):
    """struct Layer."""

    _fields_ = (
        ("input_norm", _Pointer),
        ("qkv", CWeight),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
        ("o", CWeight),
        ("post_norm", _Pointer),
        ("gate_up", CWeight),
        ("down", CWeight),
        ("window", _Count),
    )


class CStack(ctypes.Structure):
    """struct Stack."""

    _fields_ = (
        ("layers", ctypes.POINTER(CLayer)),
        ("layer_count", _Count),
        ("hidden", _Count),
        ("heads", _Count),
        ("kv_heads", _Count),
        ("d", _Count),
        ("inner", _Count),
        ("eps", _Number),
        ("scaling", _Number),
        ("final_norm", _Pointer),
    )


class CPass(ctypes.Structure):
    """struct Pass."""

    _fields_ = (
        ("states", _Pointer),
        ("output", _Pointer),
        ("captured", _Pointer),
        ("cosine", _Pointer),
        ("sine", _Pointer),
        ("positions", _Pointer),
        ("flight_positions", _Pointer),
        ("past", _Pointer),
        ("seen", _Pointer),
        ("cache", _Pointer),
        ("rows", _Count),
        ("n", _Count),
        ("flight", _Count),
        ("capacity", _Count),
    )


def run_stack(stack: CStack, each: CPass, threads: int | None = None) -> None:
    """Run every layer over one tree; `each` says where everything lies."""
    library().haast_stack_f32(ctypes.addressof(stack), ctypes.addressof(each), threads or thread_count())
