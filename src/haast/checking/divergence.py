"""The first place where two texts part, and why: a floating-point tie, or a bug.

Owns the judgement. Greedy: both tokens must be within the tolerance of the best processed logit. Sampled with one seed:
the position's own draw must be within the tolerance of both tokens' stretches of the cumulative distribution.
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
_CHUNK = 512  # positions a forward


@dataclass(frozen=True)
class Divergence:
    """Where two texts part."""

    index: int  # of the first differing new token
    vanilla: int | None  # its token; None where that text has ended
    drafted: int | None
    gap: float  # what would have to be rounded away: logits (greedy) or probability (sampled)
    top2_gap: float  # between the best two processed logits there
    allowed: float  # gap up to which it is a tie
    kind: str  # "tie" or "bug"


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded twice."""

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
    """Decode `prompt` without and with drafting, and judge the first difference.

    Args:
        target: the model; both runs use it.
        drafter: what is under test.
        prompt: token ids.
        sampling: one distribution and seed for both.
        stop: when to end, for both.
    """
    runs = []
    for each in (VanillaDrafter(), drafter):
        stats = Stats()
        (tokens,) = Engine(target, each).complete([prompt], sampling, stop, stats)
        runs.append((tuple(tokens), stats))
    (vanilla, vanilla_stats), (drafted, drafted_stats) = runs
    found = diagnose(target, prompt, vanilla, drafted, sampling)
    return Comparison(vanilla, drafted, vanilla_stats, drafted_stats, found)


def diagnose(
    target: Target, prompt: Sequence[int], vanilla: Sequence[int], drafted: Sequence[int], sampling: SamplingParams
) -> Divergence | None:
    """Judge the first difference of two texts that followed `prompt`; None where they are equal.

    A text that ends while the other goes on, after equal tokens, is a bug: stop rules see tokens, not logits.
    """
    if tuple(vanilla) == tuple(drafted):
        return None
    index = common_length(vanilla, drafted)
    mine, theirs = (text[index] if index < len(text) else None for text in (vanilla, drafted))
    if mine is None or theirs is None:
        return Divergence(index, mine, theirs, float("inf"), float("inf"), 0.0, "bug")
    history = [*prompt, *vanilla[:index]]
    logits = logits_after(target, history)
    sampler = Sampler(sampling)
    scores = sampler.scores(history, logits).double()
    finite = scores[scores.isfinite()]
    best = finite.topk(min(2, len(finite))).values
    top2 = float(best[0] - best[-1])
    allowed = tolerance(target.dtype) * max(float(finite.abs().max()), 1.0)
    if sampling.temperature == 0:
        gap = float(best[0] - torch.minimum(scores[mine], scores[theirs]))
    else:
        probs = sampler.probs(history, logits)
        point = sampler.draw(len(history))
        gap = max(_distance(probs, mine, point), _distance(probs, theirs, point))
    return Divergence(index, mine, theirs, gap, top2, allowed, "tie" if gap <= allowed else "bug")


def logits_after(target: Target, history: Sequence[int]) -> Tensor:
    """The target's raw logits (vocab,) for the token that follows `history`: a plain forward, nothing cached."""
    cache = target.new_cache(1, len(history))
    for begin in range(0, len(history), _CHUNK):
        tokens = torch.tensor([list(history[begin : begin + _CHUNK])], device=target.device)
        output = target.forward(DraftTree.chain(tokens), cache, last_only=True)
        cache.advance([tokens.shape[1]])
    return output.logits[0, 0]


def _distance(probs: Tensor, token: int, point: float) -> float:
    """How far `point` (in [0, 1)) lies outside `token`'s stretch of the cumulative distribution; inf if it has none."""
    cumulative = probs.cumsum(0)
    upper = float(cumulative[token])
    lower = upper - float(probs[token])
    point *= float(cumulative[-1])
    if probs[token] == 0:
        return float("inf")
    return max(lower - point, point - upper, 0.0)
