"""Slots of a KV pool: moving the kept ones together after verification, and the forms that keys and values may have."""

from __future__ import annotations

import torch
from torch import Tensor

from haast.native.library import library, thread_count
from haast.native.stack import Refusal

FORMS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Form: how a store may hold keys and values


def keep(
    store: Tensor,
    tables: Tensor,
    lengths: Tensor,
    path: Tensor,
    counts: Tensor,
    *,
    block: int,
    shift: int = 0,
    threads: int | None = None,
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
        threads: default torch's own count, also inside `sole_threads`.

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
    refused = library().haast_keep(*places, lanes * heads, slots, row, *sizes, threads or thread_count())
    if refused:
        what = "a table is too short for its nodes" if refused == Refusal.SHORT_TABLE else "a block is not in the store"
        raise ValueError(
            f"{what}: the tables are {tuple(tables.shape)} of {block} slots each, the store has {slots}, lengths are "
            f"{lengths.tolist()} and the kept nodes {path.tolist()}"
        )
