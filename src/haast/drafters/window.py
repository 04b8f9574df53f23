"""How far back a head looks when it drafts: all of the text, or a sliding window of it.

Owns which of the head's pairs are needed, and when the others are forgotten. A pair at position p sees those at
p - window + 1 .. p, as in transformers' sliding attention, and rotary positions are the text's own, so that dropping
what no pair sees any more changes no draft.

A prompt need not go through the head as a whole. The keys and values of a layer at position t come from the layer
below at t alone, and that layer's output at t from its own window:

    layers   pairs that the last pair of a prompt and all later ones depend on
    1        the last window                   (its keys and values come from features and embeddings alone)
    n        the last n * (window - 1) + 1
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from haast.cache import TreeCache
from haast.errors import LongContextWarning

_SPARE = 64  # slots at least, between two times that the cache is moved down


class DraftWindow:
    """The pairs a head sees.

    Args:
        window: positions, 1 or more; None is all.
        layers: of the head.
        trained: tokens of the longest sequence that the head was trained on; None where nobody knows.

    Raises:
        ValueError: a window below 1.
    """

    def __init__(self, window: int | None, layers: int, trained: int | None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"draft_window={window} is not allowed: give 1 or more positions, or None for all")
        self.window, self._trained, self._told = window, trained, False
        self.reach = None if window is None else layers * (window - 1) + 1  # pairs of a prompt that are needed
        self._needed: list[int] = []
        self._longest = 0  # of the prompts

    def start(self, lengths: list[int]) -> None:
        """Begin texts whose prompts have these lengths."""
        self._longest = max(lengths)
        self._needed = [0 if self.reach is None else max(0, length - self.reach) for length in lengths]

    def keep(self, order: Sequence[int]) -> None:
        """Rows leave, see `Drafter.keep`."""
        self._needed = [self._needed[row] for row in order]

    def make_room(self, cache: TreeCache) -> None:
        """Drop what no later pair sees; every now and then, since all the rest moves."""
        if self.window is None:
            return
        for row, length in enumerate(cache.lengths):
            if length > self.window + max(self.window, _SPARE):
                cache.drop(row, length - self.window)

    def needed(
        self, cache: TreeCache, tokens: Tensor, features: Tensor, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Leave out pairs of the prompt that nothing depends on; `cache` then begins behind them.

        Args:
            cache: the head's.
            tokens: (rows, n) of the pairs to come.
            features: (rows, n, width).
            counts: pairs per row.
        """
        skipped = [
            min(count, max(0, first - at)) for count, first, at in zip(counts, self._needed, cache.reached, strict=True)
        ]
        if not any(skipped):
            return tokens, features, counts
        for row, skip in enumerate(skipped):
            if skip:
                cache.restart(row, cache.reached[row] + skip)
        left = tuple(count - skip for count, skip in zip(counts, skipped, strict=True))
        behind = torch.tensor(skipped, device=tokens.device).unsqueeze(1)
        index = (behind + torch.arange(max(left), device=tokens.device)).clamp_max(tokens.shape[1] - 1)
        return tokens.gather(1, index), features.gather(1, index.unsqueeze(2).expand(-1, -1, features.shape[2])), left

    def recall(self, cache: TreeCache, position: int) -> None:
        """Cut a cache of one row to what stands before `position`."""
        if position >= cache.begins[0]:
            cache.truncate(0, position - cache.begins[0])
        else:
            cache.restart(0, position)  # all of it was dropped long ago

    def warn(self, cache: TreeCache) -> None:
        """Say once that a text has gone past what the head has seen in training."""
        reached, trained = max(self._longest, *cache.reached), self._trained
        if self._told or trained is None or reached <= trained:
            return
        if self.window is not None and self.window <= trained:
            return  # no pair looks farther back than it has learned to
        self._told = True
        warnings.warn(
            f"the text has {reached} tokens, the head was trained on at most {trained}: the text stays the target's, "
            f"but fewer drafts may be accepted; give draft_window={trained} (--draft-window) or less, so that the head "
            f"looks no farther back than it has learned to, or train a head on longer sequences",
            LongContextWarning,
            stacklevel=2,
        )
