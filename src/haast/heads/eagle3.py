"""EAGLE-3's draft head (arXiv 2503.01840, section 3): fuses low, middle and high features, has its own LM head.

    target's hidden_states[low], [mid], [high] at t ──(norms)── fc ──► state at t ┐ residual
                                                            hidden_norm ─► cat ───┤ midlayer ─► state at t + 1
    embedding of x_{t+1} ─────────────────────────────── input_layernorm ─┘                      │
                                                                     lm_head(norm(state)) ◄──────┘ predicts x_{t+2}

When drafting, the layer's own output is fed back without `fc`. Tensor names and shapes are the official ones
(`midlayer.*`). Options: layers after the first (`more.*`), norms before `fc` (`fc_norm.*`), and variants of other
trainers.

P-EAGLE (arXiv 2602.01469) is the same module, trained to draft all depths in one pass: its inputs after the last known
token are a mask token's embedding, and `mask_hidden` instead of the target's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from haast.heads.config import FusedConfig
from haast.heads.module import DraftModule, decoder_layers, set_projections


@dataclass(frozen=True)
class Eagle3Config(FusedConfig):
    """Sizes and options of an Eagle3Head; `mask_token_id` is that of a P-EAGLE head.

    Attributes:
        fc_norm: a norm on each captured feature before `fc` (EAGLE-3.1).
        input_norm: one norm on the concatenated captured features.
        norm_before_residual: the residual is the normed state.
        last_norm: a norm on states before the LM head.
        embedding_everywhere: layers after the first read the embedding too (DeepSpec).
    """

    fc_norm: bool = False
    input_norm: bool = False
    norm_before_residual: bool = False
    last_norm: bool = True
    embedding_everywhere: bool = False


def default_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The paper's three for a target with L layers: inputs of layers 2, L // 2 and L - 3; fewer if L is small."""
    count = int(config.num_hidden_layers)
    indices = (2, count // 2, count - 3)
    return tuple(sorted({min(max(index, 0), count - 1) for index in indices}))


class _FirstLayer(nn.Module):
    """A Llama or Qwen3 layer whose attention reads the concatenation of embedding and state, each normed.

    The residual is the state, or the normed state with `norm_before_residual`.
    """

    def __init__(self, config: Eagle3Config, number: int = 0) -> None:
        super().__init__()
        hidden, sizes = config.hidden_size, config.layers()
        self.norm_before_residual = config.norm_before_residual
        self.hidden_norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.self_attn: nn.Module = (Qwen3Attention if config.qk_norm else LlamaAttention)(sizes, layer_idx=number)
        set_projections(self.self_attn, config, 2 * hidden)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.mlp: nn.Module = (Qwen3MLP if config.qk_norm else LlamaMLP)(sizes)

    def read(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The residual (..., hidden), and the input of q, k and v (..., 2 * hidden)."""
        normed = self.hidden_norm(states)
        read = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)
        return (normed if self.norm_before_residual else states), read

    def forward(self, embeddings: Tensor, states: Tensor, **shared: Any) -> Tensor:
        states, read = self.read(embeddings, states)
        attended, _ = self.self_attn(read, **shared)
        states = states + attended
        output: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


class Eagle3Head(DraftModule):
    """See the module docstring. `lm_head.weight` is (draft vocabulary, H), `fc.weight` (H, layers * target's H)."""

    own_lm_head = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config: Eagle3Config = config
        hidden, feature, eps = config.hidden_size, config.read_size, config.rms_norm_eps
        width = len(config.layer_ids) * feature
        self.fc = nn.Linear(width, hidden, bias=config.fc_bias)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList([LlamaRMSNorm(feature, eps) for _ in config.layer_ids])
        if config.input_norm:
            self.input_norm = LlamaRMSNorm(width, eps)
        self.midlayer = _FirstLayer(config)
        later = range(1, config.num_hidden_layers)
        if config.embedding_everywhere:
            self.more = nn.ModuleList([_FirstLayer(config, number) for number in later])
        else:
            self.more = decoder_layers(config, later)
        if config.last_norm:
            self.norm = LlamaRMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.drafts, bias=False)
        self.rotary = LlamaRotaryEmbedding(config.layers())
        self.add_markov(config.drafts)
        self.add_embedding()
        if config.mask_token_id >= 0:
            self.mask_hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.target_layers = config.layer_ids

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return [self.midlayer, *self.more]

    def fuse(self, features: Tensor) -> Tensor:
        if self.config.input_norm:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        output: Tensor = self.fc(features)
        return output

    def masked(self) -> tuple[int, Tensor] | None:
        if self.config.mask_token_id < 0:
            return None
        return self.config.mask_token_id, self.fuse(self.mask_hidden)

    def layer_input(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.midlayer.read(embeddings, states)

    def run_layer(
        self, number: int, layer: nn.Module, embeddings: Tensor, states: Tensor, shared: dict[str, Any]
    ) -> Tensor:
        inputs = (embeddings, states) if isinstance(layer, _FirstLayer) else (states,)
        output: Tensor = layer(*inputs, **shared)
        return output

    def final_norm(self, states: Tensor) -> Tensor:
        output: Tensor = self.norm(states) if self.config.last_norm else states
        return output

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        rows = self.lm_head.weight
        if self.config.markov_rank:
            rows = torch.cat([rows, self.markov.rows.weight], dim=1)
        return rows.to(target_rows.dtype)
