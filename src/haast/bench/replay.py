"""What would another tree have brought? Drafts recorded once, replayed under any depth, width, budget and pace.

Owns the record and the replay. The texts come from the drafter's own run, greedy: what follows each root is known, so
every candidate that the head ever proposed is known to be right or wrong, verified or not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter, EagleState
from haast.drafters.tree_builder import Growth
from haast.engine.engine import Engine, StopParams
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel, interpolate


@dataclass(frozen=True)
class Candidate:
    """One drafted token of one step. `parent` is an index into the step's candidates, -1 for the root."""

    level: int  # 1 below the root
    parent: int
    logprob: float  # of its whole path
    right: bool


Step = tuple[Candidate, ...]


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of the parts of a step, measured; of all rows together."""

    forward_ms: tuple[float, ...]  # [n - 1]: a target forward over n nodes of every row
    level_ms: dict[int, float]  # by width
    fixed_ms: float  # observing, the root's children, bookkeeping


@dataclass(frozen=True)
class Outcome:
    """What a shape brings on the recorded steps."""

    tau: float
    ms: float  # a step
    nodes: float  # verified per step, the root included
    levels: float  # drafted per step below the first
    pace: CostModel | None

    @property
    def rate(self) -> float:
        """Tokens per ms of a row."""
        return self.tau / self.ms


class _Recorder(EagleDrafter):
    """Keeps every proposal's candidates beside the tokens that followed."""

    def watch(self) -> None:
        self.grown: list[Growth] = []

    def _draft(self, states: Sequence[EagleState], growing: Any) -> DraftTree:
        """By tensor operations: the native proposal keeps no candidates."""
        return super()._draft(states, replace(growing, quick=None))

    def _grow(self, *args: Any) -> Growth:
        grown = super()._grow(*args)
        self.grown.append(grown)
        return grown


def record(target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], tokens: int) -> list[Step]:
    """Answer the prompts with `drafter` and note all that it proposed. Steps at the end of a text are left out."""
    steps: list[Step] = []
    recorder = object.__new__(_Recorder)
    recorder.__dict__.update(drafter.__dict__)
    for prompt in prompts:
        recorder.watch()
        text, begins = list[int](), list[int]()
        for emission in Engine(target, recorder).run([list(prompt)], SamplingParams(), StopParams(tokens)):
            text.extend(emission.tokens)
            begins.append(len(text))
        for grown, begin in zip(recorder.grown, begins, strict=False):
            following = text[begin : begin + recorder.shape.depth]
            if len(following) == recorder.shape.depth:
                steps.append(_step(grown, following))
    return steps


def _step(grown: Growth, following: Sequence[int]) -> Step:
    tokens, scores, parents = (part[0].tolist() for part in grown.listed())
    found: list[Candidate] = []
    for token, score, parent in zip(tokens, scores, parents, strict=True):
        level = 1 if parent < 0 else found[parent].level + 1
        right = (parent < 0 or found[parent].right) and following[level - 1] == token
        found.append(Candidate(level, parent, score, right))
    return tuple(found)


def trust(steps: Sequence[Step], nodes: int) -> float:
    """Right candidates per unit of probability among the `nodes` - 1 best of every step."""
    expected = right = 0.0
    for step in steps:
        best = sorted(step, key=lambda c: -c.logprob)[: nodes - 1]
        expected += sum(math.exp(c.logprob) for c in best)
        right += sum(c.right for c in best)
    return right / expected if expected else 1.0


def follow(steps: Sequence[Step]) -> float:
    """How often a right candidate that was expanded has a right child."""
    expanded = continued = 0
    for step in steps:
        parents = {c.parent for c in step}
        for number, candidate in enumerate(step):
            if candidate.right and number in parents:
                expanded += 1
                continued += any(c.right for c in step if c.parent == number)
    return continued / expanded if expanded else 0.5


Row = tuple[tuple[float, bool], ...]  # a row's candidates by falling probability: log-probability, and whether right


