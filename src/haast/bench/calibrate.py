"""Calibration: measures the cost of a decoding step on this machine and picks the fastest draft shape for it.

Owns the measurements (target forwards, draft levels, overhead, the machine's roofline), the search over recorded
drafts, and a plot of the measurements.
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
COMMITTED = 160  # tokens in the KV cache during timing, about a short chat
WIDTHS = (1, 3, 8)
# For batches: rows -> numbers of nodes to time. Devices other than the CPU also time `_DEVICE_NODES`.
_BATCH_NODES = {2: (1, 2, 3, 4, 6, 8, 12), 4: (1, 2, 3, 4, 6, 8), 8: (1, 2, 3, 4, 6)}
_DEVICE_NODES = {16: (1, 2, 3, 4, 8), 32: (1, 2, 3, 4, 8)}
_BATCH_WIDTHS = (1, 3)
_LIVE_TOKENS, _LIVE_BATCH_TOKENS = 48, 16  # tokens to decode per text while timing drafts, alone and in a batch
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
    """Measure costs, then search for the best shape. The drafter's own settings are restored afterwards.

    Args:
        target: the model.
        drafter: the drafter to calibrate, with its head.
        prompts: token ids of prompts like those of the workload; never evaluation prompts.
        tokens: new tokens to record per prompt.
        rounds: timing rounds; the result is their median.
        say: called with one line per stage, for progress.

    Raises:
        ValueError: the texts are too short to record a step.
    """
    with restoring(drafter):
        say("timing target forwards of 1 to 32 nodes")
        forwards = forward_ms(target, NODES, rounds)
        say("timing draft levels while decoding")
        alone = Latency(forwards, *live_costs(target, drafter, [[prompt] for prompt in prompts[:2]], WIDTHS))
        say("timing batches of 2 and more")
        batch_costs = measure_batches(target, drafter, prompts, rounds)
        say(f"recording drafts of {len(prompts)} prompts")
        drafter.reshape(_RECORDED)
        steps = replay.record(target, drafter, prompts, tokens)
    if not len(steps):
        raise ValueError(
            f"no step was recorded, the texts are too short: give longer prompts, or tokens above {tokens}"
        )
    say(f"replaying {len(steps)} steps with other shapes")
    shape, outcome, grid = search(steps, alone)
    weight_bytes, parameters = linear_sizes(target.model.modules())
    roofline = target.device.type == "cpu" and native.available()
    # A forward proves a lower bound of the roofline, even if the probe ran while the machine was busy.
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
        batches={n: choose(steps, n, each) for n, each in batch_costs.items() if chosen["shape"] and len(steps) >= n},
        measured={"steps": len(steps), "versions": versions(), "commit": git_commit(), "rounds": rounds},
    )


def measure_v_curve(
    target: Target, drafter: EagleDrafter | None, rounds: int = 15, node_counts: Sequence[int] = CURVE_NODES
) -> dict[str, Any]:
    """Median ms of `target.forward` over a chain of n nodes after 160 committed slots, and of the draft.

    `v` is relative to the forward of one node, and so is `c_per_step`, the drafter's time per step.
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
    """Nodes per row -> median ms of a forward after `COMMITTED` cached tokens; one extra round warms up."""
    times = time_forwards(target, nodes, _committed(target, max(nodes)), rounds + 1, rows)
    return {n: median(values[1:]) for n, values in times.items()}


def _committed(target: Target, nodes: int) -> int:
    """`COMMITTED`, or less if the target's context is short."""
    return COMMITTED if target.context_length is None else min(COMMITTED, max(target.context_length - nodes, 5))


