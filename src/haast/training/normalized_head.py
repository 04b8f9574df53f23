"""Heads as they are trained: in whitened units, over packed batches.

Owns what both kinds share (units, layers, how a pass goes through them) and the FeatExtrapolator's parameters. A
target's features are badly conditioned (single dimensions reach twenty times the median's rms), so a head is trained in
z = feature / rms of that dimension, embeddings in units of their own rms. The units are fixed, hence fold into plain
weights exactly: what is saved is EAGLE-1's layout, and `FeatExtrapolator` with those weights computes the same function
(tested in fp64).

    plain                                     whitened (r: feature rms per dimension, e: embedding rms)
    h = fc [emb; f]                           z = fc' [emb / e; f / r]          fc = diag(r) fc' diag(1/e, 1/r)
    q, k, v = W h                             W' z                              W = W' diag(1/r)
    h + o_proj(.), h + down_proj(.)           z + o'(.), z + down'(.)           o = diag(r) o', down = diag(r) down'
    norm(h) = w h / rms(h)                    w' g z / rms(r z)                 w = g w' / r,  g = rms(r)
    logits = head h                           (head diag(r)) z
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from haast.heads.checkpoint import AnyModule, build_module
from haast.heads.config import HeadConfig, HeadSizes
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.training.batches import Example
from haast.training.layers import Angles, DraftLayer

_SCALE_EXAMPLES = 200  # enough for an rms
_FLOOR = 0.025  # of the overall rms: a nearly constant dimension is not blown up
Parts = dict[str, tuple[Tensor, Tensor]]  # plain name -> (whitened part, factor that makes it plain)


@dataclass(frozen=True)
class Scales:
    """Fixed units: rms of each dimension, and one rms for embeddings."""

    feature: Tensor  # (hidden,) of the LM head's input
    embedding: float
    hidden: Tensor | None = None  # (layers * hidden,) of captured hidden states, where there are any

    @staticmethod
    def measure(examples: list[Example], embeddings: Tensor) -> Scales:
        """From assistant positions of some examples; `embeddings` is (vocab, hidden)."""
        some = examples[:_SCALE_EXAMPLES]
        tokens = torch.cat([e.tokens[e.supervised.bool()] for e in some]).long()
        size = float(embeddings[tokens].float().square().mean().sqrt())
        feature = _rms([e.features[:-1][e.supervised[:-1].bool()] for e in some])
        captured = bool(some) and some[0].hidden.shape[1] > 0
        hidden = _rms([e.hidden[:-1][e.supervised[:-1].bool()] for e in some]) if captured else None
        dtype = embeddings.dtype
        return Scales(feature.to(dtype), size, None if hidden is None else hidden.to(dtype))


def _rms(parts: list[Tensor]) -> Tensor:
    square = torch.cat(parts).float().square().mean(0)
    rms = square.sqrt().clamp_min(_FLOOR * float(square.mean().sqrt()))
    if not bool(torch.isfinite(rms).all()) or float(rms.min()) <= 0:
        raise ValueError("the features to train on are all zero or not finite: extract them again")
    return rms


class Whitened(nn.Module, ABC):
    """What the trainer needs of a head, whichever kind it is."""

    config: HeadSizes
    regresses = False  # whether states aim at the target's features
    reads_captured = False  # whether it reads captured states instead of features

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales

    @abstractmethod
    def parts(self) -> Parts:
        """Every plain tensor as its whitened part and the factor (broadcastable to it) between the two."""

    @abstractmethod
    def drafted_over(self) -> int | None:
        """Tokens that rows of this head's own belong to; None where the target's rows draft."""

    def plain(self) -> AnyModule:
        """The module that users get, with the present weights, in eval mode."""
        module = build_module(self.config, self.drafted_over()).to(self.scales.feature.dtype)
        module.load_state_dict(plain_weights(self))
        return module.eval()


class TrainedHead(Whitened):
    """What training needs of an EAGLE head of either kind."""

    config: HeadConfig
    follows_token = True

    def __init__(self, config: HeadConfig, scales: Scales, seed: int) -> None:
        super().__init__(scales)
        self.config = config
        self._generator, self._dtype = torch.Generator().manual_seed(seed), scales.feature.dtype
        self.layers = nn.ModuleList()
        self.rotary = LlamaRotaryEmbedding(config.llama())

    def matrix(self, outputs: int, inputs: int, gain: float = 1.0) -> nn.Parameter:
        """A random weight."""
        normal = torch.randn(outputs, inputs, generator=self._generator)
        return nn.Parameter((normal * gain * inputs**-0.5).to(self._dtype))

    def angles(self, positions: Tensor) -> Angles:
        """Rotary angles of positions (n,)."""
        cosine, sine = self.rotary(self.scales.feature.to(positions.device), position_ids=positions.unsqueeze(0))
        return Angles(cosine[0].unsqueeze(1), sine[0].unsqueeze(1))

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The target's features (n, width), whitened, as states (n, hidden)."""

    @abstractmethod
    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of (n, hidden), whitened, as residual stream (n, hidden) and what the first layer's q, k, v read."""

    def predict(self, states: Tensor) -> Tensor:
        """States (n, hidden) as the LM head reads them."""
        return states

    @abstractmethod
    def rows(self) -> Tensor | None:
        """Trained rows (draft vocabulary, hidden) of the LM head; None takes the target's frozen ones."""

    def embed_before(self, tokens: Tensor) -> Tensor | None:
        """(n, rank): the Markov bias's part of the LM head's input; None where there is no bias."""
        return self.markov_embed[tokens] if self.config.markov_rank else None

    def add_markov(self, draft_vocab: int) -> None:
        """Parameters of the bias of the previous token; it begins as zero, since its rows do."""
        rank = self.config.markov_rank
        if rank:
            self.markov_embed = self.matrix(self.config.vocab_size, rank, rank**0.5)
            self.markov_rows = nn.Parameter(torch.zeros(draft_vocab, rank, dtype=self._dtype))

    def markov_parts(self) -> Parts:
        """See `parts`."""
        if not self.config.markov_rank:
            return {}
        one = torch.ones(())
        return {"markov.embed.weight": (self.markov_embed, one), "markov.rows.weight": (self.markov_rows, one)}

    def drafted_over(self) -> int | None:
        return int(self.markov_rows.shape[0]) if self.config.markov_rank else None


