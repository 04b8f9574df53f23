"""Training objective of a head: its predictions over a packed batch and the weighted sum of their losses.

Owns the joining of head, target weights and losses. Does not know optimisers or processes. It is one module so that
DistributedDataParallel and FSDP can wrap all uses of the parameters in one call. An EAGLE head makes one prediction in
each training pass (see `training_time_test`), a block head one per slot (see `block_objective`). Medusa heads
(Medusa-1, arXiv 2401.10774, section 3.2) make one each:

    supervised pair at t      feature f_t; the teacher after t + 1 predicts x_{t+2}: the label of head 0
    head i at t               the teacher of the pair at t + i, if that pair is supervised and of the same answer

The teacher of head i has seen the i tokens in between; the head has not, so it learns the average over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from haast.heads.block import BlockHead
from haast.heads.medusa import MedusaHeads
from haast.heads.module import DraftModule
from haast.training.batches import Example, PackedBatch, pack, usable
from haast.training.block_objective import Teacher, block_objective
from haast.training.block_passes import choose_anchors
from haast.training.config import TrainConfig
from haast.training.losses import Loss, own_loss, teacher_loss
from haast.training.scaled_head import TrainedHead
from haast.training.target_weights import TargetWeights, draft_indices
from haast.training.training_time_test import chain_passes, next_is_adjacent
from haast.training.whole_layers import whole_layer_passes

ALPHAS = 5  # number of depths whose acceptance an evaluation measures
_RANKS = 10  # number of candidates per Medusa head whose accuracy is measured
_BATCH = 16  # sequences at a time in `rank_accuracies`


class _Prediction(NamedTuple):
    """A head's prediction at n positions, and the supervised pairs that it is compared with."""

    lm_input: Tensor  # (n, width): input of the LM head
    weight: Tensor  # (draft vocabulary, width) of the LM head
    rows: Tensor  # (n,): indices into the M supervised pairs, whose teachers are the labels
    state: Tensor | None = None  # (n, hidden) trained to match the target's feature; None without a feature loss


