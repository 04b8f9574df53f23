"""Measures what a decode step costs here and picks the drafting that makes the most of it.

Owns the measurements (target forwards, draft levels, the rest, the machine's roofline) and the search over recorded
drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median

from haast import native
from haast.bench import replay
from haast.bench.report import git_commit, versions
from haast.bench.vcurve import measure_v_curve
from haast.drafters.calibrated import identity, weights_read
from haast.drafters.eagle import EagleDrafter
from haast.drafters.shape import DraftShape
from haast.engine import Engine, Stats, StopConfig
from haast.sampling import SamplingConfig
from haast.speed.calibration import Calibration
from haast.speed.policy import interpolate
from haast.target import Target

NODES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 18, 24, 32)
WIDTHS = (1, 3, 8)
BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 18, 24, 32, 48, 60)
DEPTHS = (1, 2, 3, 4, 5, 6, 7)
_RECORDED = DraftShape("dynamic", depth=max(DEPTHS), top_k=8, width=8, nodes=32)
_LIVE = 48  # tokens per prompt that time a draft
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
    """Measure and choose; the drafter keeps its shape and pace.

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
        forward_ms = {int(point["nodes"]): float(point["ms"]) for point in curve["points"]}
        say("draft levels, while decoding")
        first_ms, level_ms, overhead_ms = _live_costs(target, drafter, prompts[:2])
        say(f"drafts over {len(prompts)} prompts")
        drafter.reshape(_RECORDED)
        steps = replay.record(target, drafter, prompts, tokens)
    if not steps:
        raise ValueError(f"the texts are too short to learn from: give longer prompts, or more than {tokens} tokens")
    say(f"replaying {len(steps)} steps under other shapes")
    dense = tuple(interpolate(forward_ms, n) for n in range(1, max(NODES) + 1))
    costs = replay.StepCosts(dense, level_ms, first_ms + overhead_ms)
    vanilla = 1 / (forward_ms[1] + overhead_ms)
    shape, outcome, grid = search(steps, costs)
    pays = outcome.rate > _LEAST_GAIN * vanilla
    weight_bytes, parameters = weights_read(target)
    roofline = target.device.type == "cpu" and native.available()
    # What a forward has reached is possible: a probe that ran while something else did must not say otherwise.
    reached = max(2e3 * parameters * n / ms for n, ms in forward_ms.items())
    return Calibration(
        identity=identity(target, drafter),
        forward_ms=forward_ms,
        committed=int(curve["committed_slots"]),
        first_ms=first_ms,
        level_ms=level_ms,
        overhead_ms=overhead_ms,
        weight_bytes=weight_bytes,
        parameters=parameters,
        head_parameters=drafter.parameters,
        bandwidth=max(native.read_bandwidth(), 1e3 * weight_bytes / forward_ms[1]) if roofline else None,
        peak=max(native.multiply_peak(), reached) if roofline else None,
        shape=asdict(shape) if pays else {},
        pace=asdict(outcome.pace) if pays and outcome.pace is not None else None,
        expected={
            "tau": outcome.tau,
            "nodes": outcome.nodes,
            "levels": outcome.levels,
            "tokens_per_s": 1e3 * outcome.rate,
            "vanilla_tokens_per_s": 1e3 * vanilla,
            "speedup": outcome.rate / vanilla,
        },
        grid=grid,
        measured={"steps": len(steps), "versions": versions(), "commit": git_commit(), "rounds": rounds},
    )


def search(
    steps: Sequence[replay.Step], costs: replay.StepCosts
) -> tuple[DraftShape, replay.Outcome, list[dict[str, float]]]:
    """The shape with the most tokens per ms on the recorded steps, what it brings, and tau of all shapes tried."""
    most = len(costs.forward_ms)
    free = replace(costs, forward_ms=(1.0,) * max(BUDGETS))  # for tau alone, beyond what was timed
    found, grid = [], list[dict[str, float]]()
    for depth in DEPTHS:
        for width in (1, 2, 3, 4, 6, 8) if depth > 1 else (1,):
            drafted = replay.draft(steps, depth, width)
            outcomes = {n: replay.replay(drafted, costs if n <= most else free, width, n) for n in BUDGETS}
            grid += [{"depth": depth, "width": width, "nodes": n, "tau": o.tau} for n, o in outcomes.items()]
            best = max((o for n, o in outcomes.items() if n <= most), key=lambda o: o.rate)
            found.append((best.rate, depth, width, best))
    found.sort(key=lambda each: -each[0])
    trusted, followed = replay.trust(steps, 8), replay.follow(steps)
    finals = [(start, depth, width) for _, depth, width, start in found[:4]]
    if trusted and followed:  # else the head was never right, and there is nothing to pace by
        finals = [(replay.paced(steps, costs, d, w, start, trusted, followed), d, w) for start, d, w in finals]
    outcome, depth, width = max(finals, key=lambda each: each[0].rate)
    nodes = most if outcome.pace is not None else max(round(outcome.nodes), 2)
    return DraftShape("dynamic", depth, _RECORDED.top_k, width, nodes), outcome, grid


@contextmanager
def _kept(drafter: EagleDrafter) -> Iterator[None]:
    shape, pace = drafter.shape, drafter.pace
    try:
        yield
    finally:
        drafter.reshape(shape, pace)


def _live_costs(
    target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]]
) -> tuple[float, dict[int, float], float]:
    """Ms of a step's first level (observing included), of every level more by width, and of bookkeeping.

    Measured while decoding: alone, a small head stays in the caches that a target forward would sweep.
    """

    def live(depth: int, width: int) -> Stats:
        drafter.reshape(DraftShape("dynamic", depth, _RECORDED.top_k, width, 6))
        stats = Stats()
        for prompt in prompts:
            Engine(target, drafter).complete([prompt], SamplingConfig(), StopConfig(_LIVE), stats)
        return stats

    def draft_ms(stats: Stats) -> float:
        return stats.ms_draft / max(stats.target_forwards, 1)

    live(2, 2)
    shallow, deep = [live(1, 1) for _ in range(2)], {w: [live(5, w) for _ in range(2)] for w in WIDTHS}
    first = min(map(draft_ms, shallow))
    levels = {width: max((min(map(draft_ms, each)) - first) / 4, 1e-3) for width, each in deep.items()}
    return first, levels, median(s.ms_overhead / max(s.target_forwards, 1) for s in shallow)
