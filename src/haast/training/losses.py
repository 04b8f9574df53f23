"""The losses of a head. Owns the arithmetic; knows no modules or data.

Soft cross-entropy against the teacher's top-k (EAGLE, arXiv 2401.15077, section 3.2; top-k distillation as in HASS,
arXiv 2408.15766), or its mix with the acceptance itself (LK losses, arXiv 2602.23881), over a draft vocabulary.
Gradients are made in place from the logits of one chunk, so logits for every position never exist and there is one
exponential pass.

Of one position, with p the teacher's probabilities on its k tokens and q the head's softmax:

    ce = - sum p log q                       d ce / d logits = mass(p) q - p
    acceptance = sum min(p, q)               d acceptance / d logits = q (I - sum I q),  I = 1 where q < p
    lk = w ce - (1 - w) acceptance           w = exp(- sharpness * acceptance), held constant

Where the head is bad, w is near 1 and cross-entropy leads; where it is good, what counts is acceptance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 256  # positions whose logits exist at a time: with 8k tokens 8 MB, which stay in the cache


class Sums(NamedTuple):
    """Over positions: what is minimised, cross-entropy in nats, right first choices, acceptance at temperature 1."""

    loss: Tensor
    ce: Tensor
    hits: Tensor
    acceptance: Tensor


class _TeacherLoss(torch.autograd.Function):
    """Sums over positions, with the gradients of features and of the weight's columns from `frozen` on."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        probs: Tensor,
        frozen: int,
        sharpness: float | None,
        rejected: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, ce, accepted = (features.new_zeros(()) for _ in range(3))
        hits = torch.zeros((), dtype=torch.long, device=features.device)
        wants = ctx.needs_input_grad
        gradient = torch.empty_like(features) if wants[0] else features.new_empty(0)
        trained = weight[:, frozen:]
        of_weight = torch.zeros_like(trained) if wants[1] else features.new_empty(0)
        for start in range(0, features.shape[0], _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = features[part] @ weight.T  # (chunk, vocab)
            if bias is not None:
                logits += bias
            raw = logits.gather(1, ids[part])  # (chunk, k)
            best = logits.amax(-1, keepdim=True)
            # The teacher's first choice comes first, with probability 0 where the draft vocabulary lacks it.
            hit = (raw[:, :1] >= best) & (probs[part, :1] > 0)
            hits += hit.sum()
            counts = torch.where(hit, 1.0, rejected)  # (chunk, 1): the weight of each position
            draft_probs = torch.softmax(logits, -1, out=logits)
            log_total = best - draft_probs.amax(-1, keepdim=True).log()
            own_ce = ((log_total - raw) * probs[part]).sum(-1, keepdim=True)
            own = draft_probs.gather(1, ids[part])  # q on the teacher's tokens
            overlap = torch.minimum(own, probs[part]).sum(-1, keepdim=True)
            ce += own_ce.sum()
            accepted += overlap.sum()
            share = torch.ones_like(overlap) if sharpness is None else torch.exp(-sharpness * overlap)
            loss += (counts * (share * own_ce - (1 - share) * overlap)).sum()
            if wants[0] or wants[1]:
                below = (own < probs[part]) * own * (1 - share)  # (1 - w) I q
                # w (mass q - p) - (1 - w) q (I - sum I q)
                draft_probs *= counts * (share * probs[part].sum(-1, keepdim=True) + below.sum(-1, keepdim=True))
                draft_probs.scatter_add_(1, ids[part], -counts * (share * probs[part] + below))
                if wants[0]:
                    torch.mm(draft_probs, weight, out=gradient[part])
                if wants[1]:
                    of_weight.addmm_(draft_probs.T, features[part, frozen:])
        ctx.save_for_backward(gradient, of_weight)
        ctx.frozen, ctx.wants = frozen, (wants[0], wants[1])
        ctx.mark_non_differentiable(ce, hits, accepted)
        return loss, ce, hits, accepted

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_weight = ctx.saved_tensors
        of_features = gradient * outer[0] if ctx.wants[0] else None
        whole = functional.pad(of_weight * outer[0], (ctx.frozen, 0)) if ctx.wants[1] else None
        return of_features, whole, None, None, None, None, None, None


def teacher_loss(
    features: Tensor,
    weight: Tensor,
    ids: Tensor,
    probs: Tensor,
    bias: Tensor | None = None,
    *,
    frozen: int | None = None,
    sharpness: float | None = None,
    rejected: float = 1.0,
) -> Sums:
    """Loss of softmax(features @ weight.T + bias) against the teacher's top-k, and agreement.

    A teacher's token outside the draft vocabulary is left out: its probability must be 0 here. What is left is not
    renormalised, so a position of which the draft vocabulary knows little weighs little.

    Args:
        features: (positions, width) float.
        weight: (draft vocabulary, width).
        ids: (positions, k) int64 in the draft vocabulary, the teacher's first choice first; no id twice unless its
            further probabilities are 0.
        probs: (positions, k); 0 where an id is to be ignored.
        bias: (draft vocabulary,), frozen, or None.
        frozen: leading columns of the weight that get no gradient; None is all of them.
        sharpness: of the LK mix, see the module docstring; None is cross-entropy alone.
        rejected: weight of a position whose first choice the target would not take: training on the present head's
            own rejections, the idea of on-policy distillation (Draft-OPD, arXiv 2605.29343) without decoding.

    Returns:
        Sums over positions; only `loss` has a gradient.
    """
    columns = weight.shape[1] if frozen is None else frozen
    features, probs = features.to(weight.dtype), probs.to(weight.dtype)  # under autocast they may come in bf16
    with torch.autocast(features.device.type, enabled=False):  # in-place arithmetic wants one dtype
        apply: Any = _TeacherLoss.apply  # untyped in torch
        found = apply(features, weight, bias, ids, probs, columns, sharpness, rejected)
    return Sums(*found)
