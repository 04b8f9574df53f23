"""EAGLE-3's draft module (arXiv 2503.01840, section 3): low, middle and high features fused, an LM head of its own.

    target's hidden_states[low], [mid], [high] at t ──(norms)── fc ──► state at t ┐ residual
                                                            hidden_norm ─► cat ───┤ midlayer ─► state at t + 1
    embedding of x_{t+1} ─────────────────────────────── input_layernorm ─┘                      │
                                                                     lm_head(norm(state)) ◄──────┘ predicts x_{t+2}

When drafting, the layer's own output is fed back without `fc`. Tensor names and shapes are the official ones
(`midlayer.*`); layers after the first (`more.*`) and norms before `fc` (`fc_norm.*`) are options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from haast.heads.config import HeadConfig
from haast.heads.module import DraftModule


@dataclass(frozen=True)
class Eagle3Config(HeadConfig):
    """An Eagle3Head's sizes. `layer_ids` are HF `hidden_states` indices (0: the embedding's output), low to high."""

    layer_ids: tuple[int, ...] = ()
    draft_vocab_size: int = 0  # rows of the LM head; 0 is the target's vocabulary
    fc_norm: bool = False  # a norm on each captured feature before fc (EAGLE-3.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_ids", tuple(int(i) for i in self.layer_ids))  # JSON has lists
        if not self.layer_ids or sorted(set(self.layer_ids)) != list(self.layer_ids) or self.layer_ids[0] < 0:
            raise ValueError(f"layer_ids={list(self.layer_ids)} is not allowed: give hidden_states indices, ascending")
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} is not allowed: give 1 to {self.vocab_size}, or 0 for all"
            )

    @property
    def drafts(self) -> int:
        """Tokens that the head drafts over."""
        return self.draft_vocab_size or self.vocab_size


def default_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The paper's three of a target with L layers: inputs of layers 2, L // 2 and L - 3; fewer where L is small."""
    count = int(config.num_hidden_layers)
    wanted = (2, count // 2, count - 3)
    return tuple(sorted({min(max(index, 0), count - 1) for index in wanted}))


class _FirstLayer(nn.Module):
    """A Llama layer whose attention reads the embedding beside the state, each normed; the residual is the state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, 2 * config.hidden_size
        self.hidden_norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(self.self_attn, name).out_features
            self.self_attn.add_module(name, nn.Linear(wide, rows, bias=False))
        self.post_attention_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.mlp: nn.Module = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def read(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """What q, k and v read: (..., 2 * hidden)."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(states)], dim=-1)

    def forward(self, embeddings: Tensor, states: Tensor, **given: Any) -> Tensor:
        attended, _ = self.self_attn(self.read(embeddings, states), **given)
        states = states + attended
        output: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


class Eagle3Head(DraftModule):
    """See the module docstring. `lm_head.weight` is (draft vocabulary, H), `fc.weight` (H, layers * H)."""

    own_lm_head = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config: Eagle3Config = config
        hidden, llama = config.hidden_size, config.llama()
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList([LlamaRMSNorm(hidden, config.rms_norm_eps) for _ in config.layer_ids])
        self.midlayer = _FirstLayer(llama)
        self.more = nn.ModuleList([LlamaDecoderLayer(llama, layer_idx=i) for i in range(1, config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.drafts, bias=False)
        self.rotary = LlamaRotaryEmbedding(llama)
        self.add_markov(config.drafts)
        self.target_layers = config.layer_ids

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return [self.midlayer, *self.more]

    def fuse(self, features: Tensor) -> Tensor:
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        output: Tensor = self.fc(features)
        return output

    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        return states, self.midlayer.read(embeddings, states)

    def through_first(self, layer: nn.Module, embeddings: Tensor, states: Tensor, given: dict[str, Any]) -> Tensor:
        output: Tensor = layer(embeddings, states, **given)
        return output

    def normed(self, states: Tensor) -> Tensor:
        output: Tensor = self.norm(states)
        return output

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        rows = self.lm_head.weight
        if self.config.markov_rank:
            rows = torch.cat([rows, self.markov.rows.weight], dim=1)
        return rows.to(target_rows.dtype)
