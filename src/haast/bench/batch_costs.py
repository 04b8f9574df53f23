"""What a step costs while it decodes: drafting and bookkeeping, of one row and of several together.

Owns these measurements; which drafting follows from them is `haast.bench.calibrate`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from haast.bench.forward_latency import measure_v_curve
from haast.bench.replay import StepCosts
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Step, StopParams
from haast.target.target import Target
from haast.tuning.policy import interpolate

_NODES = {2: (1, 2, 3, 4, 6, 8, 12), 4: (1, 2, 3, 4, 6, 8), 8: (1, 2, 3, 4, 6)}  # rows -> nodes that are timed
_DEVICE_NODES = {16: (1, 2, 3, 4, 8), 32: (1, 2, 3, 4, 8)}  # elsewhere than on a CPU, beside those
_WIDTHS = (1, 3)
_LIVE, _LIVE_TOGETHER = 48, 16  # tokens per text that time a draft, alone and in a batch
_TOP_K, _LEVELS = 8, 4


@dataclass(frozen=True)
class BatchCosts:
    """Medians in ms, of all rows together; one row is a batch too."""

    forward_ms: dict[int, float]  # nodes of a row -> a target forward
    first_ms: float
    level_ms: dict[int, float]
    overhead_ms: float

    def step_costs(self) -> StepCosts:
        """As a replay takes them."""
        dense = tuple(interpolate(self.forward_ms, n) for n in range(1, max(self.forward_ms) + 1))
        return StepCosts(dense, self.level_ms, self.first_ms + self.overhead_ms)

    @property
    def vanilla_rate(self) -> float:
        """Tokens per ms of a row without drafting."""
        return 1 / (self.forward_ms[1] + self.overhead_ms)


def measure_batches(
    target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], rounds: int
) -> dict[int, BatchCosts]:
    """Costs by rows. The drafter is reshaped."""
    found = {}
    for rows, nodes in {**_NODES, **({} if target.device.type == "cpu" else _DEVICE_NODES)}.items():
        curve = measure_v_curve(target, None, max(rounds // 2, 1), nodes, rows)
        texts = [prompts[i % len(prompts)] for i in range(rows)]
        found[rows] = BatchCosts(forward_costs(curve), *live_costs(target, drafter, texts, _WIDTHS, together=True))
    return found


def forward_costs(curve: dict[str, Any]) -> dict[int, float]:
    """Nodes -> ms of what `measure_v_curve` gives."""
    return {int(point["nodes"]): float(point["ms"]) for point in curve["points"]}


def live_costs(
    target: Target,
    drafter: EagleDrafter,
    prompts: Sequence[Sequence[int]],
    widths: Sequence[int],
    together: bool = False,
) -> tuple[float, dict[int, float], float]:
    """Ms of a step's first level (observing included), of every level more by width, and of bookkeeping.

    Measured while decoding, the prompts one by one or `together`: alone, a small head stays in the caches that a target
    forward would sweep. The drafter is reshaped.
    """
    batches = [list(prompts)] if together else [[prompt] for prompt in prompts]

    def live(depth: int, width: int) -> tuple[float, float]:
        drafter.reshape(DraftShape("dynamic", depth, _TOP_K, width, 6))
        parts: list[tuple[float, float]] = []
        for batch in batches:

            def watch(step: Step, rows: int = len(batch)) -> None:
                if len(step.rows) == rows:  # requests begin one after the other
                    parts.append((step.ms_draft, step.ms_overhead))

            stop = StopParams(_LIVE_TOGETHER if together else _LIVE)
            for _ in Engine(target, drafter).run(batch, SamplingParams(), stop, watch=watch):
                continue
        draft, overhead = (sum(each) / max(len(parts), 1) for each in zip(*parts or [(0.0, 0.0)], strict=True))
        return draft, overhead

    live(2, 2)
    shallow = [live(1, 1) for _ in range(2)]
    deep = {width: [live(1 + _LEVELS, width) for _ in range(2)] for width in widths}
    first = min(draft for draft, _ in shallow)
    levels = {width: max((min(draft for draft, _ in each) - first) / _LEVELS, 1e-3) for width, each in deep.items()}
    return first, levels, median(overhead for _, overhead in shallow)
