"""All decoder layers, or what an EAGLE head does, in one native call: structures of stack.h, draft.h and slots.h.

Owns the memory layout, the error codes of native code, and moving accepted slots in a KV pool.
`haast.target.native_cpu` knows modules and checks shapes and dtypes.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import torch
from torch import Tensor

from haast.native.library import library, thread_count

FORMS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Form: number formats of stored keys and values
PLAIN = -1  # form of an embedding that is a plain fp32 matrix (enum WeightForm)
_Pointer, _Count, _Number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _members(*declared: tuple[Any, str]) -> list[tuple[str, Any]]:
    """The `_fields_` of a C structure, from pairs of a type and the names of its members, as in the C declaration."""
    return [(name, kind) for kind, names in declared for name in names.split()]


class CWeight(ctypes.Structure):
    """struct Weight."""

    _fields_ = _members((_Pointer, "packed bias"), (_Count, "inputs outputs form"), (_Pointer, "next"))


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


class CHead(ctypes.Structure):
    """struct Head."""

    _fields_ = _members((ctypes.POINTER(CStack), "stack"), (CWeight, "fc context embedding"))


class CPairs(ctypes.Structure):
    """struct Pairs."""

    _fields_ = _members(
        (_Pointer, "tokens past features output cache cosine sine"),
        (CBlockTables, "blocks"),
        (_Count, "rows n angles form"),
    )


class CDraft(ctypes.Structure):
    """struct Draft."""

    _fields_ = _members(
        (ctypes.POINTER(CHead), "head"),
        (CWeight, "lm"),
        (_Pointer, "vocab"),
        (_Count, "top_k levels"),
        (_Pointer, "widths frontier keep"),
        (_Count, "nodes"),
        (_Pointer, "forward_ms"),
        (_Number, "level_ms rate trust follow"),
        (_Pointer, "knots chances"),
        (_Count, "greedy_knots sampled_knots"),
    )


class CProposal(ctypes.Structure):
    """struct Proposal."""

    _fields_ = _members(
        (_Pointer, "states roots past cache cosine sine"),
        (CBlockTables, "blocks"),
        (_Count, "rows angles form"),
        (_Pointer, "warmth shift other_tokens other_parents other_scores"),
        (_Count, "others"),
        (_Pointer, "tokens parents depths ancestors scores"),
    )


class Refusal(enum.IntEnum):
    """enum Refusal: why a call did nothing."""

    FEW_ANGLES = 1  # a position outside the tables of angles, or a negative one
    SHORT_TABLE = 2  # a block table has too few blocks
    STRANGE_BLOCK = 3  # a block number outside the store
    STRANGE_TOKEN = 4  # a token id outside the embedding


def run_stack(stack: CStack, arguments: CPass) -> int:
    """Run all layers over one tree. Returns 0, or the negative of a `Refusal`."""
    return -int(library().haast_stack_f32(ctypes.addressof(stack), ctypes.addressof(arguments), thread_count()))


def run_commit(head: CHead, pairs: CPairs) -> int:
    """Run a head over committed pairs. Returns 0, or the negative of a `Refusal`."""
    return -int(library().haast_commit(ctypes.addressof(head), ctypes.addressof(pairs), thread_count()))


def run_draft(draft: CDraft, proposal: CProposal) -> int:
    """Draft one tree per row. Returns the number of nodes, or the negative of a `Refusal`."""
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
    """Move the accepted nodes of each row to the slots after its past, in place, in all layers and heads.

    A node that is in its slot already costs nothing.

    Args:
        store: (2 * layers, kv_heads, slots, head_dim) fp32, fp16 or bf16, contiguous, on the CPU.
        tables: (rows, blocks) int32: the blocks of the store that hold a row's slots.
        lengths: (rows,) int64: committed slots; the nodes of the last forward follow them.
        path: (rows, n) int64: accepted nodes, ascending; any stride of rows.
        counts: (rows,) int64: number of nodes of each path to keep; any stride.
        block: slots per block.
        shift: number of slots of a table before a row's first.

    Raises:
        ValueError: tensors of another dtype, shape or device, or a slot outside a table or the store; nothing was
            moved.
    """
    if store.dim() != 4 or store.dtype not in FORMS or not store.is_cpu or not store.is_contiguous():
        raise ValueError(
            f"the store is {store.dtype} of shape {tuple(store.shape)} on {store.device}; expected fp32, fp16 or bf16 "
            "(2 * layers, kv_heads, slots, head_dim), contiguous, on the CPU"
        )
    rows, width = path.shape
    kinds = (tables.dtype, lengths.dtype, path.dtype, counts.dtype)
    shapes = (tables.shape[:1], lengths.shape, counts.shape)
    contiguous = tables.is_contiguous() and lengths.is_contiguous() and (width < 2 or path.stride(1) == 1)
    if kinds != (torch.int32, *[torch.int64] * 3) or shapes != ((rows,),) * 3 or not (contiguous and path.is_cpu):
        raise ValueError(
            f"tables, lengths, path and counts are {', '.join(map(str, kinds))} of shapes {tuple(tables.shape)}, "
            f"{tuple(lengths.shape)}, {tuple(path.shape)} and {tuple(counts.shape)}; expected int32 (rows, blocks) "
            "and int64 (rows,), (rows, n) and (rows,), on the CPU"
        )
    if width == 0:
        return
    lanes, heads, slots, head_dim = store.shape
    pointers = (store.data_ptr(), tables.data_ptr(), lengths.data_ptr(), path.data_ptr(), counts.data_ptr())
    row, sizes = head_dim * store.element_size(), (tables.size(1), block, shift, rows, path.stride(0), counts.stride(0))
    refused = library().haast_keep(*pointers, lanes * heads, slots, row, *sizes, thread_count())
    if refused:
        what = "a table is too short for its nodes" if refused == Refusal.SHORT_TABLE else "a block is not in the store"
        raise ValueError(
            f"{what}: the tables are {tuple(tables.shape)} blocks of {block} slots, the store has {slots} slots, "
            f"lengths are {lengths.tolist()} and the kept nodes {path.tolist()}"
        )