class Objective(nn.Module):
    """Loss of one batch.

    Args:
        head: the head in training.
        target_weights: the target's embedding and LM head.
        draft_vocab: (draft vocabulary,) ascending target ids.
        config: weights of the losses.
        device: of the computation.
        loss: takes the place of the cross-entropy, which is then only reported; None is the cross-entropy.
    """

    def __init__(
        self,
        head: TrainedHead,
        target_weights: TargetWeights,
        draft_vocab: Tensor,
        config: TrainConfig,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.head, self._config, self._loss = head, config, loss
        own_lm_head = isinstance(head.module, MedusaHeads) or head.module.own_lm_head
        bias = None if own_lm_head or target_weights.lm_head_bias is None else target_weights.lm_head_bias[draft_vocab]
        # Plain attributes: buffers would be broadcast to all processes, and these never change.
        self._embeddings = target_weights.embeddings.to(device)  # (vocab, hidden)
        lm_head = target_weights.lm_head
        self._lm_head_rows = (lm_head[:0] if own_lm_head else lm_head[draft_vocab]).to(device)
        # The target's columns of the LM head; columns after them are a Markov bias.
        self._frozen_columns = 0 if own_lm_head else lm_head.shape[1]
        self._bias = None if bias is None else bias.to(device)
        self._draft_index = draft_indices(draft_vocab, len(lm_head)).to(device)
        self._feature_units, self._input_units = head.scales.feature.to(device), head.input_units.to(device)

    def forward(
        self,
        batch: PackedBatch,
        noise: Tensor | None = None,
        sharpness: float | None = None,
        passes: int = 1,
        seed: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over supervised tokens, and sums to report.

        Args:
            batch: supervised positions with their teacher.
            noise: (N, width) added to the features, in units of each dimension's RMS.
            sharpness: of the LK mix; None is cross-entropy.
            passes: number of training passes of an EAGLE head; all but the first read its own states.
            seed: of the choice of a block head's anchors; None spreads them evenly.

        Returns:
            The loss: the weighted mean over predictions, times M supervised tokens. A dict of sums over supervised
            tokens: `ce`, `feature`, `accepted` and `top1` of the first prediction, `views` (M), `loss`, and for each
            prediction i the number of top-1 hits `right_i` out of `tried_i` positions.
        """
        config = self._config
        features = batch.features.to(self._input_units.dtype)
        features = features if noise is None else features + noise * self._input_units
        ids, probs = self._teacher(batch)
        if isinstance(self.head.module, BlockHead):
            labels = Teacher(self._draft_index[batch.labels], ids, probs)
            anchors = choose_anchors(batch, config.block_anchors, seed)
            given = (self.head.module, batch, self._embeddings, features, anchors, labels)
            return block_objective(*given, self._lm_head_rows, self._bias, config.block_ce)
        total = weights = features.new_zeros(())
        sums = {"views": torch.tensor(float(batch.supervised_count))}
        module = self.head.module
        predictions = (
            _medusa_predictions(module, batch, features)
            if isinstance(module, MedusaHeads)
            else self._eagle_predictions(module, batch, features, passes)
        )
        reached = features.new_ones(batch.supervised_count)  # probability that drafting gets past each supervised pair
        for number, (lm_input, weight, rows, state) in enumerate(predictions):
            decayed = features.new_full(rows.shape, config.step_decay**number)
            position_weights = reached[rows - 1] if config.reach_weights and number else decayed
            teacher, own = (ids[rows], probs[rows], self._bias), self._loss
            read = (lm_input, weight) if own is None else (lm_input.detach(), weight.detach())
            label_loss = teacher_loss(
                read[0],
                read[1],
                *teacher,
                frozen_columns=self._frozen_columns,
                sharpness=sharpness,
                rejected=config.rejected_weight,
                weights=position_weights,
            )
            learnt = label_loss.loss if own is None else own_loss(own, lm_input, weight, *teacher, position_weights)
            loss = config.ce_weight * learnt / len(rows)
            if state is not None:
                units = self._feature_units
                state, label = state.to(units), batch.target_features[rows].to(units)
                regression = functional.smooth_l1_loss(state / units, label / units, reduction="none").mean(-1)
                loss = loss + config.feature_weight * (position_weights * regression).mean()
                sums.setdefault("feature", regression.detach().mean() * batch.supervised_count)
            if not number:
                sums |= {"ce": label_loss.ce, "accepted": label_loss.acceptance.sum(), "top1": label_loss.hits}
            sums |= {f"right_{number}": label_loss.hits, f"tried_{number}": torch.tensor(float(len(rows)))}
            total, weights = total + loss, weights + position_weights.mean()
            reached = torch.zeros_like(reached)
            reached[rows] = position_weights * label_loss.acceptance.to(reached)
        loss = total / weights * batch.supervised_count
        sums["loss"] = loss.detach()
        return loss, {name: value.detach() for name, value in sums.items()}

    def _eagle_predictions(
        self, module: DraftModule, batch: PackedBatch, features: Tensor, passes: int
    ) -> Iterator[_Prediction]:
        tokens = batch.next_tokens if module.follows_token else batch.tokens
        weight = module.lm_rows(self._lm_head_rows)
        run = whole_layer_passes if module.whole_layers else chain_passes
        for state, rows in run(module, batch, self._embeddings[tokens], features, passes):
            lm_input = module.lm_input(state, batch.next_tokens[batch.queries[rows]])
            yield _Prediction(lm_input, weight, rows, state if self.head.regresses else None)

    def _teacher(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The teacher's top tokens as draft vocabulary indices, and their probabilities: 0 for ids outside of it."""
        k = self._config.teacher_top or batch.teacher_ids.shape[1]
        ids = self._draft_index[batch.teacher_ids[:, :k]]
        probs = batch.teacher_probs[:, :k].to(self._input_units.dtype)
        if self._config.teacher_top:
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-6)
        return ids.clamp_min(0), probs * (ids >= 0)


def _medusa_predictions(module: MedusaHeads, batch: PackedBatch, features: Tensor) -> Iterator[_Prediction]:
    states = features[batch.queries]  # (M, hidden)
    heads: Any = module
    for head, (origin, rows) in zip(heads, _medusa_pairs(batch), strict=False):
        yield _Prediction(head[:-1](states[origin]), head[-1].weight, rows)


def _medusa_pairs(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Per Medusa head: indices of the supervised pairs that it reads, and of those whose teachers are its labels."""
    adjacent = next_is_adjacent(batch)
    origin = rows = torch.arange(batch.supervised_count, device=adjacent.device)
    while rows.numel():
        yield origin, rows
        keep = adjacent[rows]
        origin, rows = origin[keep], rows[keep] + 1


@torch.no_grad()
def rank_accuracies(module: MedusaHeads, examples: Sequence[Example], draft_vocab: Tensor) -> list[list[float]]:
    """[i][r]: share of positions of `examples` where candidate r of Medusa head i is the target's top token.

    Raises:
        ValueError: no answer is long enough for the last head.
    """
    ranks = min(_RANKS, len(draft_vocab))
    hits, tried = torch.zeros(module.config.heads, ranks), torch.zeros(module.config.heads)
    supervised = usable(examples)
    for start in range(0, len(supervised), _BATCH):
        batch = pack(supervised[start : start + _BATCH])
        states = batch.features[batch.queries].to(next(module.parameters()).dtype)
        for number, (head, (origin, rows)) in enumerate(zip(module, _medusa_pairs(batch), strict=False)):
            candidates = draft_vocab[head(states[origin]).topk(ranks).indices]  # (n, ranks)
            hits[number] += (candidates == batch.teacher_ids[rows, :1]).sum(0).cpu()
            tried[number] += len(rows)
    if not bool(tried.all()):
        raise ValueError(f"no answer is long enough for {module.config.heads} heads: train fewer, or on longer answers")
    accuracies: list[list[float]] = (hits / tried.unsqueeze(1)).tolist()
    return [[round(accuracy, 5) for accuracy in row] for row in accuracies]
