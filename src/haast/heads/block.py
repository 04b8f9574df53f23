"""BlockHead: drafts a block of tokens in one pass over the target's states (DFlash and DSpark, arXiv 2607.05147).

    context      target's hidden_states[low .. high] at t ── fc ── hidden_norm ──► c_t, for committed positions only
    every layer  keys and values   of c_0 .. c_{p-1}, and of the block's own states after input_layernorm
                 queries           of the block's states only
    block        slot 0 is the token at p (the tree's root), the others are a mask embedding, at positions p, p + 1, ...
    output       h_k of slot k ── norm ── LM head ── + Markov bias of the token before ──► logits of a draft token

The keys and values of c_t depend on position t alone, so they are computed once and kept. Those of the block are
written after them and overwritten by the next block. `sample_from_anchor` decides which token slot k predicts:

    slot                     0          1          2              position of slot k: p + k
    True (DSpark)            p + 1      p + 2      p + 3          the token after its own: as many drafts as slots
    False (DFlash)           (root)     p + 1      p + 2          the token at its own place: one draft fewer

The Markov head is a low-rank bias from the token before, which differs from branch to branch of a tree although all
branches share the one pass. The confidence head predicts how likely a draft at a slot is accepted. Tensor names are
those of DeepSpec; `mask_embedding` belongs to heads without a mask token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from haast.errors import check_at_least
from haast.heads.config import FusedConfig
from haast.heads.module import DraftModule, decoder_layers
from haast.target.native_cpu import NativeStack

MARKOV_KINDS = ("vanilla", "gated")


@dataclass(frozen=True)
class BlockConfig(FusedConfig):
    """Sizes and options of a BlockHead; `markov_rank` is that of its Markov head.

    Attributes:
        block_size: slots of a block, the root's included.
        sample_from_anchor: whether slot k predicts the token after its own place; see the module docstring.
        causal: whether a slot attends only to itself and the slots before it.
        markov_kind: "vanilla", or "gated": the bias depends on the slot's state too.
        confidence: a confidence head.
        confidence_markov: whether it reads the Markov head's embedding of the token before.
        own_lm_head: an LM head of its own, instead of the target's rows.
    """

    block_size: int = 8
    sample_from_anchor: bool = True
    causal: bool = False
    markov_kind: str = "vanilla"
    confidence: bool = False
    confidence_markov: bool = False
    own_lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("block_size", self.block_size, 2 - self.sample_from_anchor, " (a block drafts a token or more)")
        if self.markov_kind not in MARKOV_KINDS:
            raise ValueError(f"markov_kind={self.markov_kind!r} is unknown: give {' or '.join(MARKOV_KINDS)}")
        if self.read_size != self.hidden_size and not self.own_lm_head:
            raise ValueError(
                f"target_hidden_size={self.read_size} differs from hidden_size={self.hidden_size}: the target's "
                f"LM head doesn't fit this head, and it has none of its own (lm_head.weight)"
            )
        if self.confidence_markov and not (self.confidence and self.markov_rank):
            raise ValueError("confidence_markov=True needs a confidence head and a markov_rank above 0")

    @property
    def depths(self) -> int:
        """Number of tokens that one block drafts on a path."""
        return self.block_size - (not self.sample_from_anchor)


class MarkovHead(nn.Module):
    """logits += w2 w1[token before], or with a gate of the state h: w2 (sigmoid(g [h; w1[...]]) * w1[...])."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.drafts, bias=False)
        if config.markov_kind == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + rank, rank)
        self._gated = config.markov_kind == "gated"

    def inputs(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The input of `markov_w2` (..., rank), from normed states (..., hidden) and the tokens before (...)."""
        embedded: Tensor = self.markov_w1(tokens)
        if not self._gated:
            return embedded
        return torch.sigmoid(self.gate_proj(torch.cat([states, embedded], dim=-1))) * embedded


class ConfidenceHead(nn.Module):
    """A linear layer whose sigmoid is the expected acceptance of a slot's draft."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class ContextCache:
    """Gives every layer's attention the context's keys and values before the block's own; stores nothing.

    `layers` has those of each layer, (rows, kv_heads, n, head_dim) each, from `BlockHead.context_keys`. The argument of
    `DraftModule.forward` is a `KVCache` when drafting; this is for states without one.
    """

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._layers = list(layers)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of layer `layer` that attention reads, (rows, kv_heads, n + slots, head_dim) each."""
        before = (each.expand(len(keys), -1, -1, -1) for each in self._layers[layer])
        past_keys, past_values = before
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)


class BlockHead(DraftModule):
    """See the module docstring. `fc.weight` is (H, layers * target's H), without a bias."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config: BlockConfig = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(config.layer_ids) * config.read_size, hidden, bias=config.fc_bias)
        self.hidden_norm = LlamaRMSNorm(hidden, eps)
        self.layers = decoder_layers(config, range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(hidden, eps)
        self.own_lm_head = config.own_lm_head
        if config.own_lm_head:
            self.lm_head = nn.Linear(hidden, config.drafts, bias=False)
        if config.markov_rank:
            self.markov_head = MarkovHead(config)
        if config.confidence:
            self.confidence_head = ConfidenceHead(hidden + config.markov_rank * config.confidence_markov)
        if config.mask_token_id < 0:
            self.mask_embedding = nn.Parameter(torch.zeros(1, hidden))
        self.rotary = LlamaRotaryEmbedding(config.layers())
        self.add_embedding()
        self.target_layers = config.layer_ids

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def fuse(self, features: Tensor) -> Tensor:
        """The context (rows, n, hidden) from the target's states (rows, n, width)."""
        output: Tensor = self.hidden_norm(self.fc(features))
        return output

    def block(self, embed: Callable[[Tensor], Tensor], anchors: Tensor) -> Tensor:
        """The block's input (..., block_size, hidden) for anchor tokens (...)."""
        masks = self.config.block_size - 1
        first = embed(anchors).to(anchors.device).unsqueeze(-2)
        if self.config.mask_token_id < 0:
            mask = self.mask_embedding[0].to(first)
        else:
            mask = embed(torch.full((1,), self.config.mask_token_id, device=anchors.device))[0].to(first)
        return torch.cat([first, mask.expand(*anchors.shape, masks, -1)], dim=-2)

    def seen(self, device: torch.device) -> Tensor:
        """(block_size, block_size) bool: which slots of its block a slot attends to."""
        size = self.config.block_size
        every = torch.ones(size, size, dtype=torch.bool, device=device)
        return every.tril() if self.config.causal else every

    def context_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight (layers * 2 * kv width, hidden) and bias of all layers' key and value projections, joined.

        For a head whose layers are not packed; `context_keys` reads their product with the context.
        """
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        projections = [each for attention in attentions for each in (attention.k_proj, attention.v_proj)]
        bias = torch.cat([each.bias for each in projections]) if self.config.qkv_bias else None
        return torch.cat([each.weight for each in projections]), bias

    def context_keys(self, projected: Tensor, position_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys, rotated, and values of the context for each layer, (rows, kv_heads, n, head_dim) each.

        Args:
            projected: (rows, n, layers * 2 * kv width): the context times `context_weights`.
            position_ids: (rows, n) int64.
        """
        config = self.config
        cosine, sine = self.rotary(projected, position_ids=position_ids)
        by_head = projected.view(*projected.shape[:2], -1, config.num_key_value_heads, config.head_dim)
        for number, layer in enumerate(self.layers):
            keys, values = by_head[:, :, 2 * number], by_head[:, :, 2 * number + 1]
            if config.qk_norm:
                attention: Any = layer.self_attn
                keys = attention.k_norm(keys)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            rotated: Tensor = rotate_half(keys)  # type: ignore[no-untyped-call]
            yield keys * cosine.unsqueeze(1) + rotated * sine.unsqueeze(1), values

    def at_anchors(self, context: Tensor, embed: Callable[[Tensor], Tensor], anchors: Tensor, places: Tensor) -> Tensor:
        """States (A, depths, hidden) of the slots that draft, before the last norm, for blocks anywhere in one text.

        For a head whose layers are not packed.

        Args:
            context: (n, hidden), fused, of positions 0 to n - 1.
            embed: gives embeddings (..., hidden) of tokens (...).
            anchors, places: (A,) int64: the anchors' tokens and positions, 1 to n each.
        """
        device, slots = context.device, self.config.block_size
        weight, bias = self.context_weights()
        positions = torch.arange(len(context), device=device)
        projected = linear(context.unsqueeze(0), weight, bias)
        cache: Any = ContextCache(self.context_keys(projected, positions.unsqueeze(0)))
        past = (positions < places.view(-1, 1, 1)).expand(-1, slots, -1)  # (A, slots, n)
        seen = torch.cat([past, self.seen(device).expand(len(anchors), -1, -1)], dim=2).unsqueeze(1)
        block = self.block(embed, anchors)
        mask = torch.zeros(seen.shape, dtype=block.dtype, device=device)
        mask = mask.masked_fill(~seen, torch.finfo(block.dtype).min)
        output: Tensor = self(block, block, places.unsqueeze(1) + torch.arange(slots, device=device), mask, cache)
        return output[:, slots - self.config.depths :]

    def layer_input(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        first: Any = self.layers[0]
        return embeddings, first.input_layernorm(embeddings)

    def mix(self, embeddings: Tensor, states: Tensor) -> Tensor:
        return embeddings.contiguous()

    def native_stack(self, window: int = 0) -> NativeStack | None:
        return NativeStack.of(list(self.layers), None, self.rotary, window)

    def run_layer(
        self, number: int, layer: nn.Module, embeddings: Tensor, states: Tensor, shared: dict[str, Any]
    ) -> Tensor:
        output: Tensor = layer(states if number else embeddings, **shared)
        return output

    def final_norm(self, states: Tensor) -> Tensor:
        output: Tensor = self.norm(states)
        return output

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        """The LM head without the Markov head, which the drafter adds per branch."""
        return self.lm_head.weight.to(target_rows.dtype) if self.config.own_lm_head else target_rows

    def lm_input(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.normed(states)

    def markov_bias(self, states: Tensor, tokens: Tensor) -> Tensor | None:
        """The bias on logits (..., draft vocabulary) from normed states and the tokens before; None without one."""
        if not self.config.markov_rank:
            return None
        bias: Tensor = self.markov_head.markov_w2(self.markov_head.inputs(states, tokens))
        return bias

    def confidence(self, states: Tensor, tokens: Tensor) -> Tensor | None:
        """The logit of the expected acceptance (...), from normed states and the tokens before; None without one."""
        if not self.config.confidence:
            return None
        if self.config.confidence_markov:
            states = torch.cat([states, self.markov_head.markov_w1(tokens)], dim=-1)
        output: Tensor = self.confidence_head.proj(states)
        return output.squeeze(-1)

    def log_confidence(self, states: Tensor, tokens: Tensor) -> Tensor | None:
        """The logarithm of the expected acceptance (...); arguments as for `confidence`."""
        logit = self.confidence(states, tokens)
        return None if logit is None else logsigmoid(logit.float())
