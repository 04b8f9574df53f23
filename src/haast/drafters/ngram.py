"""Model-free drafting: copies the tokens that followed an earlier occurrence of the text's last tokens.

`PromptLookupDrafter` finds the latest earlier occurrence of the last few tokens (prompt lookup decoding, Saxena 2023),
`SuffixDrafter` the longest suffix of the whole text that occurred before, by an online suffix automaton (Blumer et al.
1985; SAM decoding, arXiv 2411.10666). With measured costs, they propose as many tokens as are expected to pay, by the
accuracy of earlier matches in the text.
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

LatencySource = Callable[[], Latency | None]  # None if costs were not measured


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
                length, end = self.match()
                if length:
                    self.odds.count(length, self.text[end] == token)
            self.text.append(int(token))
            self._index_last()

    def chances(self, most: int) -> list[float]:
        """[d]: probability that the first d + 1 tokens of the first path are right; empty without a match."""
        length, end = self.match()
        return self.odds.chances(length, min(most, len(self.text) - end)) if length else []

    def first_chance(self) -> float:
        """Probability that the first token after the match is right; 0 without a match."""
        length, _ = self.match()
        return self.odds.chance(length) if length else 0.0

    @abstractmethod
    def match(self) -> tuple[int, int]:
        """Length of the suffix that occurred before, and the position after that occurrence; (0, 0) without a match."""

    @abstractmethod
    def paths(self, most: int) -> list[Path]:
        """Drafted continuations, the most likely first, of at most `most` tokens each."""

    @abstractmethod
    def _index_last(self) -> None:
        """Add the last token of the text to the index."""


class HistoryDrafter(Drafter):
    """Base of the drafters that read only a request's text.

    Args:
        index: creates the index of an empty text.
        nodes: maximum nodes of a tree, root included, 2 or more; a tree has only as many as there are drafts.
        latency: returns measured costs, called at the first match; a tree then has only nodes that are expected to pay.
    """

    def __init__(self, index: Callable[[], TextIndex], nodes: int, latency: LatencySource | None = None) -> None:
        check_at_least("nodes", nodes, 2, " (root and a draft)")
        self._index, self._nodes, self._latency = index, nodes, latency

    @property
    def nodes(self) -> int:
        return self._nodes

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> Any:
        index = self._index()
        index.extend(prompt[: reused + 1])  # `observe` gets all later tokens, the rest of the prompt included
        return index

    def add_prediction(self, state: TextIndex, text: Sequence[int]) -> None:
        state.extend(text)

    def observe(self, states: Sequence[TextIndex], accepted: Accepted) -> None:
        for index, tokens in zip(states, accepted.host_tokens(), strict=True):
            index.extend(tokens, answer=accepted.verdict is not None)
            index.device = accepted.tokens.device

    def propose(self, states: Sequence[TextIndex], budget: int | None = None) -> DraftTree:
        most = self._nodes if budget is None else min(budget, self._nodes)
        if self._latency is not None:
            most = 1 + self.paying_drafts(states, most - 1)[0]
        rows = []
        for index in states:
            tree = PathTree(index.text[-1], most)
            for path in index.paths(most - 1) if most > 1 else ():
                tree.insert(path)
            rows.append(tree)
        return pack_rows(rows, states[0].device)

    def paying_drafts(self, states: Sequence[TextIndex], most: int) -> tuple[int, float]:
        """The number of drafts per row that pays, at most `most`, and the expected tokens per row with them."""
        first = [index.first_chance() for index in states] if most else []
        if not any(first):
            return 0, 1.0
        latency = None if self._latency is None else self._latency()
        if latency is None:
            return most, 1.0
        rows = len(states)
        if sum(first) < rows * least_first_chance(rows, most, latency):  # a quick bound: no number of drafts can pay
            return 0, 1.0
        return best_chain([index.chances(most) for index in states], latency)


class PromptLookupDrafter(HistoryDrafter):
    """Copies the tokens after the latest earlier occurrence of the last `ngram` tokens, or of fewer."""

    name = "lookup"

    def __init__(self, nodes: int = 11, ngram: int = 3, latency: LatencySource | None = None) -> None:
        check_at_least("ngram", ngram)
        super().__init__(lambda: NgramIndex(ngram), nodes, latency)


class NgramIndex(TextIndex):
    """The last two occurrences of each n-gram of up to `max_length` tokens."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        # n-gram -> positions after its second-last and its last occurrence (0: none). The last tokens of the text are
        # their own last occurrence, so a match is the second-last one.
        self._ends: dict[tuple[int, ...], tuple[int, int]] = {}

    def match(self) -> tuple[int, int]:
        for length in range(min(self._max_length, len(self.text) - 1), 0, -1):
            end, _ = self._ends[tuple(self.text[-length:])]
            if end:
                return length, end
        return 0, 0

    def paths(self, most: int) -> list[Path]:
        length, end = self.match()
        return [self.text[end : end + most]] if length else []

    def _index_last(self) -> None:
        for length in range(1, min(self._max_length, len(self.text)) + 1):
            gram = tuple(self.text[-length:])
            _, before = self._ends.get(gram, (0, 0))
            self._ends[gram] = before, len(self.text)


class SuffixDrafter(HistoryDrafter):
    """Copies the tokens after the longest suffix of the text that occurred before; shorter suffixes add branches.

    Args:
        nodes: see `HistoryDrafter`.
        least: minimum length of a suffix, in tokens.
        branches: maximum number of continuations.
        latency: see `HistoryDrafter`.
    """

    name = "suffix"

    def __init__(
        self, nodes: int = 11, least: int = 1, branches: int = 3, latency: LatencySource | None = None
    ) -> None:
        check_at_least("least", least)
        check_at_least("branches", branches)
        super().__init__(lambda: SuffixIndex(least, branches), nodes, latency)


class SuffixIndex(TextIndex):
    """A suffix automaton of the text: O(1) amortised per token. State 0 is the empty string.

    Arguments as in `SuffixDrafter`.
    """

    def __init__(self, least: int, branches: int) -> None:
        super().__init__()
        self._least, self._branches = least, branches
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]  # `_end`: position after the first occurrence
        self._last = 0

    def match(self) -> tuple[int, int]:
        longest = max(self._link[self._last], 0)
        long_enough = longest and self._length[longest] >= self._least
        return (self._length[longest], self._end[longest]) if long_enough else (0, 0)

    def paths(self, most: int) -> list[Path]:
        return [self.text[end : end + most] for end in self.earlier_ends()]

    def earlier_ends(self) -> list[int]:
        """Positions after earlier occurrences of suffixes, the longest suffix first."""
        ends: list[int] = []
        state = self._link[self._last]
        while state > 0 and self._length[state] >= self._least and len(ends) < self._branches:
            if self._end[state] not in ends:
                ends.append(self._end[state])
            state = self._link[state]
        return ends

    def _index_last(self) -> None:
        token, new = self.text[-1], self._add_state(len(self.text), len(self.text), {})
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = 0 if state == -1 else self._split(state, token)
        self._last = new

    def _split(self, state: int, token: int) -> int:
        """The state of the longest earlier suffix; splits it off from a longer string's state if necessary."""
        target = self._next[state][token]
        if self._length[state] + 1 == self._length[target]:
            return target
        clone = self._add_state(self._length[state] + 1, self._end[target], dict(self._next[target]))
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state != -1 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add_state(self, length: int, end: int, transitions: dict[int, int]) -> int:
        self._next.append(transitions)
        self._link.append(-1)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1
