"""The FeatExtrapolator: EAGLE-1's draft module (arXiv 2401.15077, section 3.1), also drafting for EAGLE-2's trees.

    position        t            t + 1            the pair (f_t, e_{t+1}) extrapolates f_{t+1};
    token           x_t          x_{t+1}          the target's LM head on f_{t+1} predicts x_{t+2}
    feature         f_t          f_{t+1}
    input pair     (f_t, embedding of x_{t+1}), rotary position t

Llama layers serve every target; no norm before the first or after the last, no bias in `fc`: the layout that the
official loaders, vLLM and SGLang expect (they know one layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from haast.heads import INPUTS
from haast.heads.config import HeadConfig
from haast.heads.module import DraftModule
from haast.target.native_cpu import NativeStack


@dataclass(frozen=True)
class FeatExtrapolatorConfig(HeadConfig):
    """A FeatExtrapolator's sizes. `inputs` other than the default are ablations (EAGLE, figure 4)."""

    inputs: str = "feature+shifted-token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs={self.inputs!r} is not known: give one of {', '.join(INPUTS)}")


class FeatExtrapolator(DraftModule):
    """fuse(embedding of the next token, feature) -> decoder layers (one by default) -> the next feature.

    Tensor names: `fc.weight` (H, 2H), `layers.0.*` of a Llama layer without `input_layernorm`; `layers.1.*` and so on,
    with it, where there are more; `markov.*` where there is a bias of the previous token.
    """

    def __init__(self, config: FeatExtrapolatorConfig, draft_vocab_size: int | None = None) -> None:
        super().__init__()
        self.config: FeatExtrapolatorConfig = config
        llama = config.llama()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([LlamaDecoderLayer(llama, layer_idx=i) for i in range(config.num_hidden_layers)])
        self.layers[0].add_module("input_layernorm", nn.Identity())  # the official layout has no norm before attention
        self.rotary = LlamaRotaryEmbedding(llama)
        self.add_markov(draft_vocab_size or config.vocab_size)
        self.follows_token = config.inputs != "feature+token"

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def fuse(self, features: Tensor) -> Tensor:
        return features

    def mix(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """What the first layer reads: (rows, nodes, hidden)."""
        if self.config.inputs == "feature":
            embeddings = torch.zeros_like(embeddings)
        elif self.config.inputs == "token":
            states = torch.zeros_like(states)
        output: Tensor = self.fc(torch.cat([embeddings, states], dim=-1))
        return output

    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.mix(embeddings, states)
        return fused, fused

    def native_stack(self, window: int = 0) -> NativeStack | None:
        return NativeStack.of(list(self.layers), None, self.rotary, window)

    def through_first(self, layer: nn.Module, embeddings: Tensor, states: Tensor, given: dict[str, Any]) -> Tensor:
        output: Tensor = layer(self.mix(embeddings, states), **given)
        return output

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        if not self.config.markov_rank:
            return target_rows
        return torch.cat([target_rows, self.markov.rows.weight.to(target_rows.dtype)], dim=1)
