"""Whole decoder layers, and whole proposals, in one native call: the C structures of stack.h, draft.h and slots.h.

Owns the layout of memory, and the words for what native code refuses; `haast.target.native_cpu` knows modules and
checks shapes and dtypes.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

from haast.native.library import library, thread_count

_Pointer, _Count, _Number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _members(*declared: tuple[Any, str]) -> list[tuple[str, Any]]:
    """The members of a C structure, declared as there: a type, and the names of those that have it."""
    return [(name, kind) for kind, names in declared for name in names.split()]


class CWeight(ctypes.Structure):
    """struct Weight."""

    _fields_ = _members((_Pointer, "packed scale bias"), (_Count, "inputs outputs"))


class CLayer(ctypes.Structure):
    """struct Layer."""

    _fields_ = _members(
        (_Pointer, "input_norm"),
        (CWeight, "qkv"),
        (_Pointer, "q_norm k_norm"),
        (CWeight, "o"),
        (_Pointer, "post_norm"),
        (CWeight, "gate_up down"),
        (_Count, "window"),
    )


class CStack(ctypes.Structure):
    """struct Stack."""

    _fields_ = _members(
        (ctypes.POINTER(CLayer), "layers"),
        (_Count, "layer_count hidden heads kv_heads d inner"),
        (_Number, "eps scaling"),
        (_Pointer, "final_norm"),
    )


class CBlockTables(ctypes.Structure):
    """struct BlockTables."""

    _fields_ = _members((_Pointer, "tables"), (_Count, "stride block shift slots"))


class CPass(ctypes.Structure):
    """struct Pass."""

    _fields_ = _members(
        (_Pointer, "states output captured cosine sine positions flight_positions past seen cache"),
        (CBlockTables, "blocks"),
        (_Count, "rows n flight angles form"),
    )


class CDraft(ctypes.Structure):
    """struct Draft."""

    _fields_ = _members(
        (ctypes.POINTER(CStack), "stack"),
        (CWeight, "fc lm"),
        (_Pointer, "embedding vocab"),
        (_Count, "top_k levels"),
        (_Pointer, "widths frontier keep"),
        (_Count, "nodes"),
        (_Pointer, "forward_ms"),
        (_Number, "level_ms rate trust follow"),
    )


class CProposal(ctypes.Structure):
    """struct Proposal."""

    _fields_ = _members(
        (_Pointer, "states roots past cache cosine sine"),
        (CBlockTables, "blocks"),
        (_Count, "rows angles form"),
        (_Pointer, "tokens parents depths ancestors"),
    )


class Refusal(enum.IntEnum):
    """enum Refusal: why a call did nothing."""

    FEW_ANGLES = 1  # a position behind the tables of angles, or a negative one
    SHORT_TABLE = 2
    STRANGE_BLOCK = 3


def run_stack(stack: CStack, each: CPass) -> int:
    """Run every layer over one tree; `each` says where everything lies. Returns 0, or a `Refusal` less than 0."""
    return -int(library().haast_stack_f32(ctypes.addressof(stack), ctypes.addressof(each), thread_count()))


def run_draft(draft: CDraft, proposal: CProposal) -> int:
    """Propose one tree per row; returns its nodes, or a `Refusal` less than 0."""
    return int(library().haast_draft(ctypes.addressof(draft), ctypes.addressof(proposal), thread_count()))
