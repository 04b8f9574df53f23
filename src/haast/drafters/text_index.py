"""The index of one request's text that drafters without a model copy from: the contract, and the one of n-grams.

Owns what an index answers: the longest match of the text's end, and likely continuations. `suffix_index` has the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from haast.drafters.candidates import Candidates
from haast.tuning.online import MatchOdds


class TextIndex(ABC):
    """One request's text, indexed for earlier occurrences of its last tokens.

    `device` is that of the accepted tokens, and so of the trees; `odds` counts how often matches were right.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.device = torch.device("cpu")
        self.odds = MatchOdds()

    def extend(self, tokens: Sequence[int], answer: bool = False) -> None:
        """Append `tokens`; those of the answer also update `odds`."""
        for token in tokens:
            if answer:
                length, expected = self.match()
                if length:
                    self.odds.count(length, expected == token)
            self.text.append(int(token))
            self._index_last()

    def first_chance(self) -> float:
        """Probability that the likeliest token after the match is right; 0 without a match."""
        length, _ = self.match()
        return self.odds.chance(length) if length else 0.0

    @abstractmethod
    def match(self) -> tuple[int, int]:
        """Length of the longest suffix that occurred before, and its likeliest next token; (0, -1) without a match."""

    @abstractmethod
    def candidates(self, most: int) -> Candidates:
        """At most `most` drafted nodes, the most likely first."""

    @abstractmethod
    def _index_last(self) -> None:
        """Add the last token of the text to the index."""


class NgramIndex(TextIndex):
    """The last two occurrences of each n-gram of up to `max_length` tokens."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        # n-gram -> positions after its second-last and its last occurrence (0: none). The last tokens of the text are
        # their own last occurrence, so a match is the second-last one.
        self._ends: dict[tuple[int, ...], tuple[int, int]] = {}

    def match(self) -> tuple[int, int]:
        length, end = self._longest()
        return (length, self.text[end]) if length else (0, -1)

    def candidates(self, most: int) -> Candidates:
        length, end = self._longest()
        found = Candidates()
        if length:
            tokens = self.text[end : end + most]
            for place, (token, chance) in enumerate(zip(tokens, self.odds.chances(length, most), strict=False)):
                found.add(token, place - 1, math.log(chance))
        return found

    def _longest(self) -> tuple[int, int]:
        """Length of the longest n-gram that occurred before, and the position after that occurrence; or (0, 0)."""
        for length in range(min(self._max_length, len(self.text) - 1), 0, -1):
            end, _ = self._ends[tuple(self.text[-length:])]
            if end:
                return length, end
        return 0, 0

    def _index_last(self) -> None:
        for length in range(1, min(self._max_length, len(self.text)) + 1):
            gram = tuple(self.text[-length:])
            _, before = self._ends.get(gram, (0, 0))
            self._ends[gram] = before, len(self.text)
