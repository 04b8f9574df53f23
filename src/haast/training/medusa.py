"""MedusaHeads in training (Medusa-1, arXiv 2401.10774, section 3.2: the target is frozen).

Owns their parameters in whitened units, their loss, and the measured accuracy by rank from which a tree is chosen.
Knows no optimiser. The data, the teacher and the optimiser are the FeatExtrapolator's; what differs is drawn here:

    supervised pair at t      feature f_t; teacher after t + 1, which predicts x_{t+2}: what head 0 guesses
    head i at t               the teacher of the pair at t + i, if that pair is supervised and of the same answer

The teacher of head i knows the i tokens between, which the head does not: what it learns is their average.

    plain                        whitened (r: feature rms per dimension)
    f + SiLU(W f + b)            z + SiLU(W' z + b) / r          W = W' diag(1/r)
    logits = rows f              rows' z                         rows = rows' diag(1/r)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.training.batches import Example, PackedBatch, pack, usable
from haast.training.config import TrainConfig
from haast.training.losses import teacher_loss
from haast.training.normalized_head import Parts, Scales, Whitened
from haast.training.target_weights import Frozen, draft_places
from haast.training.training_time_test import follows

_RANKS = 10  # guesses per head whose accuracy is measured
_BATCH = 16  # sequences at a time there


class _Block(nn.Module):
    """One residual block; it begins as the identity."""

    def __init__(self, units: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(units), len(units), dtype=units.dtype))
        self.bias = nn.Parameter(torch.zeros_like(units))

    def forward(self, states: Tensor, units: Tensor) -> Tensor:
        return states + functional.silu(functional.linear(states, self.weight, self.bias)) / units


class _Ahead(nn.Module):
    """One head: blocks and an LM head, which begins as the target's."""

    def __init__(self, blocks: int, units: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(units) for _ in range(blocks))
        self.lm_head = nn.Parameter(rows.clone())

    def forward(self, states: Tensor, units: Tensor) -> Tensor:
        for block in self.blocks:
            states = block(states, units)
        return states


class WhitenedMedusa(Whitened):
    """MedusaHeads' parameters in whitened units.

    Args:
        config: sizes.
        scales: fixed units.
        rows: (draft vocabulary, hidden) of the target's LM head, where every head's own begins.
    """

    def __init__(self, config: MedusaConfig, scales: Scales, rows: Tensor) -> None:
        super().__init__(scales)
        self.config: MedusaConfig = config
        start = rows.to(scales.feature.dtype) * scales.feature
        self.heads = nn.ModuleList(_Ahead(config.blocks, scales.feature, start) for _ in range(config.heads))

    def parts(self) -> Parts:
        parts: Parts = {}
        for i, head in enumerate(self.heads):
            assert isinstance(head, _Ahead), "nothing else is in the list"
            units = self.scales.feature.to(head.lm_head.device)
            for j, block in enumerate(head.blocks):
                assert isinstance(block, _Block), "nothing else is in the list"
                parts[f"{i}.{j}.linear.weight"] = (block.weight, 1 / units)
                parts[f"{i}.{j}.linear.bias"] = (block.bias, torch.ones_like(units))
            parts[f"{i}.{self.config.blocks}.weight"] = (head.lm_head, 1 / units)
        return parts

    def drafted_over(self) -> int:
        head = self.heads[0]
        assert isinstance(head, _Ahead), "nothing else is in the list"
        return int(head.lm_head.shape[0])


class MedusaObjective(nn.Module):
    """Loss of one batch: every head's cross-entropy, weighted by `step_decay` to the power of its number.

    Args:
        head: in training.
        frozen: the target's ends.
        draft_vocab: (draft vocabulary,) ascending target ids.
        config: weights of the losses.
        device: where it is computed.
    """

    def __init__(
        self, head: WhitenedMedusa, frozen: Frozen, draft_vocab: Tensor, config: TrainConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.head, self._config = head, config
        self._draft_index = draft_places(draft_vocab, len(frozen.head)).to(device)
        self._units = head.scales.feature.to(device)

    def forward(
        self, batch: PackedBatch, noise: Tensor | None = None, sharpness: float | None = None, passes: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.forward`. `passes` are of no use here: each head is right or wrong by itself.

        Returns:
            The loss and sums; `ce`, `accepted`, `top1` are head 0's, `right_i` and `tried_i` head i's.
        """
        config = self._config
        features = batch.features.to(self._units.dtype) / self._units
        states = (features if noise is None else features + noise)[batch.queries]  # (M, hidden)
        ids = self._draft_index[batch.teacher_ids]
        probs = batch.teacher_probs.to(states.dtype) * (ids >= 0)
        total, weights, sums = states.new_zeros(()), 0.0, {"views": torch.tensor(float(batch.views))}
        for number, (head, (origin, rows)) in enumerate(zip(self.head.heads, _ahead(batch), strict=False)):
            assert isinstance(head, _Ahead), "nothing else is in the list"
            read = head(states[origin], self._units)
            wanted = ids[rows].clamp_min(0)
            found = teacher_loss(read, head.lm_head, wanted, probs[rows], sharpness=sharpness)
            if not number:
                sums |= {"ce": found.ce, "accepted": found.acceptance, "top1": found.hits}
            sums |= {f"right_{number}": found.hits, f"tried_{number}": torch.tensor(float(len(rows)))}
            total = total + config.step_decay**number * found.loss / len(rows)
            weights += config.step_decay**number
        loss = total / weights * batch.views
        sums["loss"] = loss.detach()
        return loss, {name: value.detach() for name, value in sums.items()}


def _ahead(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Per head: which of the M supervised pairs it reads at, and which pairs' teachers it is held against."""
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
