"""What forwards and drafts cost here: v(n) of target forwards, and the parts of a step while it decodes.

Owns these measurements, of one row and of several together; which drafting follows from them is `calibrate`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from haast.core import SamplingParams
from haast.drafters.calibrated import draft_ms, level_costs
from haast.drafters.eagle import EagleDrafter
from haast.engine.engine import Engine, Step, StopParams
from haast.target.target import Target
from haast.tuning.latency import Latency, time_forwards

NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 60)
COMMITTED = 160  # slots in the cache, the length of a short chat
_NODES = {2: (1, 2, 3, 4, 6, 8, 12), 4: (1, 2, 3, 4, 6, 8), 8: (1, 2, 3, 4, 6)}  # rows -> nodes that are timed
_DEVICE_NODES = {16: (1, 2, 3, 4, 8), 32: (1, 2, 3, 4, 8)}  # elsewhere than on a CPU, beside those
_WIDTHS = (1, 3)
_LIVE, _LIVE_TOGETHER = 48, 16  # tokens per text that time a draft, alone and in a batch


def measure_v_curve(
    target: Target,
    drafter: EagleDrafter | None,
    rounds: int = 15,
    node_counts: Sequence[int] = NODE_COUNTS,
    rows: int = 1,
) -> dict[str, Any]:
    """Median ms of `target.forward` over a chain of n nodes after 160 committed slots, and of the draft.

    Rounds are interleaved over all n, after one round of warm-up. `v` is relative to one node, and so is `c_per_step`,
    what the drafter takes to observe and propose. With several `rows` each has n nodes.
    """
    committed = COMMITTED
    if target.context_length is not None:
        committed = min(committed, max(target.context_length - max(node_counts), 5))
    times = time_forwards(target, node_counts, committed, rounds + 1, rows)
    ms = {n: median(values[1:]) for n, values in times.items()}
    one = ms[min(ms)]
    points = [{"nodes": n, "ms": value, "v": value / one} for n, value in ms.items()]
    result: dict[str, Any] = {"committed_slots": committed, "rounds": rounds, "points": points}
    if drafter is not None:
        drafted = draft_ms(target, drafter)
        result["draft"] = {"ms": drafted, "c_per_step": drafted / one}
    return result


def measure_batches(
    target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], rounds: int
) -> dict[int, Latency]:
    """Costs by rows, of all of them together."""
    found = {}
    for rows, nodes in {**_NODES, **({} if target.device.type == "cpu" else _DEVICE_NODES)}.items():
        curve = measure_v_curve(target, None, max(rounds // 2, 1), nodes, rows)
        texts = [prompts[i % len(prompts)] for i in range(rows)]
        found[rows] = Latency(forward_costs(curve), *live_costs(target, drafter, [texts], _WIDTHS, _LIVE_TOGETHER))
    return found


def forward_costs(curve: dict[str, Any]) -> dict[int, float]:
    """Nodes -> ms of what `measure_v_curve` gives."""
    return {int(point["nodes"]): float(point["ms"]) for point in curve["points"]}


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
