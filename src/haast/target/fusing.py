"""Fuses small modules of a target into fewer native calls: RMS norms, SwiGLU feed-forwards, Llama's attention.

Owns the replacement. With few rows, Python and the small operators take about as long as the linear layers of a small
model, so fewer operators save as much as faster ones. A class name alone is not trusted: a module is replaced only if
the fused one gives the same results on a random input. Rows stay independent of each other.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from haast import compat, native
from haast.target.memory import release_freed_memory
from haast.target.packing import PackedLinear, exact_products, rounds_activations

_LLAMA_ATTENTION = {"config", "layer_idx", "head_dim", "scaling", "is_causal", "num_key_value_groups"}
_TOLERANCE = 1e-5  # relative and absolute; far above the effect of another order of fp32 sums


class FusedRMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` in one pass; fp32 on the CPU."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return native.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedSwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` with gate and up packed as one linear layer, and the rest in one kernel."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        super().__init__()
        self.gate_up = PackedLinear.joined([gate, up])
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        output: Tensor = self.down_proj(native.swiglu(self.gate_up(x)))
        return output

    def parts(self) -> dict[str, Tensor]:
        """The weights (out, in) by the names that they had before."""
        gate, up = self.gate_up.unpack().chunk(2)
        return {"gate_proj": gate, "up_proj": up, "down_proj": self.down_proj.unpack()}


class FusedAttention(nn.Module):
    """Llama's attention with q, k and v packed as one linear layer and rotated in place.

    Includes the norms of each query and key head before the rotation, if the model has them (Qwen3). It calls the same
    cache and attention function as the original, so masks and trees work unchanged.
    """

    def __init__(self, module: nn.Module, q: PackedLinear, k: PackedLinear, v: PackedLinear, o: PackedLinear) -> None:
        super().__init__()
        original: Any = module  # has Llama's attributes: `_fused_attention` has checked them
        assert len({linear.bias is None for linear in (q, k, v)}) == 1, "q, k and v all have a bias, or none has"
        self.qkv_proj = PackedLinear.joined([q, k, v])
        self.o_proj = o
        self.config, self.layer_idx, self.head_dim = original.config, original.layer_idx, original.head_dim
        self.scaling, self.is_causal = original.scaling, original.is_causal
        self.num_key_value_groups = original.num_key_value_groups
        self.q_norm = _fused_norm(original.q_norm) if "q_norm" in dict(module.named_children()) else None
        self.k_norm = _fused_norm(original.k_norm) if "k_norm" in dict(module.named_children()) else None
        self.heads, self.kv_heads = q.out_features // self.head_dim, k.out_features // self.head_dim

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `LlamaAttention.forward`: (rows, nodes, hidden) -> the same shape, and the attention's weights."""
        rows, nodes, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states)
        rotated = self.heads + self.kv_heads
        if self.q_norm is not None and self.k_norm is not None:
            by_head = qkv.view(rows, nodes, rotated + self.kv_heads, self.head_dim)
            by_head[:, :, : self.heads] = self.q_norm(by_head[:, :, : self.heads])
            by_head[:, :, self.heads : rotated] = self.k_norm(by_head[:, :, self.heads : rotated])
        if position_embeddings is not None:  # Granite's hybrids have none
            native.rotate_(qkv, *position_embeddings, rotated)
        heads = qkv.view(rows, nodes, rotated + self.kv_heads, self.head_dim).transpose(1, 2)
        query, key, value = heads[:, : self.heads], heads[:, self.heads : rotated], heads[:, rotated:]
        cache = past_key_values if cache is None else cache  # the name depends on the version of transformers
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[compat.attention_name(self.config) or ""]
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        projected: Tensor = self.o_proj(output.reshape(rows, nodes, -1))
        return projected, weights

    def parts(self) -> dict[str, Tensor]:
        """The weights (out, in) by the names that they had before."""
        sizes = [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        query, key, value = torch.split(self.qkv_proj.unpack(), sizes)
        return {"q_proj": query, "k_proj": key, "v_proj": value, "o_proj": self.o_proj.unpack()}


@torch.no_grad()
def fuse_small_modules(model: nn.Module) -> tuple[int, ...]:
    """Replace all modules that can be fused, in place. Call `pack_linears` before. A no-op without native kernels.

    Returns the numbers of replaced norms, feed-forwards and attentions.
    """
    counts = dict.fromkeys((FusedRMSNorm, FusedSwiGLU, FusedAttention), 0)
    waiting = deque(model.modules() if native.available() else ())  # without the parents done, whose parts are freed
    while waiting:
        parent = waiting.popleft()
        for name, child in list(parent.named_children()):
            fused = _fused_norm(child) or _fused_feed_forward(child) or _fused_attention(child)
            if fused is not None:
                setattr(parent, name, fused)
                counts[type(fused)] += 1
        release_freed_memory()
    return tuple(counts.values())


def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    weights = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(weights) != ["weight"] or weights["weight"].ndim != 1 or not isinstance(eps, float):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # it has a gate, as behind linear attention
        return None
    fused = FusedRMSNorm(weights["weight"], eps)
    return fused if _same(module, fused, len(weights["weight"])) else None


def _fused_feed_forward(module: nn.Module) -> FusedSwiGLU | None:
    linears = _packed_parts(module, ("gate_proj", "up_proj", "down_proj"), {"act_fn"})
    if linears is None or linears[0].bias is not None or linears[1].bias is not None:
        return None
    gate, up, down = linears
    fused = FusedSwiGLU(gate, up, down)
    return fused if _same(module, fused, gate.in_features, linears) else None


def _fused_attention(module: nn.Module) -> FusedAttention | None:
    norms = {"q_norm", "k_norm"} & set(dict(module.named_children()))
    linears = _packed_parts(module, ("q_proj", "k_proj", "v_proj", "o_proj"), norms)
    if linears is None or len(norms) == 1 or not _LLAMA_ATTENTION.issubset(vars(module)):
        return None
    q, k, v, o = linears
    if len({linear.bias is None for linear in (q, k, v)}) > 1 or k.out_features != v.out_features:
        return None
    fused = FusedAttention(module, q, k, v, o)
    if norms and any(n is None or len(n.weight) != fused.head_dim for n in (fused.q_norm, fused.k_norm)):
        return None  # a norm over all heads together (Olmo 2)
    if compat.attention_name(fused.config) not in ALL_ATTENTION_FUNCTIONS or fused.head_dim % 2:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, q.in_features, generator=generator)
    angles = tuple(torch.randn(2, 3, fused.head_dim, generator=generator) for _ in range(2))
    mask = torch.full((2, 1, 3, 3), torch.finfo(torch.float32).min).triu(1)
    with exact_products(module, fused):
        try:
            expected = module(hidden_states=x, position_embeddings=angles, attention_mask=mask)[0]
        except (TypeError, RuntimeError, AttributeError):  # another kind of attention with the same attributes
            return None
        result = fused(hidden_states=x, position_embeddings=angles, attention_mask=mask)[0]
    return fused if _agree(expected, result, linears) else None


def _packed_parts(module: nn.Module, names: Sequence[str], optional: set[str]) -> list[PackedLinear] | None:
    """A module's packed linear layers `names`; None if one is missing, or it has children that are not `optional`."""
    children = dict(module.named_children())
    linears = [child for child in map(children.get, names) if isinstance(child, PackedLinear)]
    return linears if len(linears) == len(names) and set(children) <= {*names, *optional} else None


def _same(module: nn.Module, fused: nn.Module, width: int, linears: Sequence[PackedLinear] = ()) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator)
    with exact_products(module, fused):
        return _agree(module(x), fused(x), linears)


def _agree(expected: Tensor, result: Tensor, linears: Sequence[PackedLinear]) -> bool:
    """Whether the results are equal up to rounding, which in exact products of block weights depends on the largest.

    Activations that are rounded to 8 bits would hide what tells one kind of module from another (a cap of scores).
    """
    largest = float(expected.abs().max()) if any(map(rounds_activations, linears)) else 1.0
    return torch.allclose(expected, result, rtol=_TOLERANCE, atol=_TOLERANCE * max(1.0, largest))
