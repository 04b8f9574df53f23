"""Tensor parallelism: keeps the processes of a sharded model in step while they serve the same requests.

Owns which process decides: the leader drafts, verifies and applies stop rules, and broadcasts the results. That costs
two small broadcasts per step (three with a stop rule), in addition to two reductions per layer of every forward. A
model in one process needs no broadcast (`Alone`). Knows no model.

    leader      propose -> tree | forward | verify    | stop?
                         broadcast  reduce  broadcast   broadcast
    follower             tree   | forward | verdict   | stops
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from haast.core import Verdict
from haast.errors import PromptError
from haast.target.ranks import Ranks
from haast.tree import DraftTree

Ends = Sequence[tuple[int, str]]  # per row: number of tokens to emit, and the finish reason ("" to continue)
_REASONS = ("", "stop", "length", "error")


class Alone:
    """One process: decides by itself."""

    leads = True

    def trees(self, propose: Callable[[], DraftTree], device: torch.device) -> DraftTree:
        """The trees of a step."""
        return propose()

    def verdict(self, verify: Callable[[], Verdict], device: torch.device) -> Verdict:
        """The verdict of a step."""
        return verify()

    def ends(self, compute: Callable[[], Ends]) -> Ends:
        """Where stop rules cut each row; these may read a clock, so processes could differ."""
        return compute()

    def numbers(self, compute: Callable[[], Sequence[int]]) -> Sequence[int]:
        """Numbers that all processes must share."""
        return compute()

    def check(self, *values: object) -> None:
        """Raise PromptError if the processes do not serve the same request."""


class Broadcast(Alone):
    """Several processes: the first one decides and broadcasts."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.leads = ranks, ranks.leads

    def trees(self, propose: Callable[[], DraftTree], device: torch.device) -> DraftTree:
        if not self.leads:
            rows, height, *values = self._ranks.share()
            tokens, parents, flags = torch.tensor(values, device=device).view(3, rows, -1)
            return DraftTree.from_parents(tokens, parents, flags % 2 == 1, flags >= 2, height=height, checked=True)
        with self._ranks.leading():
            tree = propose()
        flags = tree.live.long() if tree.placeholder is None else tree.live + 2 * tree.placeholder
        fields = torch.cat([part.flatten() for part in (tree.tokens, tree.parents, flags)])
        self._ranks.share([tree.rows, tree.height, *fields.tolist()])
        return tree

    def verdict(self, verify: Callable[[], Verdict], device: torch.device) -> Verdict:
        def flattened() -> list[int]:
            packed = verify().packed
            return [len(packed), *packed.flatten().tolist()]

        rows, *values = self.numbers(flattened)
        packed = torch.tensor(values).view(rows, -1)
        return Verdict(packed.to(device), Verdict(packed).rows)

    def ends(self, compute: Callable[[], Ends]) -> Ends:
        values = self.numbers(lambda: [n for count, reason in compute() for n in (count, _REASONS.index(reason))])
        return [(count, _REASONS[reason]) for count, reason in zip(values[::2], values[1::2], strict=True)]

    def numbers(self, compute: Callable[[], Sequence[int]]) -> Sequence[int]:
        if not self.leads:
            return self._ranks.share()
        with self._ranks.leading():
            values = compute()
        return self._ranks.share(values)

    def check(self, *values: object) -> None:
        digest = hashlib.sha256(repr(values).encode()).digest()
        if not self._ranks.same(int.from_bytes(digest[:7], "big")):
            raise PromptError(
                "the processes of a tensor-parallel model were given different prompts, or another max_new_tokens or "
                "prefill_chunk: all processes must decode the same requests in the same order"
            )


def agreement(ranks: Ranks | None) -> Alone:
    """The agreement between the processes of a target; `ranks` None is a target in one process."""
    return Alone() if ranks is None else Broadcast(ranks)
