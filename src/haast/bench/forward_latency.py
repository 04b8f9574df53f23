"""Measured cost of a target forward over n nodes, v(n), and of the draft step. Owns the two measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from haast.core import Accepted
from haast.drafters.eagle import EagleDrafter
from haast.target.kv_cache import KVCache
from haast.target.target import Target
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
    """Median ms of `target.forward` over a chain of n nodes after 160 committed slots, and of the draft.

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


def prefix_of(target: Target, room: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, KVCache]:
    """A prefix of 160 tokens (fewer in a small context): tokens (rows, n), their features, and the cache after it."""
    committed = COMMITTED
    if target.context_length is not None:
        committed = min(committed, max(target.context_length - room, 5))
    tokens = torch.arange(committed, device=target.device).expand(rows, -1) % target.vocab_size
    cache = target.new_cache(rows, committed + room)
    features = target.forward(DraftTree.chain(tokens), cache, last_only=True).features
    cache.advance([committed] * rows)
    return tokens, features, cache


def draft_step(
    target: Target, drafter: EagleDrafter, tokens: torch.Tensor, features: torch.Tensor
) -> tuple[float, float]:
    """Ms to observe three accepted tokens, and to propose, after the prefix."""
    prefix, kept = tokens.shape[1] - 4, 3
    said, kv = tokens[0].tolist(), target.pool.sequence()
    kv.reserve(len(said) + drafter.room)
    state = drafter.begin(said[: prefix + 1], kv, 0)
    try:
        drafter.observe([state], _accepted(tokens[:, 1 : prefix + 1], features[:, :prefix]))
        begun = _now(target)
        drafter.observe([state], _accepted(tokens[:, prefix + 1 :], features[:, prefix : prefix + kept]))
        observed = _now(target)
        drafter.propose([state])
        return 1e3 * (observed - begun), 1e3 * (_now(target) - observed)
    finally:
        drafter.end(state)
        kv.release()


def _accepted(tokens: torch.Tensor, features: torch.Tensor) -> Accepted:
    """As of a prompt, so that the head runs over it at once."""
    return Accepted(tokens, features, torch.tensor([tokens.shape[1]], device=tokens.device))


def _now(target: Target) -> float:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return perf_counter()
