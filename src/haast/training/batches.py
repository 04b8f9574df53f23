"""Examples and packed batches: whole sequences laid end to end, no padding.

Owns the index shift between tokens, features and teacher (drawn below) and the order in which examples are seen.
Knows nothing of models or losses.

    position         t              t + 1            t + 2
    token            x_t            x_{t+1}          x_{t+2}
    feature          f_t            f_{t+1}          (may be unknown at the last position)
    teacher          after t        after t + 1      predicts the token at its position + 1
    pair at t        input (f_t, embedding of x_{t+1}) at rotary position t
                     aims at f_{t+1}, and through the LM head at the teacher after t + 1, which predicts x_{t+2}
    supervised       where both x_{t+1} and x_{t+2} are the assistant's

A sequence of n tokens so gives n - 2 pairs. All of them are keys and values; only supervised ones are queries.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_WINDOW = 512  # examples sorted by length together, so that a batch's attention has little padding


@dataclass(frozen=True)
class Example:
    """One sequence of n tokens, with the target's answers about it. Views of a shard, not copies."""

    tokens: Tensor  # (n,) int32
    features: Tensor  # (n, hidden) float16; the last row may be zeros (unknown)
    supervised: Tensor  # (n,) uint8; 1 on the assistant's tokens
    topk_ids: Tensor  # (n, k) int32, best first: the target's next token after this position
    topk_probs: Tensor  # (n, k) float16, raw softmax
    hidden: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (n, layers * hidden) float16: captured states

    @property
    def pairs(self) -> int:
        """Input pairs that this sequence gives."""
        return max(len(self.tokens) - 2, 0)

    def queries(self) -> Tensor:
        """(m,) int64: the pairs to supervise, by position."""
        mask = self.supervised.bool()
        return (mask[1:-1] & mask[2:]).nonzero()[:, 0]


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end. N pairs, M supervised ones, B sequences, at most L pairs and Q queries in one."""

    features: Tensor  # (N, width) float32: f_t, or the captured states at t
    tokens: Tensor  # (N,) int64: x_t
    next_tokens: Tensor  # (N,) int64: x_{t+1}
    positions: Tensor  # (N,) int64: t
    queries: Tensor  # (M,) int64: rows of the pack that are supervised
    wanted: Tensor  # (M, hidden) float32: f_{t+1}
    teacher_ids: Tensor  # (M, k) int64: after t + 1
    teacher_probs: Tensor  # (M, k) float32
    key_slots: Tensor  # (B, L) int64: row of the pack at pair slot j, 0 where there is none
    query_slots: Tensor  # (B, Q) int64: index into `queries` at slot i, 0 where there is none
    key_places: Tensor  # (N,) int64: b * L + j, where pair n stands in the padded form
    query_places: Tensor  # (M,) int64: b * Q + i, where query m stands in the padded form
    lengths: Tensor  # (B,) int64 pairs per sequence

    @property
    def views(self) -> int:
        """Supervised positions."""
        return int(self.queries.shape[0])

    def seen(self, back: int) -> Tensor:
        """(B, Q, L) bool: the pair slots at least `back` positions before each query (0: itself included)."""
        at = self.positions[self.queries][self.query_slots]  # (B, Q)
        return torch.arange(self.key_slots.shape[1], device=at.device) <= at.unsqueeze(2) - back

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        return PackedBatch(*(getattr(self, each.name).to(device) for each in fields(self)))


def pack(examples: Sequence[Example], captured: bool = False) -> PackedBatch:
    """Lay sequences end to end; see the module docstring for the shift. `captured` takes `hidden` for features."""
    lengths, own = [example.pairs for example in examples], [example.queries() for example in examples]
    counts = [len(q) for q in own]  # own: positions within the sequence
    rows = list(torch.split(torch.arange(sum(lengths)), lengths))
    numbers = list(torch.split(torch.arange(sum(counts)), counts))
    after = [(example, q + 1) for example, q in zip(examples, own, strict=True)]
    return PackedBatch(
        features=torch.cat([(e.hidden if captured else e.features)[: e.pairs] for e in examples]).float(),
        tokens=torch.cat([e.tokens[:-2] for e in examples]).long(),
        next_tokens=torch.cat([e.tokens[1:-1] for e in examples]).long(),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        queries=torch.cat([each[q] for each, q in zip(rows, own, strict=True)]),
        wanted=torch.cat([e.features[q] for e, q in after]).float(),
        teacher_ids=torch.cat([e.topk_ids[q] for e, q in after]).long(),
        teacher_probs=torch.cat([e.topk_probs[q] for e, q in after]).float(),
        key_slots=pad_sequence(rows, batch_first=True),
        query_slots=pad_sequence(numbers, batch_first=True),
        key_places=torch.cat([torch.arange(n) + row * max(lengths) for row, n in enumerate(lengths)]),
        query_places=torch.cat([torch.arange(n) + row * max(counts) for row, n in enumerate(counts)]),
        lengths=torch.tensor(lengths),
    )


def usable(examples: Sequence[Example]) -> list[Example]:
    """The examples that have anything to supervise."""
    return [example for example in examples if bool(example.queries().numel())]


def digest(examples: Sequence[Example]) -> str:
    """A short hash of the sequences and what is supervised, in their order."""
    told = hashlib.sha256()
    for example in examples:
        told.update(example.tokens.numpy().tobytes() + example.supervised.numpy().tobytes())
    return f"{len(examples)} sequences, {told.hexdigest()[:16]}"


class BatchOrder:
    """The order of batches: a pure function of (seed, epoch), so that a place in it is two integers.

    Args:
        lengths: pairs of every example.
        batch_tokens: most pairs of one batch; an example that is longer goes alone.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        if not lengths:
            raise ValueError("there is nothing to train on: no sequence has two assistant tokens in a row")
        self._lengths, self._batch_tokens, self._seed = list(lengths), batch_tokens, seed

    def epoch(self, number: int) -> list[list[int]]:
        """Every example once, in batches of similar length, shuffled."""
        rng = random.Random(f"{self._seed}-{number}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), _WINDOW):
            window = sorted(order[start : start + _WINDOW], key=self._lengths.__getitem__)
            current: list[int] = []
            for index in window:
                if current and sum(self._lengths[i] for i in [*current, index]) > self._batch_tokens:
                    batches.append(current)
                    current = []
                current.append(index)
            batches.append(current)
        rng.shuffle(batches)
        return batches

    def batches(self, epoch: int = 0, place: int = 0) -> Iterator[tuple[int, int, list[int]]]:
        """Endless (epoch, place after this batch, indices), from a place on."""
        while True:
            for at, batch in enumerate(self.epoch(epoch)):
                if at >= place:
                    yield epoch, at + 1, batch
            epoch, place = epoch + 1, 0
