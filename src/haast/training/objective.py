"""What a head is trained on, as one module: passes over a packed batch and the weighted sum of their losses.

Owns the joining of head, frozen ends and losses. Knows no optimiser and no processes. It is a module of its own so that
DistributedDataParallel and FSDP can wrap everything that uses the parameters in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haast.training.batches import PackedBatch
from haast.training.config import TrainConfig
from haast.training.losses import feature_loss, teacher_loss
from haast.training.normalized_head import TrainedHead
from haast.training.target_weights import Frozen, draft_places
from haast.training.training_time_test import chain_passes

ALPHAS = 5  # depths whose acceptance an evaluation tells


class Objective(nn.Module):
    """Loss of one batch.

    Args:
        head: in training.
        frozen: the target's ends.
        draft_vocab: (draft vocabulary,) ascending target ids.
        config: weights of the losses.
        device: where it is computed.
    """

    def __init__(
        self,
        head: TrainedHead,
        frozen: Frozen,
        draft_vocab: Tensor,
        config: TrainConfig,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    ) -> None:
        super().__init__()
        self.head, self._config = head, config
        scales = head.scales
        own = head.rows() is not None
        rows = frozen.head[:0] if own else (frozen.head[draft_vocab] * scales.feature).contiguous()
        bias = None if own or frozen.bias is None else frozen.bias[draft_vocab]
        # Plain attributes: as buffers they would be sent from process to process, and they never change.
        self._embeddings = (frozen.embeddings / scales.embedding).to(device)  # (vocab, hidden)
        self._frozen_rows = rows.to(device)  # (draft vocabulary, hidden)
        self._bias = None if bias is None else bias.to(device)
        self._draft_index = draft_places(draft_vocab, len(frozen.head)).to(device)
        self._feature_units = scales.feature.to(device)
        captured = scales.hidden if head.reads_captured else None
        self._input_units = self._feature_units if captured is None else captured.to(device)

    def forward(
        self, batch: PackedBatch, noise: Tensor | None = None, sharpness: float | None = None, passes: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over views, and sums to report.

        Args:
            batch: supervised positions with their teacher.
            noise: (N, width) added to the whitened features.
            sharpness: of the LK mix; None is cross-entropy.
            passes: 1 and further ones on the head's own states.

        Returns:
            Loss, weighted over passes, times the views; sums over views of `ce`, `feature`, `accepted` and `top1` of
            the first pass, `views`, and per pass i the right first choices `right_i` and their positions `tried_i`.
        """
        head, config = self.head, self._config
        features = batch.features.to(self._input_units.dtype) / self._input_units
        features = features if noise is None else features + noise
        ids, probs = self._teacher(batch)
        weight, frozen = self._rows()
        total, weights, sums = features.new_zeros(()), 0.0, {"views": torch.tensor(float(batch.views))}
        held = batch.next_tokens if head.follows_token else batch.tokens
        for number, (output, rows) in enumerate(chain_passes(head, batch, self._embeddings[held], features, passes)):
            read = self._read(output, batch.next_tokens[batch.queries[rows]])
            found = teacher_loss(
                read,
                weight,
                ids[rows],
                probs[rows],
                self._bias,
                frozen=frozen,
                sharpness=sharpness,
                rejected=config.rejected_weight,
            )
            loss = config.ce_weight * found.loss / len(rows)
            if head.regresses:
                wanted = batch.wanted[rows].to(output.dtype) / self._feature_units
                regression = feature_loss(output, wanted)
                loss = loss + config.feature_weight * regression
                sums.setdefault("feature", regression.detach() * batch.views)
            if not number:
                sums |= {"ce": found.ce, "accepted": found.acceptance, "top1": found.hits}
            sums |= {f"right_{number}": found.hits, f"tried_{number}": torch.tensor(float(len(rows)))}
            total = total + config.step_decay**number * loss
            weights += config.step_decay**number
        loss = total / weights * batch.views
        sums["loss"] = loss.detach()
        return loss, {name: value.detach() for name, value in sums.items()}

    def _teacher(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The teacher's best tokens in the draft vocabulary; ids outside get probability 0."""
        most = self._config.teacher_top or batch.teacher_ids.shape[1]
        ids = self._draft_index[batch.teacher_ids[:, :most]]
        probs = batch.teacher_probs[:, :most].to(self._input_units.dtype)
        if self._config.teacher_top:  # a teacher cut short is taken as certain of what is left
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-6)
        return ids.clamp_min(0), probs * (ids >= 0)

    def _rows(self) -> tuple[Tensor, int]:
        """The LM head's weight over the draft vocabulary, and how many leading columns of it are frozen."""
        own = self.head.rows()
        rows, frozen = (self._frozen_rows, self._frozen_rows.shape[1]) if own is None else (own, 0)
        if self.head.config.markov_rank:
            rows = torch.cat([rows, self.head.markov_rows], dim=1)
        return rows, frozen

    def _read(self, states: Tensor, before: Tensor) -> Tensor:
        """What the LM head reads; `before` (n,) are the tokens before the drafted ones."""
        read, bigram = self.head.predict(states), self.head.embed_before(before)
        return read if bigram is None else torch.cat([read, bigram], dim=1)
