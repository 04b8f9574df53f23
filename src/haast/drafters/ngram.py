"""Drafting without a model: what followed the same words before, in the prompt and in what was said.

`PromptLookupDrafter` finds the latest place where the last few tokens stood before (prompt lookup decoding, Saxena
2023), `SuffixDrafter` the longest suffix of the whole text that occurred before, by an online suffix automaton (Blumer
et al. 1985; SAM decoding, arXiv 2411.10666). Told what forwards cost, they propose what is expected to pay by the odds
of the text so far, else nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from haast.core import Accepted
from haast.drafters.base import Drafter
from haast.errors import check_at_least
from haast.path_tree import Path, PathTree, pack_rows
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree
from haast.tuning.latency import Latency
from haast.tuning.online import MatchOdds, best_chain, least_first_chance

LatencySource = Callable[[], Latency | None]  # None where nothing is known


class TextIndex(ABC):
    """One request's text, and the places in it where it may go on as it went on there.

    `device` is where its trees go (where its accepted tokens came from), `odds` how often it has gone on as its match
    had.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.device = torch.device("cpu")
        self.odds = MatchOdds()

    def extend(self, tokens: Sequence[int], answer: bool = False) -> None:
        """The text goes on with `tokens`; those of the answer tell what matches are worth."""
        for token in tokens:
            if answer:
                length, place = self.match()
                if length:
                    self.odds.count(length, self.text[place] == token)
            self.text.append(int(token))
            self._learn()

    def chances(self, most: int) -> list[float]:
        """[d]: chance that the first d + 1 tokens of the first path come next; empty where there is none."""
        length, place = self.match()
        return self.odds.chances(length, min(most, len(self.text) - place)) if length else []

    def first_chance(self) -> float:
        """Chance that the token after the match comes next; 0 where there is no match."""
        length, _ = self.match()
        return self.odds.chance(length) if length else 0.0

    @abstractmethod
    def match(self) -> tuple[int, int]:
        """Tokens at the end of the text that stood before, and the place after them there; 0, 0 where none did."""

    @abstractmethod
    def paths(self, most: int) -> list[Path]:
        """Continuations of the text, the most trusted first, of at most `most` tokens each."""

    @abstractmethod
    def _learn(self) -> None:
        """Take in the newest token of the text."""


class HistoryDrafter(Drafter):
    """A drafter that reads a request's text alone.

    Args:
        index: makes the index of a text that has not begun.
        nodes: the most nodes of a tree, root included, 2 or more; a tree has as many as there are drafts for.
        latency: what forwards cost, asked for at the first match: then a tree has as many nodes as are expected to pay.
    """

    def __init__(self, index: Callable[[], TextIndex], nodes: int, latency: LatencySource | None = None) -> None:
        check_at_least("nodes", nodes, 2, " (root and a draft)")
        self._index, self._nodes, self._latency = index, nodes, latency
        self._least_chances: dict[tuple[int, int], float] = {}  # by rows and most drafts

    @property
    def nodes(self) -> int:
        return self._nodes

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> Any:
        index = self._index()
        index.extend(prompt[: reused + 1])  # `observe` brings what follows, the rest of the prompt included
        return index

    def foresee(self, state: TextIndex, text: Sequence[int]) -> None:
        state.extend(text)

    def observe(self, states: Sequence[TextIndex], accepted: Accepted) -> None:
        for index, said in zip(states, accepted.host_tokens(), strict=True):
            index.extend(said, answer=accepted.verdict is not None)
            index.device = accepted.tokens.device

    def propose(self, states: Sequence[TextIndex], budget: int | None = None) -> DraftTree:
        most = self._nodes if budget is None else min(budget, self._nodes)
        if self._latency is not None:
            most = 1 + self.paying(states, most - 1)[0]
        rows = []
        for index in states:
            tree = PathTree(index.text[-1], most)
            for path in index.paths(most - 1) if most > 1 else ():
                tree.insert(path)
            rows.append(tree)
        return pack_rows(rows, states[0].device)

    def paying(self, states: Sequence[TextIndex], most: int) -> tuple[int, float]:
        """How many drafts a row, at most `most`, are expected to pay, and a row's tokens with them."""
        first = [index.first_chance() for index in states] if most else []
        if not any(first):
            return 0, 1.0
        latency = None if self._latency is None else self._latency()
        if latency is None:
            return most, 1.0
        asked = len(states), most
        if asked not in self._least_chances:
            self._least_chances[asked] = least_first_chance(*asked, latency)
        if sum(first) < len(states) * self._least_chances[asked]:  # a look at the first drafts says that none pay
            return 0, 1.0
        return best_chain([index.chances(most) for index in states], latency)


