"""What would another tree have brought? Drafts recorded once, replayed under any depth, width, budget and pace.

Owns the record and the replay; trees grow and are cut as the drafter's own (`drafters.tree_builder`). The texts come
from the drafter's own run, greedy: what follows each root is known, so every candidate that the head ever proposed is
known to be right or wrong, verified or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.pending_features import EagleState
from haast.drafters.tree_builder import Growth, best_places
from haast.drafters.tree_shape import DraftShape, Plan, plan
from haast.engine.engine import Engine, StopParams
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.latency import Latency
from haast.tuning.policy import CostModel

_TRUSTED = 8  # nodes of a tree by which a head's probabilities are judged


@dataclass(frozen=True)
class Level:
    """The candidates of one level of every recorded step, (steps, candidates) each."""

    scores: Tensor  # log-probability of the whole path; -inf is no candidate
    right: Tensor  # bool
    parents: Tensor  # places in the level above; nothing in the first


@dataclass(frozen=True)
class Recorded:
    """Steps of texts, each with all that the head proposed."""

    levels: tuple[Level, ...]

    def __len__(self) -> int:
        return len(self.levels[0].scores) if self.levels else 0

    def batches(self, rows: int) -> Iterator[Recorded]:
        """`rows` steps of any texts and places at a time; a rest is left out."""
        order = torch.arange(len(self))
        if rows > 1:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(rows))
        for own in torch.split(order[: len(self) // rows * rows], rows):
            yield Recorded(tuple(Level(each.scores[own], each.right[own], each.parents[own]) for each in self.levels))


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
    """Keeps every proposal's candidates."""

    grown: list[Growth]

    def _draft(self, states: Sequence[EagleState], prepared: Any) -> DraftTree:
        """By tensor operations: the native proposal keeps no candidates."""
        return super()._draft(states, replace(prepared, one_call=None))

    def _grow(self, *args: Any) -> Growth:
        self.grown.append(super()._grow(*args))
        return self.grown[-1]


def record(target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], tokens: int) -> Recorded:
    """Answer the prompts with `drafter` and note all that it proposed. Steps at the end of a text are left out."""
    steps: list[list[Level]] = []
    recorder = object.__new__(_Recorder)
    recorder.__dict__.update(drafter.__dict__)
    shape = recorder.planned(drafter.shape)
    for prompt in prompts:
        recorder.grown = []
        text, begins = list[int](), list[int]()
        for emission in Engine(target, recorder).run([list(prompt)], SamplingParams(), StopParams(tokens)):
            text.extend(emission.tokens)
            begins.append(len(text))
        for grown, begin in zip(recorder.grown, begins, strict=False):
            following = text[begin : begin + drafter.shape.depth]
            if len(following) == drafter.shape.depth:
                steps.append(_levels(grown, following, shape))
    joined = [
        Level(*(torch.cat([getattr(each, name) for each in level]) for name in ("scores", "right", "parents")))
        for level in zip(*steps, strict=True)
    ]
    return Recorded(tuple(joined))


def _levels(grown: Growth, following: Sequence[int], shape: Plan) -> list[Level]:
    """A recorded tree by level, held against the tokens that followed its root."""
    sizes = [width * shape.top_k for width in (1, *shape.widths)]
    levels, before = list[Level](), 0  # before: how many candidates stand above the level's parents
    parts = zip(*(torch.split(part.cpu(), sizes, 1) for part in grown.listed()), following, strict=True)
    for place, (tokens, scores, parents, token) in enumerate(parts):
        right = tokens == token
        if place:
            parents = parents - before
            before += sizes[place - 1]
            right &= levels[-1].right.gather(1, parents)
        levels.append(Level(scores, right, parents))
    return levels


def trust(steps: Recorded, nodes: int) -> float:
    """Right candidates per unit of probability among the `nodes` - 1 best of every step."""
    scores, right = (torch.cat([getattr(each, name) for each in steps.levels], 1) for name in ("scores", "right"))
    best = best_places(scores, nodes - 1)
    expected = float(scores.gather(1, best).double().exp().sum())
    return float(right.gather(1, best).sum()) / expected if expected else 1.0


def follow(steps: Recorded) -> float:
    """How often a right candidate that was expanded has a right child. No step has two right ones at a level."""
    expanded = continued = 0
    for above, below in zip(steps.levels, steps.levels[1:], strict=False):
        of_right = above.right.gather(1, below.parents) & below.scores.isfinite()
        expanded += int(of_right.any(1).sum())
        continued += int((of_right & below.right).any(1).sum())
    return continued / expanded if expanded else 0.5


@dataclass(frozen=True)
class Drafted:
    """What a shape drafts: in all steps at once, or at a pace in one step of a batch."""

    grown: Growth  # its tokens say whether a candidate is right
    levels: int  # below the first
    most: int  # candidates that the shape has


def draft(steps: Recorded, depth: int, width: int, pace: CostModel | None = None, rows: int = 1) -> list[Drafted]:
    """What a narrower or shallower drafter would have proposed; at a `pace`, `rows` steps are drafted together."""
    return [_draft(batch, depth, width, pace) for batch in ([steps] if pace is None else steps.batches(rows))]


def _draft(steps: Recorded, depth: int, width: int, pace: CostModel | None) -> Drafted:
    top_k = steps.levels[0].scores.shape[1]
    widths = plan(DraftShape("dynamic", depth, top_k, width), top_k).widths
    grown, levels = Growth(torch.zeros(len(steps), dtype=torch.long)), 0
    kept: Tensor | None = None  # which candidates of the level above are expanded
    for level, wide in zip(steps.levels, (*widths, 0), strict=False):
        below = torch.ones_like(level.right) if kept is None else kept.gather(1, level.parents)
        scores = level.scores.masked_fill(~below, -torch.inf)
        grown.add(level.right.long(), scores, parents=None)
        if wide:
            chosen = best_places(scores, wide)
            if pace is not None and not pace.deeper(scores.gather(1, chosen)):
                break
            kept = torch.zeros_like(level.right).scatter(1, chosen, True)
            levels += 1
    return Drafted(grown, levels, top_k * (1 + sum(widths[:levels])))


def replay(
    drafted: Sequence[Drafted], costs: Latency, width: int, nodes: int, pace: CostModel | None = None
) -> Outcome:
    """Tokens of a row, and time, of trees of at most `nodes` nodes, or of as many as pay, over what was drafted.

    `costs` are those of all rows that are drafted together, by the nodes of one.
    """
    found = []
    for each in drafted:
        keep = each.grown.best(min(nodes - 1, each.most), pace)
        count = keep.shape[1] + 1
        right = float(each.grown.listed()[0].gather(1, keep).sum(1).double().mean())
        found.append((1 + right, costs.step(1, count, each.levels + 1, width), count, each.levels))
    tokens, ms, verified, levels = (sum(each) / len(found) for each in zip(*found, strict=True))
    return Outcome(tokens, ms, verified, levels, pace)


def paced(steps: Recorded, costs: Latency, depth: int, width: int, start: Outcome, rows: int = 1) -> Outcome:
    """The shape at the pace that it keeps itself: the rate is raised until it is its own result (Dinkelbach)."""
    best, most, trusted, followed = start, max(costs.forward_ms), trust(steps, _TRUSTED), follow(steps)
    if not trusted or not followed:
        return start  # the head was never right, and there is nothing to pace by
    for _ in range(4):
        pace = costs.cost_model(width, best.rate, most, trust=trusted, follow=followed)
        found = replay(draft(steps, depth, width, pace, rows), costs, width, most, pace)
        if found.rate <= best.rate:
            break
        best = found
    return best
