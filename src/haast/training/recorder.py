"""Features of answers while they are generated: training needs no second pass over the text.

Owns the collecting of features, as a drafter that proposes nothing. `features` computes those of existing text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from haast.core import Accepted, Request, TokenChooser
from haast.drafters.vanilla import RootState, VanillaDrafter
from haast.target.kv_pool import Sequence as KVSequence


@dataclass
class Recorded(RootState):
    """A request's features so far: its part of each step's features, which the steps share with other requests.

    parts: (features (rows, longest, hidden) on the CPU, the request's row, its number of positions).
    """

    parts: list[tuple[Tensor, int, int]] = field(default_factory=list)

    @property
    def features(self) -> Tensor:
        """Features (positions, hidden) of all positions that the target has run."""
        return torch.cat([features[row, :count] for features, row, count in self.parts])


class FeatureRecorder(VanillaDrafter):
    """Decodes without drafts, and keeps the features of every position that the target runs."""

    name = "feature-recorder"

    def __init__(self) -> None:
        self.prefix_key = self  # no prefix of the pool has this key, so every position is run and observed
        self._running = dict[TokenChooser, Recorded]()

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> Recorded:
        assert reused == 0
        return Recorded()

    def set_chooser(self, state: Recorded, chooser: TokenChooser) -> None:
        self._running[chooser] = state  # replaces the state from before a preemption

    def observe(self, states: Sequence[RootState], accepted: Accepted) -> None:
        super().observe(states, accepted)
        features = accepted.features.to("cpu", copy=True)  # later steps may overwrite them
        for row, (state, count) in enumerate(zip(states, accepted.counts.tolist(), strict=True)):
            assert isinstance(state, Recorded)
            state.parts.append((features, row, count))

    def filled(self, state: Recorded, length: int) -> int:
        return 0  # a later request would not observe the positions that it reuses

    def take(self, request: Request) -> Tensor:
        """A finished request's features (positions, hidden): all but its last token's, which was never run."""
        return self._running.pop(request.chooser).features
