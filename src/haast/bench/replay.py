"""Records drafts once and replays them with any depth, width, node budget and pace, to compare draft shapes offline.

Owns the record and the replay; trees grow and are pruned by the drafter's own code (`drafters.tree_builder`). The texts
come from a greedy run of the drafter itself. The tokens after each root are known, so every candidate of the head is
known to be right or wrong, whether it was verified or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from haast.core import SamplingParams
from haast.drafters.block import BlockDrafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.pending_features import EagleState
from haast.drafters.tree_builder import Growth, best_places
from haast.drafters.tree_shape import DraftShape, Plan, plan
from haast.engine.engine import Engine, StopParams
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.latency import Latency
from haast.tuning.policy import CostModel

_TRUST_NODES = 8  # size of the trees by which `paced` measures trust


@dataclass(frozen=True)
class Level:
    """The candidates at one tree level of every recorded step; all tensors are (steps, candidates)."""

    scores: Tensor  # log-probability of the path from the root; -inf: not a candidate
    right: Tensor  # bool, whether the whole path is the greedy text
    parents: Tensor  # indices into the level above; meaningless in the first level


@dataclass(frozen=True)
class Recorded:
    """Recorded decoding steps, each with all candidates of the head."""

    levels: tuple[Level, ...]

    def __len__(self) -> int:
        return len(self.levels[0].scores) if self.levels else 0

    def batches(self, rows: int) -> Iterator[Recorded]:
        """Batches of `rows` steps, mixed over texts and positions; an incomplete last batch is left out."""
        order = torch.arange(len(self))
        if rows > 1:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(rows))
        for own in torch.split(order[: len(self) // rows * rows], rows):
            yield Recorded(tuple(Level(each.scores[own], each.right[own], each.parents[own]) for each in self.levels))


@dataclass(frozen=True)
class Outcome:
    """The result of a shape on the recorded steps."""

    tau: float
    ms: float  # per step
    nodes: float  # verified per step, including the root
    levels: float  # drafted per step after the first
    pace: CostModel | None

    @property
    def rate(self) -> float:
        """Tokens per ms of one row."""
        return self.tau / self.ms


class _Recorder(EagleDrafter):
    """An EAGLE drafter that records the candidates of every step."""

    grown: list[Growth]

    def _draft(self, states: Sequence[EagleState], prepared: Any, others: Any = None) -> DraftTree:
        """Draft with tensor operations, because the native code does not return all candidates."""
        return super()._draft(states, replace(prepared, one_call=None), others)

    def _grow(self, *args: Any) -> Growth:
        self.grown.append(super()._grow(*args))
        return self.grown[-1]


class _BlockRecorder(_Recorder, BlockDrafter):
    """The same for a block drafter."""


def record(target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], tokens: int) -> Recorded:
    """Answer the prompts with `drafter` and record its candidates. Steps close to the end of a text are left out."""
    steps: list[list[Level]] = []
    recorder = object.__new__(_BlockRecorder if isinstance(drafter, BlockDrafter) else _Recorder)
    recorder.__dict__.update(drafter.__dict__)
    shape = recorder.planned(drafter.shape)
    for prompt in prompts:
        recorder.grown = []
        text, positions = list[int](), list[int]()
        for emission in Engine(target, recorder).run([list(prompt)], SamplingParams(), StopParams(tokens)):
            text.extend(emission.tokens)
            positions.append(len(text))
        for grown, position in zip(recorder.grown, positions, strict=False):
            following = text[position : position + drafter.shape.depth]
            if len(following) == drafter.shape.depth:
                steps.append(_levels(grown, following, shape))
    joined = [
        Level(*(torch.cat([getattr(each, name) for each in level]) for name in ("scores", "right", "parents")))
        for level in zip(*steps, strict=True)
    ]
    return Recorded(tuple(joined))


def _levels(grown: Growth, following: Sequence[int], shape: Plan) -> list[Level]:
    """The levels of a recorded tree, compared with the tokens `following` its root."""
    sizes = [width * shape.top_k for width in (1, *shape.widths)]
    levels, before = list[Level](), 0  # before: number of candidates in the levels before the parents'
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
    """Number of right candidates over the sum of their probabilities, among the best `nodes` - 1 of every step.

    1 for a calibrated head; below 1 the head is overconfident.
    """
    scores, right = (torch.cat([getattr(each, name) for each in steps.levels], 1) for name in ("scores", "right"))
    best = best_places(scores, nodes - 1)
    expected = float(scores.gather(1, best).double().exp().sum())
    return float(right.gather(1, best).sum()) / expected if expected else 1.0


def follow(steps: Recorded) -> float:
    """Share of the right, expanded candidates that have a right child; a level has at most one right candidate."""
    expanded = continued = 0
    for above, below in zip(steps.levels, steps.levels[1:], strict=False):
        of_right = above.right.gather(1, below.parents) & below.scores.isfinite()
        expanded += int(of_right.any(1).sum())
        continued += int((of_right & below.right).any(1).sum())
    return continued / expanded if expanded else 0.5


@dataclass(frozen=True)
class Drafted:
    """The candidates of a shape: of all steps at once, or with a pace of one batch."""

    grown: Growth  # its tokens are 1 for right candidates and 0 for wrong ones
    levels: int  # after the first
    most: int  # candidates per step


def draft(steps: Recorded, depth: int, width: int, pace: CostModel | None = None, rows: int = 1) -> list[Drafted]:
    """The candidates of a narrower or shallower drafter; with a `pace`, `rows` steps are drafted together."""
    return [_draft(batch, depth, width, pace) for batch in ([steps] if pace is None else steps.batches(rows))]


def _draft(steps: Recorded, depth: int, width: int, pace: CostModel | None) -> Drafted:
    top_k = steps.levels[0].scores.shape[1]
    widths = plan(DraftShape("dynamic", depth, top_k, width), top_k).widths
    grown, levels = Growth(torch.zeros(len(steps), dtype=torch.long)), 0
    expanded: Tensor | None = None  # bool, the candidates of the level above that were expanded
    for level, wide in zip(steps.levels, (*widths, 0), strict=False):
        below = torch.ones_like(level.right) if expanded is None else expanded.gather(1, level.parents)
        scores = level.scores.masked_fill(~below, -torch.inf)
        grown.add(level.right.long(), scores, parents=None)
        if wide:
            chosen = best_places(scores, wide)
            if pace is not None and not pace.deeper(scores.gather(1, chosen)):
                break
            expanded = torch.zeros_like(level.right).scatter(1, chosen, True)
            levels += 1
    return Drafted(grown, levels, top_k * (1 + sum(widths[:levels])))


def replay(
    drafted: Sequence[Drafted], costs: Latency, width: int, nodes: int, pace: CostModel | None = None
) -> Outcome:
    """The outcome of verifying the best `nodes` nodes of each tree, or with a pace as many of them as pay.

    `costs` are those of the whole batch, by the nodes of one row.
    """
    results = []
    for each in drafted:
        keep = each.grown.best(min(nodes - 1, each.most), pace)
        count = keep.shape[1] + 1
        right = float(each.grown.listed()[0].gather(1, keep).sum(1).double().mean())
        results.append((1 + right, costs.step(1, count, each.levels + 1, width), count, each.levels))
    tokens, ms, verified, levels = (sum(each) / len(results) for each in zip(*results, strict=True))
    return Outcome(tokens, ms, verified, levels, pace)


def paced(steps: Recorded, costs: Latency, depth: int, width: int, start: Outcome, rows: int = 1) -> Outcome:
    """The shape at its optimal pace: raise the rate until replaying with it gives that rate (Dinkelbach's method)."""
    best, most, trusted, followed = start, max(costs.forward_ms), trust(steps, _TRUST_NODES), follow(steps)
    if not trusted or not followed:
        return start  # the head was never right, so no pace can be derived
    for _ in range(4):
        pace = costs.cost_model(width, best.rate, most, trust=trusted, follow=followed)
        outcome = replay(draft(steps, depth, width, pace, rows), costs, width, most, pace)
        if outcome.rate <= best.rate:
            break
        best = outcome
    return best
