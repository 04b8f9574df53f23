"""Training passes in which the head reads its own states, as it does when drafting.

Source: HASS (arXiv 2408.15766); EAGLE-3's training-time test (arXiv 2503.01840, section 3.2).
Owns the chain of passes and their attention in a packed batch, over the head's own modules. Prompt positions are keys
and values only in the last layer. Pass 0 reads the target's features. In pass s the input state at t is the output of
pass s - 1 at t - 1, so a chain of s drafted states ends at t:

    key of position     ... t-s-1   t-s     t-s+1 ... t-1     t
    comes from pass          0       0        1   ...  s-1    s

A draft at depth s attends to the same keys: true pairs up to its start, then its own. This holds for every layer.
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


_DraftedKeys = list[
    tuple[_KeysValues, Tensor]
]  # of one layer, per earlier pass; with each supervised pair's index in them


def chain_passes(
    head: DraftModule, batch: PackedBatch, embeddings: Tensor, features: Tensor, passes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of each pass, in order.

    Args:
        head: the head in training.
        batch: N pairs, M of them supervised.
        embeddings: (N, hidden) of each pair's token.
        features: (N, width) of the target.
        passes: number of passes; passes without any position are left out.

    Yields:
        (n, hidden) next states, and (n,) their indices into the M supervised pairs.
    """
    cosine, sine = head.rotary(embeddings, position_ids=batch.positions.unsqueeze(0))
    rotary = (cosine[0].unsqueeze(1), sine[0].unsqueeze(1))
    layers: list[Any] = head.decoder_layers
    state, layer_input = head.layer_input(embeddings, head.fuse(features))
    padded: list[_KeysValues] = []
    for number, layer in enumerate(layers):
        layer_input = layer.input_layernorm(state) if number else layer_input
        padded.append(_padded(layer, batch, _keys_values(layer, layer_input, rotary)))
        all_pairs = number < len(layers) - 1
        if not all_pairs:
            state, layer_input = state[batch.queries], layer_input[batch.queries]
        queries = _queries(layer, layer_input, rotary if all_pairs else _select(rotary, batch.queries))
        state = _layer_output(layer, state, _attend_first(batch, queries, padded[-1], all_pairs))
    rows = torch.arange(batch.supervised_count, device=state.device)
    yield state, rows
    drafted: list[_DraftedKeys] = [[] for _ in layers]
    adjacent = next_is_adjacent(batch)
    for _ in range(1, passes):
        keep = adjacent[rows]
        rows = rows[keep] + 1
        if not rows.numel():
            return
        pairs = batch.queries[rows]
        index_of = torch.full((batch.supervised_count,), -1, device=rows.device)
        index_of = index_of.index_put((rows,), torch.arange(len(rows), device=rows.device))
        state, layer_input = head.layer_input(embeddings[pairs], state[keep])
        for level, layer in enumerate(layers):
            layer_input = layer.input_layernorm(state) if level else layer_input
            drafted[level].append((_keys_values(layer, layer_input, _select(rotary, pairs)), index_of))
            queries = _queries(layer, layer_input, _select(rotary, pairs))
            attended = _attend_drafted(layer, batch, queries, padded[level], drafted[level], rows)
            state = _layer_output(layer, state, attended)
        yield state, rows


def next_is_adjacent(batch: PackedBatch) -> Tensor:
    """(M,) bool: whether the next supervised pair is at the next position of the same sequence."""
    position = batch.positions[batch.queries]
    adjacent = (batch.queries[1:] == batch.queries[:-1] + 1) & (position[1:] == position[:-1] + 1)
    return torch.cat([adjacent, adjacent.new_zeros(1)])


def _select(rotary: _Rotary, rows: Tensor) -> _Rotary:
    return rotary[0][rows], rotary[1][rows]


def _rotate(states: Tensor, rotary: _Rotary) -> Tensor:
    """Apply rotary embeddings to (n, heads, dim)."""
    rotated: Tensor = rotate_half(states)  # type: ignore[no-untyped-call]
    return states * rotary[0] + rotated * rotary[1]


