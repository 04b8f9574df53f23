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

from haast.attention import hide_far, in_flight_bias
from haast.cache import TreeCache
from haast.heads.module import DraftModule
from haast.speed.compile import CompiledLayers, nodes_for, slots_for
from haast.speed.stack import CHANGING_ROPE, NativeStack
from haast.target import Target

_ROOM = 256  # slots behind a prompt that a cache begins with


@dataclass(frozen=True)
class Flight:
    """The pairs of one forward, and what stands in flight: those of the tree's earlier levels, then these.

    Attributes:
        past: committed slots per row, seen by every pair.
        positions: (rows, n) rotary positions of the pairs.
        flying: (rows, in flight) positions of what is in flight.
        seen: (rows, n, in flight) bool, what of it each pair sees.
    """

    past: list[int]
    positions: Tensor
    flying: Tensor
    seen: Tensor

    @classmethod
    def chain(cls, cache: TreeCache, pairs: int, device: torch.device) -> Flight:
        """Pairs that follow one another behind what each row of the cache holds."""
        positions = torch.tensor(cache.reached, device=device).unsqueeze(1) + torch.arange(pairs, device=device)
        causal = torch.ones(pairs, pairs, dtype=torch.bool, device=device).tril_()
        return cls(list(cache.lengths), positions, positions, causal.expand(len(positions), -1, -1))

    def below(self, parent: Tensor, positions: Tensor) -> Flight:
        """The next level of a tree: pairs (rows, m), children of the pairs numbered `parent` here."""
        rows, pairs = parent.shape
        own = torch.eye(pairs, dtype=torch.bool, device=parent.device).expand(rows, -1, -1)
        inherited = self.seen.gather(1, parent.unsqueeze(2).expand(-1, -1, self.seen.shape[2]))
        flying = torch.cat([self.flying, positions], dim=1)
        return Flight(self.past, positions, flying, torch.cat([inherited, own], dim=2))

    def padded(self, added: int) -> Flight:
        """With so many more pairs, each of which sees the past and itself alone."""
        pairs, flight = self.seen.shape[1:]
        dead = torch.arange(added, device=self.seen.device)
        seen = pad(self.seen, (0, added, 0, added))
        seen[:, pairs + dead, flight + dead] = True
        positions, flying = pad(self.positions, (0, added)), pad(self.flying, (0, added))
        return replace(self, positions=positions, flying=flying, seen=seen)


class HeadForward:
    """Runs a head.

    Args:
        target: whose way of running decides what may be compiled.
        module: the head, where and as it is to run.
        window: positions that a pair looks back; None is all.
        packed: the module's linears are packed, and native code may run them.
    """

    def __init__(self, target: Target, module: DraftModule, window: int | None, packed: bool) -> None:
        self._target, self._module, self._window = target, module, window
        self.stack: NativeStack | None = module.native_stack(window or 0) if packed else None
        self._compiled: CompiledLayers | None = None
        changing = (module.config.rope_parameters or {}).get("rope_type") in CHANGING_ROPE
        self._limit = target.context_length if changing else None

    def follow_changes(self) -> None:
        """Where somebody changed the head since the native call was made, its modules run from here on."""
        if self.stack is not None and not self.stack.current():
            self.stack = None

    def new_cache(self, rows: int, prompt: int) -> TreeCache:
        """An empty cache of the head's layers, for prompts of at most so many pairs."""
        layers, compiled = self._module.config.num_hidden_layers, self._target.compiled
        if compiled is None:
            self._compiled = None
            return TreeCache(layers, rows, prompt + _ROOM)
        self._compiled = self._compiled or compiled.sibling("the draft")
        return TreeCache(layers, rows, 1, slots_for)

    def bounded(self, positions: Tensor) -> Tensor:
        """Positions of drafts, within the context where RoPE's angles would change behind it."""
        return positions if self._limit is None else positions.clamp_max(self._limit - 1)

    def run(self, cache: TreeCache, embeddings: Tensor, states: Tensor, flight: Flight) -> Tensor:
        """The head's next states (rows, n, hidden) after pairs of an embedding and a state, (rows, n, hidden) each.

        Their keys and values lie in `cache`, which has begun n slots, until they are committed or dropped.
        """
        if self.stack is not None:
            store = cache.storage(self.stack.kv_heads, self.stack.head_dim, states.dtype)
            if store is not None:
                mixed = self._module.mix(embeddings, states)
                where = (flight.positions, flight.seen, flight.past)
                return self.stack.run(mixed, *where, store, (), flight.flying, cache.begins)[0]
        if self._compiled is not None and not self._compiled.problem:
            found = self._run_compiled(self._compiled, cache, embeddings, states, flight)
            if found is not None:
                return found
        output: Tensor = self._module(embeddings, states, flight.positions, self._bias(cache, flight, states), cache)
        return output

    def _run_compiled(
        self, compiled: CompiledLayers, cache: TreeCache, embeddings: Tensor, states: Tensor, flight: Flight
    ) -> Tensor | None:
        """`run` at a static shape; None where the modules have to answer: prompts, and what can't be compiled."""
        pairs = states.shape[1]
        nodes = nodes_for(pairs)
        if nodes is None or cache.lanes() is None:
            return None
        cache.begin(nodes)
        lanes = cache.lanes()
        assert lanes is not None, "growing keeps the lanes"
        embeddings, states = (pad(each, (0, 0, 0, nodes - pairs)) for each in (embeddings, states))
        flight = flight.padded(nodes - pairs)
        bias = self._bias(cache, flight, states, cache.capacity)
        run = functools.partial(self._module, embeddings, states, flight.positions, bias, cache)
        output: Tensor | None = compiled.run(self._module.decoder_layers, cache, lanes, cache.lengths, nodes, run)
        cache.begin(pairs)
        if output is None:
            return None
        output = output[:, :pairs]
        return output.clone() if compiled.graphs else output

    def _bias(self, cache: TreeCache, flight: Flight, states: Tensor, slots: int | None = None) -> Tensor:
        bias = in_flight_bias(flight.seen, flight.past, states.dtype, slots)
        if self._window is not None:
            hide_far(bias, flight.past, cache.begins, flight.positions, flight.flying, self._window)
        return bias
