"""Heads in training: modules of `haast.heads` with a per-dimension RMS scaling of their weights.

A target's features are badly conditioned (single dimensions reach twenty times the median RMS), so the weights that
users get ("plain" weights) are hard to optimise. Each plain weight is a fixed factor times the trained tensor; the
factors scale inputs and outputs of the trained tensor to unit RMS and never change. With r the RMS of each feature
dimension, e of embeddings, s of captured states, u the unit of each dimension of the residual stream and g = rms(u):

    FeatExtrapolator  u = r                 fc = diag(u) fc' diag(1/e, 1/r), context = diag(u) context' diag(1/s)
    Eagle3Head        u = r / |w|           fc = diag(u) fc' diag(1/s), or with fc_norm: fc = diag(u) fc',
                                            w_c = w_c' rms(s_c) / s_c; hidden_norm and norm = g w' / u
    BlockHead         u as for an Eagle3Head, fc = fc' diag(1/s), norm = r w' / u; the mask's embedding = e times its
                      trained tensor
    all three         q, k, v = W' diag(1/u) if they read the stream without a norm
                      o_proj and down_proj = diag(u) W'; norms of the stream = g w' / u
    MedusaHeads       linear = W' diag(1/r), LM heads = W' diag(1/r)
    MtpHead           none: it norms what it reads

An Eagle3Head has no feature loss, so the units of its stream can be chosen: with w the gain of the target's final norm,
training starts from the target's norm and LM head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from haast.heads.block import BlockConfig
from haast.heads.checkpoint import AnyModule, build_module
from haast.heads.config import FusedConfig, HeadConfig, HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig
from haast.heads.mtp import MtpConfig
from haast.training.batches import Example
from haast.training.config import TrainConfig
from haast.training.target_weights import TargetWeights, bigram_directions

_SCALE_EXAMPLES = 200  # enough to estimate an RMS
_MIN_RMS = 0.025  # times the overall RMS: keeps dimensions with tiny values from being amplified
_MIN_GAIN = 0.05  # times the final norm's mean gain: keeps dimensions with a tiny gain from being amplified
Factors = dict[str, Tensor]  # by name of the plain weight, broadcastable to it; a missing one is 1


@dataclass(frozen=True)
class Scales:
    """Fixed units: the RMS of each feature dimension, and one RMS for embeddings."""

    feature: Tensor  # (hidden,) of the LM head's input
    embedding: float
    hidden: Tensor | None = None  # (layers * hidden,) of captured hidden states, if there are any

    @staticmethod
    def measure(examples: Sequence[Example], embeddings: Tensor) -> Scales:
        """Measure at assistant positions of the first examples; `embeddings` is (vocab, hidden)."""
        sample = examples[:_SCALE_EXAMPLES]
        tokens = torch.cat([e.tokens[e.supervised.bool()] for e in sample]).long()
        embedding = float(embeddings[tokens].float().square().mean().sqrt())
        feature = _rms_by_dimension([e.features[:-1][e.supervised[:-1].bool()] for e in sample])
        captured = bool(sample) and sample[0].hidden.shape[1] > 0
        hidden = _rms_by_dimension([e.hidden[:-1][e.supervised[:-1].bool()] for e in sample]) if captured else None
        dtype = embeddings.dtype
        return Scales(feature.to(dtype), embedding, None if hidden is None else hidden.to(dtype))


def _rms_by_dimension(parts: list[Tensor]) -> Tensor:
    square = torch.cat(parts).float().square().mean(0)
    rms = square.sqrt().clamp_min(_MIN_RMS * float(square.mean().sqrt()))
    if not bool(torch.isfinite(rms).all()) or float(rms.min()) <= 0:
        raise ValueError("the features to train on are all zero or not finite: extract them again")
    return rms


class _FixedScale(nn.Module):
    """plain = factor * trained."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor, persistent=False)
        self.factor: Tensor

    def forward(self, trained: Tensor) -> Tensor:
        return trained * self.factor

    def right_inverse(self, plain: Tensor) -> Tensor:
        """The trained tensor of a plain weight."""
        return plain / self.factor


