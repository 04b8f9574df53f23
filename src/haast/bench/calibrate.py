"""Measures what a decode step costs here and picks the drafting that makes the most of it.

Owns the measurements (target forwards, draft levels, the rest, the machine's roofline) and the search over recorded
drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from haast import native
from haast.bench import replay
from haast.bench.forward_latency import forward_costs, live_costs, measure_batches, measure_v_curve
from haast.bench.report import git_commit, versions
from haast.drafters.calibrated import identity, weights_read
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.target.target import Target
from haast.tuning.calibration import Batch, Calibration

NODES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 18, 24, 32)
WIDTHS = (1, 3, 8)
BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 18, 24, 32, 48, 60)
DEPTHS = (1, 2, 3, 4, 5, 6, 7)
_RECORDED = DraftShape("dynamic", depth=max(DEPTHS), top_k=8, width=8, nodes=32)
_LEAST_GAIN = 1.02  # drafting has to beat vanilla by so much, or vanilla it is

Say = Callable[[str], None]


def calibrate(
    target: Target,
    drafter: EagleDrafter,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 64,
    rounds: int = 11,
    say: Say = lambda line: None,
) -> Calibration:
    """Measure and choose; the drafter keeps its shape, pace and ways.

    Args:
        target: the model.
        drafter: with its head.
        prompts: token ids of texts like those that will be asked for; never evaluation prompts.
        tokens: new tokens per prompt that are recorded.
        rounds: of timing; medians count.
        say: is told what is being done.
    """
    with _kept(drafter):
        say("target forwards over 1 to 32 nodes")
        curve = measure_v_curve(target, None, rounds, NODES)
        say("draft levels, while decoding")
        live = live_costs(target, drafter, [[prompt] for prompt in prompts[:2]], WIDTHS)
        alone = replay.Costs(forward_costs(curve), *live)
        say("batches of 2 and more")
        together = measure_batches(target, drafter, prompts, rounds)
        say(f"drafts over {len(prompts)} prompts")
        drafter.reshape(_RECORDED)
        steps = replay.record(target, drafter, prompts, tokens)
    if not len(steps):
        raise ValueError(f"the texts are too short to learn from: give longer prompts, or more than {tokens} tokens")
    say(f"replaying {len(steps)} steps under other shapes")
    shape, outcome, grid = search(steps, alone)
    pays = _pays(outcome, alone)
    weight_bytes, parameters = weights_read(target)
    roofline = target.device.type == "cpu" and native.available()
    # What a forward has reached is possible: a probe that ran while something else did must not say otherwise.
    reached = max(2e3 * parameters * n / ms for n, ms in alone.forward_ms.items())
    return Calibration(
        identity=identity(target, drafter),
        **asdict(alone),
        committed=int(curve["committed_slots"]),
        weight_bytes=weight_bytes,
        parameters=parameters,
        head_parameters=drafter.parameters,
        bandwidth=max(native.read_bandwidth(), 1e3 * weight_bytes / alone.forward_ms[1]) if roofline else None,
        peak=max(native.multiply_peak(), reached) if roofline else None,
        shape=asdict(shape) if pays else {},
        pace=asdict(outcome.pace) if pays and outcome.pace is not None else None,
        expected={**_expected(outcome, alone), "nodes": outcome.nodes, "levels": outcome.levels},
        grid=grid,
        batches={n: choose(steps, n, each) for n, each in together.items() if len(steps) >= n} if pays else {},
        measured={"steps": len(steps), "versions": versions(), "commit": git_commit(), "rounds": rounds},
    )


def choose(steps: replay.Recorded, rows: int, costs: replay.Costs) -> Batch:
    """What to draft where so many rows are decoded together."""
    shape, outcome, _ = search(steps, costs, rows, range(1, 5))
    pays = _pays(outcome, costs)
    pace = outcome.pace if pays else None
    if pace is None:
        pace = costs.pace(
            min(costs.level_ms, key=lambda w: costs.level_ms[w]), outcome.rate if pays else costs.vanilla_rate
        )
    expected = _expected(outcome, costs, rows)
    return Batch(**asdict(costs), shape=asdict(shape) if pays else {}, pace=asdict(pace), expected=expected)


def _pays(outcome: replay.Outcome, costs: replay.Costs) -> bool:
    return outcome.rate > _LEAST_GAIN * costs.vanilla_rate


def _expected(outcome: replay.Outcome, costs: replay.Costs, rows: int = 1) -> dict[str, float]:
    """What drafting is expected to bring, all rows together."""
    return {
        "tau": outcome.tau,
        "tokens_per_s": 1e3 * rows * outcome.rate,
        "vanilla_tokens_per_s": 1e3 * rows * costs.vanilla_rate,
        "speedup": outcome.rate / costs.vanilla_rate,
    }


def search(
    steps: replay.Recorded, costs: replay.Costs, rows: int = 1, depths: Sequence[int] = DEPTHS
) -> tuple[DraftShape, replay.Outcome, list[dict[str, float]]]:
    """The shape with the most tokens per ms on the recorded steps, what it brings, and tau of all shapes tried.

    Larger trees than were timed are tried for their tau alone, which projections need.
    """
    found, grid = [], list[dict[str, float]]()
    for depth in depths:
        for width in (1, 2, 3, 4, 6, 8) if depth > 1 else (1,):
            drafted = replay.draft(steps, depth, width)
            outcomes = {n: replay.replay(drafted, costs, width, n) for n in BUDGETS}
            grid += [{"depth": depth, "width": width, "nodes": n, "tau": o.tau} for n, o in outcomes.items()]
            best = max((o for n, o in outcomes.items() if n <= costs.most), key=lambda o: o.rate)
            found.append((best, depth, width))
    found.sort(key=lambda each: -each[0].rate)
    finals = [(replay.paced(steps, costs, d, w, start, rows), d, w) for start, d, w in found[:4]]
    outcome, depth, width = max(finals, key=lambda each: each[0].rate)
    nodes = costs.most if outcome.pace is not None else max(round(outcome.nodes), 2)
    return DraftShape("dynamic", depth, _RECORDED.top_k, width, nodes), outcome, grid


@contextmanager
def _kept(drafter: EagleDrafter) -> Iterator[None]:
    before, policy = (drafter.shape, drafter.pace, drafter.ways), drafter.policy
    drafter.policy = None  # all that it can draft is looked at
    try:
        yield
    finally:
        drafter.reshape(*before)
        drafter.policy = policy
