"""The KV cache of a tree decoder: preallocated, per-row lengths, commit by gather.

Owns key and value storage for one model (target or head). Knows nothing of tokens, masks or acceptance: it appends n
slots per row behind that row's committed length, and `commit` keeps the accepted ones. Rows are contiguous from slot
0 (no left padding), so a committed slot's index is its position, less `begins` where a row's beginning was dropped. It
is a transformers `Cache`, so stock models take it, under the name that `cache_name` tells.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

_CHUNK = 256  # slots; capacity grows in multiples, at least doubling, so that a long text is copied O(log n) times
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

    def __init__(self, owner: TreeCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A cycle would keep the memory of every finished text until Python's garbage collector comes by, which counts
        # objects and not megabytes: a process that answers a thousand prompts then holds gigabytes.
        self._owner = weakref.ref(owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        owner = self._cache()
        return _Layer(memo.get(id(owner), owner))  # of the cache that is being copied, if it is

    def _cache(self) -> TreeCache:
        owner = self._owner()
        assert owner is not None, "a layer is asked through its cache"
        return owner

    def get_seq_length(self) -> int:
        return self._cache().longest

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.0 gives the positions instead of their number.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0


class TreeCache(Cache):
    """Keys and values of `layers` layers for `rows` sequences. All shapes (rows, kv_heads, slots, head_dim).

    `rounding` gives the capacity that holds so many slots, where the sizes that memory grows by are to be few.
    `devices` says where each layer computes, where that is not one place: the layers of one share a slab there.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        capacity: int = _CHUNK,
        rounding: Callable[[int], int] | None = None,
        devices: Sequence[torch.device | None] | None = None,
    ) -> None:
        if layers < 1 or rows < 1 or capacity < 1:
            raise ValueError(f"a cache needs layers, rows, capacity >= 1, got {layers}, {rows}, {capacity}")
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.rows = rows
        self._rounding, self._devices = rounding, devices
        self.capacity = rounding(capacity) if rounding is not None else _round_up(capacity)
        self.lengths = [0] * rows  # committed slots per row
        self.begins = [0] * rows  # the position that each row's slot 0 holds
        # Layers of one shape share one slab (layers, rows, kv_heads, capacity, head_dim), so a commit is one gather.
        self._slabs: list[Tensor] = []
        self._held = rows  # rows that the slabs have; more than `rows` once some have left
        self._place: dict[tuple[int, int], tuple[int, int]] = {}  # (layer, 0 key or 1 value) -> (slab, index)
        self._ordered: bool | None = None  # whether the one slab holds key, value, key, value, ...
        self._lanes: list[tuple[Tensor, Tensor]] | None = None
        self._pending = 0
        self.updated_layers: set[int] = set()

    @property
    def longest(self) -> int:
        """Committed length of the longest row."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values, free slots included."""
        return sum(slab.nbytes for slab in self._slabs)

    def begin(self, nodes: int) -> int:
        """Make room for `nodes` new slots per row; returns how many slots attention has to read."""
        self._pending = nodes
        used = self.longest + nodes
        if used > self.capacity:
            self._grow(used)
        return used

    @torch.inference_mode()
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new nodes' keys and values (rows, kv_heads, nodes, dim); returns the used part of the cache."""
        assert key_states.shape[2] == self._pending, "call begin(nodes) before the forward"
        self.updated_layers.add(layer_idx)
        return self._store(key_states, layer_idx, 0), self._store(value_states, layer_idx, 1)

    def storage(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor | None:
        """The memory of all layers, (2 * layers, rows, kv_heads, capacity, head_dim): key, value, key, value, ...

        It has places for all rows that the cache began with; the first `rows` are in use. For a native forward, which
        writes the new nodes behind each row's committed length by itself. None where the layers are of different
        shapes, or stored in another order.
        """
        if not self._place:
            like = torch.empty(self._held, kv_heads, 0, head_dim, dtype=dtype)
            for layer in range(len(self.layers)):
                for which in (0, 1):
                    self._slot((layer, which), like)
        slab = self._slabs[0]
        if len(self._slabs) > 1 or slab.shape[2::2] != (kv_heads, head_dim) or slab.dtype is not dtype:
            return None
        if self._ordered is None:
            order = [(layer, which) for layer in range(len(self.layers)) for which in (0, 1)]
            self._ordered = [self._place.get(key) for key in order] == [(0, i) for i in range(len(order))]
        return slab if self._ordered and slab.device.type == "cpu" else None

    def lanes(self) -> list[tuple[Tensor, Tensor]] | None:
        """Every layer's keys and values with all slots, (rows, kv_heads, capacity, head_dim) each.

        For a forward that writes the new nodes behind each row's committed length by itself. None before the first
        `update` of every layer.
        """
        if self._lanes is None and len(self._place) == 2 * len(self.layers):
            places = [[self._place[layer, which] for which in (0, 1)] for layer in range(len(self.layers))]
            used = slice(self.rows)
            self._lanes = [(self._slabs[k][i][used], self._slabs[v][j][used]) for (k, i), (v, j) in places]
        return self._lanes

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        """Keep the accepted nodes of each row in path order; None (or an empty path) keeps nothing of that row.

        Raises:
            ValueError: a path does not fit the nodes of the last forward.
        """
        if len(paths) != self.rows:
            raise ValueError(f"commit needs one path per row: {self.rows} rows, {len(paths)} paths")
        for row, path in enumerate(paths):
            if path and (min(path) < 0 or max(path) >= self._pending):
                raise ValueError(f"row {row}: path {list(path)} does not fit the {self._pending} nodes of the forward")
        for row, path in enumerate(paths):
            if path:
                self._keep(row, path)
        self._pending = 0

    def truncate(self, row: int, length: int) -> None:
        """Forget everything of a row from slot `length` on; 0 frees the row for another sequence."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} holds {self.lengths[row]} slots and can't be cut to {length}")
        self.lengths[row] = length

    @property
    def reached(self) -> list[int]:
        """The position behind each row's last committed one."""
        return [begin + length for begin, length in zip(self.begins, self.lengths, strict=True)]

    @torch.inference_mode()
    def drop(self, row: int, count: int) -> None:
        """Forget the first `count` slots of a row; those behind move down."""
        left = self.lengths[row] - count
        if count < 0 or left < 0:
            raise ValueError(f"row {row} holds {self.lengths[row]} slots and can't drop {count}")
        for slab in self._slabs:
            lane = slab[:, row]  # (layers, kv_heads, capacity, dim)
            lane[:, :, :left] = lane[:, :, count : count + left].clone()
        self.lengths[row], self.begins[row] = left, self.begins[row] + count

    def restart(self, row: int, position: int) -> None:
        """Forget everything of a row; what comes next stands at `position`."""
        self.lengths[row], self.begins[row] = 0, position

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Let the other rows leave: row i is from now on what row `order[i]` was. The memory stays as large.

        Only rows that change their number are copied, so what leaves from the end costs nothing. See `packed_order`.

        Raises:
            ValueError: not rows of this cache, one twice, or one moved to a higher number.
        """
        if not order or len(set(order)) < len(order) or not all(i <= row < self.rows for i, row in enumerate(order)):
            raise ValueError(
                f"order {list(order)} does not fit {self.rows} rows: give each at most once, none moved up"
            )
        if any(i != row < len(order) for i, row in enumerate(order)):
            raise ValueError(f"order {list(order)} moves a row over one that stays: fill the gaps from the end")
        for i, row in enumerate(order):
            if row != i:
                used = self.lengths[row]
                for slab in self._slabs:
                    slab[:, i, :, :used] = slab[:, row, :, :used]
                self.lengths[i], self.begins[i] = used, self.begins[row]
        self.rows, self._lanes, self._pending = len(order), None, 0
        del self.lengths[self.rows :], self.begins[self.rows :]

    @torch.inference_mode()
    def copy_row(self, source: TreeCache, source_row: int, row: int) -> None:
        """Take over a committed row of another cache of the same model."""
        length = source.lengths[source_row]
        if length > self.capacity:
            self._grow(length)
        for key, (slab, index) in source._place.items():
            theirs = source._slabs[slab][index][source_row, :, :length]
            mine, at = self._slot(key, theirs.unsqueeze(0))
            self._slabs[mine][at][row, :, :length] = theirs
        self.lengths[row], self.begins[row] = length, source.begins[source_row]

    def _keep(self, row: int, path: Sequence[int]) -> None:
        length, kept = self.lengths[row], len(path)
        moved = next((i for i, node in enumerate(path) if node != i), kept)  # the path's prefix may be in place
        if moved < kept:
            source = torch.tensor([length + node for node in path[moved:]])
            for slab in self._slabs:
                lane = slab[:, row]  # (layers, kv_heads, capacity, dim)
                lane[:, :, length + moved : length + kept] = lane.index_select(2, source.to(slab.device))
        self.lengths[row] = length + kept

    def _store(self, states: Tensor, layer: int, which: int) -> Tensor:
        slab, index = self._slot((layer, which), states)
        store, nodes, longest = self._slabs[slab][index][: self.rows], states.shape[2], self.longest
        if min(self.lengths) == longest:
            store[:, :, longest : longest + nodes] = states
        else:
            rows = torch.arange(self.rows, device=store.device).unsqueeze(1)
            slots = torch.tensor(self.lengths, device=store.device).unsqueeze(1) + torch.arange(
                nodes, device=store.device
            )
            store[rows, :, slots] = states.transpose(1, 2)  # (rows, nodes, kv_heads, dim)
        return store[:, :, : longest + nodes]

    def _slot(self, key: tuple[int, int], like: Tensor) -> tuple[int, int]:
        if key not in self._place:
            self._place[key] = self._allocate(key, like)
        return self._place[key]

    def _allocate(self, key: tuple[int, int], like: Tensor) -> tuple[int, int]:
        shape = (self._held, like.shape[1], self.capacity, like.shape[3])
        taken = set(self._place.values())
        for number, slab in enumerate(self._slabs):
            if slab.shape[1:] == shape and slab.dtype == like.dtype and slab.device == like.device:
                free = next((i for i in range(slab.shape[0]) if (number, i) not in taken), None)
                if free is not None:
                    return number, free
        # Guess that the layers to come look like this one (keys and values); one that does not gets a slab of its own.
        first = all(slab.device != like.device for slab in self._slabs)
        here = len(self.layers) if self._devices is None else self._devices.count(like.device)
        layers = 2 * here if first and (here or not self._slabs) else 1
        self._slabs.append(torch.zeros(layers, *shape, dtype=like.dtype, device=like.device))
        return len(self._slabs) - 1, 0

    def _grow(self, needed: int) -> None:
        capacity = max(_round_up(needed), 2 * self.capacity)
        if self._rounding is not None:
            capacity = self._rounding(needed)
        self._lanes = None
        for number, slab in enumerate(self._slabs):
            wider = slab.new_zeros(slab.shape[0], self.rows, slab.shape[2], capacity, slab.shape[4])
            wider[:, :, :, : self.capacity] = slab[:, : self.rows]
            self._slabs[number] = wider
        self.capacity, self._held = capacity, self.rows


def packed_order(stays: Sequence[bool]) -> list[int]:
    """The `order` of `TreeCache.keep` that moves the fewest rows: gaps are filled with the last rows that stay."""
    kept = [row for row, on in enumerate(stays) if on]
    movable = [row for row in kept if row >= len(kept)]
    return [row if stays[row] else movable.pop() for row in range(len(kept))]


def _round_up(slots: int) -> int:
    return -(-slots // _CHUNK) * _CHUNK