def layer_parts(layer: DraftLayer, prefix: str, reads: Tensor) -> Parts:
    """A layer's plain tensors; `reads` (width,) are the factors of what q, k and v read."""
    units, one = layer.units, torch.ones((), device=layer.units.device)
    key, value = layer.key_value.chunk(2)
    gate, up = layer.gate_up.chunk(2)
    parts: Parts = {
        f"{prefix}self_attn.q_proj.weight": (layer.query, reads),
        f"{prefix}self_attn.k_proj.weight": (key, reads),
        f"{prefix}self_attn.v_proj.weight": (value, reads),
        f"{prefix}self_attn.o_proj.weight": (layer.out, units[:, None]),
        f"{prefix}mlp.gate_proj.weight": (gate, one),
        f"{prefix}mlp.up_proj.weight": (up, one),
        f"{prefix}mlp.down_proj.weight": (layer.down, units[:, None]),
        f"{prefix}post_attention_layernorm.weight": (layer.norm, layer.gain / units),
    }
    if layer.normed:
        parts[f"{prefix}input_layernorm.weight"] = (layer.input_norm, layer.gain / units)
    return parts


class WhitenedHead(TrainedHead):
    """A FeatExtrapolator's parameters in whitened units."""

    regresses = True

    def __init__(
        self, config: FeatExtrapolatorConfig, scales: Scales, output_init: float, seed: int, draft_vocab: int = 0
    ) -> None:
        super().__init__(config, scales, seed)
        hidden = config.hidden_size
        self.inputs = config.inputs
        self.follows_token = config.inputs != "feature+token"
        self.fc = self.matrix(hidden, 2 * hidden, output_init)
        for number in range(config.num_hidden_layers):
            self.layers.append(DraftLayer(config, scales.feature, hidden, number > 0, self.matrix, output_init))
        self.add_markov(draft_vocab or config.vocab_size)

    def fuse(self, features: Tensor) -> Tensor:
        return features

    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        if self.inputs == "feature":
            embeddings = torch.zeros_like(embeddings)
        elif self.inputs == "token":
            states = torch.zeros_like(states)
        fused = functional.linear(torch.cat([embeddings, states], dim=1), self.fc)  # (n, hidden)
        return fused, fused

    def rows(self) -> Tensor | None:
        return None

    def parts(self) -> Parts:
        feature = self.scales.feature.to(self.fc.device)
        inverse, hidden = 1 / feature, self.config.hidden_size
        pair = torch.cat([torch.full_like(feature, 1 / self.scales.embedding), inverse])
        assert len(pair) == 2 * hidden, "embedding and feature"
        parts: Parts = {"fc.weight": (self.fc, feature[:, None] * pair)}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer), "nothing else is in the list"
            reads = torch.ones_like(feature) if layer.normed else inverse
            parts |= layer_parts(layer, f"layers.{number}.", reads)
        return parts | self.markov_parts()


@torch.no_grad()
def plain_weights(head: Whitened) -> dict[str, Tensor]:
    """The official tensors, the fixed units folded in; they load into the head's plain module."""
    return {name: (part * factor).contiguous().cpu() for name, (part, factor) in head.parts().items()}


@torch.no_grad()
def load_plain(head: Whitened, weights: dict[str, Tensor]) -> None:
    """Start from a head's plain weights instead of noise.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for name, (part, factor) in head.parts().items():
        if name not in weights or weights[name].shape != part.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(f"cannot start from these weights: {name} should be {tuple(part.shape)}, found {found}")
        part.copy_(weights[name] / factor)
