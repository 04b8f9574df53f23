"""Lookahead decoding (Fu et al., arXiv 2402.02057) as one tree: window nodes are placeholders, guesses are drafts.

    window, W = 4 columns, N = 4: three rows of past choices. Column 0 of row 0 is the root.

    row 0   r -- a1 -- a2 -- a3        a chain: column i is a child of column i - 1
            |    |     |     |
    row 1   b0   b1    b2    b3        a child of the node above it
            |    |     |     |
    row 2   c0   c1    c2    c3        the target's choices here, d0 .. d3, complete the n-grams (r b0 c0 d0), ...

    next    row 1 becomes row 0 (its first token replaced by the new root), row 2 row 1, and d0 .. d3 row 2
    guesses (x1 .. x_{N-1}) that followed the root's token in the pool are chains under the root, the newest first

A node sees the chain up to its column and the column above it, as in the paper's mask (figure 5). `Accepted.choices`
gives the target's choices at the placeholders.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from haast.core import Accepted
from haast.drafters.base import Drafter
from haast.errors import check_at_least
from haast.path_tree import PathTree, pack_rows
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree

Gram = tuple[int, ...]


class NgramPool:
    """The n-grams per first token: at most `most`, the least recently added is dropped first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._grams: dict[int, dict[Gram, None]] = {}

    def add(self, gram: Sequence[int]) -> None:
        """Add an n-gram, or mark it as the newest."""
        grams, rest = self._grams.setdefault(gram[0], {}), tuple(gram[1:])
        grams.pop(rest, None)
        grams[rest] = None
        if len(grams) > self._most:
            del grams[next(iter(grams))]

    def guesses(self, token: int) -> list[Gram]:
        """The tokens that followed `token`, the newest n-gram first."""
        return list(reversed(self._grams.get(token, ())))


class LookaheadDrafter(Drafter):
    """Lookahead decoding.

    Args:
        vocab_size: for the random tokens of the first window.
        window: W, columns of the window, 1 or more.
        ngram: N, tokens of an n-gram, 2 or more; the window has N - 1 rows.
        guesses: G, maximum number of n-grams drafted per step, 1 or more.
        from_prompt: fill the pool with the prompt's own n-grams.
    """

    name = "lookahead"
    wants_choices = True

    def __init__(
        self, vocab_size: int, window: int = 5, ngram: int = 4, guesses: int = 5, from_prompt: bool = True
    ) -> None:
        check_at_least("ngram", ngram, 2)
        for name, value in (("window", window), ("guesses", guesses), ("vocab_size", vocab_size)):
            check_at_least(name, value)
        self.window, self.ngram, self.guesses = window, ngram, guesses
        self.vocab_size, self.from_prompt = vocab_size, from_prompt

    @property
    def nodes(self) -> int:
        """Nodes of window and guesses; the root is the window's first node."""
        return (self.ngram - 1) * (self.window + self.guesses)

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> LookaheadState:
        state = LookaheadState(self, int(prompt[0]))
        state.observe(list(map(int, prompt[1 : reused + 1])), None)
        return state

    def observe(self, states: Sequence[LookaheadState], accepted: Accepted) -> None:
        choices = [None] * len(states) if accepted.choices is None else accepted.choices.tolist()
        for state, tokens, chosen in zip(states, accepted.host_tokens(), choices, strict=True):
            state.observe(tokens, chosen)
            state.device = accepted.tokens.device

    def propose(self, states: Sequence[LookaheadState], budget: int | None = None) -> DraftTree:
        nodes = self.nodes if budget is None else min(budget, self.nodes)
        return pack_rows([state.tree(nodes) for state in states], states[0].device)


class LookaheadState:
    """One request's window and n-gram pool. They depend on its text only: the first window is always the same."""

    def __init__(self, owner: LookaheadDrafter, first: int) -> None:
        self._owner, self._pool = owner, NgramPool(owner.guesses)
        self._recent = [first]  # the newest tokens of the text, at most N
        draw = random.Random(0)
        self._window = [[draw.randrange(owner.vocab_size) for _ in range(owner.window)] for _ in range(owner.ngram - 1)]
        self._numbers: list[list[int]] = []  # node indices of the window in the last tree; empty if it had none
        self._learns = owner.from_prompt  # whether observed tokens are added to the pool
        self.device = torch.device("cpu")  # of the accepted tokens, and so of the trees

    def observe(self, tokens: Sequence[int], choices: Sequence[int] | None) -> None:
        """Append `tokens` to the text, and advance the window by the target's choices at the last tree's nodes."""
        if self._numbers and choices is not None:
            self._advance(choices)
        for token in tokens:
            self._recent = [*self._recent, token][-self._owner.ngram :]
            if self._learns and len(self._recent) == self._owner.ngram:
                self._pool.add(self._recent)

    def tree(self, nodes: int) -> PathTree:
        """The next tree, of at most `nodes` nodes: the window if it fits, and as many guesses as fit."""
        self._learns = True
        window = (self._owner.ngram - 1) * self._owner.window  # nodes, the root included
        reserved = window - 1 if nodes >= window else 0
        tree = PathTree(self._recent[-1], nodes)
        for guess in self._pool.guesses(self._recent[-1]):
            tree.insert(guess, tree.room - reserved)
        self._numbers = []
        if nodes >= window:
            self._numbers = [[0]]
            for token in self._window[0][1:]:
                self._numbers[0].append(tree.placeholder_under(self._numbers[0][-1], token))
            for row in self._window[1:]:
                above = zip(self._numbers[-1], row, strict=True)
                self._numbers.append([tree.placeholder_under(number, token) for number, token in above])
        return tree

    def _advance(self, choices: Sequence[int]) -> None:
        """Complete n-grams by the target's choices after the last row, which become the newest row."""
        newest = [choices[number] for number in self._numbers[-1]]
        for column in range(self._owner.window):
            first = self._recent[-1] if column == 0 else self._window[0][column]
            self._pool.add([first, *(row[column] for row in self._window[1:]), newest[column]])
        self._window = [*self._window[1:], newest]
