"""Training examples and packed batches: whole sequences concatenated without padding.

Owns the index shift between tokens, features and teacher (shown below) and the order in which examples are visited.
Does not know models or losses.

    position         t              t + 1            t + 2
    token            x_t            x_{t+1}          x_{t+2}
    feature          f_t            f_{t+1}          (may be unknown at the last position)
    teacher          after t        after t + 1      predicts the token at its position + 1
    pair at t        input (f_t, embedding of x_{t+1}) at rotary position t
                     learns f_{t+1}, and through the LM head the teacher after t + 1, which predicts x_{t+2}
    supervised       where both x_{t+1} and x_{t+2} are assistant tokens

So a sequence of n tokens gives n - 2 pairs. All of them are keys and values; only supervised pairs are queries.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_SORT_WINDOW = 512  # examples sorted by length together, so that a batch's attention has little padding


@dataclass(frozen=True)
class Example:
    """One sequence of n tokens and what the target computed at each. The tensors are views of a shard, not copies."""

    tokens: Tensor  # (n,) int32
    features: Tensor  # (n, hidden) float16; the last row may be zeros (unknown)
    supervised: Tensor  # (n,) uint8; 1 on assistant tokens
    topk_ids: Tensor  # (n, k) int32, best first: the target's next token after this position
    topk_probs: Tensor  # (n, k) float16, raw softmax
    hidden: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (n, layers * hidden) float16: captured states

    @property
    def pairs(self) -> int:
        """Number of input pairs of this sequence."""
        return max(len(self.tokens) - 2, 0)

    def queries(self) -> Tensor:
        """(m,) int64: positions of the supervised pairs."""
        mask = self.supervised.bool()
        return (mask[1:-1] & mask[2:]).nonzero()[:, 0]


@dataclass(frozen=True)
class PackedBatch:
    """Concatenated sequences. N pairs, M of them supervised, B sequences of at most L pairs and Q queries each."""

    features: Tensor  # (N, width) float32: f_t, the captured states at t, or these and then f_t
    tokens: Tensor  # (N,) int64: x_t
    next_tokens: Tensor  # (N,) int64: x_{t+1}
    positions: Tensor  # (N,) int64: t
    queries: Tensor  # (M,) int64: indices of the supervised pairs
    target_features: Tensor  # (M, hidden) float32: f_{t+1}
    labels: Tensor  # (M,) int64: x_{t+2}
    teacher_ids: Tensor  # (M, k) int64: after t + 1
    teacher_probs: Tensor  # (M, k) float32
    key_slots: Tensor  # (B, L) int64: pair at padded slot j, 0 for padding
    query_slots: Tensor  # (B, Q) int64: index into `queries` at padded slot i, 0 for padding
    key_places: Tensor  # (N,) int64: b * L + j, the flat padded index of pair n
    query_places: Tensor  # (M,) int64: b * Q + i, the flat padded index of query m
    lengths: Tensor  # (B,) int64 pairs per sequence

    @property
    def supervised_count(self) -> int:
        """Number of supervised pairs, M."""
        return int(self.queries.shape[0])

    def attention_mask(self, back: int) -> Tensor:
        """(B, Q, L) bool: True on pairs at least `back` positions before each query (0: the query's own included)."""
        positions = self.positions[self.queries][self.query_slots]  # (B, Q)
        return torch.arange(self.key_slots.shape[1], device=positions.device) <= positions.unsqueeze(2) - back

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        return PackedBatch(*(getattr(self, each.name).to(device) for each in fields(self)))


def pack(examples: Sequence[Example], reads: tuple[str, ...] = ("features",)) -> PackedBatch:
    """Concatenate sequences; see the module docstring for the shift. `reads` are the fields that the head reads."""
    lengths, local = [example.pairs for example in examples], [example.queries() for example in examples]
    counts = [len(q) for q in local]  # local: positions within the sequence
    rows = list(torch.split(torch.arange(sum(lengths)), lengths))
    numbers = list(torch.split(torch.arange(sum(counts)), counts))
    after = [(example, q + 1) for example, q in zip(examples, local, strict=True)]
    return PackedBatch(
        features=torch.cat([torch.cat([getattr(e, name)[: e.pairs] for e in examples]) for name in reads], -1).float(),
        tokens=torch.cat([e.tokens[:-2] for e in examples]).long(),
        next_tokens=torch.cat([e.tokens[1:-1] for e in examples]).long(),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        queries=torch.cat([each[q] for each, q in zip(rows, local, strict=True)]),
        target_features=torch.cat([e.features[q] for e, q in after]).float(),
        labels=torch.cat([e.tokens[q + 1] for e, q in after]).long(),
        teacher_ids=torch.cat([e.topk_ids[q] for e, q in after]).long(),
        teacher_probs=torch.cat([e.topk_probs[q] for e, q in after]).float(),
        key_slots=pad_sequence(rows, batch_first=True),
        query_slots=pad_sequence(numbers, batch_first=True),
        key_places=torch.cat([torch.arange(n) + row * max(lengths) for row, n in enumerate(lengths)]),
        query_places=torch.cat([torch.arange(n) + row * max(counts) for row, n in enumerate(counts)]),
        lengths=torch.tensor(lengths),
    )


def usable(examples: Sequence[Example]) -> list[Example]:
    """The examples that have at least one supervised pair."""
    return [example for example in examples if bool(example.queries().numel())]


def digest(examples: Sequence[Example]) -> str:
    """A short hash of the tokens and the supervision masks, in the order of `examples`."""
    sha256 = hashlib.sha256()
    for example in examples:
        sha256.update(example.tokens.numpy().tobytes() + example.supervised.numpy().tobytes())
    return f"{len(examples)} sequences, {sha256.hexdigest()[:16]}"


class BatchOrder:
    """The order of batches: a pure function of (seed, epoch), so two integers are enough to resume.

    Args:
        lengths: pairs of every example.
        batch_tokens: most pairs in one batch; a longer example is a batch of its own.
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
        for start in range(0, len(order), _SORT_WINDOW):
            window = sorted(order[start : start + _SORT_WINDOW], key=self._lengths.__getitem__)
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
        """Endless (epoch, index of the next batch, example indices), from batch `place` of `epoch` on."""
        while True:
            for index, batch in enumerate(self.epoch(epoch)):
                if index >= place:
                    yield epoch, index + 1, batch
            epoch, place = epoch + 1, 0
