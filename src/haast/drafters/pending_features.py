"""An EAGLE drafter's state per request, with the accepted features that its head has not processed yet.

Owns the queue between `observe` and the head's next forward: a step that drafts nothing does not run the head, so its
accepted features are queued here, and one head forward processes all of them later. The queue is bounded. Knows no
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from haast.core import Accepted
from haast.device import to_device
from haast.drafters.text_vocab import Rare
from haast.target.kv_pool import BLOCK
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree
from haast.tuning.correction import Correction

MAX_PENDING = 128  # queued positions while nothing is drafted: bounds their memory
_MIN_KEPT = 4 * BLOCK  # positions to keep, so that a head that starts in the middle of a text has some context


@dataclass(frozen=True)
class Drafted:
    """One row's tree as the head sees it: tokens, parents, and the probability of each node, 0 where it is not its own.

    Nodes are found again by their tokens, since a request's guide may change the tree before it is verified.
    """

    tokens: list[int]
    parents: list[int]
    chances: list[float]

    @property
    def expected(self) -> float:
        """Expected number of accepted nodes of the head."""
        return sum(self.chances)

    def accepted(self, tokens: Sequence[int]) -> int:
        """Number of the head's nodes on the path of `tokens` below the root."""
        node, nodes, found = 0, range(1, len(self.tokens)), 0
        for token in tokens:
            below = (at for at in nodes if self.parents[at] == node and self.tokens[at] == token)
            node = next(below, 0)
            if not node:
                break
            found += self.chances[node] > 0
        return found


@dataclass
class EagleState:
    """The drafter's state of one request.

    Attributes:
        kv: the request's blocks.
        observed: number of pairs up to the last processed one; pair i holds token i + 1 and is in its slot.
        skipped: number of first pairs that the head leaves out: those before its window, or before `begin`.
        temperature, correction: what acceptance depends on in addition to the head's probabilities.
        drafted: the last tree, if its probabilities are on the host.
        begin: block of `kv` where the head's text begins: 0, or later if the head did not process the text before.
        root: () int64, the last emitted token.
        before: () int64, the token after the last processed position.
        extrapolated: (hidden,), the head's state after the last pair: the extrapolated feature of the root.
        pending: accepted features not processed yet, each with the request's row.
        pending_count: number of their positions.
        rare: the text's tokens outside the draft vocabulary, see `TextVocab`.
    """

    kv: KVSequence
    observed: int
    skipped: int
    before: Tensor
    root: Tensor | None = None
    extrapolated: Tensor | None = None
    pending: list[tuple[Accepted, int]] = field(default_factory=list)
    pending_count: int = 0
    begin: int = 0
    temperature: float = 0.0
    correction: Correction = field(default_factory=Correction)
    drafted: Drafted | None = None
    rare: Rare = field(default_factory=dict)

    @property
    def warmth(self) -> float:
        """Share of the acceptance curve of sampled texts, the rest is that of greedy ones."""
        return min(self.temperature, 1.0)

    def count_accepted(self, tokens: Sequence[int]) -> None:
        """Correct the head's acceptance by the tokens that follow the root: each was in the last tree or not."""
        if self.drafted is not None:
            self.correction.observe(self.drafted.expected, self.drafted.accepted(tokens))
            self.drafted = None

    @property
    def past(self) -> int:
        """Number of pairs in the head's KV cache."""
        return self.observed - BLOCK * self.begin

    def begin_after(self, pairs: int) -> None:
        """Let the head's text begin with the first block after `pairs` pairs."""
        self.begin = -(-pairs // BLOCK)
        self.skipped = max(self.skipped, BLOCK * self.begin)

    def drop_oldest(self) -> None:
        """Drop the oldest pending features beyond the bound, as long as enough remain to draft from."""
        while self.pending_count > MAX_PENDING:
            accepted, row = self.pending[0]
            count = len(accepted.host_tokens()[row])
            if self.pending_count - count < _MIN_KEPT:
                return
            del self.pending[0]
            self.pending_count -= count
            self.observed += count
            self.before = accepted.tokens[row, count - 1].clone() if count else self.before
            self.begin_after(self.observed)

    def update_root(self) -> None:
        """Set the root to the last emitted token among the pending ones."""
        for accepted, row in reversed(self.pending):
            if count := len(accepted.host_tokens()[row]):
                self.root = accepted.tokens[row, count - 1]
                return


def remember(states: Sequence[EagleState], tree: DraftTree, scores: Tensor) -> None:
    """Note every row's tree until it is verified. `scores` are `Growth.head_scores`, on the CPU like the tree."""
    parts = zip(tree.tokens.tolist(), tree.parents.tolist(), scores.exp().tolist(), strict=True)
    for state, part in zip(states, parts, strict=True):
        state.drafted = Drafted(*part)


def join_pending(states: Sequence[EagleState]) -> tuple[Tensor, Tensor, list[int]]:
    """All pending tokens (rows, n) and features (rows, n, width), padded at the end, and the number per row."""
    first = states[0].pending[0][0] if states[0].pending else None
    same_rows = first is not None and len(states) == first.tokens.shape[0]
    if first is not None and same_rows and all(s.pending == [(first, row)] for row, s in enumerate(states)):
        return first.tokens, first.features, [len(row) for row in first.host_tokens()]  # one step: no copy needed
    parts = [[(each, row, len(each.host_tokens()[row])) for each, row in state.pending] for state in states]
    counts = [sum(count for *_, count in part) for part in parts]
    like = next(each for part in parts for each, *_ in part)
    tokens = like.tokens.new_zeros(len(states), max(counts))
    features = like.features.new_zeros(len(states), max(counts), like.features.shape[2])
    for index, part in enumerate(parts):
        start = 0
        for each, row, count in part:
            tokens[index, start : start + count] = each.tokens[row, :count]
            features[index, start : start + count] = each.features[row, :count]
            start += count
    return tokens, features, counts


def drop_first(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Drop the first `counts` (rows) of each row's values (rows, n, ...); the end is padded with the last value."""
    first = to_device(torch.tensor(counts), values.device).unsqueeze(1)
    index = (first + torch.arange(values.shape[1], device=values.device)).clamp_max(values.shape[1] - 1)
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))
