"""Training passes in which the head reads its own states, as it does when it drafts.

Source: HASS (arXiv 2408.15766); EAGLE-3's training-time test (arXiv 2503.01840, section 3.2).
Owns the chain of passes and their attention in a packed batch, over the head's own modules. Prompt positions are keys
and values only in the last layer. Pass 0 reads the target's features. In pass s the state at t is the one that pass
s - 1 made from t - 1, so a chain of s drafted states ends at t:

    key of position     ... t-s-1   t-s     t-s+1 ... t-1     t
    comes from pass          0       0        1   ...  s-1    s

That is what a draft at depth s sees: true pairs up to where it starts, then its own. It holds for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import rotate_half

from haast.heads.module import DraftModule
from haast.training.batches import PackedBatch

_Rotary = tuple[Tensor, Tensor]  # cosine and sine, (n, 1, dim) each


class _KeysValues(NamedTuple):
    """Rotated keys, and values: (n, kv_heads, dim) each, or padded (B, heads, L, dim)."""

    keys: Tensor
    values: Tensor


_Drafted = list[tuple[_KeysValues, Tensor]]  # of one layer, per earlier pass; and the place of each supervised pair


def chain_passes(
    head: DraftModule, batch: PackedBatch, embeddings: Tensor, features: Tensor, passes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The passes' outputs, first to last.

    Args:
        head: the head in training.
        batch: N pairs, M of them supervised.
        embeddings: (N, hidden) of the token that each pair holds.
        features: (N, width) of the target.
        passes: how many; passes without any position are left out.

    Yields:
        (n, hidden) next states, and (n,) which of the M supervised pairs they stand at.
    """
    cosine, sine = head.rotary(embeddings, position_ids=batch.positions.unsqueeze(0))
    rotary = (cosine[0].unsqueeze(1), sine[0].unsqueeze(1))
    layers: list[Any] = head.decoder_layers
    state, read = head.layer_input(embeddings, head.fuse(features))
    padded: list[_KeysValues] = []
    for number, layer in enumerate(layers):
        read = layer.input_layernorm(state) if number else read
        padded.append(_padded(layer, batch, _keys_values(layer, read, rotary)))
        every = number < len(layers) - 1
        if not every:
            state, read = state[batch.queries], read[batch.queries]
        queries = _queries(layer, read, rotary if every else _at(rotary, batch.queries))
        state = _finish(layer, state, _attend_first(batch, queries, padded[-1], every))
    rows = torch.arange(batch.views, device=state.device)
    yield state, rows
    drafted: list[_Drafted] = [[] for _ in layers]
    near = follows(batch)
    for _ in range(1, passes):
        alive = near[rows]
        rows = rows[alive] + 1
        if not rows.numel():
            return
        at = batch.queries[rows]
        place = torch.full((batch.views,), -1, device=rows.device)
        place = place.index_put((rows,), torch.arange(len(rows), device=rows.device))
        state, read = head.layer_input(embeddings[at], state[alive])
        for level, layer in enumerate(layers):
            read = layer.input_layernorm(state) if level else read
            drafted[level].append((_keys_values(layer, read, _at(rotary, at)), place))
            queries = _queries(layer, read, _at(rotary, at))
            attended = _attend_drafted(layer, batch, queries, padded[level], drafted[level], rows)
            state = _finish(layer, state, attended)
        yield state, rows


def follows(batch: PackedBatch) -> Tensor:
    """(M,) bool: the supervised pair after this one is its neighbour in the same sequence."""
    position = batch.positions[batch.queries]
    near = (batch.queries[1:] == batch.queries[:-1] + 1) & (position[1:] == position[:-1] + 1)
    return torch.cat([near, near.new_zeros(1)])


def _at(rotary: _Rotary, rows: Tensor) -> _Rotary:
    return rotary[0][rows], rotary[1][rows]


