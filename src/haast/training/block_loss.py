"""Loss of a block head's logits (DSpark, arXiv 2607.05147): a CE + (1 - a) L1, computed in place, chunk by chunk.

Owns the arithmetic. For one position, with p the teacher's probabilities on its k tokens, q the head's softmax and y
the next token of the text:

    ce = - log q_y, left out if the draft vocabulary lacks y         d ce / d logits = q - 1_y
    overlap = sum min(p, q)                                          d overlap / d logits = q (I - sum I q), I = [q < p]
    l1 = |p - q|_1 = 2 (1 - overlap)

The teacher's mass outside of its k tokens, and of the draft vocabulary, counts as disagreement. The overlap is the
probability that sampling from the target accepts a draft: the confidence head learns it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from haast.training.losses import ChunkedLoss, LogitGradients, product_dtype


class BlockSums(NamedTuple):
    """Sums over positions of the loss and the cross-entropy, top-1 hits; and the overlap per position (n,)."""

    loss: Tensor
    ce: Tensor
    hits: Tensor
    overlap: Tensor


class _BlockLoss(ChunkedLoss):
    """Gradients for the features, and for the weight's columns from `frozen_columns` on."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ids: Tensor,
        probs: Tensor,
        frozen_columns: int,
        ce_weight: float,
        products: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        l1_weight = 1 - ce_weight
        loss, ce, hits = (features.new_zeros(()) for _ in range(3))
        overlaps = features.new_empty(len(features))
        gradients = LogitGradients(ctx, features, weight, bias, frozen_columns, products)
        for part, logits in gradients.chunks():
            label = labels[part].clamp_min(0).unsqueeze(1)
            known = (labels[part] >= 0).unsqueeze(1).to(logits)
            top = logits.gather(1, ids[part, :1])
            hits += ((top >= logits.amax(-1, keepdim=True)) & (probs[part, :1] > 0)).sum()
            position_ce = known * (logits.logsumexp(-1, keepdim=True) - logits.gather(1, label))
            draft_probs = torch.softmax(logits, -1, out=logits)
            head_probs = draft_probs.gather(1, ids[part])  # q on the teacher's tokens
            below = (head_probs < probs[part]) * head_probs  # I q
            overlap = torch.minimum(head_probs, probs[part]).sum(-1, keepdim=True)
            overlaps[part] = overlap.squeeze(1)
            ce += position_ce.sum()
            loss += (ce_weight * position_ce + l1_weight * 2 * (1 - overlap)).sum()
            if gradients.needed:
                draft_probs *= ce_weight * known + 2 * l1_weight * below.sum(-1, keepdim=True)
                draft_probs.scatter_add_(1, ids[part], -2 * l1_weight * below)
                draft_probs.scatter_add_(1, label, -ce_weight * known)
                gradients.add(part, draft_probs)
        gradients.save(ce, hits, overlaps)
        return loss, ce, hits, overlaps


def block_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    probs: Tensor,
    bias: Tensor | None = None,
    *,
    frozen_columns: int = 0,
    ce_weight: float = 0.1,
) -> BlockSums:
    """The loss of softmax(features @ weight.T + bias) at n positions; only `loss` has a gradient.

    Args:
        features: (n, width) float.
        weight: (draft vocabulary, width).
        labels: (n,) int64 in the draft vocabulary, the next tokens of the text; -1 for tokens outside of it.
        ids: (n, k) int64 in the draft vocabulary, the teacher's top token first.
        probs: (n, k), the teacher's probabilities; 0 for an id to ignore.
        bias: (draft vocabulary,) without a gradient, or None.
        frozen_columns: number of leading weight columns without a gradient.
        ce_weight: a, between 0 and 1.
    """
    products = product_dtype(weight)
    features, probs = features.to(weight.dtype), probs.to(weight.dtype)  # under autocast they may be bf16
    with torch.autocast(features.device.type, enabled=False):  # in-place arithmetic needs one dtype
        apply: Any = _BlockLoss.apply  # untyped in torch
        return BlockSums(*apply(features, weight, bias, labels, ids, probs, frozen_columns, ce_weight, products))