def _keys_values(layer: Any, layer_input: Tensor, rotary: _Rotary) -> _KeysValues:
    attention = layer.self_attn
    keys, values = (
        each(layer_input).view(len(layer_input), -1, attention.head_dim)
        for each in (attention.k_proj, attention.v_proj)
    )
    return _KeysValues(_rotate(keys, rotary), values)


def _queries(layer: Any, layer_input: Tensor, rotary: _Rotary) -> Tensor:
    """Rotated queries (n, heads, dim)."""
    return _rotate(layer.self_attn.q_proj(layer_input).view(len(layer_input), -1, layer.self_attn.head_dim), rotary)


def _layer_output(layer: Any, state: Tensor, attended: Tensor) -> Tensor:
    """The layer after its attention: o_proj, residuals and MLP. (n, hidden), (n, heads * dim) -> (n, hidden)."""
    state = state + layer.self_attn.o_proj(attended)
    output: Tensor = state + layer.mlp(layer.post_attention_layernorm(state))
    return output


def _padded(layer: Any, batch: PackedBatch, packed: _KeysValues) -> _KeysValues:
    """Padded keys and values, (B, heads, L, dim) each, grouped heads repeated."""
    group = layer.self_attn.num_key_value_groups
    return _KeysValues(*(each[batch.key_slots].transpose(1, 2).repeat_interleave(group, 1) for each in packed))


def _attend_first(batch: PackedBatch, queries: Tensor, padded: _KeysValues, all_pairs: bool) -> Tensor:
    """Causal attention for queries of the supervised pairs (M, heads, dim), or of `all_pairs` (N, heads, dim)."""
    slots, places = (batch.key_slots, batch.key_places) if all_pairs else (batch.query_slots, batch.query_places)
    query = queries[slots].transpose(1, 2)  # (B, heads, Q, dim)
    mask = None if all_pairs else batch.attention_mask(0).unsqueeze(1)
    output = functional.scaled_dot_product_attention(query, *padded, attn_mask=mask, is_causal=all_pairs)
    return output.transpose(1, 2).flatten(0, 1).flatten(1)[places]


def _attend_drafted(
    layer: Any, batch: PackedBatch, queries: Tensor, padded: _KeysValues, drafted: _DraftedKeys, rows: Tensor
) -> Tensor:
    """Attention in pass s = len(drafted): true keys of positions up to t - s, then one drafted key per earlier pass.

    The largest tensor is (B, heads, Q, L): the scores of the supervised positions.
    """
    number, heads, dim = len(drafted), *queries.shape[1:]
    group, scaling = layer.self_attn.num_key_value_groups, dim**-0.5
    spread = queries.new_zeros(batch.supervised_count, heads, dim).index_copy(0, rows, queries)
    query = spread[batch.query_slots].transpose(1, 2) * scaling  # (B, heads, Q, dim)
    scores = query @ padded.keys.transpose(2, 3)  # (B, heads, Q, L)
    scores = scores.masked_fill(~batch.attention_mask(number).unsqueeze(1), torch.finfo(scores.dtype).min)
    scores = scores.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]  # (n, heads, L)
    own_scores, own_values = [], []
    for earlier, (keys_values, index_of) in enumerate(drafted, start=1):
        index = index_of[rows - (number - earlier)]
        own_keys = keys_values.keys[index].repeat_interleave(group, 1)  # (n, heads, dim)
        own_scores.append((queries * own_keys).sum(-1, keepdim=True) * scaling)
        own_values.append(keys_values.values[index].repeat_interleave(group, 1))
    slots = scores.shape[-1]
    weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1)  # (n, heads, L + passes)
    places = batch.query_slots.numel()
    true = weights.new_zeros(places, heads, slots).index_copy(0, batch.query_places[rows], weights[..., :slots])
    true = true.view(*batch.query_slots.shape, heads, slots).transpose(1, 2) @ padded.values
    output = true.transpose(1, 2).flatten(0, 1)[batch.query_places[rows]]
    for own, own_value in enumerate(own_values):
        output = output + weights[..., slots + own, None] * own_value
    return output.flatten(1)
