"""Finds the first difference of two decoded texts and classifies it as a floating-point tie or a bug.

Owns the classification. A greedy tie: both tokens are within the tolerance of the best processed logit. A sampled tie
(same seed): the position's random number is within the tolerance of both tokens' intervals of the cumulative
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.sampling import Sampler
from haast.target.kv_pool import common_length
from haast.target.target import Target
from haast.tree import DraftTree

# Relative to the largest finite processed logit. Chosen by judgement from each dtype's precision, not measured.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_CHUNK = 512  # positions per forward


@dataclass(frozen=True)
class Divergence:
    """The first difference of two texts."""

    index: int  # of the first differing new token
    vanilla: int | None  # vanilla's token; None if that text has ended
    drafted: int | None
    gap: float  # rounding error that would explain the difference: in logits (greedy) or probability (sampled)
    top2_gap: float  # between the two best processed logits at this position
    allowed: float  # largest gap of a tie
    kind: str  # "tie" or "bug"


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded without and with drafting."""

    vanilla: tuple[int, ...]
    drafted: tuple[int, ...]
    vanilla_stats: Stats
    drafted_stats: Stats
    divergence: Divergence | None


def tolerance(dtype: torch.dtype) -> float:
    """Largest gap, relative to the largest processed logit, that counts as rounding for a target of this dtype."""
    return _TOLERANCES[dtype]


def compare(
    target: Target, drafter: Drafter, prompt: Sequence[int], sampling: SamplingParams, stop: StopParams
) -> Comparison:
    """Decode `prompt` without and with drafting, and classify the first difference.

    Args:
        target: the model for both runs.
        drafter: the drafter under test.
        prompt: token ids.
        sampling: parameters and seed for both runs.
        stop: stop rules for both runs.
    """
    runs = []
    for each in (VanillaDrafter(), drafter):
        stats = Stats()
        (tokens,) = Engine(target, each).complete([prompt], sampling, stop, stats)
        runs.append((tuple(tokens), stats))
    (vanilla, vanilla_stats), (drafted, drafted_stats) = runs
    divergence = diagnose(target, prompt, vanilla, drafted, sampling)
    return Comparison(vanilla, drafted, vanilla_stats, drafted_stats, divergence)


def diagnose(
    target: Target, prompt: Sequence[int], vanilla: Sequence[int], drafted: Sequence[int], sampling: SamplingParams
) -> Divergence | None:
    """Classify the first difference of two texts generated after `prompt`; None if they are equal.

    If one text ends earlier, after equal tokens, that is a bug: stop rules depend on tokens, not on logits.
    """
    if tuple(vanilla) == tuple(drafted):
        return None
    index = common_length(vanilla, drafted)
    first, second = (text[index] if index < len(text) else None for text in (vanilla, drafted))
    if first is None or second is None:
        return Divergence(index, first, second, float("inf"), float("inf"), 0.0, "bug")
    history = [*prompt, *vanilla[:index]]
    logits = logits_after(target, history)
    sampler = Sampler(sampling)
    scores = sampler.scores(history, logits).double()
    finite = scores[scores.isfinite()]
    best = finite.topk(min(2, len(finite))).values
    top2 = float(best[0] - best[-1])
    allowed = tolerance(target.dtype) * max(float(finite.abs().max()), 1.0)
    if sampling.temperature == 0:
        gap = float(best[0] - torch.minimum(scores[first], scores[second]))
    else:
        probs = sampler.probs(history, logits)
        point = sampler.draw(len(history))
        gap = max(_distance(probs, first, point), _distance(probs, second, point))
    return Divergence(index, first, second, gap, top2, allowed, "tie" if gap <= allowed else "bug")


def logits_after(target: Target, history: Sequence[int]) -> Tensor:
    """The target's raw logits (vocab,) for the token after `history`: plain forwards with a fresh KV cache."""
    cache = target.new_cache(1, len(history))
    for begin in range(0, len(history), _CHUNK):
        tokens = torch.tensor([list(history[begin : begin + _CHUNK])], device=target.device)
        output = target.forward(DraftTree.chain(tokens), cache, last_only=True)
        cache.advance([tokens.shape[1]])
    return output.logits[0, 0]


def _distance(probs: Tensor, token: int, point: float) -> float:
    """Distance of `point` (in [0, 1)) from `token`'s interval of the cumulative distribution; inf if it is empty."""
    cumulative = probs.cumsum(0)
    upper = float(cumulative[token])
    lower = upper - float(probs[token])
    point *= float(cumulative[-1])
    if probs[token] == 0:
        return float("inf")
    return max(lower - point, point - upper, 0.0)