@dataclass(frozen=True)
class Drafted:
    """What a shape drafts in one step of one or more rows, and the levels below the first."""

    rows: tuple[Row, ...]
    levels: int


def grouped(steps: Sequence[Step], rows: int) -> list[tuple[Step, ...]]:
    """Steps as batches take them: `rows` of any texts and places at a time; a rest is left out."""
    mixed = list(steps)
    if rows > 1:
        random.Random(rows).shuffle(mixed)
    return [tuple(mixed[begin : begin + rows]) for begin in range(0, len(mixed) - rows + 1, rows)]


def draft(steps: Sequence[Step], depth: int, width: int, pace: CostModel | None = None, rows: int = 1) -> list[Drafted]:
    """What a narrower or shallower drafter would have proposed in every step, `rows` of them drafted together."""
    return [_draft(group, depth, width, pace) for group in grouped(steps, rows)]


def _draft(group: Sequence[Step], depth: int, width: int, pace: CostModel | None) -> Drafted:
    by_level = [_levels_of(step) for step in group]
    here = [places.get(1, []) for places in by_level]
    present, levels = [list(first) for first in here], 0
    for level in range(1, depth):
        frontiers = [_likeliest(step, numbers)[:width] for step, numbers in zip(group, here, strict=True)]
        scores = [[step[n].logprob for n in numbers] for step, numbers in zip(group, frontiers, strict=True)]
        if not any(frontiers) or (pace is not None and not pace.deeper(_tensor(scores))):
            break
        for row, (step, numbers) in enumerate(zip(group, frontiers, strict=True)):
            chosen = set(numbers)
            here[row] = [n for n in by_level[row].get(level + 1, ()) if step[n].parent in chosen]
            present[row] += here[row]
        levels += 1
    found = [_likeliest(step, numbers) for step, numbers in zip(group, present, strict=True)]
    rows = (tuple((step[n].logprob, step[n].right) for n in order) for step, order in zip(group, found, strict=True))
    return Drafted(tuple(rows), levels)


def _levels_of(step: Step) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for number, candidate in enumerate(step):
        places.setdefault(candidate.level, []).append(number)
    return places


def _likeliest(step: Step, numbers: Sequence[int]) -> list[int]:
    return sorted(numbers, key=lambda n: (-step[n].logprob, n))


def _tensor(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-math.inf] * (longest - len(row))] for row in rows], dtype=torch.float64)


def replay(
    drafted: Sequence[Drafted], costs: StepCosts, width: int, nodes: int, pace: CostModel | None = None
) -> Outcome:
    """Tokens of a row, and time, of trees of at most `nodes` nodes, or of as many as pay, over what was drafted."""
    level_ms = interpolate(costs.level_ms, width)
    tokens = ms = verified = levels = 0.0
    for step in drafted:
        count = min(nodes, max(map(len, step.rows)) + 1)
        if pace is not None:
            count = pace.nodes(_tensor([[logprob for logprob, _ in row[: count - 1]] for row in step.rows]))
        right = sum(right for row in step.rows for _, right in row[: count - 1])
        tokens += 1 + right / len(step.rows)
        ms += costs.fixed_ms + step.levels * level_ms + costs.forward_ms[count - 1]
        verified, levels = verified + count, levels + step.levels
    total = len(drafted)
    return Outcome(tokens / total, ms / total, verified / total, levels / total, pace)


def paced(
    steps: Sequence[Step],
    costs: StepCosts,
    depth: int,
    width: int,
    start: Outcome,
    trusted: float,
    followed: float,
    rows: int = 1,
) -> Outcome:
    """The shape at the pace that it keeps itself: the rate is raised until it is its own result (Dinkelbach)."""
    best, most = start, len(costs.forward_ms)
    for _ in range(4):
        pace = CostModel(costs.forward_ms, interpolate(costs.level_ms, width), best.rate, trusted, followed)
        found = replay(draft(steps, depth, width, pace, rows), costs, width, most, pace)
        if found.rate <= best.rate:
            break
        best = found
    return best
