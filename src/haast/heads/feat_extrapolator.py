"""FeatExtrapolator: EAGLE-1's draft head (arXiv 2401.15077, section 3.1), also used for EAGLE-2's dynamic trees.

    position        t            t + 1            the pair (f_t, e_{t+1}) extrapolates f_{t+1};
    token           x_t          x_{t+1}          the target's LM head on f_{t+1} predicts x_{t+2}
    feature         f_t          f_{t+1}
    input pair     (f_t, embedding of x_{t+1}), rotary position t

With `layer_ids` a linear map of the target's lower layers at t is added to f_t (EAGLE-3's fused features, arXiv
2503.01840, on top of EAGLE-1's pairs); a drafted state has none. Other engines cannot read such a head.

The layers are Llama's for every target. By default there is no norm before the first layer or after the last, and no
bias in `fc`: the layout that vLLM expects (it supports one layer). Biases and norms are options for heads of other
trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from haast.heads import INPUTS
from haast.heads.config import HeadConfig
from haast.heads.module import DraftModule, decoder_layers
from haast.target.native_cpu import NativeStack


@dataclass(frozen=True)
class FeatExtrapolatorConfig(HeadConfig):
    """Sizes and options of a FeatExtrapolator. `inputs` other than the default are ablations (EAGLE, figure 4).

    `norms` adds a norm on the embedding, one before the first layer's attention and one before the LM head
    (speculators' first EAGLE heads). `layer_ids` are the HF `hidden_states` indices of the layers that are added to the
    feature, low to high, and last the feature's own: the target's number of layers. Empty: the feature alone.
    """

    inputs: str = "feature+shifted-token"
    norms: bool = False
    layer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_ids", tuple(int(i) for i in self.layer_ids))  # JSON has lists
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs={self.inputs!r} is unknown: give one of {', '.join(INPUTS)}")
        ids = self.layer_ids
        if ids and (len(ids) < 2 or sorted(set(ids)) != list(ids) or ids[0] < 0):
            raise ValueError(
                f"layer_ids={list(ids)} is not allowed: give hidden_states indices, ascending, the feature's own last"
            )


class FeatExtrapolator(DraftModule):
    """fuse(embedding of the next token, feature) -> decoder layers (one by default) -> the next feature.

    Tensor names: `fc.weight` (H, 2H), `layers.0.*` of a Llama layer without `input_layernorm`; further layers
    `layers.1.*` and so on have it. Options add `context.weight` (H, layers * H), `markov.*`, `embedding_norm`, `norm`
    and `embed_tokens`.
    """

    def __init__(self, config: FeatExtrapolatorConfig, draft_vocab_size: int | None = None) -> None:
        super().__init__()
        self.config: FeatExtrapolatorConfig = config
        llama, hidden = config.layers(), config.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.fc_bias)
        self.layers = decoder_layers(config, range(config.num_hidden_layers))
        if config.norms:
            self.embedding_norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
            self.norm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        else:  # the official layout has no norm before attention
            self.layers[0].add_module("input_layernorm", nn.Identity())
        if config.layer_ids:
            self.context = nn.Linear((len(config.layer_ids) - 1) * hidden, hidden, bias=False)
        self.target_layers = config.layer_ids
        self.add_embedding()
        self.rotary = LlamaRotaryEmbedding(llama)
        self.add_markov(draft_vocab_size or config.vocab_size)
        self.follows_token = config.inputs != "feature+token"

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def fuse(self, features: Tensor) -> Tensor:
        if not self.config.layer_ids:
            return features
        hidden = self.config.hidden_size
        output: Tensor = features[..., -hidden:] + self.context(features[..., :-hidden])
        return output

    def mix(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Input of the first layer, (rows, nodes, hidden)."""
        if self.config.inputs == "feature":
            embeddings = torch.zeros_like(embeddings)
        elif self.config.inputs == "token":
            states = torch.zeros_like(states)
        if self.config.norms:
            embeddings = self.embedding_norm(embeddings)
        output: Tensor = self.fc(torch.cat([embeddings, states], dim=-1))
        return output

    def layer_input(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.mix(embeddings, states)
        return fused, fused

    def native_stack(self, window: int = 0) -> NativeStack | None:
        return None if self.config.norm_output else NativeStack.of(list(self.layers), None, self.rotary, window)

    def run_layer(
        self, number: int, layer: nn.Module, embeddings: Tensor, states: Tensor, shared: dict[str, Any]
    ) -> Tensor:
        output: Tensor = layer(states if number else self.mix(embeddings, states), **shared)
        return output

    def final_norm(self, states: Tensor) -> Tensor:
        output: Tensor = self.norm(states) if self.config.norms else states
        return output

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        if not self.config.markov_rank:
            return target_rows
        return torch.cat([target_rows, self.markov.rows.weight.to(target_rows.dtype)], dim=1)
