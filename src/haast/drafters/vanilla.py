"""Vanilla decoding as a drafter: proposes only the root, so one token per target forward in the same engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from haast.core import Accepted
from haast.drafters.base import Drafter, last_tokens, stacked
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree


@dataclass
class RootState:
    """The newest token of a request, () int64 on the target's device; set by the first `observe`."""

    root: Tensor | None = None


class VanillaDrafter(Drafter):
    """Proposes only the root."""

    name = "vanilla"

    @property
    def nodes(self) -> int:
        return 1

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> RootState:
        return RootState()

    def observe(self, states: Sequence[RootState], accepted: Accepted) -> None:
        for state, root in zip(states, last_tokens(accepted).unbind(), strict=True):
            state.root = root

    def propose(self, states: Sequence[RootState], budget: int | None = None) -> DraftTree:
        return DraftTree.roots(stacked(states, "root"))
