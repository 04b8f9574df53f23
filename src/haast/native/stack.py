"""Whole decoder layers, and whole proposals, in one native call: the C structures of stack.h, draft.h and slots.h.

Owns the layout of memory, and the words for what native code refuses; `haast.target.native_cpu` knows modules and
checks shapes and dtypes.
"""

from __future__ import annotations

import ctypes
import enum

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


class CBlockTables(ctypes.Structure):
    """struct BlockTables."""

    _fields_ = (
        ("tables", _Pointer),
        ("stride", _Count),
        ("block", _Count),
        ("shift", _Count),
        ("slots", _Count),
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
        ("blocks", CBlockTables),
        ("rows", _Count),
        ("n", _Count),
        ("flight", _Count),
        ("angles", _Count),
        ("form", _Count),
    )


class Refusal(enum.IntEnum):
    """enum Refusal: why a call did nothing."""

    FEW_ANGLES = 1  # a position behind the tables of angles, or a negative one
    SHORT_TABLE = 2
    STRANGE_BLOCK = 3


def run_stack(stack: CStack, each: CPass, threads: int | None = None) -> int:
    """Run every layer over one tree; `each` says where everything lies. Returns 0, or a `Refusal`: nothing was done."""
    return int(library().haast_stack_f32(ctypes.addressof(stack), ctypes.addressof(each), threads or thread_count()))


class CDraft(ctypes.Structure):
    """struct Draft."""

    _fields_ = (
        ("stack", ctypes.POINTER(CStack)),
        ("fc", CWeight),
        ("lm", CWeight),
        ("embedding", _Pointer),
        ("vocab", _Pointer),
        ("top_k", _Count),
        ("levels", _Count),
        ("widths", _Pointer),
        ("frontier", _Pointer),
        ("keep", _Pointer),
        ("nodes", _Count),
        ("forward_ms", _Pointer),
        ("level_ms", _Number),
        ("rate", _Number),
        ("trust", _Number),
        ("follow", _Number),
    )


class CProposal(ctypes.Structure):
    """struct Proposal."""

    _fields_ = (
        ("states", _Pointer),
        ("roots", _Pointer),
        ("past", _Pointer),
        ("cache", _Pointer),
        ("cosine", _Pointer),
        ("sine", _Pointer),
        ("blocks", CBlockTables),
        ("rows", _Count),
        ("angles", _Count),
        ("form", _Count),
        ("tokens", _Pointer),
        ("parents", _Pointer),
        ("depths", _Pointer),
        ("ancestors", _Pointer),
    )


def run_draft(draft: CDraft, proposal: CProposal, threads: int | None = None) -> int:
    """Propose one tree per row; returns its nodes, or a `Refusal` less than 0."""
    return int(library().haast_draft(ctypes.addressof(draft), ctypes.addressof(proposal), threads or thread_count()))
