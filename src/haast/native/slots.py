"""Slots of a KV pool: moving the kept ones together after verification, and the forms that keys and values may have."""

from __future__ import annotations

import torch
from torch import Tensor

from haast.native.library import library, thread_count

FORMS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Form: how a store may hold keys and values


def move_slots(store: Tensor, sources: Tensor, targets: Tensor, threads: int | None = None) -> None:
    """Copy slot `sources[k]` to `targets[k]` of every layer and head, in place, k = 0, 1, ... in turn.

    The commit after a verification: kept nodes move up behind the past. A source never stands before its target in the
    text, and both ascend, so none is overwritten before it is read. What stays where it is costs nothing.

    Args:
        store: (2 * layers, kv_heads, slots, head_dim) fp32, fp16 or bf16, contiguous, on the CPU.
        sources: (n,) int64, slots of the store.
        targets: as sources.
        threads: default torch's own count, also inside `sole_threads`.

    Raises:
        ValueError: tensors of another kind, or a slot that the store does not have; nothing was moved.
    """
    if store.dim() != 4 or store.dtype not in FORMS or not store.is_cpu or not store.is_contiguous():
        raise ValueError(
            f"the store is {store.dtype} of shape {tuple(store.shape)} on {store.device}; expected fp32, fp16 or bf16 "
            "(2 * layers, kv_heads, slots, head_dim), contiguous, on the CPU"
        )
    count = sources.numel()
    for each in (sources, targets):
        if each.dtype is not torch.int64 or not each.is_cpu or each.dim() != 1 or each.numel() != count:
            raise ValueError(
                f"sources are {sources.dtype} of shape {tuple(sources.shape)} on {sources.device}, targets "
                f"{targets.dtype} of shape {tuple(targets.shape)} on {targets.device}; expected both (n,) int64 on the "
                "CPU"
            )
    sources, targets = sources.contiguous(), targets.contiguous()
    lanes, heads, slots, head_dim = store.shape
    moved = library().haast_move_slots(
        store.data_ptr(),
        sources.data_ptr(),
        targets.data_ptr(),
        count,
        lanes * heads,
        slots,
        head_dim * store.element_size(),
        threads or thread_count(),
    )
    if not moved:
        named = torch.cat([sources, targets])
        raise ValueError(f"slots from {int(named.min())} to {int(named.max())} are named, the store has {slots}")
