"""The contract of whatever runs a target's layers over trees.

Three ways keep it: the model's own modules (`hf.ModuleForward`), which always answer; one native call over packed
weights (`faster.NativeForward`); compiled layers at static shapes (`faster.CompiledForward`). `Target.forward`
asks the faster ones first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from haast.target.kv_cache import KVCache
from haast.tree import DraftTree


@dataclass(frozen=True)
class TargetOutput:
    """One forward over a tree."""

    features: Tensor  # (rows, nodes, hidden): the LM head's input at every node
    logits: Tensor  # (rows, nodes or 1, vocab), raw; 1 when only the last live node was asked for
    hidden: dict[int, Tensor]  # HF hidden_states index -> (rows, nodes, hidden)

    def cut(self, rows: int, nodes: int, own: bool) -> TargetOutput:
        """The first rows and nodes; `own` copies them out of memory that the next forward overwrites."""
        parts = [part[:rows, :nodes] for part in (self.features, self.logits, *self.hidden.values())]
        parts = [part.clone() if own else part for part in parts]
        return TargetOutput(parts[0], parts[1], dict(zip(self.hidden, parts[2:], strict=True)))


class TreeForward(ABC):
    """One way to run a model over trees."""

    @abstractmethod
    def run(
        self, tree: DraftTree, cache: KVCache, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput | None:
        """`Target.forward` after `cache.begin`; None where this way can't take it, and has changed nothing."""
