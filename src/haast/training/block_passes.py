"""A block head's states in training: many blocks of a packed batch in one pass.

Owns the choice of the anchors and the attention of the blocks, over the head's own modules. With t the position of a
supervised pair (see `batches`):

    anchor        x_{t+1}, at slot 0 and rotary position t + 1
    context       the target's states of positions 0 .. t of the same sequence
    slot k        its state, with the Markov bias of x_{t+1+k}, predicts x_{t+2+k}: the label of the pair at t + k

Slots attend to the context before their anchor and to their own block (DFlash's mask). Blocks of one sequence overlap,
and know nothing of each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llama.modeling_llama import rotate_half

from haast.heads.block import BlockHead
from haast.training.batches import PackedBatch

_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly


def choose_anchors(batch: PackedBatch, most: int, seed: int | None) -> Tensor:
    """(A,) int64, ascending: supervised pairs whose next tokens are anchors, at most `most` of each sequence.

    A function of the seed; None spreads them evenly.
    """
    count, device = batch.supervised_count, batch.queries.device
    if seed is None:
        keys = (torch.arange(count, dtype=torch.float64) * _GOLDEN).frac()
    else:
        keys = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sequence = batch.query_places.cpu() // batch.query_slots.shape[1]
    order = (sequence + keys).argsort()
    ordered = sequence[order]
    rank = torch.arange(count) - torch.searchsorted(ordered, ordered)
    return order[rank < most].sort().values.to(device)


class _Blocks(NamedTuple):
    """Where the blocks stand, padded: B sequences of at most P anchors."""

    positions: Tensor  # (B, P): position of the anchor
    tokens: Tensor  # (B, P)
    seen: Tensor  # (B, P, L) bool: the context that a block sees, by padded slot of the pairs
    places: Tensor  # (A,): flat padded index of each anchor


def block_states(head: BlockHead, batch: PackedBatch, embeddings: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
    """States of all slots before the last norm, (A, block_size, hidden).

    Args:
        head: the head in training, not packed.
        batch: N pairs, M of them supervised.
        embeddings: (vocab, hidden).
        features: (N, width), the target's states.
        anchors: (A,) indices into the supervised pairs, from `choose_anchors`.
    """
    blocks = _placed(batch, anchors)
    weight, bias = head.context_weights()
    projected = functional.linear(head.fuse(features), weight, bias).unsqueeze(0)
    states = head.block(lambda tokens: embeddings[tokens], blocks.tokens)  # (B, P, slots, hidden)
    rows, count, slots, _ = states.shape
    positions = blocks.positions.unsqueeze(2) + torch.arange(slots, device=states.device)
    cosine, sine = head.rotary(states, position_ids=positions.flatten(1))
    rotary = (cosine.view(rows, 1, count, slots, -1), sine.view(rows, 1, count, slots, -1))
    own = head.seen(states.device).expand(rows, count, slots, slots)
    seen = torch.cat([blocks.seen.unsqueeze(2).expand(-1, -1, slots, -1), own], dim=3).unsqueeze(1)
    layers: list[Any] = head.decoder_layers
    context = head.context_keys(projected, batch.positions.unsqueeze(0))
    for layer, (keys, values) in zip(layers, context, strict=True):
        padded = tuple(each[0][:, batch.key_slots].transpose(0, 1) for each in (keys, values))  # (B, kv, L, dim)
        attended = _attend(layer.self_attn, layer.input_layernorm(states), padded, rotary, seen)
        states = states + layer.self_attn.o_proj(attended)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return states.flatten(0, 1)[blocks.places]


def _placed(batch: PackedBatch, anchors: Tensor) -> _Blocks:
    sequence = batch.query_places[anchors] // batch.query_slots.shape[1]
    counts = torch.bincount(sequence, minlength=len(batch.lengths))
    slots = pad_sequence(list(torch.split(torch.arange(len(anchors), device=anchors.device), counts.tolist())), True)
    rank = torch.arange(len(anchors), device=anchors.device) - (counts.cumsum(0) - counts)[sequence]
    pairs = batch.queries[anchors][slots]  # (B, P)
    before = batch.positions[pairs]
    keys = torch.arange(batch.key_slots.shape[1], device=anchors.device)
    seen = keys <= before.unsqueeze(2)
    return _Blocks(before + 1, batch.next_tokens[pairs], seen, sequence * slots.shape[1] + rank)


def _attend(
    attention: Any, normed: Tensor, context: tuple[Tensor, ...], rotary: tuple[Tensor, Tensor], seen: Tensor
) -> Tensor:
    """Attention of the blocks (B, P, slots, hidden) to the context and to themselves, (B, P, slots, heads * dim).

    The largest tensor is (B, heads, P, slots, L + slots): the scores.
    """
    rows, count, slots, _ = normed.shape
    dim, group = attention.head_dim, attention.num_key_value_groups

    def by_head(name: str) -> Tensor:  # (B, heads, P, slots, dim)
        projected: Tensor = getattr(attention, f"{name}_proj")(normed).view(rows, count, slots, -1, dim)
        norm = dict(attention.named_children()).get(f"{name}_norm")
        projected = projected if norm is None else norm(projected)
        return projected.permute(0, 3, 1, 2, 4)

    query, key = (_rotated(by_head(name), rotary) for name in ("q", "k"))
    key, value = (each.repeat_interleave(group, 1) for each in (key, by_head("v")))
    past_key, past_value = (each.repeat_interleave(group, 1) for each in context)  # (B, heads, L, dim)
    heads, length = query.shape[1], past_key.shape[2]
    past = (query.flatten(2, 3) @ past_key.transpose(2, 3)).view(rows, heads, count, slots, length)
    scores = torch.cat([past, query @ key.transpose(3, 4)], dim=4) * dim**-0.5
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    output: Tensor = (weights[..., :length].flatten(2, 3) @ past_value).view_as(query) + weights[..., length:] @ value
    return output.permute(0, 2, 3, 1, 4).flatten(3)


def _rotated(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    rotated: Tensor = rotate_half(states)  # type: ignore[no-untyped-call]
    return states * rotary[0] + rotated * rotary[1]
