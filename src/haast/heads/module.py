"""What a drafter needs of a head, whichever kind it is. Owns the contract and the Markov bias; knows no trees.

features of the target ──fuse──► state ──┐
                                         ├─forward─► next state ──lm_input──► LM head over `lm_rows` ─► next token
embedding of the following token ────────┘              │
                                         └──────────────┘ when drafting, a state is fed back
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from haast.heads.config import HeadConfig
from haast.target.kv_cache import KVCache, cache_name
from haast.target.native_cpu import NativeStack

_CACHE = cache_name(LlamaDecoderLayer.forward)


def storing(cache: KVCache | None) -> dict[str, Any]:
    """What Llama's layers and their attention take to keep keys and values in `cache`; in none where it is None."""
    return {"use_cache": cache is not None, _CACHE: cache}


class DraftModule(nn.Module, ABC):
    """A head's forward pass, with the parts that differ between kinds behind methods."""

    config: HeadConfig
    rotary: LlamaRotaryEmbedding
    target_layers: tuple[int, ...] = ()  # HF `hidden_states` indices that `fuse` reads side by side; empty: the feature
    follows_token = True  # whether a pair holds the token after the feature's position (EAGLE) or the one at it
    own_lm_head = False  # whether logits come from the head's own rows; else from the target's

    @property
    @abstractmethod
    def decoder_layers(self) -> list[nn.Module]:
        """The layers that keep keys and values, in the cache's order."""

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The target's features (rows, nodes, width) as the head's state (rows, nodes, hidden)."""

    def masked(self) -> tuple[int, Tensor] | None:
        """Of a head that drafts all depths in one pass: its mask token, and the state (1, 1, hidden) beside it."""
        return None

    @abstractmethod
    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the first layer's q, k and v read, of what `forward` takes."""

    def mix(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """What `native_stack` reads, (rows, nodes, hidden), of what `forward` takes."""
        raise NotImplementedError(f"{type(self).__name__} has no native stack")

    def native_stack(self, window: int = 0) -> NativeStack | None:
        """The layers as one native call, once they are packed and fused; None where they do not allow it.

        `window` is how many positions they look back; 0 is all.
        """
        return None

    def forward(
        self,
        embeddings: Tensor,
        states: Tensor,
        position_ids: Tensor,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The next states, (rows, nodes, hidden).

        Args:
            embeddings: (rows, nodes, hidden) of the token that follows each state.
            states: (rows, nodes, hidden), fused from the target's features or this head's own.
            position_ids: (rows, nodes) positions of the states.
            bias: additive mask (rows, 1, nodes, slots); None is causal self-attention without a past.
            cache: keys and values of earlier pairs, one layer for each of the head's.
        """
        rotary = self.rotary(states, position_ids=position_ids)
        given = {"attention_mask": bias, "position_ids": position_ids, "position_embeddings": rotary, **storing(cache)}
        for number, layer in enumerate(self.decoder_layers):
            states = self.through(number, layer, embeddings, states, given)
        assert isinstance(states, Tensor), "a Llama layer returns one tensor"
        return self.final_norm(states) if self.config.norm_output else states

    @abstractmethod
    def through(
        self, number: int, layer: nn.Module, embeddings: Tensor, states: Tensor, given: dict[str, Any]
    ) -> Tensor:
        """One layer's output (rows, nodes, hidden), of what `forward` takes and every layer is `given`."""

    @abstractmethod
    def lm_rows(self, target_rows: Tensor) -> Tensor:
        """Weight (draft vocabulary, width) of the draft's LM head; `target_rows` are the target's for the same ids."""

    def lm_input(self, states: Tensor, tokens: Tensor) -> Tensor:
        """What the draft's LM head reads: (rows, nodes, width), of states and of the tokens (rows, nodes) before."""
        normed = self.normed(states)
        return torch.cat([normed, self.markov.embed(tokens)], dim=-1) if self.config.markov_rank else normed

    def normed(self, states: Tensor) -> Tensor:
        """What `forward` gives, as logits are made of it."""
        return states if self.config.norm_output else self.final_norm(states)

    def final_norm(self, states: Tensor) -> Tensor:
        """The norm before the LM head, where the head has one."""
        return states

    def embedding(self, target: nn.Module) -> nn.Module:
        """What embeds tokens for this head: its own table, or the target's module, scaled where the head wants it."""
        if self.config.own_embedding:
            return self.embed_tokens
        scale = self.config.embedding_scale
        return target if scale == 1.0 else ScaledEmbedding(target, scale)

    def add_embedding(self) -> None:
        """Create an embedding table where the configuration says that the head has one."""
        if self.config.own_embedding:
            self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def add_markov(self, draft_vocab_size: int) -> None:
        """Create the bias of the previous token where the configuration asks for one."""
        if self.config.markov_rank:
            self.markov = Markov(self.config.vocab_size, draft_vocab_size, self.config.markov_rank)


class ScaledEmbedding(nn.Module):
    """`scale` times what another module gives."""

    def __init__(self, module: nn.Module, scale: float) -> None:
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Any shape -> (..., hidden)."""
        output: Tensor = self.module(tokens) * self.scale
        return output


def set_projections(attention: Any, config: HeadConfig, read: int) -> None:
    """Give a Llama or Qwen3 attention q, k and v that read `read` numbers, and the biases that `config` says."""
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = getattr(attention, name).out_features
        attention.add_module(name, nn.Linear(read, rows, bias=config.qkv_bias))
    width = attention.o_proj.in_features
    attention.add_module("o_proj", nn.Linear(width, config.hidden_size, bias=config.o_bias))


def decoder_layers(config: HeadConfig, numbers: Iterable[int]) -> nn.ModuleList:
    """Whole decoder layers of these numbers: Llama's, or Qwen3's where queries and keys are normed."""
    kind, sizes = Qwen3DecoderLayer if config.qk_norm else LlamaDecoderLayer, config.layers()
    layers = [kind(sizes, layer_idx=number) for number in numbers]
    if config.qkv_bias or config.o_bias:
        for layer in layers:
            set_projections(layer.self_attn, config, config.hidden_size)
    return nn.ModuleList(layers)


class Markov(nn.Module):
    """logits += rows @ embed(previous token): a bigram table of low rank."""

    def __init__(self, vocab: int, draft_vocab: int, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, rank)
        self.rows = nn.Linear(rank, draft_vocab, bias=False)
