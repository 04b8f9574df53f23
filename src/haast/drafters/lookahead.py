"""Lookahead decoding (Fu et al., arXiv 2402.02057) as one tree: its window's nodes are probes, its guesses are drafts.

Owns the window, the pool of n-grams and the tree of both. Knows no head; the target's own choices at the probes come
with `Accepted.choices`.

    window, W = 4 columns, N = 4: three rows of past choices. Column 0 of row 0 is the root.

    row 0   r -- a1 -- a2 -- a3        a chain: column i is a child of column i - 1
            |    |     |     |
    row 1   b0   b1    b2    b3        a child of the node above it
            |    |     |     |
    row 2   c0   c1    c2    c3        what the target says here, d0 .. d3, completes the n-grams (r b0 c0 d0), ...

    next    row 1 becomes row 0 (its first token replaced by the new root), row 2 row 1, and d0 .. d3 row 2
    guesses (x1 .. x_{N-1}) that followed the root's token in the pool are chains under the root, the newest first

A node sees the chain up to its column and the column above it: the ancestors of a tree, at positions of its depths.
That is the paper's mask (figure 5).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

import torch

from haast.drafters.base import Accepted, Drafter
from haast.drafters.paths import PathTree, pack_rows
from haast.tree import DraftTree

Gram = tuple[int, ...]


class NgramPool:
    """First token -> the n-grams' other tokens, at most `most` of them, the least recently seen leave first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._grams: dict[int, OrderedDict[Gram, None]] = {}

    def add(self, gram: Sequence[int]) -> None:
        """Take in an n-gram."""
        kept = self._grams.setdefault(gram[0], OrderedDict())
        rest = tuple(gram[1:])
        kept.pop(rest, None)
        kept[rest] = None
        if len(kept) > self._most:
            kept.popitem(last=False)

    def guesses(self, token: int) -> list[Gram]:
        """What followed the token, the newest first."""
        return list(reversed(self._grams.get(token, ())))


class LookaheadDrafter(Drafter):
    """Lookahead decoding.

    Args:
        window: W, columns of the window, 1 or more.
        ngram: N, tokens of an n-gram, 2 or more; the window has N - 1 rows.
        guesses: G, n-grams that are tried a step, 1 or more.
        vocab_size: random tokens begin the window.
        from_prompt: fill the pool with the prompt's own n-grams.
        device: where the target takes its tokens.
    """

    name = "lookahead"
    wants_choices = True

    def __init__(
        self,
        vocab_size: int,
        window: int = 5,
        ngram: int = 4,
        guesses: int = 5,
        from_prompt: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (
            ("window", window, 1),
            ("ngram", ngram, 2),
            ("guesses", guesses, 1),
            ("vocab_size", vocab_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is not allowed: give {least} or more")
        self.window, self.ngram, self.guesses = window, ngram, guesses
        self.vocab_size, self.from_prompt, self._device = vocab_size, from_prompt, torch.device(device)

    @property
    def nodes(self) -> int:
        """Window and guesses; the root is the window's first node."""
        return (self.ngram - 1) * (self.window + self.guesses)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._rows = [_Row(self, prompt, seed) for seed, prompt in enumerate(prompts)]

    def keep(self, order: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in order]

    def observe(self, accepted: Accepted) -> None:
        for place, row in enumerate(self._rows):
            said = accepted.tokens[place, : accepted.counts[place]].tolist()
            if said:
                row.observe(said, None if accepted.choices is None else accepted.choices[place].tolist())

    def recall(self, memory: object, following: Sequence[int]) -> None:
        self._rows[0].observe(list(following), None)

    def propose(self) -> DraftTree:
        return pack_rows([row.tree() for row in self._rows], self.nodes, self._device)


class _Row:
    """One text's window and pool."""

    def __init__(self, owner: LookaheadDrafter, prompt: Sequence[int], seed: int) -> None:
        self._owner = owner
        self._pool = NgramPool(owner.guesses)
        self._last = int(prompt[0])
        self._recent = [self._last]  # the newest tokens of the text, N at most
        draw = random.Random(seed)
        self._window = [[draw.randrange(owner.vocab_size) for _ in range(owner.window)] for _ in range(owner.ngram - 1)]
        self._numbers: list[list[int]] = []  # node numbers of the last tree's window; empty before the first

    def observe(self, said: Sequence[int], choices: Sequence[int] | None) -> None:
        if self._numbers and choices is not None:
            self._advance(choices)
        learns = bool(self._numbers) or self._owner.from_prompt  # what was said makes n-grams too
        for token in said:
            self._recent = [*self._recent, token][-self._owner.ngram :]
            if learns and len(self._recent) == self._owner.ngram:
                self._pool.add(self._recent)
        self._last = said[-1]

    def tree(self) -> PathTree:
        tree = PathTree(self._last, self._owner.nodes)
        for guess in self._pool.guesses(self._last):
            tree.insert(guess)
        width = self._owner.window
        first, numbers = self._window[0], [[0]]
        for column in range(1, width):
            numbers[0].append(tree.probe_under(numbers[0][column - 1], first[column]))
        for row in self._window[1:]:
            numbers.append([tree.probe_under(numbers[-1][column], row[column]) for column in range(width)])
        self._numbers = numbers
        return tree

    def _advance(self, choices: Sequence[int]) -> None:
        """The target's choices below the last row complete n-grams and become the newest row."""
        said = [choices[number] for number in self._numbers[-1]]
        for column in range(self._owner.window):
            head = self._last if column == 0 else self._window[0][column]
            self._pool.add([head, *(row[column] for row in self._window[1:]), said[column]])
        self._window = [*self._window[1:], said]
