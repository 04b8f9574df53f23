"""Keys and values of one model in a KV pool: a transformers `Cache` whose rows are `Sequence`s of blocks.

Owns appending n nodes per row after that row's committed length, and keeping the accepted ones; the tensors are
`KVStores`'. Knows nothing of tokens, masks or acceptance. Seen from a row, slots are contiguous from 0, so a slot's
index is its position.

    row 0   committed 0 1 2 3 4 | nodes 5 6 7        keep(path (0, 2)): node 2's keys and values move to slot 6
    row 1   committed 0 1       | nodes 2 3 4

A draft head has a KVCache of its own over the same blocks (`beside`), with `shift` 1: its pair for token i + 1 lies in
the slot of token i + 1, so that the contents of a block depend on no token after it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from haast import native
from haast.device import to_device, without_autograd
from haast.errors import UnsupportedModelError
from haast.target.kv_pool import BLOCK, KVPool, Sequence
from haast.target.kv_stores import FLOATS, KVStores

CACHE_NAMES = ("cache", "past_key_values")  # what models call the argument: since transformers 5.24, and before


def cache_name(forward: Callable[..., Any]) -> str:
    """The name under which a model's or layer's `forward` takes a cache.

    Code that a model brings along may keep the older name in a newer transformers. A wrapper that passes on whatever it
    gets (an adapter's) is taken to stand before a model of the installed transformers.
    """
    for function in (forward, GenerationMixin.prepare_inputs_for_generation):
        known = inspect.signature(function).parameters
        for name in CACHE_NAMES:
            if name in known:
                return name
    raise TypeError(f"the installed transformers takes a cache under none of the names {', '.join(CACHE_NAMES)}")


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    """What stock model code may ask of one layer; storage lives in the owning cache."""

    def __init__(self, owner: KVCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A cycle would keep the memory of every cache until Python's garbage collector comes by, which counts objects
        # and not megabytes.
        self._owner = weakref.ref(owner)

    def _cache(self) -> KVCache:
        owner = self._owner()
        assert owner is not None, "a layer is asked through its cache"
        return owner

    def get_seq_length(self) -> int:
        return self._cache().longest

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.0 gives the positions instead of their number.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0


class KVCache(Cache):
    """Keys and values of `layers` layers; `bind` says whose. All shapes (rows, kv_heads, slots, head_dim).

    Args:
        pool: whose blocks the rows hold.
        layers: of the model.
        device: where the model's tokens go.
        shift: slots between a row's first slot and that of its first entry.
        dtype: of what is stored; None is as the model gives it. Others are converted when they are written and read.
        devices: where each layer computes, where that is not one place.
    """

    def __init__(
        self,
        pool: KVPool,
        layers: int,
        device: torch.device,
        *,
        shift: int = 0,
        dtype: torch.dtype | None = None,
        devices: Rows[torch.device | None] | None = None,
    ) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.pool, self.device, self.shift, self.dtype = pool, device, shift, dtype
        self.stores = KVStores(pool.slots, layers, dtype, devices)
        self.sequences: list[Sequence] = []
        self.lengths: list[int] = []  # committed slots per row, from its first block here on
        self._begins: list[int] = []  # that block's number, per row
        self.updated_layers: set[int] = set()
        self._nodes, self.reads = 0, 0  # nodes of the forward, and slots that its attention reads

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        raise TypeError("a KVCache belongs to one pool and can't be copied: make another one")

    def beside(self, layers: int, device: torch.device) -> KVCache:
        """A head's keys and values, in the same blocks."""
        return KVCache(self.pool, layers, device, shift=1, dtype=self.dtype)

    @property
    def rows(self) -> int:
        """Sequences that are bound."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Committed length of the longest row."""
        return max(self.lengths)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token slot; 0 before the first forward."""
        return sum(store.nbytes for store in self.stores.tensors) // self.pool.slots

    def bind(
        self, sequences: Rows[Sequence], lengths: Rows[int] | None = None, begins: Rows[int] | None = None
    ) -> KVCache:
        """Let the next forwards be over these rows; their committed lengths are the sequences' own if None.

        With `begins`, a row begins with so many-th of its sequence's blocks, 0 being the first, as if none were before
        it; its length is counted from there on.
        """
        self.sequences = list(sequences)
        self.lengths = [each.length for each in sequences] if lengths is None else list(lengths)
        self._begins = [0] * len(self.sequences) if begins is None else list(begins)
        self._nodes = 0
        return self

    @contextmanager
    def repeated(self, rows: int) -> Iterator[None]:
        """Within it `rows` rows are bound: these, then the first one again, which writes the same to the same slots."""
        own = self.sequences, self.lengths, self._begins
        more = rows - self.rows
        self.bind(*([*each, *each[:1] * more] for each in own))
        try:
            yield
        finally:
            self.sequences, self.lengths, self._begins = own

    def begin(self, nodes: int, read: int | None = None) -> int:
        """Make room for `nodes` new slots per row; returns how many slots attention reads, `read` if given.

        Raises:
            PoolFullError: the pool has no room now.
        """
        longest = self.longest
        self._nodes, self.reads = nodes, read or longest + nodes
        each_row = zip(self.sequences, self.lengths, self._begins, strict=True)
        for sequence, length, first in each_row:
            sequence.reserve(first * BLOCK + length + nodes + self.shift)
        blocks = -(-(self.reads + self.shift) // BLOCK)
        tables = np.empty((self.rows, blocks), dtype=np.int32)
        for row, (sequence, first) in enumerate(zip(self.sequences, self._begins, strict=True)):
            own = sequence.table[first : first + blocks]
            tables[row, : len(own)] = own
            tables[row, len(own) :] = own[0]  # what a row masks is its own, so that it is finite
        self._host_tables = tables
        self.tables = torch.from_numpy(tables)  # (rows, blocks) int32, on the CPU
        self._lengths_tensor: Tensor | None = None
        self._flat: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
        self._start: int | None = None  # see `_stretch`
        return self.reads

    @property
    def lengths_tensor(self) -> Tensor:
        """(rows,) int64 on the cache's device: committed slots when the forward began."""
        if self._lengths_tensor is None:
            self._lengths_tensor = to_device(torch.tensor(self.lengths), self.device)
        return self._lengths_tensor

    def _stretch(self) -> int | None:
        """Where the only row begins, if its blocks are one stretch: then it is read through a view."""
        if self._start is None:
            table = self._host_tables[0]
            whole = bool((np.diff(table) == 1).all())
            self._start = int(table[0]) * BLOCK + self.shift if whole else -1
        return None if self._start < 0 else self._start

    def physical(self, slots: Tensor) -> Tensor:
        """The pool's slots (rows, n) for the rows' own (rows, n)."""
        tables = to_device(self.tables, slots.device)
        shifted = slots + self.shift
        blocks = tables.gather(1, shifted.div(BLOCK, rounding_mode="floor")).long()
        return blocks * BLOCK + shifted.remainder(BLOCK)

    def all_slots(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Where the new nodes go (rows, nodes), and what attention reads (rows, read), of the pool's slots."""
        lengths = to_device(self.lengths_tensor, self.device if device is None else device).unsqueeze(1)
        write = self.physical(lengths + torch.arange(self._nodes, device=lengths.device))
        return write, self.physical(torch.arange(self.reads, device=lengths.device).expand(self.rows, -1))

    @without_autograd
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new nodes' keys and values (rows, kv_heads, nodes, dim); returns the used part of the cache.

        Raises:
            UnsupportedModelError: a model that stores other positions than it was given.
        """
        if key_states.shape[2] != self._nodes:
            raise UnsupportedModelError(
                f"layer {layer_idx} stores {key_states.shape[2]} positions where the forward has {self._nodes}: this "
                f"model adds positions of its own, so its cache can't be gathered by tree path"
            )
        self.updated_layers.add(layer_idx)
        return self._store(key_states, layer_idx, 0), self._store(value_states, layer_idx, 1)

    def _store(self, states: Tensor, layer: int, which: int) -> Tensor:
        store = self.stores.of(layer, which, states)  # (kv_heads, slots, dim)
        rows, heads, nodes, dim = states.shape
        if self.rows == 1 and (start := self._stretch()) is not None:
            begin, end = start, start + self.lengths[0]
            store[:, end : end + nodes] = states[0].to(store.dtype)
            return store[:, begin : begin + self.reads].unsqueeze(0).to(states.dtype)
        write, read = self._flat_slots(states.device, heads)
        flat = store.view(-1, dim)
        flat.index_copy_(0, write, states.reshape(-1, dim).to(store.dtype))
        return flat.index_select(0, read).view(rows, heads, self.reads, dim).to(states.dtype)

    def _flat_slots(self, device: torch.device, heads: int) -> tuple[Tensor, Tensor]:
        """Places of (rows, heads, nodes) and (rows, heads, read) in a layer's (heads * slots, dim), flattened.

        What is read then lies as models expect it: some put rows and heads together by a view.
        """
        if (device, heads) not in self._flat:
            write, read = self.all_slots(device)
            begins = torch.arange(heads, device=device).view(1, -1, 1) * self.pool.slots
            self._flat[device, heads] = (
                (begins + write.unsqueeze(1)).flatten(),
                (begins + read.unsqueeze(1)).flatten(),
            )
        return self._flat[device, heads]

    @without_autograd
    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Move the accepted nodes to where they are committed; `advance` then says so on the host.

        Args:
            path: (rows, n) int64: nodes of the last forward, in path order, ascending.
            counts: (rows,) int64: how many of them are kept.
        """
        for store in self.stores.tensors:
            on_cpu = store.device.type == "cpu" and path.device.type == "cpu"
            if on_cpu and store.dtype in FLOATS and native.available():
                where = (self.tables, self.lengths_tensor, path, counts)
                native.keep(store, *where, block=BLOCK, shift=self.shift)
            else:
                self._keep_in(store, path, counts)

    def _keep_in(self, store: Tensor, path: Tensor, counts: Tensor) -> None:
        index = torch.arange(path.shape[1], device=path.device)
        lengths = self.lengths_tensor.unsqueeze(1)
        kept = torch.where(index < counts.unsqueeze(1), path, index)
        source, target = (self.physical(lengths + each).flatten().to(store.device) for each in (kept, index))
        store.index_copy_(2, target, store.index_select(2, source))

    def advance(self, counts: Rows[int]) -> None:
        """Commit so many slots more of each row, in the sequences too where the lengths are theirs."""
        for row, count in enumerate(counts):
            self.lengths[row] += count
            if not self.shift:
                self.sequences[row].length = self.lengths[row]
