"""Configuration of heads: sizes, derived from the target's, and options. Knows no modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from haast import compat
from haast.errors import check_at_least
from haast.target import attention
from haast.target.support import last_layer_config

# RoPE types that transformers' Llama layers support.
_LLAMA_ROPE_TYPES = {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}

_LAYER_FIELDS = (
    *("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "hidden_act", "max_position_embeddings", "num_hidden_layers"),
)


@dataclass(frozen=True)
class HeadSizes:
    """Sizes that every head must share with its target; see `haast.heads.checkpoint.check_fits`."""

    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class HeadConfig(HeadSizes):
    """Sizes and options of an EAGLE head. Options after `markov_rank` are for other trainers' heads (docs/heads.md).

    Attributes:
        markov_rank: rank of a bias on the draft's logits from the previous token (DSpark, arXiv 2607.05147); 0 is none.
        fc_bias, qkv_bias, o_bias: biases of `fc`, of q, k and v together, and of the attention's output.
        qk_norm: RMS norms of each attention head's queries and keys (Qwen3's layers).
        own_embedding: the head has its own embedding table `embed_tokens` instead of using the target's.
        embedding_scale: factor of the target's embeddings before the head reads them.
        norm_output: feed back the normed state, from which logits are computed, instead of the state before the norm.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None
    num_hidden_layers: int = 1
    markov_rank: int = 0
    fc_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    own_embedding: bool = False
    embedding_scale: float = 1.0
    norm_output: bool = False

    def __post_init__(self) -> None:
        check_at_least("num_hidden_layers", self.num_hidden_layers)
        check_at_least("markov_rank", self.markov_rank, 0, " (0 is none)")

    @classmethod
    def for_target(cls, config: PretrainedConfig, **more: Any) -> Self:
        """Derive a head's sizes and RoPE from the target's (text) configuration; `more` are the head's own options."""
        config = last_layer_config(config)
        hidden = int(config.hidden_size)
        heads = int(getattr(config, "num_attention_heads", None) or max(hidden // 64, 1))
        inner = getattr(config, "intermediate_size", None) or 8 * hidden // 3
        return cls(
            hidden_size=hidden,
            vocab_size=int(config.vocab_size),
            intermediate_size=int(inner[-1] if isinstance(inner, list | tuple) else inner),  # one per layer (Gemma 3n)
            num_attention_heads=heads,
            num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            rms_norm_eps=float(getattr(config, "rms_norm_eps", None) or 1e-5),
            max_position_embeddings=int(getattr(config, "max_position_embeddings", 4096)),
            rope_parameters=rope_of(config),
            **more,
        )

    def layers(self) -> Any:
        """The transformers configuration of the decoder layers: a LlamaConfig; a Qwen3Config with `qk_norm`."""
        sizes = {name: getattr(self, name) for name in _LAYER_FIELDS}
        sizes["rope_parameters"] = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        config = (Qwen3Config if self.qk_norm else LlamaConfig)(**sizes, tie_word_embeddings=False)
        compat.set_attention_name(config, attention.NAME)
        return config


@dataclass(frozen=True)
class FusedConfig(HeadConfig):
    """Sizes of a head that reads several layers of the target and drafts over a vocabulary of its own.

    Attributes:
        layer_ids: HF `hidden_states` indices (0: the embedding's output), low to high.
        draft_vocab_size: size of the draft vocabulary; 0 is the target's vocabulary.
        target_hidden_size: size of one of the target's features if it differs from the head's; 0 is `hidden_size`.
        mask_token_id: token that stands for an unknown one, in heads that draft several depths in one pass; -1 is none.
    """

    layer_ids: tuple[int, ...] = ()
    draft_vocab_size: int = 0
    target_hidden_size: int = 0
    mask_token_id: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_ids", tuple(int(i) for i in self.layer_ids))  # JSON has lists
        if not self.layer_ids or sorted(set(self.layer_ids)) != list(self.layer_ids) or self.layer_ids[0] < 0:
            raise ValueError(f"layer_ids={list(self.layer_ids)} is not allowed: give hidden_states indices, ascending")
        if self.target_hidden_size not in (0, self.hidden_size) and not self.own_embedding:
            raise ValueError(
                f"target_hidden_size={self.target_hidden_size} differs from hidden_size={self.hidden_size}: the "
                f"target's embedding doesn't fit this head, and it has none of its own (embed_tokens.weight)"
            )
        if not -1 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id={self.mask_token_id} is not allowed: give 0 to {self.vocab_size - 1}")
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} is not allowed: give 1 to {self.vocab_size}, or 0 for all"
            )

    @property
    def read_size(self) -> int:
        """Size of one of the target's features."""
        return self.target_hidden_size or self.hidden_size

    @property
    def drafts(self) -> int:
        """Size of the draft vocabulary."""
        return self.draft_vocab_size or self.vocab_size


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE parameters of the draft layers, which rotate all of an attention head's dimensions: the target's own.

    Includes the target's scaling. For a target with parameters per layer type, those of full attention are used. Only
    the base is used for RoPE types that Llama's layers do not have, and for longrope on a target that rotates only a
    part of each head: its factors per dimension would not fit.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:  # parameters per layer type (gemma 3), or no RoPE at all (gpt2)
        rope = dict(rope.get("full_attention") or {})
    kind, base = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10000.0))
    partial = float(rope.pop("partial_rotary_factor", 1.0)) != 1.0
    if "rope_theta" not in rope or kind not in _LLAMA_ROPE_TYPES or (partial and kind == "longrope"):
        return {"rope_type": "default", "rope_theta": base}
    return rope
