"""KV cache of one model in a KV pool: a transformers `Cache` whose rows are `Sequence`s of blocks.

Owns appending n nodes per row after that row's committed length, and keeping the accepted ones; `KVStores` owns the
tensors. Knows nothing of tokens, masks or acceptance. A row's slots are numbered from 0 without gaps, so a slot's index
is its position.

    row 0   committed 0 1 2 3 4 | nodes 5 6 7        keep(path (0, 2)): node 2's keys and values move to slot 6
    row 1   committed 0 1       | nodes 2 3 4

A draft head has its own KVCache over the same blocks (`for_head`), with `shift` 1: its pair that ends in token i + 1
lies in the slot of token i + 1, so that the contents of a block do not depend on tokens after it.
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
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from haast import native
from haast.device import to_device, without_autograd
from haast.errors import UnsupportedModelError
from haast.target.kv_pool import BLOCK, KVPool, Sequence
from haast.target.kv_stores import FLOATS, KVStores
from haast.target.recurrent import Recurrence, Run, TextState
from haast.tree import DraftTree

# The argument's name: since transformers 5.24, before, and in models with nothing but recurrent states.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(forward: Callable[..., Any]) -> str:
    """The name of the cache argument of a model's or layer's `forward`.

    A model's own remote code may use the older name with a newer transformers. A wrapper with `**kwargs` only (an
    adapter's) is assumed to wrap a model of the installed transformers.
    """
    for function in (forward, GenerationMixin.prepare_inputs_for_generation):
        parameters = inspect.signature(function).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
    raise TypeError(f"the installed transformers has no cache argument named {' or '.join(CACHE_NAMES)}")


def is_empty(cache: Cache) -> bool:
    """Whether a cache, of any class of transformers, holds nothing of a text yet."""
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) or not cache.layers:
        return cache.get_seq_length() == 0
    return not cache.has_previous_state()  # recurrent layers only


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    """What stock model code reads from one layer; the owning cache stores the tensors."""

    def __init__(self, owner: KVCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A reference cycle would hold each cache's memory until Python's garbage collector runs, which it does by the
        # number of objects, not by their bytes.
        self._owner = weakref.ref(owner)

    def _cache(self) -> KVCache:
        owner = self._owner()
        assert owner is not None, "a layer is used only through its cache"
        return owner

    def get_seq_length(self) -> int:
        return self._cache().longest

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.0 passes the positions instead of their number.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0


class KVCache(Cache):
    """Keys and values of `layers` layers, for the sequences of `bind`. All shapes (rows, kv_heads, slots, head_dim).

    Args:
        pool: the pool that the rows' blocks belong to.
        layers: number of layers of the model.
        device: device of the model's input tokens.
        shift: number of slots between a row's first slot and that of its first entry.
        dtype: of stored values; None is the model's own. Others are converted on writing and reading.
        devices: device of each layer, if they differ.
        recurrence: the model's recurrent layers, if it has any; their states are the sequences'.
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
        recurrence: Recurrence | None = None,
    ) -> None:
        Cache.__init__(self, layers=[_Layer(self) for _ in range(layers)])  # a subclass may have another base too
        self.pool, self.device, self.shift, self.dtype = pool, device, shift, dtype
        storing = range(layers) if recurrence is None else recurrence.layout.attention_layers
        devices = None if devices is None else [devices[layer] for layer in storing]
        self.stores = KVStores(pool.slots, len(storing), dtype, devices)
        self._recurrence = recurrence
        self._run: Run | None = None  # the recurrent layers' part of the forward
        self._path: Tensor | None = None  # of `keep`
        self.sequences: list[Sequence] = []
        self.lengths: list[int] = []  # committed slots per row, counted from its first block
        self._first_blocks: list[int] = []  # per row: index of its first block in the sequence's table
        self.updated_layers: set[int] = set()
        self._nodes, self.reads = 0, 0  # nodes of the forward, and number of slots that its attention reads

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        raise TypeError("a KVCache belongs to one pool and can't be copied: create a new one")

    def for_head(self, layers: int, device: torch.device) -> KVCache:
        """A cache for a head's keys and values, in the same blocks."""
        return KVCache(self.pool, layers, device, shift=1, dtype=self.dtype)

    @property
    def rows(self) -> int:
        """Number of bound sequences."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Committed length of the longest row."""
        return max(self.lengths)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token slot; 0 before the first forward."""
        return sum(store.nbytes for store in self.stores.tensors) // self.pool.slots

    def bind(
        self, sequences: Rows[Sequence], lengths: Rows[int] | None = None, first_blocks: Rows[int] | None = None
    ) -> KVCache:
        """Set the rows of the next forwards. `lengths` are their committed lengths; None: the sequences' own.

        With `first_blocks`, a row starts at the block of this index in its sequence, as if there were none before it;
        its length counts from there.
        """
        self.sequences = list(sequences)
        self.lengths = [each.length for each in sequences] if lengths is None else list(lengths)
        self._first_blocks = [0] * len(self.sequences) if first_blocks is None else list(first_blocks)
        self._nodes = 0
        return self

    @contextmanager
    def repeated(self, rows: int) -> Iterator[None]:
        """Pad the batch to `rows` rows inside the block by repeating the first row.

        Repeated rows write the same values to the same slots.
        """
        saved = self.sequences, self.lengths, self._first_blocks
        more = rows - self.rows
        self.bind(*([*each, *each[:1] * more] for each in saved))
        try:
            yield
        finally:
            self.sequences, self.lengths, self._first_blocks = saved

    def begin(self, nodes: int, read: int | None = None) -> int:
        """Reserve `nodes` new slots per row; returns the number of slots that attention reads: `read` if not None.

        Raises:
            PoolFullError: the pool has no room now.
        """
        longest = self.longest
        self._nodes, self.reads = nodes, read or longest + nodes
        self._run = self._path = None
        each_row = zip(self.sequences, self.lengths, self._first_blocks, strict=True)
        for sequence, length, first in each_row:
            sequence.reserve(first * BLOCK + length + nodes + self.shift)
        blocks = -(-(self.reads + self.shift) // BLOCK)
        tables = np.empty((self.rows, blocks), dtype=np.int32)
        for row, (sequence, first) in enumerate(zip(self.sequences, self._first_blocks, strict=True)):
            own = sequence.table[first : first + blocks]
            tables[row, : len(own)] = own
            tables[row, len(own) :] = own[0]  # pad with the row's own block: masked values must be finite
        self._host_tables = tables
        self.tables = torch.from_numpy(tables)  # (rows, blocks) int32, on the CPU
        self._lengths_tensor: Tensor | None = None
        self._flat: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
        self._start: int | None = None  # see `_contiguous_start`
        return self.reads

    @property
    def lengths_tensor(self) -> Tensor:
        """(rows,) int64 on the cache's device: committed slots at the start of the forward."""
        if self._lengths_tensor is None:
            self._lengths_tensor = to_device(torch.tensor(self.lengths), self.device)
        return self._lengths_tensor

    def _contiguous_start(self) -> int | None:
        """First slot of a single row if its blocks are contiguous, so that it can be read through a view; else None."""
        if self._start is None:
            table = self._host_tables[0]
            contiguous = bool((np.diff(table) == 1).all())
            self._start = int(table[0]) * BLOCK + self.shift if contiguous else -1
        return None if self._start < 0 else self._start

    def physical(self, slots: Tensor) -> Tensor:
        """Slots of the pool (rows, n) for slots of the rows (rows, n)."""
        tables = to_device(self.tables, slots.device)
        shifted = slots + self.shift
        blocks = tables.gather(1, shifted.div(BLOCK, rounding_mode="floor")).long()
        return blocks * BLOCK + shifted.remainder(BLOCK)

    def all_slots(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Slots of the pool: those of the new nodes (rows, nodes), and those that attention reads (rows, read)."""
        lengths = to_device(self.lengths_tensor, self.device if device is None else device).unsqueeze(1)
        write = self.physical(lengths + torch.arange(self._nodes, device=lengths.device))
        return write, self.physical(torch.arange(self.reads, device=lengths.device).expand(self.rows, -1))

    @without_autograd
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new nodes' keys and values (rows, kv_heads, nodes, dim); returns all that attention reads.

        Raises:
            UnsupportedModelError: the model stores another number of positions than the forward has nodes.
        """
        if key_states.shape[2] != self._nodes:
            raise UnsupportedModelError(
                f"layer {layer_idx} stores {key_states.shape[2]} positions where the forward has {self._nodes}: the "
                f"model adds positions of its own, so its cache can't be gathered by tree path"
            )
        self.updated_layers.add(layer_idx)
        return self._store(key_states, layer_idx, 0), self._store(value_states, layer_idx, 1)

    @without_autograd
    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Store the keys (rows, nodes, dim) by which a sparse attention selects tokens; returns all, like `update`."""
        return self._store(indexer_key_states.unsqueeze(1), layer_idx, 2).squeeze(1)

    def write(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        """Store the new nodes' keys and values as `update` does, without reading any."""
        self._write(key_states, layer_idx, 0)
        self._write(value_states, layer_idx, 1)

    def _store(self, states: Tensor, layer: int, which: int) -> Tensor:
        store = self._write(states, layer, which)
        rows, heads, _, dim = states.shape
        if self.rows == 1 and (start := self._contiguous_start()) is not None:
            return store[:, start : start + self.reads].unsqueeze(0).to(states.dtype)
        _, read = self._flat_slots(states.device, heads)
        return store.view(-1, dim).index_select(0, read).view(rows, heads, self.reads, dim).to(states.dtype)

    def _write(self, states: Tensor, layer: int, which: int) -> Tensor:
        store = self.stores.of(layer, which, states)  # (kv_heads, slots, dim)
        nodes, dim = states.shape[2:]
        if self.rows == 1 and (start := self._contiguous_start()) is not None:
            end = start + self.lengths[0]
            store[:, end : end + nodes] = states[0].to(store.dtype)
        else:
            write, _ = self._flat_slots(states.device, states.shape[1])
            store.view(-1, dim).index_copy_(0, write, states.reshape(-1, dim).to(store.dtype))
        return store

    def _flat_slots(self, device: torch.device, heads: int) -> tuple[Tensor, Tensor]:
        """Flat indices of (rows, heads, nodes) and (rows, heads, read) in a layer's (heads * slots, dim).

        Values are then read in the memory order that models expect: some merge rows and heads by a view.
        """
        if (device, heads) not in self._flat:
            write, read = self.all_slots(device)
            head_offsets = torch.arange(heads, device=device).view(1, -1, 1) * self.pool.slots
            self._flat[device, heads] = (
                (head_offsets + write.unsqueeze(1)).flatten(),
                (head_offsets + read.unsqueeze(1)).flatten(),
            )
        return self._flat[device, heads]

    @contextmanager
    def recurring(self, tree: DraftTree, prompt: bool) -> Iterator[None]:
        """Run recurrent layers over `tree` inside the block; of a chunk of a `prompt` only the last state is kept."""
        if self._recurrence is None:
            yield
            return
        begun = []
        for sequence, length in zip(self.sequences, self.lengths, strict=True):
            state = sequence.state
            if (0 if state is None else state.length) != length:
                raise RuntimeError(f"the recurrent state of a text of {length} tokens is not that after its last one")
            assert state is None or isinstance(state, TextState), "only this class sets it"
            begun.append(state)
        lengths = zip(self.sequences, self.lengths, strict=True)
        prompts = [tree.nodes if s.decoded_from is None else s.decoded_from - length for s, length in lengths]
        self._run = self._recurrence.begin(tree, begun, prompts if prompt else None)
        with self._run.replacing():
            yield

    @without_autograd
    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Move the accepted nodes' keys and values to the next slots of each row; `advance` then commits them.

        Nothing is erased: rejected ones lie after the committed length until the next forward writes there.

        Args:
            path: (rows, n) int64: nodes of the last forward, in path order, ascending.
            counts: (rows,) int64: number of nodes of each path that are kept.
        """
        self._path = path
        for store in self.stores.tensors:
            on_cpu = store.device.type == "cpu" and path.device.type == "cpu"
            if on_cpu and store.dtype in FLOATS and native.available():
                arguments = (self.tables, self.lengths_tensor, path, counts)
                native.keep(store, *arguments, block=BLOCK, shift=self.shift)
            else:
                self._keep_in(store, path, counts)

    def _keep_in(self, store: Tensor, path: Tensor, counts: Tensor) -> None:
        index = torch.arange(path.shape[1], device=path.device)
        lengths = self.lengths_tensor.unsqueeze(1)
        kept = torch.where(index < counts.unsqueeze(1), path, index)
        source, target = (self.physical(lengths + each).flatten().to(store.device) for each in (kept, index))
        store.index_copy_(2, target, store.index_select(2, source))

    def advance(self, counts: Rows[int]) -> None:
        """Commit `counts` more slots of each row; a target's cache (`shift` 0) also advances the sequences' lengths."""
        path = None if self._path is None or self._recurrence is None else self._path.tolist()
        for row, count in enumerate(counts):
            self.lengths[row] += count
            if not self.shift:
                self.sequences[row].length = self.lengths[row]
            if count and self._recurrence is not None:
                self._enter_state(row, count - 1 if path is None else path[row][count - 1])
        self._run = None  # frees the states of all other nodes

    def _enter_state(self, row: int, node: int) -> None:
        """Commit the recurrent state after a row's last accepted node."""
        if self._run is None:
            raise RuntimeError("a model with recurrent layers needs a forward before positions are committed")
        self.sequences[row].enter(self._run.state(row, node, self.lengths[row]))
