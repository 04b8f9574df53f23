"""How far back a head looks when it drafts: all of the text, or a sliding window of it.

A pair at position p sees those at p - window + 1 .. p, as in transformers' sliding attention. A prompt need not go
through the head as a whole: the keys and values of a layer at position t come from the layer below at t alone, and that
layer's output at t from its own window.

    layers   pairs that the last pair of a prompt and all later ones depend on
    1        the last window                   (its keys and values come from features and embeddings alone)
    n        the last n * (window - 1) + 1
"""

from __future__ import annotations

import warnings

from haast.errors import LongContextWarning, check_at_least


class DraftWindow:
    """The pairs that a head of so many layers sees: `window` positions, 1 or more; None is all.

    `trained` is the length of the longest sequence that the head was trained on, None where nobody knows. Raises
    ValueError for a window below 1.
    """

    def __init__(self, window: int | None, layers: int, trained: int | None) -> None:
        if window is not None:
            check_at_least("draft_window", window, meaning=" positions, or None for all")
        self.window, self._trained, self._told = window, trained, False
        self.reach = None if window is None else layers * (window - 1) + 1  # pairs of a prompt that are needed

    def skipped(self, prompt: int) -> int:
        """Pairs, from the first, of a prompt of so many tokens that nothing depends on."""
        return 0 if self.reach is None else max(0, prompt - self.reach)

    def left_out(self, skipped: int, observed: int, pairs: int) -> int:
        """Of `pairs` pairs to come after `observed` ones, how many are left out as the first `skipped` ones are."""
        return min(pairs, max(0, skipped - observed))

    def warn(self, reached: int) -> None:
        """Say once that a text, `reached` tokens long now, has gone past what the head has seen in training."""
        trained = self._trained
        if self._told or trained is None or min(reached, self.window or reached) <= trained:
            return  # no pair looks farther back than the head has learned to
        self._told = True
        warnings.warn(
            f"the text has {reached} tokens, the head was trained on at most {trained}: the text stays the target's, "
            f"but fewer drafts may be accepted; give draft_window={trained} (--draft-window) or less, so that the head "
            f"looks no farther back than it has learned to, or train a head on longer sequences",
            LongContextWarning,
            stacklevel=2,
        )
