"""What a head is trained on, as one module: its guesses over a packed batch and the weighted sum of their losses.

Owns the joining of head, frozen ends and losses. Knows no optimiser and no processes. It is a module of its own so that
DistributedDataParallel and FSDP can wrap everything that uses the parameters in one call. An EAGLE head guesses once in
each training pass (see `training_time_test`). Medusa's heads (Medusa-1, arXiv 2401.10774, section 3.2) guess once each:

    supervised pair at t      feature f_t; teacher after t + 1, which predicts x_{t+2}: what head 0 guesses
    head i at t               the teacher of the pair at t + i, if that pair is supervised and of the same answer

The teacher of head i knows the i tokens between, which the head does not: what it learns is their average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from haast.heads.medusa import MedusaHeads
from haast.heads.module import DraftModule
from haast.training.batches import Example, PackedBatch, pack, usable
from haast.training.config import TrainConfig
from haast.training.losses import teacher_loss
from haast.training.scaled_head import TrainedHead
from haast.training.target_weights import Frozen, draft_places
from haast.training.training_time_test import chain_passes, follows

ALPHAS = 5  # depths whose acceptance an evaluation tells
_RANKS = 10  # guesses per Medusa head whose accuracy is measured
_BATCH = 16  # sequences at a time there


class _Guess(NamedTuple):
    """What a head says at n positions, and where it is held against the teacher."""

    read: Tensor  # (n, width): what the LM head reads
    weight: Tensor  # (draft vocabulary, width)
    rows: Tensor  # (n,): of the M supervised pairs, those whose teachers are aimed at
    state: Tensor | None = None  # (n, hidden) that aims at the target's feature


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
        own = isinstance(head.module, MedusaHeads) or head.module.own_lm_head
        bias = None if own or frozen.bias is None else frozen.bias[draft_vocab]
        # Plain attributes: as buffers they would be sent from process to process, and they never change.
        self._embeddings = frozen.embeddings.to(device)  # (vocab, hidden)
        self._frozen_rows = (frozen.head[:0] if own else frozen.head[draft_vocab]).to(device)
        self._frozen_columns = 0 if own else frozen.head.shape[1]  # of the LM head: the target's, before a Markov bias
        self._bias = None if bias is None else bias.to(device)
        self._draft_index = draft_places(draft_vocab, len(frozen.head)).to(device)
        self._feature_units, self._input_units = head.scales.feature.to(device), head.input_units.to(device)

    def forward(
        self, batch: PackedBatch, noise: Tensor | None = None, sharpness: float | None = None, passes: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over views, and sums to report.

        Args:
            batch: supervised positions with their teacher.
            noise: (N, width) added to the features, in units of each dimension's rms.
            sharpness: of the LK mix; None is cross-entropy.
            passes: of an EAGLE head: 1 and further ones on its own states.

        Returns:
            Loss, weighted over guesses, times the views; sums over views of `ce`, `feature`, `accepted` and `top1` of
            the first guess, `views`, and per guess i the right first choices `right_i` and their positions `tried_i`.
        """
        config = self._config
        features = batch.features.to(self._input_units.dtype)
        features = features if noise is None else features + noise * self._input_units
        ids, probs = self._teacher(batch)
        total, weights, sums = features.new_zeros(()), 0.0, {"views": torch.tensor(float(batch.views))}
        module = self.head.module
        guesses = (
            _medusa_guesses(module, batch, features)
            if isinstance(module, MedusaHeads)
            else self._eagle_guesses(module, batch, features, passes)
        )
        for number, (read, weight, rows, state) in enumerate(guesses):
            found = teacher_loss(
                read,
                weight,
                ids[rows],
                probs[rows],
                self._bias,
                frozen=self._frozen_columns,
                sharpness=sharpness,
                rejected=config.rejected_weight,
            )
            loss = config.ce_weight * found.loss / len(rows)
            if state is not None:
                wanted = batch.wanted[rows].to(state.dtype)
                regression = functional.smooth_l1_loss(state / self._feature_units, wanted / self._feature_units)
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

    def _eagle_guesses(
        self, module: DraftModule, batch: PackedBatch, features: Tensor, passes: int
    ) -> Iterator[_Guess]:
        held = batch.next_tokens if module.follows_token else batch.tokens
        weight = module.lm_rows(self._frozen_rows)
        for state, rows in chain_passes(module, batch, self._embeddings[held], features, passes):
            read = module.lm_input(state, batch.next_tokens[batch.queries[rows]])
            yield _Guess(read, weight, rows, state if self.head.regresses else None)

    def _teacher(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The teacher's best tokens in the draft vocabulary; ids outside get probability 0."""
        most = self._config.teacher_top or batch.teacher_ids.shape[1]
        ids = self._draft_index[batch.teacher_ids[:, :most]]
        probs = batch.teacher_probs[:, :most].to(self._input_units.dtype)
        if self._config.teacher_top:  # a teacher cut short is taken as certain of what is left
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-6)
        return ids.clamp_min(0), probs * (ids >= 0)


def _medusa_guesses(module: MedusaHeads, batch: PackedBatch, features: Tensor) -> Iterator[_Guess]:
    states = features[batch.queries]  # (M, hidden)
    heads: Any = module
    for head, (origin, rows) in zip(heads, _ahead(batch), strict=False):
        yield _Guess(head[:-1](states[origin]), head[-1].weight, rows)


def _ahead(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Per Medusa head: which of the M supervised pairs it reads at, and which pairs' teachers it is held against."""
    near = follows(batch)
    origin = rows = torch.arange(batch.views, device=near.device)
    while rows.numel():
        yield origin, rows
        alive = near[rows]
        origin, rows = origin[alive], rows[alive] + 1


@torch.no_grad()
def rank_accuracies(module: MedusaHeads, examples: Sequence[Example], draft_vocab: Tensor) -> list[list[float]]:
    """[i][r]: how often the r-th best guess of head i is the target's own first choice there, over `examples`.

    Raises:
        ValueError: no answer is as long as the furthest head looks ahead.
    """
    ranks = min(_RANKS, len(draft_vocab))
    hits, tried = torch.zeros(module.config.heads, ranks), torch.zeros(module.config.heads)
    some = usable(examples)
    for start in range(0, len(some), _BATCH):
        batch = pack(some[start : start + _BATCH])
        states = batch.features[batch.queries].to(next(module.parameters()).dtype)
        for number, (head, (origin, rows)) in enumerate(zip(module, _ahead(batch), strict=False)):
            guesses = draft_vocab[head(states[origin]).topk(ranks).indices]  # (n, ranks)
            hits[number] += (guesses == batch.teacher_ids[rows, :1]).sum(0).cpu()
            tried[number] += len(rows)
    if not bool(tried.all()):
        raise ValueError(f"no answer is long enough for {module.config.heads} heads: train fewer, or on longer answers")
    found: list[list[float]] = (hits / tried.unsqueeze(1)).tolist()
    return [[round(chance, 5) for chance in row] for row in found]
