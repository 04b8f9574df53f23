"""A head that begins as the target's last decoder layer instead of as noise.

Owns the closed form. The head's one layer has the shape of the target's own, and the feature that it is to
extrapolate is what the target's last layer leaves behind, so the target has already learned most of the work. Two
things stand between:

    target   h' = h + attention(norm(h)) + mlp(norm(.))      f = w h' / rms(h')     h: the last layer's input
    head     u' = u + attention(u) + mlp(norm(.))            f = u'                 u = fc [e; f]

1. Units. With rms(h) and rms(h') taken as constants, u = D h with D = diag(w / rms(h')) turns the upper line into the
   lower: W -> W diag(g / rms(h)) D^-1 for q, k, v (g: the norm's gain), and D o_proj, D down_proj. The norm before the
   MLP stays a norm; its gain and D^-1 go into gate and up. Biases of q, k, v are left out: the head has none.
2. The input. h at t + 1 is not known when drafting, but the embedding e of the token at t + 1 and the feature f of t
   are: `fc` is the ridge regression of D h on the two.

A trial on 1,170 answers of SmolLM2-135M-Instruct: held-out cross-entropy 3.18 before the first step (random weights:
7.64), and 2.44 against 2.89 after 300,000 views.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haast.heads.config import HeadConfig
from haast.target.fusing import FusedAttention, FusedSwiGLU
from haast.target.packing import is_linear
from haast.target.precision import weight_rows
from haast.target.target import Target
from haast.training.batches import Example, usable
from haast.training.scaled_head import Scales
from haast.training.target_weights import rms_gain
from haast.tree import DraftTree

_EXAMPLES = 400  # sequences that the regression sees: about fifty positions for each of its inputs
_RIDGE = 0.01  # of the inputs' mean square
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _LastLayer:
    """The target's last decoder layer, taken apart. Weights are (out, in), gains (hidden,)."""

    norms: tuple[nn.Module, ...]  # before attention, before the MLP, after the layers
    gains: tuple[Tensor, ...]  # of these
    weights: dict[str, Tensor]


def why_not_last_layer(target: Target, config: HeadConfig) -> str:
    """One line that says why a head of these sizes can't begin as the target's last layer; empty where it can."""
    found = _find(target)
    if isinstance(found, str):
        return found
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    for name, shape in zip(_LINEARS, shapes, strict=True):
        if found.weights[name].shape != shape:
            return f"the last layer's {name} is {tuple(found.weights[name].shape)}, the head's {shape}"
    return ""


