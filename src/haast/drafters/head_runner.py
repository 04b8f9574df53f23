"""Runs a draft head: `HeadForward` computes one forward over the pairs of a `Flight`.

Owns the choice of the backend (one native call, compiled at a static shape, or PyTorch modules) and its attention mask.
All three give the same result. Knows nothing of tree expansion.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from haast.drafters.native_draft import NativeHead
from haast.heads.module import DraftModule
from haast.target.attention import tree_mask
from haast.target.compiled import CompiledLayers, nodes_for, slots_for
from haast.target.kv_cache import KVCache
from haast.target.native_cpu import LENGTH_DEPENDENT_ROPE, NativeStack
from haast.target.target import Target
from haast.tree import padded_row_index


@dataclass(frozen=True)
class Flight:
    """The pairs of one forward, and all uncommitted pairs: those of the tree's earlier levels, then these.

    Attributes:
        past: number of committed pairs per row, seen by every pair; `committed` on the host.
        committed: (rows,) int64.
        positions: (rows, n) rotary positions of the pairs.
        flying: (rows, uncommitted) positions of all uncommitted pairs.
        seen: (rows, n, uncommitted) bool: which of these each pair sees.
    """

    past: list[int]
    committed: Tensor
    positions: Tensor
    flying: Tensor
    seen: Tensor

    @classmethod
    def chain(cls, past: list[int], committed: Tensor, pairs: int) -> Flight:
        """A chain of `pairs` pairs after each row's committed ones."""
        positions = committed.unsqueeze(1) + torch.arange(pairs, device=committed.device)
        causal = _causal(pairs, committed.device)
        return cls(past, committed, positions, positions, causal.expand(len(past), -1, -1))

    def below(self, parent: Tensor, positions: Tensor) -> Flight:
        """The next level of a tree: pairs (rows, m) whose parents are this level's pairs `parent` (rows, m)."""
        rows, pairs = parent.shape
        itself = torch.eye(pairs, dtype=torch.bool, device=parent.device).expand(rows, -1, -1)
        inherited = self.seen.gather(1, parent.unsqueeze(2).expand(-1, -1, self.seen.shape[2]))
        flying = torch.cat([self.flying, positions], dim=1)
        return replace(self, positions=positions, flying=flying, seen=torch.cat([inherited, itself], dim=2))

    def padded(self, added: int) -> Flight:
        """Padded with `added` pairs, each of which sees only the past and itself."""
        pairs, flight = self.seen.shape[1:]
        dead = torch.arange(added, device=self.seen.device)
        seen = pad(self.seen, (0, added, 0, added))
        seen[:, pairs + dead, flight + dead] = True
        positions, flying = pad(self.positions, (0, added)), pad(self.flying, (0, added))
        return replace(self, positions=positions, flying=flying, seen=seen)

    def select_rows(self, index: Tensor) -> Flight:
        """A flight of the rows `index` (n,)."""
        tensors = (self.committed, self.positions, self.flying, self.seen)
        committed, positions, flying, seen = (each[index] for each in tensors)
        return replace(self, committed=committed, positions=positions, flying=flying, seen=seen)


@functools.lru_cache(maxsize=64)
def _causal(pairs: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(pairs, pairs, dtype=torch.bool, device=device).tril_()


class HeadForward:
    """Runs a head with the fastest available backend.

    Args:
        target: decides what may be compiled; its KV pool is used.
        module: the head, on the target's device and in its dtype.
        embedding: the head's.
        window: attention window in positions; None is all.
        packed: the module's linear layers are packed, so native code may run them.
    """

    def __init__(
        self, target: Target, module: DraftModule, embedding: nn.Module, window: int | None, packed: bool
    ) -> None:
        self._target, self._module, self._window = target, module, window
        self.stack: NativeStack | None = module.native_stack(window or 0) if packed else None
        self._native_head = NativeHead.of(embedding, module, self.stack)
        self._compiled: CompiledLayers | None = None
        changing = (module.config.rope_parameters or {}).get("rope_type") in LENGTH_DEPENDENT_ROPE
        self._limit = target.context_length if changing else None

    @property
    def native_head(self) -> NativeHead | None:
        """The head with its embedding as native calls; None if it, or a changed one, is not supported."""
        return None if self.stack is None else self._native_head

    def store(self, cache: KVCache, dtype: torch.dtype) -> Tensor | None:
        """The keys and values of a cache after `begin`, for native code; None if it has another layout."""
        stack = self.stack
        return None if stack is None else cache.stores.together(stack.kv_heads, stack.head_dim, dtype)

    def refresh(self) -> None:
        """Check whether weights, or whether the target is compiled, have changed since the last request."""
        if self.stack is not None and not self.stack.current():
            self.stack = None  # from now on the modules run
        if self._native_head is not None and not self._native_head.current():
            self._native_head = None
        compiled = self._target.compiled
        self._compiled = None if compiled is None else self._compiled or compiled.sibling("the draft")

    def bounded(self, positions: Tensor) -> Tensor:
        """Positions of drafts, limited to the context length if RoPE's angles would change beyond it."""
        return positions if self._limit is None else positions.clamp_max(self._limit - 1)

    def run(self, cache: KVCache, embeddings: Tensor, states: Tensor, flight: Flight) -> Tensor:
        """The head's states (rows, n, hidden) after pairs of an embedding and a state, (rows, n, hidden) each.

        Keys and values are written after the committed ones of `cache`; they are overwritten unless it is advanced.
        """
        pairs = states.shape[1]
        slots = cache.begin(pairs)
        if self.stack is not None and (store := self.store(cache, states.dtype)) is not None:
            mixed = self._module.mix(embeddings, states)
            where = (flight.positions, flight.seen, flight.past, store, cache.tables)
            return self.stack.run(mixed, *where, (), flight.flying, cache.shift)[0]
        if self._compiled is not None and not self._compiled.problem:
            compiled_output = self._run_compiled(self._compiled, cache, embeddings, states, flight)
            if compiled_output is not None:
                return compiled_output
            cache.begin(pairs)
        bias = self._bias(flight, states, slots)
        output: Tensor = self._module(embeddings, states, flight.positions, bias, cache)
        return output

    def _run_compiled(
        self, compiled: CompiledLayers, cache: KVCache, embeddings: Tensor, states: Tensor, flight: Flight
    ) -> Tensor | None:
        """`run` at a static shape; None if the modules must run: for prompts, and if compilation failed."""
        pairs = states.shape[1]
        nodes, stores = nodes_for(pairs), cache.stores.by_layer()
        if nodes is None or stores is None:
            return None
        batch, slots = cache.rows, slots_for(cache.longest + nodes)
        rows = compiled.rows_for(batch, nodes, slots)
        index = padded_row_index(batch, rows, states.device)
        embeddings, states = (pad(each, (0, 0, 0, nodes - pairs))[index] for each in (embeddings, states))
        flight = flight.padded(nodes - pairs).select_rows(index)
        with cache.repeated(rows):
            cache.begin(nodes, slots)
            bias = self._bias(flight, states, slots)
            run = functools.partial(self._module, embeddings, states, flight.positions, bias, cache)
            output: Tensor | None = compiled.run(self._module.decoder_layers, cache, stores, *cache.all_slots(), run)
        if output is None:
            return None
        output = output[:batch, :pairs]
        return output.clone() if compiled.graphs else output

    def _bias(self, flight: Flight, states: Tensor, slots: int) -> Tensor:
        where: dict[str, Any] = {"positions": flight.positions, "flight_positions": flight.flying}
        return tree_mask(flight.seen, flight.committed, slots, states.dtype, **where, window=self._window)
