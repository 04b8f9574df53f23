"""When a text loops: it says again what it has said. Owns the measure and its limit; knows only token ids."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM, LOOP_SHARE = 8, 0.3  # a text loops when more than 30 % of its 8-grams were there before


def loop_share(tokens: Sequence[int]) -> float:
    """Share of a text's 8-grams that occurred before in it; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text loops."""
    return loop_share(tokens) > LOOP_SHARE
