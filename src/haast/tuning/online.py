"""The closed loop: what a request's own drafts have brought lately, against what they cost, says how much is drafted.

Owns the counts of each request and the choice made from them before every step. Knows costs from `Latency`, and the
sizes of drafts that there are to choose from; no clock and no model: the same counts lead to the same choice.

    chances    by depth: of the steps that drafted so far, the share that kept so many drafts; recent steps weigh more
    choice     the size with the most expected tokens per cost, of all rows together, or nothing
    account    what a request's drafts have cost beyond steps without, less the tokens that they have brought, in such
               steps. It never falls below 0: what was won before is not staked again. Above the stake the request
               rests, and is tried again after 8 steps, 16, 32, ...: drafts that do not pay cost the stake, and little
               more.

Drafts that are read off the text need less (`MatchOdds`): what a match would have brought is seen for free, proposed or
not, so its chances are known before anything is staked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from haast.core import Request, RowVerdict
from haast.tuning.latency import Latency

LEAST_GAIN = 1.02  # drafts have to beat their absence by so much: what was measured is not exact
_STAKE = 2.0  # steps without drafts that a request may lose before it rests
_PAUSE, _LONGEST_PAUSE = 8, 1024  # steps
_TRIAL_SHARE = 1 / 16  # of the steps before it, that a first trial may cost
_KEEP = 0.93  # of a count, from one drafted step to the next
_PRIOR = 6.0  # steps that the first chances weigh
_NARROW = 0.75  # of a full tree's chances, what a small one is expected to have at the same depth


@dataclass(frozen=True)
class DraftSize:
    """One amount of drafting.

    Attributes:
        budget: what the drafter is told; None is up to it.
        nodes: of a row's tree on average, root included.
        levels, width: of drafting, 0 levels where it takes no time to speak of, and nodes expanded on each.
        depth: of the tree, below the root.
        gain: drafts that a step keeps of it, where nothing is known of a request yet.
    """

    budget: int | None
    nodes: float
    levels: int
    width: int
    depth: int
    gain: float


class OnlinePolicy:
    """A `DraftPolicy` for drafters whose drafts can't be judged before they are verified.

    Args:
        latency: what steps cost.
        sizes: by rows, what there is to choose from, from small to full; none where drafts never pay.
        undrafted: tokens per row, and nodes, that a step brings with a budget of 1; None where that is a root alone.
        behind: positions of all rows that the drafter has to catch up with before it drafts; None where there are none.
    """

    def __init__(
        self,
        latency: Latency,
        sizes: Callable[[int], Sequence[DraftSize]],
        undrafted: Callable[[Sequence[Request]], tuple[float, float]] | None = None,
        behind: Callable[[Sequence[Request]], int] | None = None,
    ) -> None:
        self.latency, self._sizes, self._undrafted, self._behind = latency, sizes, undrafted, behind
        self._rests: dict[tuple[int, Sequence[DraftSize]], bool] = {}

    def budget(self, requests: Sequence[Request]) -> int | None:
        """Most nodes per row of the next step, root included; None is up to the drafter."""
        rows, sizes = len(requests), self._sizes(len(requests))
        if not sizes:
            return 1
        small, full = sizes[0], sizes[-1]
        for request in requests:
            request.draft_policy = request.draft_policy or Record(full)
        records: list[Record] = [request.draft_policy for request in requests]
        trial = self.ratio(rows, small, small.nodes)
        tokens, nodes = (1.0, 1.0) if self._undrafted is None else self._undrafted(requests)
        best, chosen = LEAST_GAIN * tokens / self.ratio(rows, None, nodes), None
        for size in sizes:
            nodes = size.nodes if size is not full else sum(record.nodes for record in records) / rows
            least = LEAST_GAIN * trial * 1.001 if size is small else 0.0  # what a trial counts for: just enough
            expected = sum(record.expected(size, full, least) for record in records) / rows
            rate = expected / self.ratio(rows, size, nodes)
            if rate > best:
                best, chosen = rate, size
        if chosen is None and self._behind is not None:
            trial += self.latency.catching_up(self._behind(requests)) / self.latency.step(rows, 1)
        for record in records:
            record.decided(rows, chosen, full, trial)
        return 1 if chosen is None else chosen.budget

    def rests(self, rows: int) -> bool:
        """Whether nothing is drafted for requests that nothing is known of, where so many rows are decoded together."""
        sizes = self._sizes(rows)
        if not sizes:
            return True
        asked = rows, tuple(sizes)
        if asked not in self._rests:
            fresh, full = Record(sizes[-1]), sizes[-1]
            gains = [fresh.expected(size, full, 0.0) / self.ratio(rows, size, size.nodes) for size in sizes]
            self._rests[asked] = max(gains) <= LEAST_GAIN
        return self._rests[asked]

    def observed(self, request: Request, kept: RowVerdict, nodes: int) -> None:
        """A step over `nodes` nodes a row kept this of the request."""
        record: Record | None = request.draft_policy
        if record is not None and record.size is not None:
            record.observed(len(kept.path) - 1, nodes, self.ratio(record.rows, record.size, nodes))

    def ratio(self, rows: int, size: DraftSize | None, nodes: float) -> float:
        """What a step over `nodes` nodes of every row costs, in steps over the roots alone."""
        levels, width = (0, 1) if size is None else (size.levels, size.width)
        return self.latency.step(rows, nodes, levels, width) / self.latency.step(rows, 1)


class Record:
    """What a request's drafts have brought lately, and whether it drafts, rests, or tries again.

    `nodes` are those of its full trees, on average; `size` (None for none) and `rows` are of the running step.
    """

    def __init__(self, full: DraftSize) -> None:
        self._tried = [_PRIOR] * full.depth  # [d]: steps whose trees reached depth d + 1
        self._kept = [_PRIOR * chance for chance in chances_of(full.gain, full.depth)]  # ... that kept so many drafts
        self.nodes = full.nodes
        self.size: DraftSize | None = None
        self.rows = 1
        self._whole = False  # whether the running step drafts fully
        self._account, self._idle, self._failed = 0.0, 0, 0
        self._resting = self._trying = False
        self._totals: dict[DraftSize, float] = {}  # tokens of a step by its size, since the last one that drafted

    def expected(self, size: DraftSize, full: DraftSize, trial: float) -> float:
        """Tokens of a step that drafts so much; at least `trial` where the request is due to try again."""
        if self._resting:
            return 1.0
        total = self._totals.get(size)
        if total is None:
            total = self._totals[size] = self._tokens(size, 1.0 if size is full else _NARROW)
        return max(total, trial) if self._trying else total

    def _tokens(self, size: DraftSize, share: float) -> float:
        chance, total = 1.0, 1.0
        for tried, kept in zip(self._tried[: size.depth], self._kept, strict=False):
            chance = min(chance, kept / tried)
            total += share * chance
        return total

    def decided(self, rows: int, size: DraftSize | None, full: DraftSize, trial: float) -> None:
        """The next step is of so many rows and drafts so much. `trial` is what a small one costs."""
        self.rows, self.size, self._whole = rows, size, size is full
        if size is None:
            self._idle += 1
            first = max(_PAUSE, math.ceil((trial - 1) / _TRIAL_SHARE))
            if self._idle >= min(first << min(self._failed, 16), max(first, _LONGEST_PAUSE)):
                self._idle, self._account = 0, _STAKE
                self._resting, self._trying = False, True

    def observed(self, drafts: int, nodes: int, cost: float) -> None:
        """The step kept so many drafts and has cost as much as so many steps without."""
        assert self.size is not None, "a step that drafted"
        self._totals.clear()
        share = 1.0 if self._whole else _NARROW
        for depth in range(min(self.size.depth, len(self._tried))):
            self._tried[depth] = _KEEP * self._tried[depth] + 1
            self._kept[depth] = _KEEP * self._kept[depth] + (drafts > depth) / share
        if self._whole:
            self.nodes = _KEEP * self.nodes + (1 - _KEEP) * nodes
        self._account = max(0.0, self._account + cost - 1 - drafts)
        if self._account > _STAKE:
            self._failed += self._trying
            self._account, self._resting, self._trying = _STAKE, True, False
        elif self._account == 0:
            self._failed, self._resting, self._trying = 0, False, False


def chances_of(gain: float, depth: int) -> list[float]:
    """[d]: chance of d + 1 kept drafts, falling by the same factor at every depth, that sum up to `gain`."""
    factor = _factor_of(gain, depth)
    return [factor ** (d + 1) for d in range(depth)]


@functools.lru_cache(maxsize=256)  # every request begins with the same few
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

# [class]: chance that the next token is the one that followed the match: on the default target's own answers, greedy,
# those that do not loop. Classes are lengths of matches: 0 to 8, then doubling.
_NEXT = (0.0, 0.13, 0.42, 0.5, 0.6, 0.63, 0.65, 0.7, 0.75, 0.78, 0.85, 0.95, 0.98)
_MATCH_PRIOR, _MATCH_KEEP = 8.0, 0.95
_MATCH_STAKE = 1.5  # tokens that a match has to promise for every one that it costs: at 1 it would be a fair bet
_LEAST_CHANCE = 0.02


class MatchOdds:
    """How often a text went on as it had gone on after its longest match, by the length of the match.

    A match that is one token longer at every right draft makes the chance of a whole chain a product of these.
    """

    def __init__(self) -> None:
        self._seen = [_MATCH_PRIOR] * len(_NEXT)
        self._right = [_MATCH_PRIOR * chance for chance in _NEXT]

    def count(self, length: int, right: bool) -> None:
        """The text went on, after a match of so many tokens, as it had before or otherwise."""
        at, forget = _class_of(length), 1 - _MATCH_KEEP
        self._seen[at] = _MATCH_KEEP * self._seen[at] + 1 + forget * _MATCH_PRIOR
        self._right[at] = _MATCH_KEEP * self._right[at] + right + forget * _MATCH_PRIOR * _NEXT[at]

    def chance(self, length: int) -> float:
        """Chance that the token after a match of so many tokens comes again."""
        at = _class_of(length)
        return self._right[at] / self._seen[at]

    def chances(self, length: int, most: int) -> list[float]:
        """[d]: chance that the first d + 1 tokens, up to `most`, after a match of so many tokens come again.

        It ends where chances are too small to look at.
        """
        chance, found = 1.0, list[float]()
        for ahead in range(length, length + most):
            at = ahead if ahead <= 8 else _class_of(ahead)
            chance *= self._right[at] / self._seen[at]
            if chance < _LEAST_CHANCE:
                break
            found.append(chance)
        return found


def _class_of(length: int) -> int:
    return length if length <= 8 else min(5 + length.bit_length(), len(_NEXT) - 1)


def least_first_chance(rows: int, most: int, latency: Latency) -> float:
    """The mean chance of the rows' first drafts below which no chain of up to `most` drafts pays.

    Later drafts are less likely than the first, so it bounds what a chain can gain.
    """
    step = latency.step
    return min((_MATCH_STAKE * (step(rows, 1 + n) / step(rows, 1) - 1) / n for n in range(1, most + 1)), default=0.0)


def best_chain(chances: Sequence[Sequence[float]], latency: Latency) -> tuple[int, float]:
    """How many drafts a row to verify of chains with these chances, one list a row, and a row's tokens by them.

    0 drafts, and 1 token, where no number of them is a bet well in our favour: fair bets win nothing where nodes are
    dear.
    """
    rows, gain = len(chances), 0.0
    chances = [each for each in chances if each]
    if not chances:
        return 0, 1.0
    best, found = 1 / latency.step(rows, 1), (0, 1.0)
    for drafts in range(1, max(map(len, chances)) + 1):
        gain += sum(each[drafts - 1] for each in chances if len(each) >= drafts) / rows
        rate = (1 + gain / _MATCH_STAKE) / latency.step(rows, 1 + drafts)
        if rate > best:
            best, found = rate, (drafts, 1 + gain)
    return found
