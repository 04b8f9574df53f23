"""The FeatExtrapolator: EAGLE-1's draft module (arXiv 2401.15077, section 3.1), also drafting for EAGLE-2's trees.

Owns the module and its configuration. Knows nothing of trees, vocabularies or training.

    position        t            t + 1            the pair (f_t, e_{t+1}) extrapolates f_{t+1};
    token           x_t          x_{t+1}          the target's LM head on f_{t+1} predicts x_{t+2}
    feature         f_t          f_{t+1}
    input pair     (f_t, embedding of x_{t+1}), rotary position t

One `LlamaDecoderLayer` of transformers serves every target; no input norm in front of it and no norm behind it, no
bias in `fc`: the layout that the official loaders, vLLM and SGLang expect.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from haast import attention
from haast.cache import TreeCache


@dataclass(frozen=True)
class FeatExtrapolatorConfig:
    """Sizes of a head. `vocab_size` and `hidden_size` are the target's own and are checked when they meet."""

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None

    @staticmethod
    def for_target(config: PretrainedConfig) -> FeatExtrapolatorConfig:
        """Derive a head's sizes and RoPE from the target's (text) configuration."""
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        inner = getattr(config, "intermediate_size", None) or 8 * hidden // 3
        rope = getattr(config, "rope_parameters", None) or {}
        if "rope_theta" not in rope:  # nested by layer type (gemma 3), or a target without RoPE (gpt2)
            rope = rope.get("full_attention", {})
        if "rope_theta" not in rope or float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
            rope = {"rope_type": "default", "rope_theta": float(rope.get("rope_theta", 10000.0))}
        return FeatExtrapolatorConfig(
            hidden_size=hidden,
            vocab_size=int(config.vocab_size),
            intermediate_size=int(inner),
            num_attention_heads=heads,
            num_key_value_heads=int(kv_heads),
            head_dim=int(head_dim),
            rms_norm_eps=float(getattr(config, "rms_norm_eps", 1e-5)),
            max_position_embeddings=int(getattr(config, "max_position_embeddings", 4096)),
            rope_parameters=dict(rope),
        )

    def llama(self) -> LlamaConfig:
        """The transformers configuration of the one decoder layer."""
        fields = asdict(self)
        fields["rope_parameters"] = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        config = LlamaConfig(**fields, num_hidden_layers=1, tie_word_embeddings=False)
        config._attn_implementation = attention.NAME
        return config


class FeatExtrapolator(nn.Module):
    """fuse(embedding of the next token, feature) -> one decoder layer -> the next feature.

    Tensor names: `fc.weight` (H, 2H), `layers.0.*` of a Llama layer without `input_layernorm`.
    """

    def __init__(self, config: FeatExtrapolatorConfig) -> None:
        super().__init__()
        self.config = config
        llama = config.llama()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer = LlamaDecoderLayer(llama, layer_idx=0)
        layer.add_module("input_layernorm", nn.Identity())  # the official layout has no norm before attention
        self.layers = nn.ModuleList([layer])
        self.rotary = LlamaRotaryEmbedding(llama)

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        position_ids: Tensor,
        bias: Tensor | None = None,
        cache: TreeCache | None = None,
    ) -> Tensor:
        """Extrapolate one feature per input pair.

        Args:
            embeddings: (rows, nodes, hidden) of the token that follows each feature.
            features: (rows, nodes, hidden), the target's own or this head's.
            position_ids: (rows, nodes) positions of the features.
            bias: additive mask (rows, 1, nodes, slots); None is causal self-attention without a past.
            cache: keys and values of earlier pairs.

        Returns:
            (rows, nodes, hidden): the extrapolated next features.
        """
        fused = self.fc(torch.cat([embeddings, features], dim=-1))
        rotary = self.rotary(fused, position_ids=position_ids)
        output = self.layers[0](
            fused,
            attention_mask=bias,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=rotary,
        )
        assert isinstance(output, Tensor), "a Llama layer returns one tensor"
        return output