def measure_batches(
    target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], rounds: int
) -> dict[int, Latency]:
    """Costs per batch size; each time is that of the whole batch."""
    costs = {}
    for rows, nodes in {**_BATCH_NODES, **({} if target.device.type == "cpu" else _DEVICE_NODES)}.items():
        forwards = forward_ms(target, nodes, max(rounds // 2, 1), rows)
        texts = [prompts[i % len(prompts)] for i in range(rows)]
        costs[rows] = Latency(forwards, *live_costs(target, drafter, [texts], _BATCH_WIDTHS, _LIVE_BATCH_TOKENS))
    return costs


def live_costs(
    target: Target,
    drafter: EagleDrafter,
    batches: Sequence[Sequence[Sequence[int]]],
    widths: Sequence[int],
    tokens: int = _LIVE_TOKENS,
) -> tuple[float, dict[int, float], float]:
    """Ms of a step's first draft level (observe included), of each further level by width, and of the overhead.

    Measured while decoding `tokens` per text, batch by batch. Timed without target forwards in between, a small head
    would stay in the CPU caches and look too cheap.
    """
    overheads = list[float]()

    def once() -> float:
        steps: list[tuple[float, float]] = []
        for batch in batches:

            def watch(step: Step, rows: int = len(batch)) -> None:
                if len(step.rows) == rows:  # skip steps before all requests have joined
                    steps.append((step.ms_draft, step.ms_overhead))

            for _ in Engine(target, drafter).run(batch, SamplingParams(), StopParams(tokens), watch=watch):
                continue
        count = max(len(steps), 1)
        overheads.append(sum(overhead for _, overhead in steps) / count)
        return sum(draft for draft, _ in steps) / count

    once()  # warm-up
    first, levels = level_costs(drafter, lambda: min(once(), once()), widths)
    return first, levels, median(overheads[1:])


def choose(steps: replay.Recorded, rows: int, costs: Latency) -> Batch:
    """The draft settings for a batch of `rows` rows with these costs."""
    shape, outcome, _ = search(steps, costs, rows, range(1, 5))
    chosen = _chosen(shape, outcome, costs, rows)
    if chosen["pace"] is None:
        width = min(costs.level_ms, key=lambda wide: costs.level_ms[wide])
        rate = outcome.rate if chosen["shape"] else 1 / costs.step(1, 1)
        chosen["pace"] = costs.cost_model(width, rate, max(costs.forward_ms))
    return Batch(**chosen)


def _chosen(shape: DraftShape, outcome: replay.Outcome, costs: Latency, rows: int = 1) -> dict[str, Any]:
    """Costs, shape, pace and expected speed of a batch; speeds are those of all rows together."""
    vanilla = 1 / costs.step(1, 1)  # tokens per ms of one row
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
    """The shape with the most tokens per ms on the recorded steps, its outcome, and tau of all shapes tried.

    Trees larger than the largest timed forward enter the grid only, for projections to other hardware.
    """
    candidates, grid, most = [], list[dict[str, float]](), max(costs.forward_ms)
    for depth in depths:
        for width in (1, 2, 3, 4, 6, 8) if depth > 1 else (1,):
            drafted = replay.draft(steps, depth, width)
            outcomes = {n: replay.replay(drafted, costs, width, n) for n in BUDGETS}
            grid += [{"depth": depth, "width": width, "nodes": n, "tau": o.tau} for n, o in outcomes.items()]
            best = max((o for n, o in outcomes.items() if n <= most), key=lambda o: o.rate)
            candidates.append((best, depth, width))
    candidates.sort(key=lambda each: -each[0].rate)
    finals = [(replay.paced(steps, costs, d, w, start, rows), d, w) for start, d, w in candidates[:4]]
    outcome, depth, width = max(finals, key=lambda each: each[0].rate)
    nodes = most if outcome.pace is not None else max(round(outcome.nodes), 2)
    return DraftShape("dynamic", depth, _RECORDED.top_k, width, nodes), outcome, grid


def draw(calibration: Calibration, path: Path) -> None:
    """Plot the cost of a forward by nodes with the roofline, and the costs of drafting. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    nodes = sorted(calibration.forward_ms)
    left.plot(nodes, [calibration.forward_ms[n] for n in nodes], "o-", label="measured")
    if calibration.bandwidth is not None:
        least = [calibration.roofline_ms(n) or 0.0 for n in nodes]
        left.plot(nodes, least, "--", color="gray", label="roofline of the linear layers")
    left.set(xlabel="nodes of one target forward", ylabel="ms", title="cost of verification", ylim=(0, None))
    left.legend()
    level = sorted(calibration.level_ms.items())
    right.bar([f"level, width {w}" for w, _ in level], [ms for _, ms in level], color="tab:orange")
    right.bar(["first level", "overhead"], [calibration.first_ms, calibration.overhead_ms], color="tab:blue")
    right.axhline(0.08 * calibration.forward_ms[1], linestyle=":", color="gray")
    right.set(ylabel="ms", title=f"cost of drafting (a one-node forward: {calibration.forward_ms[1]:.1f} ms)")
    right.tick_params(axis="x", rotation=30)
    figure.suptitle(
        f"{calibration.identity['cpu']}, {calibration.identity['threads']} threads, {calibration.identity['packing']}"
    )
    figure.savefig(path, dpi=120)
