"""Whole decoder layers, and whole proposals, in one native call: the C structures of stack.h, draft.h and slots.h.

Owns the layout of memory, the words for what native code refuses, and the move of kept slots of a KV pool;
`haast.target.native_cpu` knows modules and checks shapes and dtypes.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import torch
from torch import Tensor

from haast.native.library import library, thread_count

FORMS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Form: how a store may hold keys and values
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


def keep(
    store: Tensor,
    tables: Tensor,
    lengths: Tensor,
    path: Tensor,
    counts: Tensor,
    *,
    block: int,
    shift: int = 0,
) -> None:
    """Move the accepted nodes of every row up after its past, in place, in every layer and head.

    A node that stays where it is costs nothing.

    Args:
        store: (2 * layers, kv_heads, slots, head_dim) fp32, fp16 or bf16, contiguous, on the CPU.
        tables: (rows, blocks) int32: which blocks of the store hold a row's slots.
        lengths: (rows,) int64: committed slots, which the nodes of the last forward follow.
        path: (rows, n) int64: kept nodes, ascending; its rows may be any stride apart.
        counts: (rows,) int64: how many of each path are kept; any stride.
        block: slots of a block.
        shift: slots of a table before a row's first.

    Raises:
        ValueError: tensors of another kind, or a slot that a table or the store does not have; nothing was moved.
    """
    if store.dim() != 4 or store.dtype not in FORMS or not store.is_cpu or not store.is_contiguous():
        raise ValueError(
            f"the store is {store.dtype} of shape {tuple(store.shape)} on {store.device}; expected fp32, fp16 or bf16 "
            "(2 * layers, kv_heads, slots, head_dim), contiguous, on the CPU"
        )
    rows, width = path.shape
    kinds = (tables.dtype, lengths.dtype, path.dtype, counts.dtype)
    shapes = (tables.shape[:1], lengths.shape, counts.shape)
    plain = tables.is_contiguous() and lengths.is_contiguous() and (width < 2 or path.stride(1) == 1)
    if kinds != (torch.int32, *[torch.int64] * 3) or shapes != ((rows,),) * 3 or not (plain and path.is_cpu):
        raise ValueError(
            f"tables, lengths, path and counts are {', '.join(map(str, kinds))} of shapes {tuple(tables.shape)}, "
            f"{tuple(lengths.shape)}, {tuple(path.shape)} and {tuple(counts.shape)}; expected int32 (rows, blocks) "
            "and int64 (rows,), (rows, n) and (rows,), on the CPU"
        )
    if width == 0:
        return
    lanes, heads, slots, head_dim = store.shape
    places = (store.data_ptr(), tables.data_ptr(), lengths.data_ptr(), path.data_ptr(), counts.data_ptr())
    row, sizes = head_dim * store.element_size(), (tables.size(1), block, shift, rows, path.stride(0), counts.stride(0))
    refused = library().haast_keep(*places, lanes * heads, slots, row, *sizes, thread_count())
    if refused:
        what = "a table is too short for its nodes" if refused == Refusal.SHORT_TABLE else "a block is not in the store"
        raise ValueError(
            f"{what}: the tables are {tuple(tables.shape)} of {block} slots each, the store has {slots}, lengths are "
            f"{lengths.tolist()} and the kept nodes {path.tolist()}"
        )
