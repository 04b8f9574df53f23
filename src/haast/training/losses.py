"""Losses of a head. Owns the arithmetic; does not know modules or data.

Soft cross-entropy against the teacher's top-k (EAGLE, arXiv 2401.15077, section 3.2; top-k distillation as in HASS,
arXiv 2408.15766), or its mix with the acceptance rate (LK losses, arXiv 2602.23881), over a draft vocabulary.
Gradients are computed in place from the logits of one chunk, so the logits of all positions are never stored and there
is one exponential pass.

For one position, with p the teacher's probabilities on its k tokens and q the head's softmax:

    ce = - sum p log q                       d ce / d logits = mass(p) q - p
    acceptance = sum min(p, q)               d acceptance / d logits = q (I - sum I q),  I = 1 where q < p
    lk = w ce - (1 - w) acceptance           w = exp(- sharpness * acceptance), held constant

Where the head is bad, w is near 1 and cross-entropy dominates; where it is good, acceptance dominates.

A `Loss` of your own replaces both. Autograd computes its gradient, so the logits of all positions are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 256  # positions per chunk: with 8k tokens 8 MB of logits, which stay in the CPU cache


class Loss(ABC):
    """A loss of your own, in place of the soft cross-entropy: `train(..., loss=...)`; see `examples/own_loss.py`.

    Attributes:
        name: with its settings, if it has any. It is stored in checkpoints and in the head's files, and a run can only
            be resumed with a loss of the same name.
    """

    name: str

    @abstractmethod
    def __call__(self, logits: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
        """The loss at n positions, which need not be of one sequence.

        Called once for each training pass or Medusa head. Its values are weighted by `ce_weight`, and by `step_decay`
        or `reach_weights`. It has no parameters.

        Args:
            logits: (n, draft vocabulary) float, of the head.
            ids: (n, k) int64, the teacher's best tokens as indices into the draft vocabulary, the best one first.
            probs: (n, k) float, the teacher's probabilities of these tokens, renormalised only by `teacher_top`; 0 for
                a token outside the draft vocabulary, whose id then means nothing.

        Returns:
            (n,) float, one value per position, differentiable in `logits`.
        """


class Sums(NamedTuple):
    """Sums over positions of the loss, cross-entropy in nats, top-1 hits; per position (n,), acceptance at T = 1."""

    loss: Tensor
    ce: Tensor
    hits: Tensor
    acceptance: Tensor


class ChunkedLoss(torch.autograd.Function):
    """A loss of softmax(features @ weight.T + bias), of which `forward` computes the gradients too (`LogitGradients`).

    The first two arguments are features and weight. Only the first result has a gradient.
    """

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight_gradient = ctx.saved_tensors
        feature_gradient = gradient * outer[0] if ctx.needs_grad[0] else None
        whole = functional.pad(weight_gradient * outer[0], (ctx.frozen_columns, 0)) if ctx.needs_grad[1] else None
        return feature_gradient, whole, *[None] * (len(ctx.needs_input_grad) - 2)


class LogitGradients:
    """Logits of a `ChunkedLoss` chunk by chunk, and gradients for features and the weight's trained columns.

    Args:
        ctx: of the autograd function, in whose `forward` this is used.
        features, weight, bias: (n, width), (draft vocabulary, width) and (draft vocabulary,) or None.
        frozen_columns: columns of the weight before this one get no gradient.
        products: dtype of the matrix products' factors; sums and everything else have the features' dtype.
    """

    def __init__(
        self,
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        frozen_columns: int,
        products: torch.dtype,
    ) -> None:
        self._ctx, self._bias, self._frozen, self._products = ctx, bias, frozen_columns, products
        self._features, self._weight = features.to(products), weight.to(products)
        of_features, of_weight = ctx.needs_input_grad[:2]
        self.needed, self._dtype = of_features or of_weight, features.dtype
        self._gradient = torch.empty_like(features) if of_features else features.new_empty(0)
        trained = weight[:, frozen_columns:]
        self._weight_gradient = torch.zeros_like(trained) if of_weight else features.new_empty(0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk of positions, and its logits (chunk, draft vocabulary)."""
        for start in range(0, len(self._features), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = (self._features[part] @ self._weight.T).to(self._dtype)
            if self._bias is not None:
                logits += self._bias
            yield part, logits

    def add(self, part: slice, of_logits: Tensor) -> None:
        """Add a chunk's gradient (chunk, draft vocabulary) for its logits."""
        of_logits, mixed = of_logits.to(self._products), self._products != self._dtype
        if self._ctx.needs_input_grad[0]:
            if mixed:
                self._gradient[part] = of_logits @ self._weight
            else:
                torch.mm(of_logits, self._weight, out=self._gradient[part])
        if self._ctx.needs_input_grad[1]:
            trained = self._features[part, self._frozen :]
            if mixed:
                self._weight_gradient += of_logits.T @ trained
            else:
                self._weight_gradient.addmm_(of_logits.T, trained)

    def save(self, *undifferentiated: Tensor) -> None:
        """Keep the gradients for `ChunkedLoss.backward`; the given results have none."""
        self._ctx.save_for_backward(self._gradient, self._weight_gradient)
        self._ctx.frozen_columns, self._ctx.needs_grad = self._frozen, self._ctx.needs_input_grad[:2]
        self._ctx.mark_non_differentiable(*undifferentiated)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of matrix products with a weight: autocast's for an fp32 weight where it is on, as for any other layer."""
    device = weight.device.type
    mixed = weight.dtype is torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else weight.dtype


class _TeacherLoss(ChunkedLoss):
    """Sums over positions, with gradients for the features and for the weight's columns from `frozen_columns` on."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        probs: Tensor,
        frozen_columns: int,
        sharpness: float | None,
        rejected: float,
        weights: Tensor | None,
        products: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, ce = features.new_zeros(()), features.new_zeros(())
        acceptance = features.new_empty(len(features))
        hits = torch.zeros((), dtype=torch.long, device=features.device)
        gradients = LogitGradients(ctx, features, weight, bias, frozen_columns, products)
        for part, logits in gradients.chunks():
            teacher_logits = logits.gather(1, ids[part])  # (chunk, k): the head's logits of the teacher's tokens
            max_logit = logits.amax(-1, keepdim=True)
            # The teacher's top token comes first; its probability is 0 if the draft vocabulary lacks it.
            hit = (teacher_logits[:, :1] >= max_logit) & (probs[part, :1] > 0)
            hits += hit.sum()
            position_weight = torch.where(hit, 1.0, rejected)  # (chunk, 1)
            if weights is not None:
                position_weight = position_weight * weights[part].unsqueeze(1)
            draft_probs = torch.softmax(logits, -1, out=logits)
            log_total = max_logit - draft_probs.amax(-1, keepdim=True).log()
            position_ce = ((log_total - teacher_logits) * probs[part]).sum(-1, keepdim=True)
            head_probs = draft_probs.gather(1, ids[part])  # q on the teacher's tokens
            overlap = torch.minimum(head_probs, probs[part]).sum(-1, keepdim=True)
            ce += position_ce.sum()
            acceptance[part] = overlap.squeeze(1)
            ce_weight = torch.ones_like(overlap) if sharpness is None else torch.exp(-sharpness * overlap)
            loss += (position_weight * (ce_weight * position_ce - (1 - ce_weight) * overlap)).sum()
            if gradients.needed:
                below = (head_probs < probs[part]) * head_probs * (1 - ce_weight)  # (1 - w) I q
                # w (mass q - p) - (1 - w) q (I - sum I q)
                draft_probs *= position_weight * (
                    ce_weight * probs[part].sum(-1, keepdim=True) + below.sum(-1, keepdim=True)
                )
                draft_probs.scatter_add_(1, ids[part], -position_weight * (ce_weight * probs[part] + below))
                gradients.add(part, draft_probs)
        gradients.save(ce, hits, acceptance)
        return loss, ce, hits, acceptance


def teacher_loss(
    features: Tensor,
    weight: Tensor,
    ids: Tensor,
    probs: Tensor,
    bias: Tensor | None = None,
    *,
    frozen_columns: int | None = None,
    sharpness: float | None = None,
    rejected: float = 1.0,
    weights: Tensor | None = None,
) -> Sums:
    """Loss of softmax(features @ weight.T + bias) against the teacher's top-k, and agreement.

    The caller sets the probability of teacher tokens outside the draft vocabulary to 0. The others are not
    renormalised, so a position that the draft vocabulary covers poorly has a small weight.

    Args:
        features: (positions, width) float.
        weight: (draft vocabulary, width).
        ids: (positions, k) int64 in the draft vocabulary, the teacher's top token first; a repeated id must have
            probability 0.
        probs: (positions, k); 0 for an id to ignore.
        bias: (draft vocabulary,) without a gradient, or None.
        frozen_columns: number of leading weight columns without a gradient; None is all of them.
        sharpness: of the LK mix, see the module docstring; None is cross-entropy alone.
        rejected: weight of a position where the target would reject the head's first choice. This trains on the
            current head's rejections, as on-policy distillation does (Draft-OPD, arXiv 2605.29343), without decoding.
        weights: (positions,) of each position's loss; None is 1.

    Returns:
        Sums over positions, and acceptance; only `loss` has a gradient.
    """
    columns = weight.shape[1] if frozen_columns is None else frozen_columns
    products = product_dtype(weight)
    features, probs = features.to(weight.dtype), probs.to(weight.dtype)  # under autocast they may be bf16
    with torch.autocast(features.device.type, enabled=False):  # in-place arithmetic needs one dtype
        apply: Any = _TeacherLoss.apply  # untyped in torch
        sums = apply(features, weight, bias, ids, probs, columns, sharpness, rejected, weights, products)
    return Sums(*sums)


def own_loss(
    loss: Loss,
    features: Tensor,
    weight: Tensor,
    ids: Tensor,
    probs: Tensor,
    bias: Tensor | None,
    weights: Tensor,
) -> Tensor:
    """The weighted sum over positions of a `Loss`. The arguments are as for `teacher_loss`.

    Raises:
        ValueError: it does not return one value per position.
    """
    products = product_dtype(weight)
    with torch.autocast(features.device.type, enabled=False):
        logits = functional.linear(features.to(products), weight.to(products)).to(weight.dtype)
        logits = logits if bias is None else logits + bias  # (positions, draft vocabulary)
        values = loss(logits, ids, probs.to(weight.dtype))
    if values.shape != logits.shape[:1]:
        raise ValueError(
            f"the loss {loss.name!r} returned {tuple(values.shape)}: return one value for each of the {len(logits)} "
            f"positions, without their mean"
        )
    return (values * weights).sum()
