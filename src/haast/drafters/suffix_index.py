"""A suffix automaton of one request's text with counts: what followed earlier occurrences of the text's end, how often.

Owns the automaton (Blumer et al. 1985; online, O(1) amortised per token) and the counts. The idea of weighting
continuations by frequency is SuffixDecoding's (arXiv 2411.04975); an automaton finds the longest match of any length,
as in SAM decoding (arXiv 2411.10666).
"""

from __future__ import annotations

import heapq
import math

from haast.drafters.candidates import Candidates
from haast.drafters.text_index import TextIndex

_LONGEST_WALK = 32  # suffixes, the longest first, whose counts a token updates
MOST_COST = -math.log(0.02)  # of a drafted path: minus its log-probability


class Waiting:
    """Continuations that wait for their turn: cost, number, parent, token, state, length of the match before it."""

    __slots__ = ("heap", "number")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, int, int, int, int]] = []
        self.number = 0  # of equal costs the earlier one comes first

    def add(self, cost: float, parent: int, token: int, state: int, length: int) -> None:
        if cost <= MOST_COST:
            heapq.heappush(self.heap, (cost, self.number, parent, token, state, length))
            self.number += 1


class SuffixIndex(TextIndex):
    """The automaton. State 0 is the empty string.

    Args:
        least: minimum length of a match.
        branches: maximum continuations of one node.
    """

    def __init__(self, least: int, branches: int) -> None:
        super().__init__()
        self._least, self._branches = least, branches
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length = [-1], [0]
        self._count = [0]  # occurrences of the state's strings
        self._last = 0

    def match(self) -> tuple[int, int]:
        state = max(self._link[self._last], 0)
        length = self._length[state]
        if not state or length < self._least:
            return 0, -1
        following, count = self._next[state], self._count
        return length, max(following, key=lambda token: count[following[token]])

    def candidates(self, most: int) -> Candidates:
        state, found = max(self._link[self._last], 0), Candidates()
        length = self._length[state]
        if not state or length < self._least:
            return found
        waiting = Waiting()
        self._continue(waiting, 0.0, -1, state, length)
        while waiting.heap and len(found) < most:
            cost, _, parent, token, state, length = heapq.heappop(waiting.heap)
            self._continue(waiting, cost, found.add(token, parent, -cost), state, length + 1)
        return found

    def _continue(self, waiting: Waiting, cost: float, parent: int, state: int, length: int) -> None:
        """Let what followed a state's strings wait: its most frequent continuations, by the share of each."""
        cost -= math.log(self.odds.chance(length))
        if cost > MOST_COST:
            return
        following = self._next[state]
        if len(following) == 1:  # the usual case: it always went on like this
            ((token, after),) = following.items()
            waiting.add(cost, parent, token, after, length)
            return
        counted = [(-self._count[after], token, after) for token, after in following.items()]
        total = -sum(count for count, *_ in counted)
        for count, token, after in heapq.nsmallest(self._branches, counted):
            waiting.add(cost - math.log(-count / total), parent, token, after, length)

    def _index_last(self) -> None:
        token, new = self.text[-1], self._add_state(len(self.text), {}, 1)
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = 0 if state == -1 else self._split(state, token)
        self._last = new
        state = self._link[new]
        for _ in range(_LONGEST_WALK):
            if state <= 0:
                break
            self._count[state] += 1
            state = self._link[state]

    def _split(self, state: int, token: int) -> int:
        """The state of the longest earlier suffix; splits it off from a longer string's state if necessary."""
        target = self._next[state][token]
        if self._length[state] + 1 == self._length[target]:
            return target
        clone = self._add_state(self._length[state] + 1, dict(self._next[target]), self._count[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state != -1 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add_state(self, length: int, transitions: dict[int, int], count: int) -> int:
        self._next.append(transitions)
        self._link.append(-1)
        self._length.append(length)
        self._count.append(count)
        return len(self._next) - 1
