"""MtpHead: the multi-token-prediction layer that many targets bring in their own checkpoint.

    feature of the target at t ──── hnorm ─┐
                                           ├─ cat ── eh_proj ──► decoder layer ──► state at t + 1
    embedding of x_{t+1} ────────── enorm ─┘                                           │
                                                           LM head(norm(state)) ◄──────┘ predicts x_{t+2}

When drafting, the layer's own output is fed back in place of the feature. The decoder layer is the target's own
transformers class. Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.2), whose tensor names these are; Qwen3-Next,
GLM-4.5 and MiMo have the same parts under other names (`formats.mtp`). Which of the target's states is read, and which
of the head's is fed back, differs by producer and by engine: both are options.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from haast.heads.config import HeadConfig
from haast.heads.module import DraftModule
from haast.heads.stock import layer_document, stock_decoder
from haast.target.hf import BEFORE_NORM
from haast.target.native_cpu import NativeStack

_NATIVE = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)  # they combine their parts as a NativeStack does


@dataclass(frozen=True)
class MtpConfig(HeadConfig):
    """Sizes and options of an MtpHead. `num_hidden_layers` is its number of layers, one for each depth.

    Attributes:
        layer: transformers configuration of the layers, see `haast.heads.stock.layer_document`.
        reads_normed: it reads the target's state after the final norm (the feature), not the one before it.
        own_lm_head: it has its own LM head instead of using the target's.
        producer: whose names its tensors have in a checkpoint, see `haast.formats.mtp_layouts`.
    """

    layer: dict[str, Any] = field(default_factory=dict)
    reads_normed: bool = True
    own_lm_head: bool = False
    producer: str = "DeepSeek"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer.get("num_hidden_layers") != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, but the layers' own configuration has "
                f"{self.layer.get('num_hidden_layers')}"
            )
        if self.markov_rank:
            raise ValueError(f"markov_rank={self.markov_rank} is not allowed for an MTP head: give 0")

    @classmethod
    def of_layers(cls, config: PretrainedConfig, layers: int, dense: bool, **more: Any) -> MtpConfig:
        """For `layers` layers of the class of a target with this (text) configuration. Raises ValueError."""
        document = layer_document(config, layers, dense)
        return cls.for_target(config, num_hidden_layers=layers, layer=document, **more)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The states that it reads instead of features, as in `Target.forward`; empty if it reads those."""
        return () if self.reads_normed else (BEFORE_NORM,)


class _Fuse(nn.Module):
    """Norms on embedding and state, and the projection of both."""

    def __init__(self, hidden: int, norm: nn.Module) -> None:
        super().__init__()
        self.enorm, self.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, embeddings: Tensor, states: Tensor) -> Tensor:
        output: Tensor = self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(states)], dim=-1))
        return output


class MtpHead(DraftModule):
    """See the module docstring.

    Tensor names: `inputs.N.{enorm,hnorm,eh_proj}`, `layers.N.*` as in the target's layers, `norms.N`,
    `lm_head` (draft vocabulary, H) with `own_lm_head`, and `embed_tokens`.
    """

    whole_layers = True

    def __init__(self, config: MtpConfig, draft_vocab_size: int | None = None) -> None:
        super().__init__()
        self.config: MtpConfig = config
        hidden = config.hidden_size
        self.layers, norm, rotary = stock_decoder(config.layer)
        self.rotary = rotary  # type: ignore[assignment]  # that of the target's class
        self.inputs = nn.ModuleList([_Fuse(hidden, norm) for _ in self.layers])
        self.norms = nn.ModuleList([copy.deepcopy(norm) for _ in self.layers])
        if config.own_lm_head:
            self.lm_head = nn.Linear(hidden, draft_vocab_size or config.vocab_size, bias=False)
        self.own_lm_head = config.own_lm_head
        self.add_embedding()
        self.target_layers = config.layer_ids

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def fuse(self, features: Tensor) -> Tensor:
        return features

    def mix(self, embeddings: Tensor, states: Tensor, number: int = 0) -> Tensor:
        output: Tensor = self.inputs[number](embeddings, states)
        return output

    def layer_input(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("an MtpHead's layers are run whole")

    def native_stack(self, window: int = 0) -> NativeStack | None:
        if not all(type(layer) in _NATIVE for layer in self.layers):
            return None
        norm = self.norms[0] if self.config.norm_output else None
        return NativeStack.of(list(self.layers), norm, self.rotary, window)

    def run_layer(
        self, number: int, layer: nn.Module, embeddings: Tensor, states: Tensor, shared: dict[str, Any]
    ) -> Tensor:
        output: Any = layer(self.mix(embeddings, states, number), **shared)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def final_norm(self, states: Tensor, number: int = 0) -> Tensor:
        output: Tensor = self.norms[number](states)
        return output

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        return self.lm_head.weight.to(target_rows.dtype) if self.own_lm_head else target_rows