class TrainedHead(nn.Module):
    """A head's module whose weights are trained with per-dimension RMS scaling.

    Args:
        config: sizes of the head.
        draft_vocab_size: number of tokens in the draft vocabulary.
        scales: RMS of its inputs.
        factors: plain weight / trained tensor.
    """

    def __init__(self, config: HeadSizes, draft_vocab_size: int, scales: Scales, factors: Factors) -> None:
        super().__init__()
        self.config, self.scales = config, scales
        self._draft_vocab_size, self._factors = draft_vocab_size, factors
        self.module = module = self._build()
        self._keys = {name: f"module.{name}" for name in module.state_dict()}  # of trained tensors, by plain name
        for name, factor in factors.items():
            owner, _, leaf = name.rpartition(".")
            register_parametrization(module.get_submodule(owner), leaf, _FixedScale(factor.to(scales.feature.dtype)))
            self._keys[name] = ".".join(filter(None, ("module", owner, "parametrizations", leaf, "original")))

    def _build(self) -> AnyModule:
        return build_module(self.config, self._draft_vocab_size).to(self.scales.feature.dtype)

    @property
    def regresses(self) -> bool:
        """Whether the head has a feature loss: its states learn the target's features."""
        return isinstance(self.config, FeatExtrapolatorConfig)

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields of an `Example` that the head reads, in this order: the captured states, the feature, or both."""
        captured = isinstance(self.config, FusedConfig | MtpConfig | FeatExtrapolatorConfig) and self.config.layer_ids
        return ("hidden",) * bool(captured) + ("features",) * (self.regresses or not captured)

    @property
    def input_units(self) -> Tensor:
        """(width,) RMS of each dimension of the target's states that the module reads."""
        units = {"hidden": self.scales.hidden, "features": self.scales.feature}
        return torch.cat([part for name in self.reads if (part := units[name]) is not None])

    def trained(self, name: str) -> nn.Parameter:
        """The trained parameter of a plain weight."""
        return self.get_parameter(self._keys[name])

    @torch.no_grad()
    def plain_weights(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Plain weights, with the factors multiplied in, from a state dict; None uses the current weights."""
        trained = self.state_dict() if state is None else state
        return {name: trained[key].cpu() * self._factor(name) for name, key in self._keys.items()}

    def _factor(self, name: str) -> Tensor:
        return self._factors.get(name, torch.ones(()))

    @torch.no_grad()
    def load_plain(self, weights: Mapping[str, Tensor]) -> None:
        """Set the trained tensors from plain weights.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        parts = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, key in self._keys.items():
            part = parts[key]
            if name not in weights or weights[name].shape != part.shape:
                found = tuple(weights[name].shape) if name in weights else "nothing"
                raise ValueError(
                    f"cannot start from these weights: {name} should have shape {tuple(part.shape)}, found {found}"
                )
            part.copy_(weights[name] / self._factor(name))

    def plain(self, state: Mapping[str, Tensor] | None = None) -> AnyModule:
        """The module with plain weights, in eval mode, from a state dict; None uses the current weights."""
        module = self._build()
        module.load_state_dict(self.plain_weights(state))
        return module.eval()


def make_head(
    config: TrainConfig,
    sizes: HeadSizes,
    target_weights: TargetWeights,
    examples: Sequence[Example],
    draft_vocab: Tensor,
) -> TrainedHead:
    """A randomly initialised head of the kind of `sizes`. LM heads and an Eagle3Head's norm start as the target's."""
    scales = Scales.measure(examples, target_weights.embeddings)
    from_target, drafted = config.initialisation != "random", len(draft_vocab)
    if isinstance(sizes, MedusaConfig):
        head = TrainedHead(sizes, drafted, scales, _medusa_factors(sizes, scales))
        head.load_plain(head.plain_weights() | _lm_heads(sizes, target_weights.lm_head[draft_vocab]))
        return head
    if isinstance(sizes, MtpConfig):  # its inputs are normed; its weights are those of the head to start from
        return TrainedHead(sizes, drafted, scales, {})
    if isinstance(sizes, Eagle3Config):
        sizes = Eagle3Config(**(asdict(sizes) | {"draft_vocab_size": drafted}))
        factors = _eagle3_factors(sizes, scales, target_weights.final_gain if from_target else None)
        head = TrainedHead(sizes, drafted, scales, factors)
        _init_random(head, sizes, config, fc=0.2)
        with torch.no_grad():  # the stream starts as the highest captured layer, in units of its RMS
            head.trained("fc.weight")[:, -sizes.hidden_size :] += torch.eye(sizes.hidden_size)
            if from_target:
                head.trained("lm_head.weight").copy_(target_weights.lm_head[draft_vocab] * scales.feature)
    elif isinstance(sizes, BlockConfig):
        return _make_block_head(config, sizes, target_weights, scales, drafted)
    else:
        assert isinstance(sizes, FeatExtrapolatorConfig), "there are five kinds of heads"
        head = TrainedHead(sizes, drafted, scales, _feat_extrapolator_factors(sizes, scales))
        _init_random(head, sizes, config, fc=config.output_init)
        if sizes.layer_ids:
            torch.nn.init.zeros_(head.trained("context.weight"))
    if sizes.markov_rank and from_target:
        with torch.no_grad():
            directions = bigram_directions(examples, sizes.vocab_size, draft_vocab, sizes.markov_rank)
            head.trained("markov.embed.weight").copy_(directions)
    return head


@torch.no_grad()
def _make_block_head(
    config: TrainConfig, sizes: BlockConfig, target_weights: TargetWeights, scales: Scales, drafted: int
) -> TrainedHead:
    """A block head whose layers start as the target's last ones, if they fit, and whose norm starts as the target's."""
    sizes = replace(sizes, draft_vocab_size=drafted)
    units = _stream_units(scales, target_weights.final_gain)
    head = TrainedHead(sizes, drafted, scales, _block_factors(sizes, scales, units, target_weights.final_gain))
    _init_random(head, sizes, config, fc=0.2)
    head.trained("fc.weight")[:, -sizes.hidden_size :] += torch.eye(sizes.hidden_size)
    if config.initialisation == "random" or len(target_weights.layers) != sizes.num_hidden_layers:
        return head
    assert scales.hidden is not None, "_block_factors has checked it"
    size = _rms(scales.hidden[-sizes.hidden_size :])  # of the target's stream, in which its layers write
    plain = head.plain_weights()
    for number, weights in enumerate(target_weights.layers):
        for name, weight in weights.items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            writes = name in ("o_proj", "down_proj")
            plain[f"layers.{number}.{part}.{name}.weight"] = weight / size if writes else weight * units / _rms(units)
    head.load_plain(plain)
    return head


@torch.no_grad()
def _init_random(head: TrainedHead, sizes: HeadConfig, config: TrainConfig, fc: float) -> None:
    """Random matrices whose outputs have their inputs' RMS times a gain; norms of one; a Markov bias of zero."""
    generator = torch.Generator().manual_seed(config.seed)
    gains = {"fc": fc, "o_proj": 0.5 * config.output_init, "down_proj": 0.5 * config.output_init}
    gains["embed"] = gains["markov_w1"] = sizes.markov_rank**0.5  # entries have unit RMS
    gains["mask_embedding"] = sizes.hidden_size**0.5
    for name in head.plain_weights():
        part = head.trained(name)
        if part.ndim == 1:
            part.fill_(1.0)
        elif name in ("markov.rows.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight"):
            part.zero_()
        else:
            normal = torch.randn(part.shape, generator=generator)
            part.copy_(normal * gains.get(name.removesuffix(".weight").split(".")[-1], 1.0) * part.shape[1] ** -0.5)


def _rms(units: Tensor) -> Tensor:
    return units.square().mean().sqrt()


def _layer_factors(
    prefix: str, units: Tensor, norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm")
) -> Factors:
    """Factors of a decoder layer: its outputs to the stream, and the norms that read the stream."""
    outputs = {f"{prefix}.{name}.weight": units[:, None] for name in ("self_attn.o_proj", "mlp.down_proj")}
    return outputs | {f"{prefix}.{norm}.weight": _rms(units) / units for norm in norms}


def _feat_extrapolator_factors(config: FeatExtrapolatorConfig, scales: Scales) -> Factors:
    units = scales.feature
    read = torch.cat([torch.full_like(units, 1 / scales.embedding), 1 / units])
    factors = {"fc.weight": units[:, None] * read} | _layer_factors("layers.0", units, ["post_attention_layernorm"])
    factors |= {f"layers.0.self_attn.{name}.weight": 1 / units for name in ("q_proj", "k_proj", "v_proj")}
    for number in range(1, config.num_hidden_layers):
        factors |= _layer_factors(f"layers.{number}", units)
    if config.layer_ids:
        if scales.hidden is None:
            raise ValueError("context_layers needs captured states: extract features with the same --context-layers")
        factors["context.weight"] = units[:, None] / scales.hidden
    return factors


def _eagle3_factors(config: Eagle3Config, scales: Scales, final_gain: Tensor | None) -> Factors:
    if scales.hidden is None:
        raise ValueError("an Eagle3Head needs captured states of several layers: extract features with --head eagle3")
    units = _stream_units(scales, final_gain)
    read = torch.ones_like(scales.hidden) if config.fc_norm else 1 / scales.hidden
    factors = {"fc.weight": units[:, None] * read, "norm.weight": _rms(units) / units}
    if config.fc_norm:
        captured = scales.hidden.chunk(len(config.layer_ids))
        factors |= {f"fc_norm.{i}.weight": _rms(part) / part for i, part in enumerate(captured)}
    factors |= _layer_factors("midlayer", units, ["hidden_norm", "post_attention_layernorm"])
    for number in range(config.num_hidden_layers - 1):
        factors |= _layer_factors(f"more.{number}", units)
    return factors


def _stream_units(scales: Scales, final_gain: Tensor | None) -> Tensor:
    """u: the features' RMS before the target's final norm's gain."""
    if final_gain is None:
        return scales.feature
    gain = final_gain.to(scales.feature).abs()
    return scales.feature / gain.clamp_min(_MIN_GAIN * float(gain.mean()))


def _block_factors(config: BlockConfig, scales: Scales, units: Tensor, final_gain: Tensor | None) -> Factors:
    if scales.hidden is None:
        raise ValueError("a block head needs captured states of several layers: extract features with --head block")
    sign = 1.0 if final_gain is None else torch.where(final_gain < 0, -1.0, 1.0)
    factors = {"fc.weight": 1 / scales.hidden, "norm.weight": sign * _rms(units) * scales.feature / units}
    if config.mask_token_id < 0:
        factors["mask_embedding"] = torch.tensor(scales.embedding)
    for number in range(config.num_hidden_layers):
        factors |= _layer_factors(f"layers.{number}", units)
    return factors


def _medusa_factors(config: MedusaConfig, scales: Scales) -> Factors:
    blocks = [f"{i}.{j}.linear.weight" for i in range(config.heads) for j in range(config.blocks)]
    return dict.fromkeys([*blocks, *_lm_heads(config, scales.feature)], 1 / scales.feature)


def _lm_heads(config: MedusaConfig, rows: Tensor) -> dict[str, Tensor]:
    """The LM head rows for each Medusa head, by name of the weight."""
    return {f"{i}.{config.blocks}.weight": rows for i in range(config.heads)}
