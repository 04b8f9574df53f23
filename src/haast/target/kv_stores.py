"""Tensors of a KV pool: one (kv_heads, slots, head_dim) for the keys and one for the values of every layer.

Owns allocation: layers of one shape share a tensor whose address never changes. On the CPU the operating system
provides its memory page by page on the first write. Knows nothing of rows and of a request's blocks.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from haast.device import without_autograd
from haast.target.kv_pool import BLOCK

KV_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FLOATS = (torch.float32, *KV_DTYPES.values())  # dtypes that native code stores


class KVStores:
    """Keys and values of `layers` layers in `slots` slots.

    Args:
        slots: number of slots of the pool.
        layers: number of layers of the model.
        dtype: of stored values; None is the model's own.
        devices: device of each layer, if they differ.
    """

    def __init__(
        self, slots: int, layers: int, dtype: torch.dtype | None, devices: Sequence[torch.device | None] | None
    ) -> None:
        self.tensors: list[Tensor] = []  # (entries, kv_heads, slots, head_dim); an entry is one layer's keys or values
        self._slots, self._layers, self._dtype, self._devices = slots, layers, dtype, devices
        self._index: dict[tuple[int, int], tuple[int, int]] = {}  # (layer, `which`) -> (tensor, index)
        self._ordered: bool | None = None  # whether a single tensor holds key, value, key, value, ... by layer

    def of(self, layer: int, which: int, like: Tensor) -> Tensor:
        """A layer's keys (`which` 0), values (1) or indexer keys (2); allocated at first use, for states like `like`.

        `like` is (rows, kv_heads, n, head_dim), the result (kv_heads, slots, head_dim).
        """
        key = (layer, which)
        if key not in self._index:
            self._index[key] = self._allocate(like)
        number, index = self._index[key]
        return self.tensors[number][index]

    def by_layer(self) -> list[tuple[Tensor, Tensor]] | None:
        """Every layer's keys and values, (kv_heads, slots, head_dim) each; None before all have been used."""
        if len(self._index) != 2 * self._layers:
            return None
        indices = [[self._index[layer, which] for which in (0, 1)] for layer in range(self._layers)]
        return [(self.tensors[k][i], self.tensors[v][j]) for (k, i), (v, j) in indices]

    def together(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor | None:
        """One tensor of all layers, (2 * layers, kv_heads, slots, head_dim): key, value, key, value, ...

        For a native forward, which writes the new nodes itself. None if the layers differ in shape, are stored in
        another order or dtype, or are not on the CPU.
        """
        if not self._index:
            like = torch.empty(1, kv_heads, 0, head_dim, dtype=dtype)
            for layer in range(self._layers):
                for which in (0, 1):
                    self.of(layer, which, like)
        store = self.tensors[0]
        if len(self.tensors) > 1 or store.shape[1::2] != (kv_heads, head_dim) or store.device.type != "cpu":
            return None
        if self._ordered is None:
            order = [(layer, which) for layer in range(self._layers) for which in (0, 1)]
            self._ordered = [self._index.get(key) for key in order] == [(0, i) for i in range(len(order))]
        return store if self._ordered and store.dtype in FLOATS else None

    @without_autograd
    def copy_block(self, source: int, target: int) -> None:
        """Copy block `source` to block `target`, in all layers."""
        for store in self.tensors:
            blocks = store.view(*store.shape[:2], -1, BLOCK, store.shape[3])
            blocks[:, :, target] = blocks[:, :, source]

    def _allocate(self, like: Tensor) -> tuple[int, int]:
        dtype = self._dtype or like.dtype
        shape = (like.shape[1], self._slots, like.shape[3])
        used = set(self._index.values())
        for number, store in enumerate(self.tensors):
            if store.shape[1:] == shape and store.dtype == dtype and store.device == like.device:
                free = next((i for i in range(store.shape[0]) if (number, i) not in used), None)
                if free is not None:
                    return number, free
        # Assume that the other layers have the same shape; one that has not gets its own tensor.
        first = all(store.device != like.device for store in self.tensors)
        layers = self._layers if self._devices is None else self._devices.count(like.device)
        entries = 2 * layers if first and (layers or not self.tensors) else 1
        self.tensors.append(_zeros((entries, *shape), dtype, like.device))
        return len(self.tensors) - 1, 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU memory is provided page by page on the first write, so a large pool costs only what it holds.

    Uses small pages on Linux: numpy asks for huge ones, and then a text's first token zeroes 2 MB for every head.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = dtype.itemsize * math.prod(shape)
    if sys.platform == "linux" and size:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    same_size = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=same_size)).view(dtype)
