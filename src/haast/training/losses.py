"""The two losses of a head (EAGLE, arXiv 2401.15077, section 3.2). Owns the arithmetic; knows no modules or data.

Soft cross-entropy against the teacher's top-k, over a draft vocabulary, with the gradient made in place from the logits
of one chunk: logits for every position never exist, and there is one exponential pass. Smooth L1 on features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 256  # positions whose logits exist at a time: with 8k tokens 8 MB, which stay in the cache


class _TeacherCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; only the features get a gradient (the LM head is frozen)."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = features.new_zeros(())
        hits = torch.zeros((), dtype=torch.long, device=features.device)
        gradient = torch.empty_like(features)
        wants_gradient = ctx.needs_input_grad[0]
        for start in range(0, features.shape[0], _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = features[part] @ weight.T  # (chunk, vocab)
            if bias is not None:
                logits += bias
            raw = logits.gather(1, ids[part])  # (chunk, k)
            best = logits.amax(-1, keepdim=True)
            # The teacher's first choice comes first, with probability 0 where the draft vocabulary lacks it.
            hits += ((raw[:, :1] >= best) & (probs[part, :1] > 0)).sum()
            law = torch.softmax(logits, -1, out=logits)
            log_total = best - law.amax(-1, keepdim=True).log()
            total += ((log_total - raw) * probs[part]).sum()
            if wants_gradient:
                mass = probs[part].sum(-1, keepdim=True)
                law.scatter_add_(1, ids[part], -probs[part] / mass.clamp_min(1e-12))
                torch.mm(law, weight, out=gradient[part])
                gradient[part] *= mass
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None, None


def teacher_cross_entropy(
    features: Tensor, weight: Tensor, ids: Tensor, probs: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(features @ weight.T + bias) against the teacher's top-k, and agreement.

    A teacher's token outside the draft vocabulary is left out: its probability must be 0 here. What is left is not
    renormalised, so a position of which the draft vocabulary knows little weighs little.

    Args:
        features: (positions, hidden) float.
        weight: (draft vocabulary, hidden), frozen.
        ids: (positions, k) int64 in the draft vocabulary, the teacher's first choice first.
        probs: (positions, k); 0 where an id is to be ignored.
        bias: (draft vocabulary,), frozen, or None.

    Returns:
        The mean cross-entropy in nats, and how many positions' best token is the teacher's first choice.
    """
    total, hits = _TeacherCrossEntropy.apply(features, weight, bias, ids, probs)  # type: ignore[no-untyped-call]
    return total / features.shape[0], hits


def feature_loss(extrapolated: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1, mean over (positions, hidden); both are in units of each dimension's rms."""
    return functional.smooth_l1_loss(extrapolated, wanted)
