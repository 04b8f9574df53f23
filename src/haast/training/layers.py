"""Decoder layers as a head trains them: over packed batches, prompt positions as keys and values only.

Owns one Llama layer's parameters and arithmetic in whitened units (see `whitened`), and attention in a packed batch.
Knows neither where states come from nor what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import rotate_half

from haast.heads.config import HeadConfig
from haast.training.batches import PackedBatch

Matrix = Callable[[int, int, float], nn.Parameter]  # (outputs, inputs, gain) -> a random weight (outputs, inputs)


class Angles(NamedTuple):
    """Rotary angles of n positions, (n, 1, dim) each."""

    cosine: Tensor
    sine: Tensor

    def at(self, rows: Tensor) -> Angles:
        """Those of some of the positions."""
        return Angles(self.cosine[rows], self.sine[rows])

    def turn(self, states: Tensor) -> Tensor:
        """Rotate (n, heads, dim)."""
        turned: Tensor = rotate_half(states)  # type: ignore[no-untyped-call]
        return states * self.cosine + turned * self.sine


class Memory(NamedTuple):
    """What n pairs leave for attention in one layer, (n, kv_heads, dim) each; keys are rotated."""

    keys: Tensor
    values: Tensor


class DraftLayer(nn.Module):
    """One decoder layer's parameters. Linear weights are (out, in).

    Args:
        config: sizes.
        units: (hidden,) of each dimension of the residual stream; its norms divide by the rms of the plain stream.
        width: what q, k and v read.
        normed: whether they read the stream through a norm of this layer (else the caller gives what they read).
        matrix: makes random weights.
        output_init: scale of the outputs at a random start.
    """

    def __init__(
        self, config: HeadConfig, units: Tensor, width: int, normed: bool, matrix: Matrix, output_init: float
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.query = matrix(self.heads * self.dim, width, 1.0)
        self.key_value = matrix(2 * self.kv_heads * self.dim, width, 1.0)
        self.out = matrix(hidden, self.heads * self.dim, 0.5 * output_init)
        self.gate_up = matrix(2 * inner, hidden, 1.0)
        self.down = matrix(hidden, inner, 0.5 * output_init)
        self.norm = nn.Parameter(torch.ones_like(units))
        if normed:
            self.input_norm = nn.Parameter(torch.ones_like(units))
        self.normed, self.eps, self.act = normed, config.rms_norm_eps, ACT2FN[config.hidden_act]
        self.register_buffer("units", units, persistent=False)
        self.units: Tensor

    @property
    def gain(self) -> Tensor:
        """What keeps a norm's weight at 1 in whitened units."""
        return rms(self.units)

    def read(self, state: Tensor) -> Tensor:
        """What q, k and v read of the residual stream (n, hidden)."""
        return norm(state, self.input_norm, self.units, self.eps) if self.normed else state

    def remember(self, read: Tensor, angles: Angles) -> Memory:
        """Keys and values of n pairs."""
        keys, values = functional.linear(read, self.key_value).view(-1, 2, self.kv_heads, self.dim).unbind(1)
        return Memory(angles.turn(keys), values)

    def ask(self, read: Tensor, angles: Angles) -> Tensor:
        """Rotated queries (n, heads, dim)."""
        return angles.turn(functional.linear(read, self.query).view(-1, self.heads, self.dim))

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: (n, hidden) and (n, heads * dim) -> (n, hidden)."""
        state = state + functional.linear(attended, self.out)
        gate, up = functional.linear(norm(state, self.norm, self.units, self.eps), self.gate_up).chunk(2, dim=-1)
        return state + functional.linear(self.act(gate) * up, self.down)

    def padded(self, batch: PackedBatch, memory: Memory) -> Memory:
        """Keys and values of every sequence, (B, heads, L, dim) each, grouped heads repeated."""
        group = self.heads // self.kv_heads
        key = memory.keys[batch.key_slots].transpose(1, 2).repeat_interleave(group, 1)
        value = memory.values[batch.key_slots].transpose(1, 2).repeat_interleave(group, 1)
        return Memory(key, value)

    def attend(self, batch: PackedBatch, asked: Tensor, padded: Memory, every: bool) -> Tensor:
        """Causal attention of the queries (M, heads, dim), or of `every` pair (N, heads, dim): (n, heads * dim)."""
        slots, places = (batch.key_slots, batch.key_places) if every else (batch.query_slots, batch.query_places)
        query = asked[slots].transpose(1, 2)  # (B, heads, Q, dim)
        seen = None if every else batch.seen(0).unsqueeze(1)
        output = functional.scaled_dot_product_attention(
            query, padded.keys, padded.values, attn_mask=seen, is_causal=every
        )
        return output.transpose(1, 2).flatten(0, 1).flatten(1)[places]


def rms(units: Tensor) -> Tensor:
    """Root of the mean square over all entries."""
    return units.square().mean().sqrt()


def norm(state: Tensor, weight: Tensor, units: Tensor, eps: float) -> Tensor:
    """RMS norm of the plain stream units * state (n, hidden), in whitened units: about unit size for weight 1."""
    square = (state * units).square().mean(-1, keepdim=True)
    return state * torch.rsqrt(square + eps) * (rms(units) * weight)
