"""A draft head's forwards: `HeadForward`, over the pairs of a `Flight`.

Owns the choice of how the head runs (in one native call, compiled at a static shape, or by its modules) and the mask
that each way needs. All three answer the same. Knows nothing of how trees grow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from haast.heads.module import DraftModule
from haast.target.attention import tree_mask
from haast.target.compiled import CompiledLayers, nodes_for, slots_for
from haast.target.kv_cache import KVCache
from haast.target.native_cpu import LENGTH_DEPENDENT_ROPE, NativeStack
from haast.target.target import Target
from haast.tree import repeating


@dataclass(frozen=True)
class Flight:
    """The pairs of one forward, and what stands in flight: those of the tree's earlier levels, then these.

    Attributes:
        past: pairs of each row that are committed, seen by every pair; the same as `committed`, on the host.
        committed: (rows,) int64.
        positions: (rows, n) rotary positions of the pairs.
        flying: (rows, in flight) positions of what is in flight.
        seen: (rows, n, in flight) bool, what of it each pair sees.
    """

    past: list[int]
    committed: Tensor
    positions: Tensor
    flying: Tensor
    seen: Tensor

    @classmethod
    def chain(cls, past: list[int], committed: Tensor, pairs: int) -> Flight:
        """Pairs that follow one another after what each row has."""
        positions = committed.unsqueeze(1) + torch.arange(pairs, device=committed.device)
        causal = _causal(pairs, committed.device)
        return cls(past, committed, positions, positions, causal.expand(len(past), -1, -1))

    def below(self, parent: Tensor, positions: Tensor) -> Flight:
        """The next level of a tree: pairs (rows, m), children of the pairs numbered `parent` here."""
        rows, pairs = parent.shape
        own = torch.eye(pairs, dtype=torch.bool, device=parent.device).expand(rows, -1, -1)
        inherited = self.seen.gather(1, parent.unsqueeze(2).expand(-1, -1, self.seen.shape[2]))
        flying = torch.cat([self.flying, positions], dim=1)
        return replace(self, positions=positions, flying=flying, seen=torch.cat([inherited, own], dim=2))

    def padded(self, added: int) -> Flight:
        """With so many more pairs, each of which sees the past and itself alone."""
        pairs, flight = self.seen.shape[1:]
        dead = torch.arange(added, device=self.seen.device)
        seen = pad(self.seen, (0, added, 0, added))
        seen[:, pairs + dead, flight + dead] = True
        positions, flying = pad(self.positions, (0, added)), pad(self.flying, (0, added))
        return replace(self, positions=positions, flying=flying, seen=seen)

    def taken(self, index: Tensor) -> Flight:
        """The rows `index` (n,) of it."""
        tensors = (self.committed, self.positions, self.flying, self.seen)
        committed, positions, flying, seen = (each[index] for each in tensors)
        return replace(self, committed=committed, positions=positions, flying=flying, seen=seen)


@functools.lru_cache(maxsize=64)
def _causal(pairs: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(pairs, pairs, dtype=torch.bool, device=device).tril_()


class HeadForward:
    """Runs a head.

    Args:
        target: whose way of running decides what may be compiled, and whose KV pool is used.
        module: the head, where and as it is to run.
        window: positions that a pair looks back; None is all.
        packed: the module's linears are packed, and native code may run them.
    """

    def __init__(self, target: Target, module: DraftModule, window: int | None, packed: bool) -> None:
        self._target, self._module, self._window = target, module, window
        self.stack: NativeStack | None = module.native_stack(window or 0) if packed else None
        self._compiled: CompiledLayers | None = None
        changing = (module.config.rope_parameters or {}).get("rope_type") in LENGTH_DEPENDENT_ROPE
        self._limit = target.context_length if changing else None

    def refresh(self) -> None:
        """Notice what was changed since the last request: the head's weights, and whether the target is compiled."""
        if self.stack is not None and not self.stack.current():
            self.stack = None  # its modules run from here on
        compiled = self._target.compiled
        self._compiled = None if compiled is None else self._compiled or compiled.sibling("the draft")

    def bounded(self, positions: Tensor) -> Tensor:
        """Positions of drafts, within the context where RoPE's angles would change after it."""
        return positions if self._limit is None else positions.clamp_max(self._limit - 1)

    def run(self, cache: KVCache, embeddings: Tensor, states: Tensor, flight: Flight) -> Tensor:
        """The head's next states (rows, n, hidden) after pairs of an embedding and a state, (rows, n, hidden) each.

        Their keys and values lie after what `cache` says is there; they are overwritten unless it is advanced.
        """
        pairs = states.shape[1]
        slots = cache.begin(pairs)
        if self.stack is not None:
            store = cache.stores.together(self.stack.kv_heads, self.stack.head_dim, states.dtype)
            if store is not None:
                mixed = self._module.mix(embeddings, states)
                where = (flight.positions, flight.seen, flight.past, store, cache.tables)
                return self.stack.run(mixed, *where, (), flight.flying, cache.shift)[0]
        if self._compiled is not None and not self._compiled.problem:
            found = self._run_compiled(self._compiled, cache, embeddings, states, flight)
            if found is not None:
                return found
            cache.begin(pairs)
        bias = self._bias(flight, states, slots)
        output: Tensor = self._module(embeddings, states, flight.positions, bias, cache)
        return output

    def _run_compiled(
        self, compiled: CompiledLayers, cache: KVCache, embeddings: Tensor, states: Tensor, flight: Flight
    ) -> Tensor | None:
        """`run` at a static shape; None where the modules have to answer: prompts, and what can't be compiled."""
        pairs = states.shape[1]
        nodes, stores = nodes_for(pairs), cache.stores.by_layer()
        if nodes is None or stores is None:
            return None
        kept, slots = cache.rows, slots_for(cache.longest + nodes)
        rows = compiled.rows_for(kept, nodes, slots)
        index = repeating(kept, rows, states.device)
        embeddings, states = (pad(each, (0, 0, 0, nodes - pairs))[index] for each in (embeddings, states))
        flight = flight.padded(nodes - pairs).taken(index)
        with cache.repeated(rows):
            cache.begin(nodes, slots)
            bias = self._bias(flight, states, slots)
            run = functools.partial(self._module, embeddings, states, flight.positions, bias, cache)
            output: Tensor | None = compiled.run(self._module.decoder_layers, cache, stores, *cache.all_slots(), run)
        if output is None:
            return None
        output = output[:kept, :pairs]
        return output.clone() if compiled.graphs else output

    def _bias(self, flight: Flight, states: Tensor, slots: int) -> Tensor:
        where = {"positions": flight.positions, "flight_positions": flight.flying}
        return tree_mask(flight.seen, flight.committed, slots, states.dtype, **where, window=self._window)
