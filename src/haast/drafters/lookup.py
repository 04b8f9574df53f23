"""Drafting without a model: what followed the same words before, in the prompt and in what was said.

Owns two ways to find it. `PromptLookupDrafter`: the latest place where the last few tokens stood before (prompt
lookup decoding, Saxena 2023; `prompt_lookup_num_tokens` of transformers). `SuffixDrafter`: the longest suffix of the
whole text that occurred before, by an online suffix automaton (Blumer et al. 1985; SAM decoding, arXiv 2411.10666);
shorter suffixes give further branches. Both cost microseconds and know no target.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from haast.drafters.base import Accepted, Drafter
from haast.drafters.paths import Path, PathTree, pack_rows
from haast.tree import DraftTree


class HistoryDrafter(Drafter):
    """A drafter that reads its row's text alone. Subclasses say how a text continues.

    Args:
        nodes: of every tree, root included, 2 or more; what is not filled is dead.
        device: where the target takes its tokens.
    """

    def __init__(self, nodes: int, device: torch.device | str = "cpu") -> None:
        if nodes < 2:
            raise ValueError(f"nodes={nodes} is not allowed: give 2 or more (root and a draft)")
        self._nodes, self._device = nodes, torch.device(device)

    @property
    def nodes(self) -> int:
        return self._nodes

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._texts: list[list[int]] = []
        self._begin(len(prompts))
        for row, prompt in enumerate(prompts):
            self._texts.append([])
            self._append(row, int(prompt[0]))  # `observe` brings what follows, the rest of the prompt included

    def keep(self, order: Sequence[int]) -> None:
        self._texts = [self._texts[row] for row in order]
        self._rearrange(order)

    def observe(self, accepted: Accepted) -> None:
        for row, count in enumerate(accepted.counts):
            for token in accepted.tokens[row, :count].tolist():
                self._append(row, token)

    def recall(self, memory: object, following: Sequence[int]) -> None:
        for token in following:
            self._append(0, int(token))

    def propose(self) -> DraftTree:
        rows = []
        for row, text in enumerate(self._texts):
            tree = PathTree(text[-1], self._nodes)
            for path in self.paths(row, self._nodes - 1):
                tree.insert(path)
            rows.append(tree)
        return pack_rows(rows, self._nodes, self._device)

    def _append(self, row: int, token: int) -> None:
        self._texts[row].append(token)
        self._learn(row)

    @abstractmethod
    def paths(self, row: int, most: int) -> list[Path]:
        """Continuations of the row's text, the most trusted first, of at most `most` tokens each."""

    @abstractmethod
    def _begin(self, rows: int) -> None:
        """Forget everything; `rows` texts begin."""

    @abstractmethod
    def _rearrange(self, order: Sequence[int]) -> None:
        """Row i is from now on what row `order[i]` was."""

    @abstractmethod
    def _learn(self, row: int) -> None:
        """Take in the newest token of the row's text."""


class PromptLookupDrafter(HistoryDrafter):
    """Continues as after the latest earlier place of the last `ngram` tokens; of fewer where there is none."""

    name = "lookup"

    def __init__(self, nodes: int = 11, ngram: int = 3, device: torch.device | str = "cpu") -> None:
        super().__init__(nodes, device)
        if ngram < 1:
            raise ValueError(f"ngram={ngram} is not allowed: give 1 or more")
        self._ngram = ngram

    def paths(self, row: int, most: int) -> list[Path]:
        text = self._texts[row]
        for length in range(min(self._ngram, len(text) - 1), 0, -1):
            place = self._before[row].get(tuple(text[-length:]))
            if place is not None:
                return [text[place : place + most]]
        return []

    def _begin(self, rows: int) -> None:
        # n-gram -> the place behind its latest occurrence, and the one before that (the newest n-gram ends the text)
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]
        self._before: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]

    def _rearrange(self, order: Sequence[int]) -> None:
        self._latest = [self._latest[row] for row in order]
        self._before = [self._before[row] for row in order]

    def _learn(self, row: int) -> None:
        text = self._texts[row]
        for length in range(1, min(self._ngram, len(text)) + 1):
            gram = tuple(text[-length:])
            if gram in self._latest[row]:
                self._before[row][gram] = self._latest[row][gram]
            self._latest[row][gram] = len(text)


class SuffixDrafter(HistoryDrafter):
    """Continues as after the longest suffix of the text that occurred before; shorter suffixes give further branches.

    Args:
        nodes: see `HistoryDrafter`.
        least: tokens that a suffix must have to be trusted.
        branches: how many continuations at most.
    """

    name = "suffix"

    def __init__(self, nodes: int = 11, least: int = 1, branches: int = 3, device: torch.device | str = "cpu") -> None:
        super().__init__(nodes, device)
        for name, value in (("least", least), ("branches", branches)):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed: give 1 or more")
        self._least, self._branches = least, branches

    def paths(self, row: int, most: int) -> list[Path]:
        text, automaton = self._texts[row], self._automata[row]
        return [text[end : end + most] for end in automaton.earlier(self._least, self._branches)]

    def longest(self, row: int) -> int:
        """Length of the longest suffix of the row's text that occurred before."""
        return self._automata[row].longest

    def _begin(self, rows: int) -> None:
        self._automata = [SuffixAutomaton() for _ in range(rows)]

    def _rearrange(self, order: Sequence[int]) -> None:
        self._automata = [self._automata[row] for row in order]

    def _learn(self, row: int) -> None:
        self._automata[row].append(self._texts[row][-1])


class SuffixAutomaton:
    """All substrings of a growing text, in O(1) amortised a token. State 0 is the empty string."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]  # `_end`: place behind the first occurrence
        self._last, self._size = 0, 0

    def append(self, token: int) -> None:
        """The text grows by one token."""
        self._size += 1
        new = self._state(self._size, self._size, {})
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = 0 if state == -1 else self._split(state, token)
        self._last = new

    @property
    def longest(self) -> int:
        """Length of the longest suffix of the text that occurred before."""
        return self._length[self._link[self._last]] if self._last else 0

    def earlier(self, least: int, most: int) -> list[int]:
        """Places behind earlier occurrences of suffixes of at least `least` tokens, the longest suffix first."""
        places: list[int] = []
        state = self._link[self._last] if self._last else 0
        while state > 0 and self._length[state] >= least and len(places) < most:
            if self._end[state] not in places:
                places.append(self._end[state])
            state = self._link[state]
        return places

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
