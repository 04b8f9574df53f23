"""Training passes in which the head reads its own features, as it does when it drafts.

Source: HASS (arXiv 2408.15766); EAGLE-3's training-time test (arXiv 2503.01840, section 3.2).
Owns the chain of passes and their attention. Pass 0 reads the target's features. In pass s the feature at t is the one
that pass s - 1 extrapolated from t - 1, so a chain of s drafted features ends at t:

    key of position     ... t-s-1   t-s     t-s+1 ... t-1     t
    comes from pass          0       0        1   ...  s-1    s

That is what a draft at depth s sees: true pairs up to where it starts, then its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from haast.training.batches import PackedBatch
from haast.training.whitened import Memory, WhitenedHead


def chain_passes(
    head: WhitenedHead, batch: PackedBatch, embeddings: Tensor, features: Tensor, passes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The passes' outputs, first to last.

    Args:
        head: the head in training.
        batch: N pairs, M of them supervised.
        embeddings: (vocab, hidden), whitened.
        features: (N, hidden), whitened.
        passes: how many; passes without any position are left out.

    Yields:
        (n, hidden) whitened next features, and (n,) which of the M supervised pairs they stand at.
    """
    inputs = embeddings[batch.next_tokens]
    memory = head.remember(batch, inputs, features)
    output, rows = head(batch, memory), torch.arange(batch.views)
    yield output, rows
    if passes == 1:
        return
    padded, drafted = head.padded_keys(batch, memory), list[tuple[Memory, Tensor]]()
    follows = _follows(batch)
    for number in range(1, passes):
        alive = follows[rows]
        rows = rows[alive] + 1
        if not rows.numel():
            return
        at = batch.queries[rows]
        own = head.remember(batch, inputs[at], output[alive], at)
        drafted.append((own, torch.full((batch.views,), -1).index_put((rows,), torch.arange(len(rows)))))
        asked = head.ask(own.fused, own.cosine, own.sine)
        output = head.finish(own.fused, _attend(head, batch, asked, padded, drafted, rows, number))
        yield output, rows


def _follows(batch: PackedBatch) -> Tensor:
    """(M,) bool: the supervised pair after this one is its neighbour in the same sequence."""
    position = batch.positions[batch.queries]
    near = (batch.queries[1:] == batch.queries[:-1] + 1) & (position[1:] == position[:-1] + 1)
    return torch.cat([near, near.new_zeros(1)])


def _attend(
    head: WhitenedHead,
    batch: PackedBatch,
    asked: Tensor,
    padded: tuple[Tensor, Tensor],
    drafted: list[tuple[Memory, Tensor]],
    rows: Tensor,
    number: int,
) -> Tensor:
    """Attention of pass `number`: true keys at least `number` behind, then one drafted key per earlier pass."""
    key, value = padded
    group = head.heads // head.kv_heads
    spread = asked.new_zeros(batch.views, head.heads, head.dim).index_copy(0, rows, asked)
    query = spread[batch.query_slots].transpose(1, 2) * head.dim**-0.5  # (B, heads, Q, dim)
    scores = query @ key.transpose(2, 3)  # (B, heads, Q, L)
    scores = scores.masked_fill(~batch.seen(number).unsqueeze(1), torch.finfo(scores.dtype).min)
    scores = scores.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]  # (n, heads, L)
    own_scores, own_values = [], []
    for earlier, (memory, place) in enumerate(drafted, start=1):
        there = place[rows - (number - earlier)]
        own_keys = memory.keys[there].repeat_interleave(group, 1)  # (n, heads, dim)
        own_scores.append((asked * own_keys).sum(-1, keepdim=True) * head.dim**-0.5)
        own_values.append(memory.values[there].repeat_interleave(group, 1))
    slots = scores.shape[-1]
    weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1)  # (n, heads, L + passes)
    places = batch.query_slots.shape[0] * batch.query_slots.shape[1]
    true = weights.new_zeros(places, head.heads, slots).index_copy(0, batch.query_places[rows], weights[..., :slots])
    true = true.view(*batch.query_slots.shape, head.heads, slots).transpose(1, 2) @ value  # (B, heads, Q, dim)
    output = true.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]
    for number_, own_value in enumerate(own_values):
        output = output + weights[..., slots + number_, None] * own_value
    return output.flatten(1)
