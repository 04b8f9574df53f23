"""Vanilla decoding as a drafter: the root alone, so one token per target forward through the same engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from haast.drafters.base import Accepted, Drafter, last_tokens
from haast.tree import DraftTree


class VanillaDrafter(Drafter):
    """Proposes nothing but the root."""

    name = "vanilla"

    def __init__(self) -> None:
        self._root: Tensor | None = None

    @property
    def nodes(self) -> int:
        return 1

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._root = None

    def keep(self, order: Sequence[int]) -> None:
        assert self._root is not None, "no row ends before its prompt is observed"
        self._root = self._root[list(order)]

    def observe(self, accepted: Accepted) -> None:
        self._root = last_tokens(accepted, self._root)

    def propose(self) -> DraftTree:
        assert self._root is not None, "observe the prompt before the first proposal"
        return DraftTree.roots(self._root)
