"""What the processes of a sharded model have to agree on, while they serve the same requests in step.

Owns who decides: the first process drafts, judges and applies stop rules; the others take its word. That costs two
small broadcasts a step (three with a stop rule), beside two reductions per layer of every forward. A model in one
process agrees with itself (`Alone`). Knows no model.

    leader      propose -> tree | forward | judge     | stop?
                         broadcast   meets  broadcast   broadcast
    follower             tree   | forward |  verdict  |  stops
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from haast.core import Verdict
from haast.errors import PromptError
from haast.target.ranks import Ranks
from haast.tree import DraftTree

Ends = Sequence[tuple[int, str]]  # per row: tokens that stay, and why the request ends there
_REASONS = ("", "stop", "length", "error")


class Alone:
    """One process: every decision is its own."""

    leads = True

    def proposed(self, propose: Callable[[], DraftTree], device: torch.device) -> DraftTree:
        """The trees of a step."""
        return propose()

    def judged(self, judge: Callable[[], Verdict], device: torch.device) -> Verdict:
        """What is kept of them."""
        return judge()

    def settled(self, ends: Callable[[], Ends]) -> Ends:
        """What stop rules leave of that: they may look at a clock."""
        return ends()

    def numbers(self, own: Callable[[], Sequence[int]]) -> Sequence[int]:
        """Numbers that all processes go by."""
        return own()

    def check(self, *values: object) -> None:
        """Raises PromptError where the processes do not serve the same request."""


class Agreed(Alone):
    """Several processes: the first one decides."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.leads = ranks, ranks.leads

    def proposed(self, propose: Callable[[], DraftTree], device: torch.device) -> DraftTree:
        if not self.leads:
            rows, height, *said = self._ranks.share()
            tokens, parents, flags = torch.tensor(said, device=device).view(3, rows, -1)
            return DraftTree.from_parents(tokens, parents, flags % 2 == 1, flags >= 2, height=height, checked=True)
        with self._ranks.leading():
            tree = propose()
        flags = tree.live.long() if tree.placeholder is None else tree.live + 2 * tree.placeholder
        fields = torch.cat([part.flatten() for part in (tree.tokens, tree.parents, flags)])
        self._ranks.share([tree.rows, tree.height, *fields.tolist()])
        return tree

    def judged(self, judge: Callable[[], Verdict], device: torch.device) -> Verdict:
        def numbers() -> list[int]:
            packed = judge().packed
            return [len(packed), *packed.flatten().tolist()]

        rows, *said = self.numbers(numbers)
        packed = torch.tensor(said).view(rows, -1)
        return Verdict(packed.to(device), Verdict(packed).rows)

    def settled(self, ends: Callable[[], Ends]) -> Ends:
        said = self.numbers(lambda: [each for kept, why in ends() for each in (kept, _REASONS.index(why))])
        return [(kept, _REASONS[why]) for kept, why in zip(said[::2], said[1::2], strict=True)]

    def numbers(self, own: Callable[[], Sequence[int]]) -> Sequence[int]:
        if not self.leads:
            return self._ranks.share()
        with self._ranks.leading():
            said = own()
        return self._ranks.share(said)

    def check(self, *values: object) -> None:
        digest = hashlib.sha256(repr(values).encode()).digest()
        if not self._ranks.same(int.from_bytes(digest[:7], "big")):
            raise PromptError(
                "the processes of a tensor-parallel model were given different prompts, or another max_new_tokens or "
                "prefill_chunk: all of them must decode the same requests in the same order"
            )


def agreement(ranks: Ranks | None) -> Alone:
    """Of the processes that hold a target; None is a target in one process."""
    return Alone() if ranks is None else Agreed(ranks)
