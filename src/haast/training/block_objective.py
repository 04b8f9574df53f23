"""Training objective of a block head (DSpark, arXiv 2607.05147): all slots of sampled blocks, teacher-forced.

Owns the joining of the blocks' states with labels and losses. Slots count with weights exp(-k / 4), since a draft is
reached only if those before it were accepted; a block ends before the first label that is not supervised. The Markov
head reads the text's own tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from haast.heads.block import BlockHead
from haast.training.batches import PackedBatch
from haast.training.block_loss import block_loss
from haast.training.block_passes import block_states
from haast.training.training_time_test import next_is_adjacent

_GAMMA = 4.0  # in slots
_CONFIDENCE_WEIGHT = 1.0


class Teacher(NamedTuple):
    """Of the M supervised pairs, all in the draft vocabulary."""

    labels: Tensor  # (M,): the next token of the text; -1 outside of the vocabulary
    ids: Tensor  # (M, k)
    probs: Tensor  # (M, k)


def block_objective(
    head: BlockHead,
    batch: PackedBatch,
    embeddings: Tensor,
    features: Tensor,
    anchors: Tensor,
    teacher: Teacher,
    rows: Tensor,
    bias: Tensor | None,
    ce_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted mean of the slots' losses, times M; and sums to report, as `Objective.forward` does.

    Args:
        head: the head in training.
        batch: N pairs, M of them supervised.
        embeddings: (vocab, hidden) of the target.
        features: (N, width), the target's states.
        anchors: (A,) indices into the supervised pairs.
        teacher: the labels.
        rows, bias: the target's LM head over the draft vocabulary, (drafted, hidden) and (drafted,) or None.
        ce_weight: of the cross-entropy, see `block_loss`.
    """
    states = head.normed(block_states(head, batch, embeddings, features, anchors))
    states = states[:, head.config.block_size - head.config.depths :]
    weight, frozen = head.lm_rows(rows), 0 if head.own_lm_head else rows.shape[1]
    if head.config.markov_rank:
        weight = torch.cat([weight, head.markov_head.markov_w2.weight], dim=1)
    adjacent, alive = next_is_adjacent(batch), torch.arange(len(anchors), device=anchors.device)
    total, weights, labelled, sums = features.new_zeros(()), 0.0, anchors, dict[str, Tensor]()
    for slot in range(head.config.depths):
        if slot:
            keep = adjacent[labelled]
            alive, labelled = alive[keep], labelled[keep] + 1
        if not len(alive):
            break
        hidden, before = states[alive, slot], batch.next_tokens[batch.queries[labelled]]
        read = torch.cat([hidden, head.markov_head.inputs(hidden, before)], -1) if head.config.markov_rank else hidden
        labels, ids, probs = (each[labelled] for each in teacher)
        found = block_loss(read, weight, labels, ids, probs, bias, frozen_columns=frozen, ce_weight=ce_weight)
        loss, count = found.loss / len(alive), torch.tensor(float(len(alive)))
        logit = head.confidence(hidden, before)
        if logit is not None:
            loss = loss + _CONFIDENCE_WEIGHT * binary_cross_entropy_with_logits(logit, found.overlap.to(logit.dtype))
        if not slot:
            share = batch.supervised_count / len(alive)
            sums = {"ce": found.ce * share, "accepted": found.overlap.sum() * share, "top1": found.hits * share}
        sums |= {f"right_{slot}": found.hits, f"tried_{slot}": count}
        total = total + math.exp(-slot / _GAMMA) * loss
        weights += math.exp(-slot / _GAMMA)
    total = total / weights * batch.supervised_count
    sums |= {"views": torch.tensor(float(batch.supervised_count)), "loss": total}
    return total, {name: value.detach() for name, value in sums.items()}
