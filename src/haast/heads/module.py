"""DraftModule: the common interface of EAGLE heads. Owns this interface and the Markov bias; knows no trees.

features of the target ──fuse──► state ──┐
                                         ├─forward─► next state ──lm_input──► LM head over `lm_rows` ─► next token
embedding of the following token ────────┘              │
                                         └──────────────┘ when drafting, a state is fed back
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from haast.heads.config import HeadConfig
from haast.target.kv_cache import KVCache, cache_name
from haast.target.native_cpu import NativeStack

_CACHE = cache_name(LlamaDecoderLayer.forward)


def cache_arguments(cache: KVCache | None) -> dict[str, Any]:
    """The arguments of Llama's layers and attention that store keys and values in `cache`; None stores none."""
    return {"use_cache": cache is not None, _CACHE: cache}


class DraftModule(nn.Module, ABC):
    """A head's forward pass; subclasses implement the parts that differ between kinds of heads.

    An input pair is (a state, the embedding of a token).
    """

    config: HeadConfig
    rotary: LlamaRotaryEmbedding
    target_layers: tuple[int, ...] = ()  # HF `hidden_states` indices whose concatenation `fuse` reads; empty: feature
    follows_token = True  # whether a pair has the token after the feature's position (EAGLE) or the one at it
    whole_layers = False  # whether the parts of its layers are those of an unknown class, so that they are run whole
    own_lm_head = False  # whether logits come from the head's own LM head; else from the target's

    @property
    @abstractmethod
    def decoder_layers(self) -> list[nn.Module]:
        """The layers with keys and values, in the cache's order."""

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The head's states (rows, nodes, hidden) from the target's features (rows, nodes, width)."""

    def continued(self, states: Tensor, before: Sequence[Tensor | None]) -> Tensor:
        """`fuse`'s states, of a row's pairs after those whose last output is `before` (None: there are none).

        For heads in which a pair also reads the outputs of the pair before it.
        """
        return states

    def masked(self) -> tuple[int, Tensor] | None:
        """Mask token and its state (1, 1, hidden), of a head that drafts all depths in one pass; else None."""
        return None

    @abstractmethod
    def layer_input(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and the input of the first layer's q, k and v; arguments as for `forward`."""

    def mix(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """The input of `native_stack`, (rows, nodes, hidden); arguments as for `forward`."""
        raise NotImplementedError(f"{type(self).__name__} has no native stack")

    def native_stack(self, window: int = 0) -> NativeStack | None:
        """The packed and fused layers as one native call; None if they are not supported.

        `window` is their sliding window in positions; 0 is none.
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
            states: (rows, nodes, hidden), fused from the target's features, or earlier outputs of this head.
            position_ids: (rows, nodes) positions of the states.
            bias: additive mask (rows, 1, nodes, slots); None is causal self-attention without a past.
            cache: keys and values of earlier pairs, with the head's number of layers.
        """
        rotary = self.rotary(states, position_ids=position_ids)
        shared = {
            "attention_mask": bias, "position_ids": position_ids, "position_embeddings": rotary,
            **cache_arguments(cache),
        }  # fmt: skip
        for number, layer in enumerate(self.decoder_layers):
            states = self.run_layer(number, layer, embeddings, states, shared)
        assert isinstance(states, Tensor), "a Llama layer returns one tensor"
        return self.final_norm(states) if self.config.norm_output else states

    @abstractmethod
    def run_layer(
        self, number: int, layer: nn.Module, embeddings: Tensor, states: Tensor, shared: dict[str, Any]
    ) -> Tensor:
        """Output (rows, nodes, hidden) of layer `number`; `shared` are the keyword arguments of all layers."""

    @abstractmethod
    def lm_rows(self, target_rows: Tensor) -> Tensor:
        """Weight (draft vocabulary, width) of the draft LM head. `target_rows` is the target's for the same ids."""

    def lm_input(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Input of the draft LM head (rows, nodes, width), from states and the previous tokens (rows, nodes)."""
        normed = self.normed(states)
        return torch.cat([normed, self.markov.embed(tokens)], dim=-1) if self.config.markov_rank else normed

    def normed(self, states: Tensor) -> Tensor:
        """The output of `forward`, normed for the LM head."""
        return states if self.config.norm_output else self.final_norm(states)

    def final_norm(self, states: Tensor) -> Tensor:
        """Apply the norm before the LM head, if the head has one."""
        return states

    def embedding(self, target: nn.Module) -> nn.Module:
        """The embedding for this head: its own table, or the target's module, scaled by `embedding_scale`."""
        if self.config.own_embedding:
            return self.embed_tokens
        scale = self.config.embedding_scale
        return target if scale == 1.0 else ScaledEmbedding(target, scale)

    def add_embedding(self) -> None:
        """Create the head's own embedding table if the configuration has one."""
        if self.config.own_embedding:
            self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def add_markov(self, draft_vocab_size: int) -> None:
        """Create the bias from the previous token if `markov_rank` is above 0."""
        if self.config.markov_rank:
            self.markov = Markov(self.config.vocab_size, draft_vocab_size, self.config.markov_rank)


class ScaledEmbedding(nn.Module):
    """The output of another module times `scale`."""

    def __init__(self, module: nn.Module, scale: float) -> None:
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Any shape -> (..., hidden)."""
        output: Tensor = self.module(tokens) * self.scale
        return output


def set_projections(attention: Any, config: HeadConfig, read: int) -> None:
    """Replace q, k, v and o of a Llama or Qwen3 attention: `read` inputs for q, k and v, and biases as in `config`."""
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = getattr(attention, name).out_features
        attention.add_module(name, nn.Linear(read, rows, bias=config.qkv_bias))
    width = attention.o_proj.in_features
    attention.add_module("o_proj", nn.Linear(width, config.hidden_size, bias=config.o_bias))


def decoder_layers(config: HeadConfig, numbers: Iterable[int]) -> nn.ModuleList:
    """Decoder layers with these layer numbers: Llama's, or Qwen3's with `qk_norm`."""
    kind, sizes = Qwen3DecoderLayer if config.qk_norm else LlamaDecoderLayer, config.layers()
    layers = [kind(sizes, layer_idx=number) for number in numbers]
    if config.qkv_bias or config.o_bias:
        for layer in layers:
            set_projections(layer.self_attn, config, config.hidden_size)
    return nn.ModuleList(layers)


class Markov(nn.Module):
    """Low-rank bigram bias: logits += rows @ embed(previous token)."""

    def __init__(self, vocab: int, draft_vocab: int, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, rank)
        self.rows = nn.Linear(rank, draft_vocab, bias=False)
