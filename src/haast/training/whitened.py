"""The FeatExtrapolator as it is trained: in whitened units, over packed batches.

Owns the trainable parameters, the fixed scales, and the way to and from plain weights. A target's features are badly
conditioned (single dimensions reach twenty times the median's rms), so the head is trained in z = feature / rms of that
dimension, embeddings in units of their own rms. The scales are fixed, hence fold into plain weights exactly: what is
saved is EAGLE-1's layout, and `FeatExtrapolator` with those weights computes the same function (tested in fp64).

    plain                                     whitened (r: feature rms per dimension, e: embedding rms)
    h = fc [emb; f]                           z = fc' [emb / e; f / r]          fc = diag(r) fc' diag(1/e, 1/r)
    q, k, v = W h                             W' z                              W = W' diag(1/r)
    h + o_proj(.), h + down_proj(.)           z + o'(.), z + down'(.)           o = diag(r) o', down = diag(r) down'
    norm(h) = w h / rms(h)                    w' g z / rms(r z)                 w = g w' / r,  g = rms(r)
    logits = head h                           (head diag(r)) z

Prompt positions are keys and values only: their queries, MLP and logits are never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.training.batches import Example, PackedBatch

_SCALE_EXAMPLES = 200  # enough for an rms
_FLOOR = 0.025  # of the overall rms: a nearly constant dimension is not blown up


@dataclass(frozen=True)
class Scales:
    """Fixed units: `feature` (hidden,) rms of each dimension, `embedding` one rms."""

    feature: Tensor
    embedding: float

    @staticmethod
    def measure(examples: list[Example], embeddings: Tensor) -> Scales:
        """From assistant positions of some examples; `embeddings` is (vocab, hidden)."""
        some = examples[:_SCALE_EXAMPLES]
        features = torch.cat([e.features[:-1][e.supervised[:-1].bool()] for e in some]).float()
        tokens = torch.cat([e.tokens[e.supervised.bool()] for e in some]).long()
        square = features.square().mean(0)
        rms = square.sqrt().clamp_min(_FLOOR * float(square.mean().sqrt()))
        if not bool(torch.isfinite(rms).all()) or float(rms.min()) <= 0:
            raise ValueError("the features to train on are all zero or not finite: extract them again")
        return Scales(rms.to(embeddings.dtype), float(embeddings[tokens].float().square().mean().sqrt()))


class Memory(NamedTuple):
    """What n pairs leave for attention."""

    fused: Tensor  # (n, hidden), whitened
    keys: Tensor  # (n, kv_heads, dim), rotated
    values: Tensor  # (n, kv_heads, dim)
    cosine: Tensor  # (n, 1, dim)
    sine: Tensor  # (n, 1, dim)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    turned: Tensor = rotate_half(states)  # type: ignore[no-untyped-call]
    return states * cosine + turned * sine


class WhitenedHead(nn.Module):
    """A FeatExtrapolator's parameters in whitened units. Linear weights are (out, in)."""

    def __init__(self, config: FeatExtrapolatorConfig, scales: Scales, output_init: float, seed: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.config, self.scales = config, scales
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        generator = torch.Generator().manual_seed(seed)

        def matrix(outputs: int, inputs: int, gain: float = 1.0) -> nn.Parameter:
            normal = torch.randn(outputs, inputs, generator=generator)
            return nn.Parameter((normal * gain * inputs**-0.5).to(scales.feature.dtype))

        self.fc = matrix(hidden, 2 * hidden, output_init)
        self.query = matrix(self.heads * self.dim, hidden)
        self.key_value = matrix(2 * self.kv_heads * self.dim, hidden)
        self.out = matrix(hidden, self.heads * self.dim, 0.5 * output_init)
        self.gate_up = matrix(2 * inner, hidden)
        self.down = matrix(hidden, inner, 0.5 * output_init)
        self.norm = nn.Parameter(torch.ones_like(scales.feature))
        self.act = ACT2FN[config.hidden_act]
        self.rotary = LlamaRotaryEmbedding(config.llama())
        self.gain = float(scales.feature.square().mean().sqrt())

    def remember(self, batch: PackedBatch, embeddings: Tensor, features: Tensor, rows: Tensor | None = None) -> Memory:
        """Fuse pairs and make their keys and values.

        Args:
            batch: N pairs.
            embeddings: (n, hidden) of the next tokens, whitened.
            features: (n, hidden), whitened.
            rows: (n,) which of the batch's pairs these are; None is all of them.
        """
        fused = functional.linear(torch.cat([embeddings, features], dim=1), self.fc)  # (n, hidden)
        positions = batch.positions if rows is None else batch.positions[rows]
        cosine, sine = self.rotary(fused, position_ids=positions.unsqueeze(0))
        cosine, sine = cosine[0].unsqueeze(1), sine[0].unsqueeze(1)  # (n, 1, dim)
        keys, values = functional.linear(fused, self.key_value).view(-1, 2, self.kv_heads, self.dim).unbind(1)
        return Memory(fused, _rotate(keys, cosine, sine), values, cosine, sine)

    def ask(self, fused: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotated queries (n, heads, dim) of fused pairs (n, hidden)."""
        return _rotate(functional.linear(fused, self.query).view(-1, self.heads, self.dim), cosine, sine)

    def finish(self, fused: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: (n, hidden) and (n, heads * dim) -> the next features (n, hidden), whitened."""
        state = fused + functional.linear(attended, self.out)
        return state + self._mlp(state)

    def forward(self, batch: PackedBatch, memory: Memory) -> Tensor:
        """The next features (M, hidden), whitened, at the supervised pairs; `memory` holds all N pairs."""
        own = memory.fused[batch.queries]
        asked = self.ask(own, memory.cosine[batch.queries], memory.sine[batch.queries])
        return self.finish(own, self._attend(batch, asked, memory))

    def padded_keys(self, batch: PackedBatch, memory: Memory) -> tuple[Tensor, Tensor]:
        """Keys and values of every sequence, (B, heads, L, dim) each, grouped heads repeated."""
        group = self.heads // self.kv_heads
        key = memory.keys[batch.key_slots].transpose(1, 2).repeat_interleave(group, 1)
        value = memory.values[batch.key_slots].transpose(1, 2).repeat_interleave(group, 1)
        return key, value

    def _attend(self, batch: PackedBatch, asked: Tensor, memory: Memory) -> Tensor:
        query = asked[batch.query_slots].transpose(1, 2)  # (B, heads, Q, dim)
        key, value = self.padded_keys(batch, memory)
        seen = batch.seen(0).unsqueeze(1)
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return output.transpose(1, 2).flatten(0, 1).flatten(1)[batch.query_places]

    def _mlp(self, state: Tensor) -> Tensor:
        square = (state * self.scales.feature).square().mean(-1, keepdim=True)
        normed = state * torch.rsqrt(square + self.config.rms_norm_eps) * (self.gain * self.norm)
        gate, up = functional.linear(normed, self.gate_up).chunk(2, dim=-1)
        return functional.linear(self.act(gate) * up, self.down)


def _plain_scales(head: WhitenedHead) -> dict[str, Tensor]:
    """Of every plain weight, the factor (broadcastable to it) that turns whitened into plain."""
    feature = head.scales.feature
    inverse, hidden = 1 / feature, head.config.hidden_size
    pair = torch.cat([torch.full((hidden,), 1 / head.scales.embedding, dtype=feature.dtype), inverse])
    layer = "layers.0."
    return {
        "fc.weight": feature[:, None] * pair,
        f"{layer}self_attn.q_proj.weight": inverse,
        f"{layer}self_attn.k_proj.weight": inverse,
        f"{layer}self_attn.v_proj.weight": inverse,
        f"{layer}self_attn.o_proj.weight": feature[:, None],
        f"{layer}mlp.gate_proj.weight": torch.ones(()),
        f"{layer}mlp.up_proj.weight": torch.ones(()),
        f"{layer}mlp.down_proj.weight": feature[:, None],
        f"{layer}post_attention_layernorm.weight": head.gain * inverse,
    }


def _whitened_parts(head: WhitenedHead) -> dict[str, Tensor]:
    key, value = head.key_value.chunk(2)
    gate, up = head.gate_up.chunk(2)
    parts = (head.fc, head.query, key, value, head.out, gate, up, head.down, head.norm)
    return dict(zip(_plain_scales(head), parts, strict=True))


@torch.no_grad()
def plain_weights(head: WhitenedHead) -> dict[str, Tensor]:
    """EAGLE-1's tensors (`fc.weight`, `layers.0.*`), the fixed scales folded in; loads into `FeatExtrapolator`."""
    scales = _plain_scales(head)
    return {name: (part * scales[name]).contiguous() for name, part in _whitened_parts(head).items()}


@torch.no_grad()
def load_plain(head: WhitenedHead, weights: dict[str, Tensor]) -> None:
    """Start from a head's plain weights instead of noise.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    scales = _plain_scales(head)
    for name, part in _whitened_parts(head).items():
        if name not in weights or weights[name].shape != part.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(f"cannot start from these weights: {name} should be {tuple(part.shape)}, found {found}")
        part.copy_(weights[name] / scales[name])
