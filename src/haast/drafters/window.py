"""Sliding attention window of a draft head.

A pair at position p sees those at p - window + 1 .. p, as in transformers' sliding window attention. So the head need
not process all of a prompt: keys and values of a layer at position t depend on the layer below at t only, and that
layer's output at t on its own window.

    layers   pairs that the last pair of a prompt and all later ones depend on
    1        the last window                   (its keys and values depend on features and embeddings only)
    n        the last n * (window - 1) + 1
"""

from __future__ import annotations

import warnings

from haast.errors import LongContextWarning, check_at_least


class DraftWindow:
    """The window of a head with `layers` layers: `window` positions, 1 or more; None is all.

    `trained` is the longest sequence that the head was trained on, None if unknown. Raises ValueError for a window
    below 1.
    """

    def __init__(self, window: int | None, layers: int, trained: int | None) -> None:
        if window is not None:
            check_at_least("draft_window", window, meaning=" positions, or None for all")
        self.window, self._trained, self._warned = window, trained, False
        self.reach = None if window is None else layers * (window - 1) + 1  # last pairs of a prompt that are needed

    def skipped(self, prompt: int) -> int:
        """Number of first pairs of a prompt of `prompt` tokens that the head need not process."""
        return 0 if self.reach is None else max(0, prompt - self.reach)

    def left_out(self, skipped: int, observed: int, pairs: int) -> int:
        """How many of the `pairs` pairs after the first `observed` ones belong to the first `skipped` ones."""
        return min(pairs, max(0, skipped - observed))

    def warn(self, reached: int) -> None:
        """Warn once if a text of `reached` tokens is longer than the head's training sequences and its window."""
        trained = self._trained
        if self._warned or trained is None or min(reached, self.window or reached) <= trained:
            return
        self._warned = True
        warnings.warn(
            f"the text has {reached} tokens, the head was trained on at most {trained}: the text stays the target's, "
            f"but fewer drafts may be accepted; give draft_window={trained} (--draft-window) or less, so that the head "
            f"attends no farther back than in training, or train a head on longer sequences",
            LongContextWarning,
            stacklevel=2,
        )
