"""What forwards and drafts cost here: v(n) of target forwards, and the parts of a step while it decodes.

Owns these measurements, of one row and of several together; which drafting follows from them is `calibrate`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from haast.bench.replay import Costs
from haast.core import Accepted, SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Step, StopParams
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.latency import timed

NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 60)
COMMITTED = 160  # slots in the cache, the length of a short chat
_NODES = {2: (1, 2, 3, 4, 6, 8, 12), 4: (1, 2, 3, 4, 6, 8), 8: (1, 2, 3, 4, 6)}  # rows -> nodes that are timed
_DEVICE_NODES = {16: (1, 2, 3, 4, 8), 32: (1, 2, 3, 4, 8)}  # elsewhere than on a CPU, beside those
_WIDTHS = (1, 3)
_LIVE, _LIVE_TOGETHER = 48, 16  # tokens per text that time a draft, alone and in a batch
_TOP_K, _LEVELS = 8, 4


def measure_v_curve(
    target: Target,
    drafter: EagleDrafter | None,
    rounds: int = 15,
    node_counts: Sequence[int] = NODE_COUNTS,
    rows: int = 1,
) -> dict[str, Any]:
    """Median ms of `target.forward` over a chain of n nodes after 160 committed slots, and of the draft.

    Rounds are interleaved over all n, after one round of warm-up. `v` is relative to one node. `ms_observe` is the
    head's pass over three accepted tokens, `ms_propose` the growth of one tree. With several `rows` each has n nodes.
    """
    committed = COMMITTED
    if target.context_length is not None:
        committed = min(committed, max(target.context_length - max(node_counts), 5))
    tokens = torch.arange(committed, device=target.device).expand(rows, -1) % target.vocab_size
    cache = target.new_cache(rows, committed + max(node_counts))
    features = target.forward(DraftTree.chain(tokens), cache, last_only=True).features
    cache.advance([committed] * rows)
    times: dict[int, list[float]] = {n: [] for n in node_counts}
    drafted: list[tuple[float, float]] = []
    with target.step_threads():
        for _ in range(rounds + 1):
            for n in node_counts:
                tree = DraftTree.chain(torch.arange(n, device=target.device).expand(rows, -1) % target.vocab_size)
                times[n].append(timed(target, partial(target.forward, tree, cache)))
            if drafter is not None:
                drafted.append(_draft_step(target, drafter, tokens, features))
    ms = {n: median(values[1:]) for n, values in times.items()}
    one = ms[min(ms)]
    points = [{"nodes": n, "ms": value, "v": value / one} for n, value in ms.items()]
    result: dict[str, Any] = {"committed_slots": committed, "rounds": rounds, "points": points}
    if drafter is not None:
        observe, propose = (median(values) for values in zip(*drafted[1:], strict=True))
        result["draft"] = {"ms_observe": observe, "ms_propose": propose, "c_per_step": (observe + propose) / one}
    return result


def _draft_step(
    target: Target, drafter: EagleDrafter, tokens: torch.Tensor, features: torch.Tensor
) -> tuple[float, float]:
    """Ms to observe three accepted tokens, and to propose, after the prefix."""
    end = tokens.shape[1] - 1
    said, kv = tokens[0].tolist(), target.pool.sequence()
    kv.reserve(len(said) + drafter.room)
    state = drafter.begin(said[: end - 2], kv, 0)

    def observe(begin: int, end: int) -> None:
        """As of a prompt, so that the head runs over it at once."""
        counts = torch.tensor([end - begin], device=tokens.device)
        drafter.observe([state], Accepted(tokens[:, begin + 1 : end + 1], features[:, begin:end], counts))

    try:
        observe(0, end - 3)
        return timed(target, partial(observe, end - 3, end)), timed(target, partial(drafter.propose, [state]))
    finally:
        drafter.end(state)
        kv.release()


def measure_batches(
    target: Target, drafter: EagleDrafter, prompts: Sequence[Sequence[int]], rounds: int
) -> dict[int, Costs]:
    """Costs by rows. The drafter is reshaped."""
    found = {}
    for rows, nodes in {**_NODES, **({} if target.device.type == "cpu" else _DEVICE_NODES)}.items():
        curve = measure_v_curve(target, None, max(rounds // 2, 1), nodes, rows)
        texts = [prompts[i % len(prompts)] for i in range(rows)]
        found[rows] = Costs(forward_costs(curve), *live_costs(target, drafter, [texts], _WIDTHS, _LIVE_TOGETHER))
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
    forward would sweep. The drafter is reshaped.
    """

    def live(depth: int, width: int) -> tuple[float, float]:
        drafter.reshape(DraftShape("dynamic", depth, _TOP_K, width, 6))
        steps: list[tuple[float, float]] = []
        for batch in batches:

            def watch(step: Step, rows: int = len(batch)) -> None:
                if len(step.rows) == rows:  # requests begin one after the other
                    steps.append((step.ms_draft, step.ms_overhead))

            for _ in Engine(target, drafter).run(batch, SamplingParams(), StopParams(tokens), watch=watch):
                continue
        draft, overhead = (sum(each) / max(len(steps), 1) for each in zip(*steps or [(0.0, 0.0)], strict=True))
        return draft, overhead

    live(2, 2)
    shallow = [live(1, 1) for _ in range(2)]
    deep = {width: [live(1 + _LEVELS, width) for _ in range(2)] for width in widths}
    first = min(draft for draft, _ in shallow)
    levels = {width: max((min(draft for draft, _ in each) - first) / _LEVELS, 1e-3) for width, each in deep.items()}
    return first, levels, median(overhead for _, overhead in shallow)