class PromptLookupDrafter(HistoryDrafter):
    """Continues as after the latest earlier place of the last `ngram` tokens; of fewer where there is none."""

    name = "lookup"

    def __init__(self, nodes: int = 11, ngram: int = 3, latency: LatencySource | None = None) -> None:
        check_at_least("ngram", ngram)
        super().__init__(lambda: NgramIndex(ngram), nodes, latency)


class NgramIndex(TextIndex):
    """Where each n-gram of up to `most` tokens stood last, and the time before."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        # n-gram -> the place after its last occurrence but one, and after its latest: the newest n-gram ends the text
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}

    def match(self) -> tuple[int, int]:
        for length in range(min(self._most, len(self.text) - 1), 0, -1):
            place, _ = self._places[tuple(self.text[-length:])]
            if place:
                return length, place
        return 0, 0

    def paths(self, most: int) -> list[Path]:
        length, place = self.match()
        return [self.text[place : place + most]] if length else []

    def _learn(self) -> None:
        for length in range(1, min(self._most, len(self.text)) + 1):
            gram = tuple(self.text[-length:])
            _, before = self._places.get(gram, (0, 0))
            self._places[gram] = before, len(self.text)


class SuffixDrafter(HistoryDrafter):
    """Continues as after the longest suffix of the text that occurred before; shorter suffixes give further branches.

    Args:
        nodes: see `HistoryDrafter`.
        least: tokens that a suffix must have to be trusted.
        branches: how many continuations at most.
    """

    name = "suffix"

    def __init__(
        self, nodes: int = 11, least: int = 1, branches: int = 3, latency: LatencySource | None = None
    ) -> None:
        check_at_least("least", least)
        check_at_least("branches", branches)
        super().__init__(lambda: SuffixIndex(least, branches), nodes, latency)


class SuffixIndex(TextIndex):
    """A text with all of its substrings, a suffix automaton: O(1) amortised a token. State 0 is the empty string.

    The arguments are `SuffixDrafter`'s.
    """

    def __init__(self, least: int, branches: int) -> None:
        super().__init__()
        self._least, self._branches = least, branches
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]  # `_end`: place after the first occurrence
        self._last = 0

    def match(self) -> tuple[int, int]:
        longest = max(self._link[self._last], 0)
        trusted = longest and self._length[longest] >= self._least
        return (self._length[longest], self._end[longest]) if trusted else (0, 0)

    def paths(self, most: int) -> list[Path]:
        return [self.text[end : end + most] for end in self.earlier()]

    def earlier(self) -> list[int]:
        """Places after earlier occurrences of suffixes, the longest suffix first."""
        places: list[int] = []
        state = self._link[self._last]
        while state > 0 and self._length[state] >= self._least and len(places) < self._branches:
            if self._end[state] not in places:
                places.append(self._end[state])
            state = self._link[state]
        return places

    def _learn(self) -> None:
        token, new = self.text[-1], self._state(len(self.text), len(self.text), {})
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = 0 if state == -1 else self._split(state, token)
        self._last = new

    def _split(self, state: int, token: int) -> int:
        """The state of the longest earlier suffix, cut out of a longer string's state where that is needed."""
        target = self._next[state][token]
        if self._length[state] + 1 == self._length[target]:
            return target
        clone = self._state(self._length[state] + 1, self._end[target], dict(self._next[target]))
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state != -1 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _state(self, length: int, end: int, following: dict[int, int]) -> int:
        self._next.append(following)
        self._link.append(-1)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1
