"""Measured cost of a target forward over n nodes, v(n), and of the draft step. Owns the two measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from haast.cache import TreeCache
from haast.drafters.base import Accepted
from haast.drafters.eagle import EagleDrafter
from haast.target import Target
from haast.tree import DraftTree

NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 60)
COMMITTED = 160  # slots in the cache, the length of a short chat


def measure_v_curve(
    target: Target,
    drafter: EagleDrafter | None,
    rounds: int = 15,
    node_counts: Sequence[int] = NODE_COUNTS,
    rows: int = 1,
) -> dict[str, Any]:
    """Median ms of `target.forward` over a chain of n nodes behind 160 committed slots, and of the draft.

    Rounds are interleaved over all n, after one round of warm-up. `v` is relative to one node. `ms_observe` is the
    head's pass over three accepted tokens, `ms_propose` the growth of one tree. With several `rows` each has n nodes.
    """
    tokens, prefix, cache = prefix_of(target, max(node_counts), rows)
    committed = cache.lengths[0]
    timed: dict[int, list[float]] = {n: [] for n in node_counts}
    drafted: list[tuple[float, float]] = []
    with target.step_threads():
        for turn in range(rounds + 1):
            for n in node_counts:
                chain = torch.arange(n, device=target.device).expand(rows, -1) % target.vocab_size
                tree = DraftTree.chain(chain)
                begun = _now(target)
                target.forward(tree, cache)
                elapsed = 1e3 * (_now(target) - begun)
                if turn:
                    timed[n].append(elapsed)
            if drafter is not None:
                drafted.append(draft_step(target, drafter, tokens, prefix))
    ms = {n: median(values) for n, values in timed.items()}
    one = ms[min(ms)]
    result: dict[str, Any] = {
        "committed_slots": committed,
        "rounds": rounds,
        "points": [{"nodes": n, "ms": value, "v": value / one} for n, value in ms.items()],
    }
    if drafter is not None:
        observe, propose = (median(values) for values in zip(*drafted[1:], strict=True))
        result["draft"] = {"ms_observe": observe, "ms_propose": propose, "c_per_step": (observe + propose) / one}
    return result


def prefix_of(target: Target, room: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, TreeCache]:
    """A prefix of 160 tokens (fewer in a small context): tokens (rows, n), their features, and the cache behind it."""
    committed = COMMITTED
    if target.context_length is not None:
        committed = min(committed, max(target.context_length - room, 5))
    tokens = torch.arange(committed, device=target.device).expand(rows, -1) % target.vocab_size
    cache = target.new_cache(rows, committed + room)
    features = target.forward(DraftTree.chain(tokens), cache, last_only=True).features
    cache.commit([range(committed)] * rows)
    return tokens, features, cache


def draft_step(
    target: Target, drafter: EagleDrafter, tokens: torch.Tensor, features: torch.Tensor
) -> tuple[float, float]:
    """Ms to observe three accepted tokens, and to propose, behind the prefix."""
    prefix, kept = tokens.shape[1] - 4, 3
    drafter.start([tokens[0].tolist()])
    drafter.observe(Accepted(tokens[:, 1 : prefix + 1], features[:, :prefix], (prefix,)))
    begun = _now(target)
    drafter.observe(Accepted(tokens[:, prefix + 1 :], features[:, prefix : prefix + kept], (kept,)))
    observed = _now(target)
    drafter.propose()
    return 1e3 * (observed - begun), 1e3 * (_now(target) - observed)


def _now(target: Target) -> float:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return perf_counter()
