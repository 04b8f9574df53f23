"""Training passes in which the head reads its own states, as it does when it drafts.

Source: HASS (arXiv 2408.15766); EAGLE-3's training-time test (arXiv 2503.01840, section 3.2).
Owns the chain of passes and their attention. Pass 0 reads the target's features. In pass s the state at t is the one
that pass s - 1 made from t - 1, so a chain of s drafted states ends at t:

    key of position     ... t-s-1   t-s     t-s+1 ... t-1     t
    comes from pass          0       0        1   ...  s-1    s

That is what a draft at depth s sees: true pairs up to where it starts, then its own. It holds for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from haast.training.batches import PackedBatch
from haast.training.layers import DraftLayer, Memory
from haast.training.normalized_head import TrainedHead

_Drafted = list[tuple[Memory, Tensor]]  # of one layer, per earlier pass: its memory, and the place of each view in it


def chain_passes(
    head: TrainedHead, batch: PackedBatch, embeddings: Tensor, features: Tensor, passes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The passes' outputs, first to last.

    Args:
        head: the head in training.
        batch: N pairs, M of them supervised.
        embeddings: (N, hidden), whitened, of the token that each pair holds.
        features: (N, width), whitened.
        passes: how many; passes without any position are left out.

    Yields:
        (n, hidden) whitened next states, and (n,) which of the M supervised pairs they stand at.
    """
    angles = head.angles(batch.positions)
    state, read = head.enter(embeddings, head.fuse(features))
    padded: list[Memory] = []
    last = len(head.layers) - 1
    for number, layer in enumerate(head.layers):
        assert isinstance(layer, DraftLayer), "nothing else is in the list"
        read = layer.read(state) if number else read
        padded.append(layer.padded(batch, layer.remember(read, angles)))
        asked, turned = read, angles
        if number == last:  # prompt positions are keys and values only
            state, asked, turned = state[batch.queries], read[batch.queries], angles.at(batch.queries)
        attended = layer.attend(batch, layer.ask(asked, turned), padded[-1], every=number != last)
        state = layer.finish(state, attended)
    rows = torch.arange(batch.views, device=state.device)
    yield state, rows
    if passes == 1:
        return
    drafted: list[_Drafted] = [[] for _ in head.layers]
    near = follows(batch)
    for number in range(1, passes):
        alive = near[rows]
        rows = rows[alive] + 1
        if not rows.numel():
            return
        at = batch.queries[rows]
        place = torch.full((batch.views,), -1, device=rows.device)
        place = place.index_put((rows,), torch.arange(len(rows), device=rows.device))
        turned = angles.at(at)
        state, read = head.enter(embeddings[at], state[alive])
        for level, layer in enumerate(head.layers):
            assert isinstance(layer, DraftLayer), "nothing else is in the list"
            read = layer.read(state) if level else read
            drafted[level].append((layer.remember(read, turned), place))
            attended = _attend(layer, batch, layer.ask(read, turned), padded[level], drafted[level], rows, number)
            state = layer.finish(state, attended)
        yield state, rows


def follows(batch: PackedBatch) -> Tensor:
    """(M,) bool: the supervised pair after this one is its neighbour in the same sequence."""
    position = batch.positions[batch.queries]
    near = (batch.queries[1:] == batch.queries[:-1] + 1) & (position[1:] == position[:-1] + 1)
    return torch.cat([near, near.new_zeros(1)])


def _attend(
    layer: DraftLayer,
    batch: PackedBatch,
    asked: Tensor,
    padded: Memory,
    drafted: _Drafted,
    rows: Tensor,
    number: int,
) -> Tensor:
    """Attention of pass `number`: true keys at least `number` behind, then one drafted key per earlier pass.

    The largest tensor is (B, heads, Q, L): scores of the supervised positions, never one more axis of L.
    """
    group = layer.heads // layer.kv_heads
    spread = asked.new_zeros(batch.views, layer.heads, layer.dim).index_copy(0, rows, asked)
    query = spread[batch.query_slots].transpose(1, 2) * layer.dim**-0.5  # (B, heads, Q, dim)
    scores = query @ padded.keys.transpose(2, 3)  # (B, heads, Q, L)
    scores = scores.masked_fill(~batch.seen(number).unsqueeze(1), torch.finfo(scores.dtype).min)
    scores = scores.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]  # (n, heads, L)
    own_scores, own_values = [], []
    for earlier, (memory, place) in enumerate(drafted, start=1):
        there = place[rows - (number - earlier)]
        own_keys = memory.keys[there].repeat_interleave(group, 1)  # (n, heads, dim)
        own_scores.append((asked * own_keys).sum(-1, keepdim=True) * layer.dim**-0.5)
        own_values.append(memory.values[there].repeat_interleave(group, 1))
    slots = scores.shape[-1]
    weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1)  # (n, heads, L + passes)
    places = batch.query_slots.shape[0] * batch.query_slots.shape[1]
    true = weights.new_zeros(places, layer.heads, slots).index_copy(0, batch.query_places[rows], weights[..., :slots])
    true = true.view(*batch.query_slots.shape, layer.heads, slots).transpose(1, 2) @ padded.values
    output = true.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]
    for own, own_value in enumerate(own_values):
        output = output + weights[..., slots + own, None] * own_value
    return output.flatten(1)
