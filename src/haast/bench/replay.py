"""What would another tree have brought? Drafts recorded once, replayed under any depth, width, budget and pace.

Owns the record and the replay. The texts come from the drafter's own run, greedy: what follows each root is known, so
every candidate that the head ever proposed is known to be right or wrong, verified or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from haast.drafters.eagle import EagleDrafter
from haast.drafters.growth import Growth
from haast.engine import Engine, StopConfig
from haast.sampling import SamplingConfig
from haast.speed.policy import Pace, interpolate
from haast.target import Target
from haast.tree import DraftTree


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
    """Milliseconds of the parts of a step, measured."""

    forward_ms: tuple[float, ...]  # [n - 1]: a target forward over n nodes
    level_ms: dict[int, float]  # by width
    fixed_ms: float  # observing, the root's children, bookkeeping


@dataclass(frozen=True)
class Outcome:
    """What a shape brings on the recorded steps."""

    tau: float
    ms: float  # a step
    nodes: float  # verified per step, the root included
    levels: float  # drafted per step below the first
    pace: Pace | None

    @property
    def rate(self) -> float:
        """Tokens per ms."""
        return self.tau / self.ms


class _Recorder(EagleDrafter):
    """Keeps every proposal's candidates beside the tokens that followed."""

    def watch(self) -> None:
        self.grown: list[Growth] = []

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        """By tensor operations: the native proposal keeps no candidates."""
        return self._grow_tree()

    def _grow(self) -> Growth:
        grown = super()._grow()
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
        for emission in Engine(target, recorder).run([list(prompt)], SamplingConfig(), StopConfig(tokens)):
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


@dataclass(frozen=True)
class Drafted:
    """What a shape drafts in one step: its candidates by falling probability, and the levels below the first."""

    logprobs: tuple[float, ...]
    right: tuple[bool, ...]
    levels: int


def draft(steps: Sequence[Step], depth: int, width: int, pace: Pace | None = None) -> list[Drafted]:
    """What a narrower or shallower drafter would have proposed in every step."""
    return [_draft(step, depth, width, pace) for step in steps]


def _draft(step: Step, depth: int, width: int, pace: Pace | None) -> Drafted:
    by_level: dict[int, list[int]] = {}
    for number, candidate in enumerate(step):
        by_level.setdefault(candidate.level, []).append(number)
    present, here, levels = list(by_level.get(1, ())), by_level.get(1, []), 0
    for level in range(1, depth):
        frontier = sorted(here, key=lambda n: -step[n].logprob)[:width]
        if not frontier or (pace is not None and not pace.deeper(_tensor(step[n].logprob for n in frontier))):
            break
        chosen = set(frontier)
        here = [n for n in by_level.get(level + 1, ()) if step[n].parent in chosen]
        present += here
        levels += 1
    present.sort(key=lambda n: (-step[n].logprob, n))
    return Drafted(tuple(step[n].logprob for n in present), tuple(step[n].right for n in present), levels)


def _tensor(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor([list(values)], dtype=torch.float64)


def replay(drafted: Sequence[Drafted], costs: StepCosts, width: int, nodes: int, pace: Pace | None = None) -> Outcome:
    """Tokens and time of trees of at most `nodes` nodes, or of as many as pay, over what was drafted."""
    level_ms = interpolate(costs.level_ms, width)
    tokens = ms = verified = levels = 0.0
    for step in drafted:
        count = min(nodes, len(step.logprobs) + 1)
        if pace is not None:
            count = pace.nodes(_tensor(step.logprobs[: count - 1]))
        tokens += 1 + sum(step.right[: count - 1])
        ms += costs.fixed_ms + step.levels * level_ms + costs.forward_ms[count - 1]
        verified, levels = verified + count, levels + step.levels
    total = len(drafted)
    return Outcome(tokens / total, ms / total, verified / total, levels / total, pace)


def paced(
    steps: Sequence[Step], costs: StepCosts, depth: int, width: int, start: Outcome, trusted: float, followed: float
) -> Outcome:
    """The shape at the pace that it keeps itself: the rate is raised until it is its own result (Dinkelbach)."""
    best, most = start, len(costs.forward_ms)
    for _ in range(4):
        pace = Pace(costs.forward_ms, interpolate(costs.level_ms, width), best.rate, trusted, followed)
        found = replay(draft(steps, depth, width, pace), costs, width, most, pace)
        if found.rate <= best.rate:
            break
        best = found
    return best