def _turn(states: Tensor, rotary: _Rotary) -> Tensor:
    """Rotate (n, heads, dim)."""
    turned: Tensor = rotate_half(states)  # type: ignore[no-untyped-call]
    return states * rotary[0] + turned * rotary[1]


def _keys_values(layer: Any, read: Tensor, rotary: _Rotary) -> _KeysValues:
    attention = layer.self_attn
    keys, values = (each(read).view(len(read), -1, attention.head_dim) for each in (attention.k_proj, attention.v_proj))
    return _KeysValues(_turn(keys, rotary), values)


def _queries(layer: Any, read: Tensor, rotary: _Rotary) -> Tensor:
    """Rotated queries (n, heads, dim)."""
    return _turn(layer.self_attn.q_proj(read).view(len(read), -1, layer.self_attn.head_dim), rotary)


def _finish(layer: Any, state: Tensor, attended: Tensor) -> Tensor:
    """The rest of the layer: (n, hidden) and (n, heads * dim) -> (n, hidden)."""
    state = state + layer.self_attn.o_proj(attended)
    output: Tensor = state + layer.mlp(layer.post_attention_layernorm(state))
    return output


def _padded(layer: Any, batch: PackedBatch, known: _KeysValues) -> _KeysValues:
    """Keys and values of every sequence, (B, heads, L, dim) each, grouped heads repeated."""
    group = layer.self_attn.num_key_value_groups
    return _KeysValues(*(each[batch.key_slots].transpose(1, 2).repeat_interleave(group, 1) for each in known))


def _attend_first(batch: PackedBatch, queries: Tensor, padded: _KeysValues, every: bool) -> Tensor:
    """Causal attention of the supervised pairs' (M, heads, dim), or of `every` pair's (N, heads, dim) queries."""
    slots, places = (batch.key_slots, batch.key_places) if every else (batch.query_slots, batch.query_places)
    query = queries[slots].transpose(1, 2)  # (B, heads, Q, dim)
    seen = None if every else batch.seen(0).unsqueeze(1)
    output = functional.scaled_dot_product_attention(query, *padded, attn_mask=seen, is_causal=every)
    return output.transpose(1, 2).flatten(0, 1).flatten(1)[places]


def _attend_drafted(
    layer: Any, batch: PackedBatch, queries: Tensor, padded: _KeysValues, drafted: _Drafted, rows: Tensor
) -> Tensor:
    """Attention of pass s = len(drafted): true keys of positions up to t - s, then one drafted key per pass.

    The largest tensor is (B, heads, Q, L): scores of the supervised positions, never one more axis of L.
    """
    number, heads, dim = len(drafted), *queries.shape[1:]
    group, scaling = layer.self_attn.num_key_value_groups, dim**-0.5
    spread = queries.new_zeros(batch.views, heads, dim).index_copy(0, rows, queries)
    query = spread[batch.query_slots].transpose(1, 2) * scaling  # (B, heads, Q, dim)
    scores = query @ padded.keys.transpose(2, 3)  # (B, heads, Q, L)
    scores = scores.masked_fill(~batch.seen(number).unsqueeze(1), torch.finfo(scores.dtype).min)
    scores = scores.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]  # (n, heads, L)
    own_scores, own_values = [], []
    for earlier, (known, place) in enumerate(drafted, start=1):
        there = place[rows - (number - earlier)]
        own_keys = known.keys[there].repeat_interleave(group, 1)  # (n, heads, dim)
        own_scores.append((queries * own_keys).sum(-1, keepdim=True) * scaling)
        own_values.append(known.values[there].repeat_interleave(group, 1))
    slots = scores.shape[-1]
    weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1)  # (n, heads, L + passes)
    places = batch.query_slots.numel()
    true = weights.new_zeros(places, heads, slots).index_copy(0, batch.query_places[rows], weights[..., :slots])
    true = true.view(*batch.query_slots.shape, heads, slots).transpose(1, 2) @ padded.values
    output = true.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]
    for own, own_value in enumerate(own_values):
        output = output + weights[..., slots + own, None] * own_value
    return output.flatten(1)
