"""Online policy: decides before each step how much to draft, by each request's recent acceptance and measured costs.

Owns the counts of each request and the decision. Knows costs (`Latency`) and the available draft sizes; no clock and no
model: equal counts give equal decisions.

    rates      per depth: share of the steps drafting that deep that accepted a draft there; recent steps count more
    decision   the size with the most expected tokens per cost, over all rows together, or no drafts
    loss       cost of a request's drafts minus the tokens that they gained, in steps without drafts; at least 0, so
               that earlier gains do not hide a loss. Above the limit the request's drafting is paused, and tried again
               after 8 steps, 16, 32, ...: so drafts that do not pay cost little more than the limit.

Drafts copied from the text need no trial (`MatchOdds`): whether a match would have been right is known without
proposing it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from haast.core import Request, RowVerdict
from haast.tuning.latency import Latency

LEAST_GAIN = 1.02  # minimum expected speedup of drafting: allows for errors of the measured costs
_MAX_LOSS = 2.0  # loss, in steps without drafts, above which a request's drafting is paused
_PAUSE, _LONGEST_PAUSE = 8, 1024  # steps
_TRIAL_SHARE = 1 / 16  # maximum cost of the first trial, relative to the paused steps before it
_KEEP = 0.93  # decay of counts per drafted step
_PRIOR = 6.0  # weight of the initial rates, in steps
_NARROW = 0.75  # acceptance of a small tree relative to a full one at the same depth


@dataclass(frozen=True)
class DraftSize:
    """One option of how much to draft.

    Attributes:
        budget: `budget` of `Drafter.propose`; None leaves the size to the drafter.
        nodes: mean nodes of a row's tree, root included.
        levels, width: draft levels (0: drafting takes almost no time), and nodes expanded per level.
        depth: levels of the tree below the root.
        gain: expected accepted drafts per step of a new request.
    """

    budget: int | None
    nodes: float
    levels: int
    width: int
    depth: int
    gain: float


class OnlinePolicy:
    """A `DraftPolicy` for drafters whose acceptance is known only after verification.

    Args:
        latency: measured costs.
        sizes: batch size -> available draft sizes, from small to full; empty if drafting never pays.
        baseline: expected tokens per row, and nodes, of a step with a budget of 1; None if that is only the root.
        pending: positions of all rows' draft states that must be processed before drafting; None if there are none.
    """

    def __init__(
        self,
        latency: Latency,
        sizes: Callable[[int], Sequence[DraftSize]],
        baseline: Callable[[Sequence[Request]], tuple[float, float]] | None = None,
        pending: Callable[[Sequence[Any]], int] | None = None,
    ) -> None:
        self.latency, self._sizes, self._baseline, self._pending = latency, sizes, baseline, pending

    def budget(self, requests: Sequence[Request]) -> int | None:
        """Maximum nodes per row of the next step, root included; None leaves it to the drafter."""
        rows, sizes = len(requests), self._sizes(len(requests))
        if not sizes:
            return 1
        small, full = sizes[0], sizes[-1]
        for request in requests:
            request.draft_policy = request.draft_policy or Record(full)
        records: list[Record] = [request.draft_policy for request in requests]
        trial = self.ratio(rows, small, small.nodes)
        tokens, nodes = (1.0, 1.0) if self._baseline is None else self._baseline(requests)
        best, chosen = LEAST_GAIN * tokens / self.ratio(rows, None, nodes), None
        for size in sizes:
            nodes = size.nodes if size is not full else sum(record.nodes for record in records) / rows
            least = LEAST_GAIN * trial * 1.001 if size is small else 0.0  # a trial counts as just enough to pay
            expected = sum(record.expected(size, full, least) for record in records) / rows
            rate = expected / self.ratio(rows, size, nodes)
            if rate > best:
                best, chosen = rate, size
        if chosen is None and self._pending is not None:
            pending = self._pending([request.draft_state for request in requests])
            trial += self.latency.catch_up(pending) / self.latency.step(rows, 1)
        for record in records:
            record.decided(rows, chosen, full, trial)
        return 1 if chosen is None else chosen.budget

    def drafting_off(self, rows: int) -> bool:
        """Whether drafting does not pay for a new request, without counts of its own, in a batch of `rows` rows."""
        sizes = self._sizes(rows)
        if not sizes:
            return True
        new, full = Record(sizes[-1]), sizes[-1]
        return all(new.expected(each, full, 0.0) <= LEAST_GAIN * self.ratio(rows, each, each.nodes) for each in sizes)

    def observed(self, request: Request, kept: RowVerdict, nodes: int) -> None:
        """Record the verdict of a request in a step with `nodes` nodes per row."""
        record: Record | None = request.draft_policy
        if record is not None and record.size is not None:
            record.observed(len(kept.path) - 1, nodes, self.ratio(record.rows, record.size, nodes))

    def ratio(self, rows: int, size: DraftSize | None, nodes: float) -> float:
        """Cost of a step with `nodes` nodes per row, relative to a step with only the roots."""
        levels, width = (0, 1) if size is None else (size.levels, size.width)
        return self.latency.step(rows, nodes, levels, width) / self.latency.step(rows, 1)


class Record:
    """A request's recent acceptance, and whether its drafting is on, paused or on trial.

    `nodes` is the mean size of its full trees; `size` (None for no drafts) and `rows` are of the running step.
    """

    def __init__(self, full: DraftSize) -> None:
        self._tried = [_PRIOR] * full.depth  # [d]: steps whose trees reached depth d + 1
        self._kept = [_PRIOR * chance for chance in chances_of(full.gain, full.depth)]  # ... and accepted d + 1 drafts
        self.nodes = full.nodes
        self.size: DraftSize | None = None
        self.rows = 1
        self._full = False  # whether the running step drafts a full tree
        self._loss, self._idle, self._failed = 0.0, 0, 0  # idle steps since the last draft; failed trials
        self._paused = self._on_trial = False
        self._totals: dict[DraftSize, float] = {}  # expected tokens per step by size; cleared by each drafted step

    def expected(self, size: DraftSize, full: DraftSize, trial: float) -> float:
        """Expected tokens of a step with a draft size; at least `trial` if the request is on trial."""
        if self._paused:
            return 1.0
        total = self._totals.get(size)
        if total is None:
            total = self._totals[size] = self._tokens(size, 1.0 if size is full else _NARROW)
        return max(total, trial) if self._on_trial else total

    def _tokens(self, size: DraftSize, share: float) -> float:
        chance, total = 1.0, 1.0
        for tried, kept in zip(self._tried[: size.depth], self._kept, strict=False):
            chance = min(chance, kept / tried)
            total += share * chance
        return total

    def decided(self, rows: int, size: DraftSize | None, full: DraftSize, trial: float) -> None:
        """Note the decision for the next step. `trial` is the relative cost of a step with small drafts."""
        self.rows, self.size, self._full = rows, size, size is full
        if size is None:
            self._idle += 1
            first = max(_PAUSE, math.ceil((trial - 1) / _TRIAL_SHARE))
            if self._idle >= min(first << min(self._failed, 16), max(first, _LONGEST_PAUSE)):
                self._idle, self._loss = 0, _MAX_LOSS
                self._paused, self._on_trial = False, True

    def observed(self, drafts: int, nodes: int, cost: float) -> None:
        """Count a step that accepted `drafts` drafts; `cost` is relative to a step without drafts."""
        assert self.size is not None, "called only after steps with drafts"
        self._totals.clear()
        share = 1.0 if self._full else _NARROW
        for depth in range(min(self.size.depth, len(self._tried))):
            self._tried[depth] = _KEEP * self._tried[depth] + 1
            self._kept[depth] = _KEEP * self._kept[depth] + (drafts > depth) / share
        if self._full:
            self.nodes = _KEEP * self.nodes + (1 - _KEEP) * nodes
        self._loss = max(0.0, self._loss + cost - 1 - drafts)
        if self._loss > _MAX_LOSS:
            self._failed += self._on_trial
            self._loss, self._paused, self._on_trial = _MAX_LOSS, True, False
        elif self._loss == 0:
            self._failed, self._paused, self._on_trial = 0, False, False


def chances_of(gain: float, depth: int) -> list[float]:
    """[d]: probability of d + 1 accepted drafts: a geometric sequence over `depth` depths with the sum `gain`."""
    factor = _factor_of(gain, depth)
    return [factor ** (d + 1) for d in range(depth)]


@functools.lru_cache(maxsize=256)  # all requests start with the same few arguments
def _factor_of(gain: float, depth: int) -> float:
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle ** (d + 1) for d in range(depth)) < gain:
            low = middle
        else:
            high = middle
    return low


# ------------------------------------------------------------------------------------------------- matches in the text

# [class]: initial probability that a match predicts the next token, measured on greedy answers of the default target
# that do not loop. Classes are match lengths: 0 to 8, then doubling.
_NEXT = (0.0, 0.13, 0.42, 0.5, 0.6, 0.63, 0.65, 0.7, 0.75, 0.78, 0.85, 0.95, 0.98)
_MATCH_PRIOR, _MATCH_KEEP = 8.0, 0.95  # weight of the initial probabilities, and decay of counts per token
_MATCH_MARGIN = 1.5  # expected tokens per token of cost that a match needs; 1 is the break-even
_LEAST_CHANCE = 0.02


class MatchOdds:
    """How often the token after the longest match was right, by the length of the match.

    Each right draft makes the match one token longer, so the probability of a chain is a product of these.
    """

    def __init__(self) -> None:
        self._seen = [_MATCH_PRIOR] * len(_NEXT)
        self._right = [_MATCH_PRIOR * chance for chance in _NEXT]

    def count(self, length: int, right: bool) -> None:
        """Count whether the token after a match of `length` tokens was right."""
        index, forget = _class_of(length), 1 - _MATCH_KEEP
        self._seen[index] = _MATCH_KEEP * self._seen[index] + 1 + forget * _MATCH_PRIOR
        self._right[index] = _MATCH_KEEP * self._right[index] + right + forget * _MATCH_PRIOR * _NEXT[index]

    def chance(self, length: int) -> float:
        """Probability that the token after a match of `length` tokens is right."""
        index = _class_of(length)
        return self._right[index] / self._seen[index]

    def chances(self, length: int, most: int) -> list[float]:
        """[d]: probability that the first d + 1 tokens after a match of `length` tokens are right, d + 1 <= `most`.

        The list ends before the first probability below 0.02.
        """
        chance, result = 1.0, list[float]()
        for match_length in range(length, length + most):
            index = match_length if match_length <= 8 else _class_of(match_length)
            chance *= self._right[index] / self._seen[index]
            if chance < _LEAST_CHANCE:
                break
            result.append(chance)
        return result


def _class_of(length: int) -> int:
    return length if length <= 8 else min(5 + length.bit_length(), len(_NEXT) - 1)


def least_first_chance(rows: int, most: int, latency: Latency) -> float:
    """The mean probability of the rows' first drafts below which no chain of up to `most` drafts pays.

    Later drafts are less likely than the first, so this bounds the gain of a chain.
    """
    step = latency.step
    return min((_MATCH_MARGIN * (step(rows, 1 + n) / step(rows, 1) - 1) / n for n in range(1, most + 1)), default=0.0)


def best_chain(chances: Sequence[Sequence[float]], latency: Latency) -> tuple[int, float]:
    """The number of drafts per row to verify, and the expected tokens per row.

    `chances` has one list per row, see `MatchOdds.chances`. Returns 0 drafts and 1 token if no number of drafts is
    expected to gain clearly more than it costs.
    """
    rows, gain = len(chances), 0.0
    chances = [each for each in chances if each]
    if not chances:
        return 0, 1.0
    best, result = 1 / latency.step(rows, 1), (0, 1.0)
    for drafts in range(1, max(map(len, chances)) + 1):
        gain += sum(each[drafts - 1] for each in chances if len(each) >= drafts) / rows
        rate = (1 + gain / _MATCH_MARGIN) / latency.step(rows, 1 + drafts)
        if rate > best:
            best, result = rate, (drafts, 1 + gain)
    return result
