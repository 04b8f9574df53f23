"""What a head has still to observe: steps that were not drafted for need no head until one is. Owns their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haast.drafters.base import Accepted


class Waiting:
    """`Accepted` values in the order of their steps, to be taken as one."""

    def __init__(self) -> None:
        self._steps: list[Accepted] = []

    @property
    def positions(self) -> int:
        """The most that a row can have waiting."""
        return sum(max(step.counts) for step in self._steps)

    def add(self, accepted: Accepted) -> None:
        """One more step."""
        self._steps.append(accepted)

    def keep(self, order: Sequence[int]) -> None:
        """Rows leave, see `Drafter.keep`."""
        rows = list(order)
        self._steps = [
            Accepted(step.tokens[rows], step.features[rows], tuple(step.counts[row] for row in rows))
            for step in self._steps
        ]

    def take(self) -> Accepted | None:
        """All that waits as one value, shorter rows padded at the end; nothing waits afterwards."""
        steps, self._steps = self._steps, []
        if len(steps) < 2:
            return steps[0] if steps else None
        counts = tuple(sum(row) for row in zip(*(step.counts for step in steps), strict=True))
        tokens, features = (_joined(steps, counts, field) for field in ("tokens", "features"))
        return Accepted(tokens, features, counts)


def _joined(steps: Sequence[Accepted], counts: Sequence[int], field: str) -> Tensor:
    parts: list[Tensor] = [getattr(step, field) for step in steps]
    whole = parts[0].new_zeros(len(counts), max(counts), *parts[0].shape[2:])
    for row in range(len(counts)):
        own = [part[row, : step.counts[row]] for part, step in zip(parts, steps, strict=True)]
        torch.cat(own, out=whole[row, : counts[row]])
    return whole
