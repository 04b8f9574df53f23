"""The Eagle3Head as it is trained: the same layers and units as a FeatExtrapolator's, with its own fuse and LM head.

Owns the algebra between whitened and plain Eagle3Head. Its states aim at no feature, so the stream's units are free:
they are chosen so that the target's own final norm and LM head are the start. With r the rms of features, w the final
norm's gain and h the state before it, feature = w h / rms(h); so u = r / |w| is the stream's unit, and

    plain                                        whitened (s: rms of captured states, e: of embeddings, g = rms(u))
    h = fc [low; mid; high]                      z = fc' [low / s; ...]              fc = diag(u) fc' diag(1/s)
    norm_c(x) = w_c x / rms(x)  (fc_norm)        w_c' x / (rms(x) s)                 w_c = w_c' / s, s: of x / rms(x)
    q, k, v = W [norm_e(emb); norm_h(h)]         the same, norms as in `layers`      w_h = g w_h' / u, w_e = w_e'
    logits = lm_head (w_n h / rms(h))            lm_head' (w_n' g z / rms(u z))      w_n = g w_n' / u
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from haast.heads.eagle3 import Eagle3Config
from haast.training.layers import DraftLayer, norm, rms
from haast.training.normalized_head import Parts, Scales, TrainedHead, layer_parts

_LEAST_GAIN = 0.05  # of the final norm's typical gain: a dimension that the norm all but drops is not blown up


class WhitenedEagle3(TrainedHead):
    """An Eagle3Head's parameters in whitened units.

    Args:
        config: sizes.
        scales: with `hidden`.
        final_gain: (hidden,) of the target's final norm; None takes ones.
        target_rows: (draft vocabulary, hidden) of the target's LM head, the start of this head's own; None is noise.
        output_init: scale of the layer's outputs at a random start.
        seed: of noise.
    """

    reads_captured = True

    def __init__(
        self,
        config: Eagle3Config,
        scales: Scales,
        final_gain: Tensor | None,
        target_rows: Tensor | None,
        output_init: float,
        seed: int,
    ) -> None:
        super().__init__(config, scales, seed)
        if scales.hidden is None:
            raise ValueError("an Eagle3Head needs the states of several layers: extract features with --head eagle3")
        hidden, count = config.hidden_size, len(config.layer_ids)
        self.register_buffer("units", _units(scales.feature, final_gain), persistent=False)
        self.register_buffer("captured", scales.hidden, persistent=False)
        self.units: Tensor
        self.captured: Tensor
        self.fc = self.matrix(hidden, count * hidden, 0.2)
        with torch.no_grad():  # the stream begins as the highest captured layer, itself in whitened units
            self.fc[:, -hidden:] += torch.eye(hidden, dtype=self.fc.dtype)
        if config.fc_norm:
            self.fc_norm = nn.Parameter(torch.ones_like(scales.hidden))
        self.embedding_norm = nn.Parameter(torch.ones_like(scales.feature))
        self.state_norm = nn.Parameter(torch.ones_like(scales.feature))
        for number in range(config.num_hidden_layers):
            width = hidden if number else 2 * hidden
            self.layers.append(DraftLayer(config, self.units, width, number > 0, self.matrix, output_init))
        self.final_norm = nn.Parameter(torch.ones_like(scales.feature))
        self.lm_head = self.matrix(config.drafts, hidden)
        if target_rows is not None:
            with torch.no_grad():
                self.lm_head.copy_(target_rows * scales.feature)
        self.add_markov(config.drafts)

    def fuse(self, features: Tensor) -> Tensor:
        """`features` (n, layers * hidden) are divided by their rms already, so a norm multiplies them back first."""
        if self._fc_norm:
            parts = []
            for part, unit in zip(features.chunk(self._count, -1), self.captured.chunk(self._count), strict=True):
                square = (part * unit).square().mean(-1, keepdim=True)
                parts.append(part * rms(unit) * torch.rsqrt(square + self.config.rms_norm_eps))
            features = torch.cat(parts, dim=-1) * self.fc_norm
        return functional.linear(features, self.fc)

    @property
    def _count(self) -> int:
        assert isinstance(self.config, Eagle3Config), "its own configuration"
        return len(self.config.layer_ids)

    @property
    def _fc_norm(self) -> bool:
        assert isinstance(self.config, Eagle3Config), "its own configuration"
        return self.config.fc_norm

    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.full_like(self.units, self.scales.embedding)
        embedded = norm(embeddings, self.embedding_norm, one, self.config.rms_norm_eps)
        normed = norm(states, self.state_norm, self.units, self.config.rms_norm_eps)
        return states, torch.cat([embedded, normed], dim=1)

    def predict(self, states: Tensor) -> Tensor:
        return norm(states, self.final_norm, self.units, self.config.rms_norm_eps)

    def rows(self) -> Tensor | None:
        return self.lm_head

    def parts(self) -> Parts:
        units, captured, one = self.units, self.captured, torch.ones((), device=self.units.device)
        gain = rms(units)
        typical = torch.cat([rms(part).expand_as(part) for part in captured.chunk(self._count)])
        inside = one.expand_as(captured) if self._fc_norm else 1 / captured
        parts: Parts = {"fc.weight": (self.fc, units[:, None] * inside)}
        if self._fc_norm:
            weights, factors = self.fc_norm.chunk(self._count), (typical / captured).chunk(self._count)
            parts |= {f"fc_norm.{i}.weight": pair for i, pair in enumerate(zip(weights, factors, strict=True))}
        parts["midlayer.input_layernorm.weight"] = (self.embedding_norm, one)
        parts["midlayer.hidden_norm.weight"] = (self.state_norm, gain / units)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer), "nothing else is in the list"
            prefix = f"more.{number - 1}." if number else "midlayer."
            parts |= layer_parts(layer, prefix, torch.ones(layer.query.shape[1], device=units.device))
        parts |= {"norm.weight": (self.final_norm, gain / units), "lm_head.weight": (self.lm_head, one)}
        return parts | self.markov_parts()


def _units(feature: Tensor, final_gain: Tensor | None) -> Tensor:
    if final_gain is None:
        return feature
    gain = final_gain.to(feature).abs()
    return feature / gain.clamp_min(_LEAST_GAIN * float(gain.mean()))
