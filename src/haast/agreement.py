"""What the processes of a sharded model have to agree on, while they decode one batch of texts in step.

Owns who decides: the first process drafts, chooses tokens and applies stop rules; the others take its word. That costs
two small broadcasts a step (three with a stop rule), beside two reductions per layer of every forward. A model in one
process agrees with itself (`Alone`). Knows no model.

    leader      propose -> tree | forward | choose ... | stop?
                         broadcast   meets  broadcast    broadcast
    follower             tree   | forward |  choices   |  stops
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from haast.drafters.base import Accepted, Drafter
from haast.errors import PromptError
from haast.ranks import Ranks
from haast.sampling import Sampler
from haast.tree import DraftTree
from haast.verify import RowVerdict, Verdict


class Alone:
    """One process: every decision is its own."""

    def drafter(self, drafter: Drafter, device: torch.device) -> Drafter:
        """Who drafts here."""
        return drafter

    def check(self, prompts: Sequence[Sequence[int]], *settings: int) -> None:
        """Raises PromptError where the processes do not decode the same texts."""

    @contextmanager
    def deciding(self, sampler: Sampler) -> Iterator[Callable[[int], int]]:
        """Within it what the sampler decides is agreed on, and so is what goes through the function that it gives."""
        yield int

    def judged(self, judge: Callable[[], Verdict]) -> Verdict:
        """What `judge` says of a tree, the first process's word."""
        return judge()


class Agreed(Alone):
    """Several processes: the first one decides."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def drafter(self, drafter: Drafter, device: torch.device) -> Drafter:
        return SharedDrafter(drafter, self._ranks, device)

    def check(self, prompts: Sequence[Sequence[int]], *settings: int) -> None:
        digest = hashlib.sha256(repr(([list(map(int, prompt)) for prompt in prompts], settings)).encode())
        if not self._ranks.same(int.from_bytes(digest.digest()[:7], "big")):
            raise PromptError(
                "the processes of a tensor-parallel model were given different prompts, or another max_new_tokens or "
                "prefill_chunk: all of them must decode the same batch"
            )

    @contextmanager
    def deciding(self, sampler: Sampler) -> Iterator[Callable[[int], int]]:
        said: list[int] = []
        heard = iter(() if self._ranks.leads else self._ranks.share())

        def decide(own: int) -> int:
            if not self._ranks.leads:
                return next(heard)
            said.append(int(own))
            return said[-1]

        sampler.decide = decide
        try:
            with self._ranks.leading():
                yield decide
        finally:
            sampler.decide = int
        if self._ranks.leads:
            self._ranks.share(said)
        assert next(heard, None) is None, "the processes took different steps"

    def judged(self, judge: Callable[[], Verdict]) -> Verdict:
        if not self._ranks.leads:
            return _verdict(self._ranks.share())
        with self._ranks.leading():
            verdict = judge()
        self._ranks.share(_numbers(verdict))
        return verdict


def agreement(ranks: Ranks | None) -> Alone:
    """Of the processes that hold a target; None is a target in one process."""
    return Alone() if ranks is None else Agreed(ranks)


class SharedDrafter(Drafter):
    """A drafter that works in the first process only; the others get its trees.

    It must not call the sharded model, whose modules wait for all processes.
    """

    def __init__(self, inner: Drafter, ranks: Ranks, device: torch.device) -> None:
        self._inner, self._ranks, self._device = inner, ranks, device
        self.name, self.lock = inner.name, inner.lock
        if ranks.leads:
            self.target_layers, self.wants_choices = inner.target_layers, inner.wants_choices

    def __eq__(self, other: object) -> bool:
        """Every run has one of its own, and a `Past` goes by the drafter that it stands for."""
        return isinstance(other, SharedDrafter) and other._inner is self._inner

    def __hash__(self) -> int:
        return hash(id(self._inner))

    @property
    def owner(self) -> object:
        """The run whose text the drafter follows."""
        return self._inner.owner

    @owner.setter
    def owner(self, run: object) -> None:
        self._inner.owner = run

    @property
    def nodes(self) -> int:
        return self._inner.nodes

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        if self._ranks.leads:
            self._inner.start(prompts)

    def memory(self) -> object:
        return self._inner.memory() if self._ranks.leads else None

    def recall(self, memory: object, following: Sequence[int]) -> None:
        if self._ranks.leads:
            self._inner.recall(memory, following)

    def keep(self, order: Sequence[int]) -> None:
        if self._ranks.leads:
            self._inner.keep(order)

    def observe(self, accepted: Accepted) -> None:
        if self._ranks.leads:
            self._inner.observe(accepted)

    def propose(self) -> DraftTree:
        if not self._ranks.leads:
            return self._received()
        with self._ranks.leading():
            tree = self._inner.propose()
        flags = tree.live.long() if tree.probe is None else tree.live + 2 * tree.probe
        fields = torch.cat([part.flatten() for part in (tree.tokens, tree.parents, flags)])
        self._ranks.share([tree.rows, *fields.tolist()])
        return tree

    def _received(self) -> DraftTree:
        rows, *fields = self._ranks.share()
        tokens, parents, flags = torch.tensor(fields, device=self._device).view(3, rows, -1)
        return DraftTree.from_parents(tokens, parents, flags % 2 == 1, flags >= 2)


def _numbers(verdict: Verdict) -> list[int]:
    """A verdict as a message: for every row how many nodes are kept, these, as many tokens, and the first choices."""
    said: list[int] = []
    for row in verdict.rows:
        if row is None:
            said.append(0)
        else:
            said += [len(row.path), *row.path, *row.tokens, len(row.first_choice), *map(int, row.first_choice)]
    return said


def _verdict(said: list[int]) -> Verdict:
    rows: list[RowVerdict | None] = []
    left = iter(said)
    for kept in left:
        if not kept:
            rows.append(None)
            continue
        path, tokens = (tuple(next(left) for _ in range(kept)) for _ in range(2))
        rows.append(RowVerdict(path, tokens, tuple(bool(next(left)) for _ in range(next(left)))))
    return Verdict(tuple(rows))
