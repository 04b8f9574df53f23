"""Measures what a decode step costs here and picks the drafting that makes the most of it.

Owns the measurements (target forwards, draft levels, the rest, the machine's roofline), the search over recorded
drafts, and a picture of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from haast import native
from haast.bench import replay
from haast.bench.report import git_commit, versions
from haast.core import SamplingParams
from haast.drafters.calibrated import draft_ms, identity, level_costs, restoring
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Step, StopParams
from haast.target.packing import linear_sizes
from haast.target.target import Target
from haast.tuning.calibration import Batch, Calibration
from haast.tuning.latency import Latency, time_forwards
from haast.tuning.online import LEAST_GAIN

NODES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 18, 24, 32)
CURVE_NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 60)
COMMITTED = 160  # slots in the cache, the length of a short chat
WIDTHS = (1, 3, 8)
# Of batches: rows -> nodes that are timed; elsewhere than on a CPU those of `_DEVICE_NODES` beside them.
_NODES = {2: (1, 2, 3, 4, 6, 8, 12), 4: (1, 2, 3, 4, 6, 8), 8: (1, 2, 3, 4, 6)}
_DEVICE_NODES = {16: (1, 2, 3, 4, 8), 32: (1, 2, 3, 4, 8)}
_WIDTHS = (1, 3)
_LIVE, _LIVE_TOGETHER = 48, 16  # tokens per text that time a draft, alone and in a batch
BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 18, 24, 32, 48, 60)
DEPTHS = (1, 2, 3, 4, 5, 6, 7)
_RECORDED = DraftShape("dynamic", depth=max(DEPTHS), top_k=8, width=8, nodes=32)

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
    with restoring(drafter):
        say("target forwards over 1 to 32 nodes")
        forwards = forward_ms(target, NODES, rounds)
        say("draft levels, while decoding")
        alone = Latency(forwards, *live_costs(target, drafter, [[prompt] for prompt in prompts[:2]], WIDTHS))
        say("batches of 2 and more")
        together = measure_batches(target, drafter, prompts, rounds)
        say(f"drafts over {len(prompts)} prompts")
        drafter.reshape(_RECORDED)
        steps = replay.record(target, drafter, prompts, tokens)
    if not len(steps):
        raise ValueError(f"the texts are too short to learn from: give longer prompts, or more than {tokens} tokens")
    say(f"replaying {len(steps)} steps under other shapes")
    shape, outcome, grid = search(steps, alone)
    weight_bytes, parameters = linear_sizes(target.model.modules())  # what one forward reads and multiplies
    roofline = target.device.type == "cpu" and native.available()
    # What a forward has reached is possible: a probe that ran while something else did must not say otherwise.
    reached = max(2e3 * parameters * n / ms for n, ms in alone.forward_ms.items())
    chosen = _chosen(shape, outcome, alone)
    return Calibration(
        **chosen,
        identity=identity(target, drafter),
        committed=_committed(target, max(NODES)),
        weight_bytes=weight_bytes,
        parameters=parameters,
        head_parameters=drafter.parameters,
        bandwidth=max(native.read_bandwidth(), 1e3 * weight_bytes / alone.forward_ms[1]) if roofline else None,
        peak=max(native.multiply_peak(), reached) if roofline else None,
        grid=grid,
        batches={n: choose(steps, n, each) for n, each in together.items() if chosen["shape"] and len(steps) >= n},
        measured={"steps": len(steps), "versions": versions(), "commit": git_commit(), "rounds": rounds},
    )


def measure_v_curve(
    target: Target, drafter: EagleDrafter | None, rounds: int = 15, node_counts: Sequence[int] = CURVE_NODES
) -> dict[str, Any]:
    """Median ms of `target.forward` over a chain of n nodes after 160 committed slots, and of the draft.

    `v` is relative to one node, and so is `c_per_step`, what the drafter takes to observe and propose.
    """
    ms = forward_ms(target, node_counts, rounds)
    one = ms[min(ms)]
    points = [{"nodes": n, "ms": value, "v": value / one} for n, value in ms.items()]
    committed = _committed(target, max(node_counts))
    result: dict[str, Any] = {"committed_slots": committed, "rounds": rounds, "points": points}
    if drafter is not None:
        drafted = draft_ms(target, drafter)
        result["draft"] = {"ms": drafted, "c_per_step": drafted / one}
    return result


def forward_ms(target: Target, nodes: Sequence[int], rounds: int, rows: int = 1) -> dict[int, float]:
    """Nodes of every row -> median ms of a forward behind `COMMITTED` slots, after one round of warm-up."""
    times = time_forwards(target, nodes, _committed(target, max(nodes)), rounds + 1, rows)
    return {n: median(values[1:]) for n, values in times.items()}


def _committed(target: Target, nodes: int) -> int:
    return COMMITTED if target.context_length is None else min(COMMITTED, max(target.context_length - nodes, 5))


def measure_batches(
    target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], rounds: int
) -> dict[int, Latency]:
    """Costs by rows, of all of them together."""
    found = {}
    for rows, nodes in {**_NODES, **({} if target.device.type == "cpu" else _DEVICE_NODES)}.items():
        forwards = forward_ms(target, nodes, max(rounds // 2, 1), rows)
        texts = [prompts[i % len(prompts)] for i in range(rows)]
        found[rows] = Latency(forwards, *live_costs(target, drafter, [texts], _WIDTHS, _LIVE_TOGETHER))
    return found


def live_costs(
    target: Target,
    drafter: EagleDrafter,
    batches: Sequence[Sequence[Sequence[int]]],
    widths: Sequence[int],
    tokens: int = _LIVE,
) -> tuple[float, dict[int, float], float]:
    """Ms of a step's first level (observing included), of every level more by width, and of bookkeeping.

    Measured while decoding `tokens` per text, batch by batch: alone, a small head stays in the caches that a target
    forward would sweep.
    """
    overheads = list[float]()

    def once() -> float:
        steps: list[tuple[float, float]] = []
        for batch in batches:

            def watch(step: Step, rows: int = len(batch)) -> None:
                if len(step.rows) == rows:  # requests begin one after the other
                    steps.append((step.ms_draft, step.ms_overhead))

            for _ in Engine(target, drafter).run(batch, SamplingParams(), StopParams(tokens), watch=watch):
                continue
        count = max(len(steps), 1)
        overheads.append(sum(overhead for _, overhead in steps) / count)
        return sum(draft for draft, _ in steps) / count

    once()  # to warm up
    first, levels = level_costs(drafter, lambda: min(once(), once()), widths)
    return first, levels, median(overheads[1:])


def choose(steps: replay.Recorded, rows: int, costs: Latency) -> Batch:
    """What to draft where so many rows, whose costs these are, are decoded together."""
    shape, outcome, _ = search(steps, costs, rows, range(1, 5))
    chosen = _chosen(shape, outcome, costs, rows)
    if chosen["pace"] is None:
        width = min(costs.level_ms, key=lambda wide: costs.level_ms[wide])
        rate = outcome.rate if chosen["shape"] else 1 / costs.step(1, 1)
        chosen["pace"] = costs.cost_model(width, rate, max(costs.forward_ms))
    return Batch(**chosen)


def _chosen(shape: DraftShape, outcome: replay.Outcome, costs: Latency, rows: int = 1) -> dict[str, Any]:
    """The costs of a batch, what pays by them, and what that is expected to bring, all rows together."""
    vanilla = 1 / costs.step(1, 1)  # tokens per ms of a row
    pays = outcome.rate > LEAST_GAIN * vanilla
    expected = {
        "tau": outcome.tau,
        "tokens_per_s": 1e3 * rows * outcome.rate,
        "vanilla_tokens_per_s": 1e3 * rows * vanilla,
        "speedup": outcome.rate / vanilla,
        "nodes": outcome.nodes,
        "levels": outcome.levels,
    }
    pace = outcome.pace if pays else None
    return {**asdict(costs), "shape": asdict(shape) if pays else {}, "pace": pace, "expected": expected}


def search(
    steps: replay.Recorded, costs: Latency, rows: int = 1, depths: Sequence[int] = DEPTHS
) -> tuple[DraftShape, replay.Outcome, list[dict[str, float]]]:
    """The shape with the most tokens per ms on the recorded steps, what it brings, and tau of all shapes tried.

    Larger trees than were timed are tried for their tau alone, which projections need.
    """
    found, grid, most = [], list[dict[str, float]](), max(costs.forward_ms)
    for depth in depths:
        for width in (1, 2, 3, 4, 6, 8) if depth > 1 else (1,):
            drafted = replay.draft(steps, depth, width)
            outcomes = {n: replay.replay(drafted, costs, width, n) for n in BUDGETS}
            grid += [{"depth": depth, "width": width, "nodes": n, "tau": o.tau} for n, o in outcomes.items()]
            best = max((o for n, o in outcomes.items() if n <= most), key=lambda o: o.rate)
            found.append((best, depth, width))
    found.sort(key=lambda each: -each[0].rate)
    finals = [(replay.paced(steps, costs, d, w, start, rows), d, w) for start, d, w in found[:4]]
    outcome, depth, width = max(finals, key=lambda each: each[0].rate)
    nodes = most if outcome.pace is not None else max(round(outcome.nodes), 2)
    return DraftShape("dynamic", depth, _RECORDED.top_k, width, nodes), outcome, grid


def draw(found: Calibration, path: Path) -> None:
    """Cost of a forward over nodes, the roofline below it, and what of a step goes where. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    nodes = sorted(found.forward_ms)
    left.plot(nodes, [found.forward_ms[n] for n in nodes], "o-", label="measured")
    if found.bandwidth is not None:
        least = [found.roofline_ms(n) or 0.0 for n in nodes]
        left.plot(nodes, least, "--", color="gray", label="roofline of the linear layers")
    left.set(xlabel="nodes of one target forward", ylabel="ms", title="what verification costs", ylim=(0, None))
    left.legend()
    level = sorted(found.level_ms.items())
    right.bar([f"level, width {w}" for w, _ in level], [ms for _, ms in level], color="tab:orange")
    right.bar(["first level", "bookkeeping"], [found.first_ms, found.overhead_ms], color="tab:blue")
    right.axhline(0.08 * found.forward_ms[1], linestyle=":", color="gray")
    right.set(ylabel="ms", title=f"what drafting costs (a one-node forward: {found.forward_ms[1]:.1f} ms)")
    right.tick_params(axis="x", rotation=30)
    figure.suptitle(f"{found.identity['cpu']}, {found.identity['threads']} threads, {found.identity['packing']}")
    figure.savefig(path, dpi=120)