@torch.no_grad()
def last_layer_weights(target: Target, config: HeadConfig, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Plain weights (EAGLE-1's tensors) of a head that begins as the target's last layer.

    Args:
        target: a Llama-like model.
        config: sizes of the head.
        examples: what the head will be trained on; the first 400 are used.

    Raises:
        ValueError: the target has no such layer, or another size.
    """
    reason = why_not_last_layer(target, config)
    if reason:
        raise ValueError(f"initialisation='last-layer' is not possible: {reason}; use initialisation='random'")
    layer = _find(target)
    assert isinstance(layer, _LastLayer), "refused above"
    some = usable(examples)[:_EXAMPLES]
    embeddings = target.embed(torch.arange(target.vocab_size, device=target.device)).float().cpu()
    scales = Scales.measure(some, embeddings)
    seen = _flows(target, layer, some)
    entering, middle, leaving = (torch.cat(parts).float().cpu() for parts in zip(*seen, strict=True))
    units = layer.gains[2] / _typical(leaving)  # D
    units = torch.where(units.abs() < 1e-8, torch.full_like(units, 1e-8), units)
    plain = _layer_weights(layer, units, scales, entering, middle)
    plain["fc.weight"] = _fuse(some, embeddings, scales, entering * units)
    return plain


def _layer_weights(
    layer: _LastLayer, units: Tensor, scales: Scales, entering: Tensor, middle: Tensor
) -> dict[str, Tensor]:
    weights = layer.weights
    before = layer.gains[0] / _typical(entering) / units
    # norm(u) divides by the rms of u = D a, the target's norm by that of a: their ratio is taken as constant as well.
    ratio = float((_rms(middle * units) / _rms(middle)).mean())
    # The head's gain is what training starts a random head with. What is left over goes into gate and up.
    gain = float(scales.feature.square().mean().sqrt()) / scales.feature
    inside = layer.gains[1] * ratio / units / gain
    prefix = "layers.0."
    return {
        f"{prefix}self_attn.q_proj.weight": weights["q_proj"] * before,
        f"{prefix}self_attn.k_proj.weight": weights["k_proj"] * before,
        f"{prefix}self_attn.v_proj.weight": weights["v_proj"] * before,
        f"{prefix}self_attn.o_proj.weight": weights["o_proj"] * units[:, None],
        f"{prefix}mlp.gate_proj.weight": weights["gate_proj"] * inside,
        f"{prefix}mlp.up_proj.weight": weights["up_proj"] * inside,
        f"{prefix}mlp.down_proj.weight": weights["down_proj"] * units[:, None],
        f"{prefix}post_attention_layernorm.weight": gain,
    }


def _fuse(examples: Sequence[Example], embeddings: Tensor, scales: Scales, wanted: Tensor) -> Tensor:
    """Ridge regression of `wanted` (n, hidden) on embedding and feature, solved in units of their rms: fc (H, 2H)."""
    inputs = []
    for example in examples:
        at = example.queries()
        following = embeddings[example.tokens[at + 1].long()] / scales.embedding
        inputs.append(torch.cat([following, example.features[at].float() / scales.feature], dim=1))
    x, y = torch.cat(inputs), wanted / scales.feature
    square = x.T @ x / len(x)
    square += _RIDGE * float(square.diagonal().mean()) * torch.eye(len(square))
    solved = torch.linalg.solve(square.double(), (x.T @ y / len(x)).double()).T.float()
    hidden = len(scales.feature)
    units = torch.cat([torch.full((hidden,), scales.embedding), scales.feature])
    fuse: Tensor = scales.feature[:, None] * solved / units
    return fuse


def _flows(target: Target, layer: _LastLayer, examples: Sequence[Example]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What enters the last layer, stands between its halves, and leaves it, at t + 1 of each supervised pair t."""
    captured: dict[nn.Module, Tensor] = {}
    found, one_call = [], target.one_call
    with ExitStack() as stack:
        for norm in layer.norms:
            hook = norm.register_forward_pre_hook(lambda module, inputs: captured.update({module: inputs[0]}))
            stack.callback(hook.remove)
        stack.enter_context(target.step_threads())
        for example in examples:
            tokens = example.tokens[:-1].long().unsqueeze(0).to(target.device)
            cache = target.new_cache(1, tokens.shape[1])  # which notices the hooks, so that the modules run
            target.forward(DraftTree.chain(tokens), cache, last_only=True)
            at = example.queries() + 1
            entering, middle, leaving = (captured[norm][0, at] for norm in layer.norms)
            found.append((entering, middle, leaving))
    if one_call:
        target.use_one_call()
    return found


def _find(target: Target) -> _LastLayer | str:
    """The last layer, or why there is none of the kind."""
    name = type(target.model).__name__
    decoder: nn.Module = target.model.get_decoder()  # type: ignore[no-untyped-call]
    parts = dict(decoder.named_children())
    layers, final = parts.get("layers"), parts.get("norm")
    if not isinstance(layers, nn.ModuleList) or final is None:
        return f"{name} keeps its layers elsewhere than in `layers` and `norm`"
    inside = dict(layers[-1].named_children())
    if set(inside) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return f"the layers of {name} hold {sorted(inside)}, not a Llama layer's four parts"
    norms = (inside["input_layernorm"], inside["post_attention_layernorm"], final)
    gains = tuple(gain for gain in map(rms_gain, norms) if gain is not None)
    if len(gains) < len(norms):
        return f"the norms of {name} are no RMS norms with a gain"
    attention, mlp = inside["self_attn"], inside["mlp"]
    weights: dict[str, Tensor] = {}
    for module, names in ((attention, _LINEARS[:4]), (mlp, _LINEARS[4:])):
        if isinstance(module, FusedAttention | FusedSwiGLU):
            weights |= module.parts()
        else:
            linears = {key: dict(module.named_children()).get(key) for key in names}
            weights |= {k: weight_rows(m, m.in_features) for k, m in linears.items() if is_linear(m)}
    known = {key: weight.detach().float().cpu() for key, weight in weights.items()}
    if len(known) < len(_LINEARS) or any("norm" in key for key, _ in attention.named_children()):
        return (
            f"the last layer of {name} is not a Llama layer: it lacks {sorted(set(_LINEARS) - set(known)) or 'nothing'}"
        )
    return _LastLayer(norms, gains, known)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def _typical(x: Tensor) -> float:
    """The geometric mean over positions of the rms over dimensions."""
    return float(_rms(x).log().mean().exp())
