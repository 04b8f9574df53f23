"""What an EAGLE drafter keeps of one request, and the accepted features that its head has not processed yet.

Owns the queue between `observe` and the head's next forward: a step that drafts nothing needs no head, so what it
accepted waits here, and one head forward goes over all of it later. Its length is bounded. Knows no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from haast.core import Accepted
from haast.device import to_device
from haast.target.kv_pool import BLOCK
from haast.target.kv_pool import Sequence as KVSequence

MOST_PENDING = 128  # positions that wait for a head while nothing is drafted: bounds their memory
_LEAST_KEPT = 4 * BLOCK  # of them, that a head that begins in the middle of a text has to begin with


@dataclass
class EagleState:
    """What the drafter keeps of one request.

    Attributes:
        kv: the request's blocks.
        observed: pairs that the head has; pair i holds token i + 1 and lies in its slot.
        skipped: pairs, from the first, that the head leaves out: those before its window, or before `begin`.
        begin: block of `kv` in which the head's text begins: 0, or later where it has not followed the text so far.
        root: () int64, the last emitted token.
        before: () int64, the token after the last observed position.
        extrapolated: (hidden,), the head's state after the last pair: it stands at the root.
        pending: what was accepted since, and the request's row in it.
    """

    kv: KVSequence
    observed: int
    skipped: int
    before: Tensor
    root: Tensor | None = None
    extrapolated: Tensor | None = None
    pending: list[tuple[Accepted, int]] = field(default_factory=list)
    waiting: int = 0  # positions that are pending
    begin: int = 0

    @property
    def past(self) -> int:
        """Pairs that the head has of its text."""
        return self.observed - BLOCK * self.begin

    def begin_after(self, pairs: int) -> None:
        """The head's text begins with the first block after so many pairs."""
        self.begin = -(-pairs // BLOCK)
        self.skipped = max(self.skipped, BLOCK * self.begin)

    def forget_oldest(self) -> None:
        """Leave out the oldest of what waits, where more wait than may and enough are left to draft by."""
        while self.waiting > MOST_PENDING:
            accepted, row = self.pending[0]
            count = len(accepted.host_tokens()[row])
            if self.waiting - count < _LEAST_KEPT:
                return
            del self.pending[0]
            self.waiting -= count
            self.observed += count
            self.before = accepted.tokens[row, count - 1].clone() if count else self.before
            self.begin_after(self.observed)

    def note_root(self) -> None:
        """Take the last emitted token from what is pending."""
        for accepted, row in reversed(self.pending):
            if count := len(accepted.host_tokens()[row]):
                self.root = accepted.tokens[row, count - 1]
                return


def joined(states: Sequence[EagleState]) -> tuple[Tensor, Tensor, list[int]]:
    """All that waits: tokens (rows, n), features (rows, n, width), shorter rows padded at the end, and counts."""
    first = states[0].pending[0][0] if states[0].pending else None
    alike = first is not None and len(states) == first.tokens.shape[0]
    if first is not None and alike and all(s.pending == [(first, row)] for row, s in enumerate(states)):
        return first.tokens, first.features, [len(said) for said in first.host_tokens()]  # a step, as it was
    parts = [[(each, row, len(each.host_tokens()[row])) for each, row in state.pending] for state in states]
    counts = [sum(count for *_, count in part) for part in parts]
    some = next(each for part in parts for each, *_ in part)
    tokens = some.tokens.new_zeros(len(states), max(counts))
    features = some.features.new_zeros(len(states), max(counts), some.features.shape[2])
    for place, part in enumerate(parts):
        at = 0
        for each, row, count in part:
            tokens[place, at : at + count] = each.tokens[row, :count]
            features[place, at : at + count] = each.features[row, :count]
            at += count
    return tokens, features, counts


def without(values: Tensor, left_out: Sequence[int]) -> Tensor:
    """Each row's values (rows, n, ...) without its first ones; what is missing at the end repeats the last."""
    first = to_device(torch.tensor(left_out), values.device).unsqueeze(1)
    index = (first + torch.arange(values.shape[1], device=values.device)).clamp_max(values.shape[1] - 1)
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))
