"""Small modules of a target swapped for one native call each: RMS norms and SwiGLU feed-forwards.

Owns the swap. At a few rows the linears of a small model take about as long as Python and the small operators between
them, so fewer operators are worth as much as faster ones. Nothing is guessed from a class name alone: a module is
swapped only if its substitute gives the same numbers on a random input. Rows stay independent of one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haast import native
from haast.speed.packing import PackedLinear

_TOLERANCE = 1e-5  # relative and absolute; fp32 sums in another order stay far below it


@dataclass(frozen=True)
class FusingReport:
    """What `fuse_small_modules` did."""

    norms: int
    feed_forwards: int


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
    """`down(silu(gate(x)) * up(x))` with gate and up packed as one linear, and one pass between the two."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        super().__init__()
        self.gate_up = PackedLinear(torch.cat([gate.unpack(), up.unpack()]))
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        output: Tensor = self.down_proj(native.swiglu(self.gate_up(x)))
        return output


@torch.no_grad()
def fuse_small_modules(model: nn.Module) -> FusingReport:
    """Swap what can be swapped, in place; `model` is packed already (see `pack_linears`). A no-op without kernels."""
    norms = feed_forwards = 0
    if not native.available():
        return FusingReport(0, 0)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            norm = _fused_norm(child)
            feed_forward = _fused_feed_forward(child)
            if norm is not None:
                setattr(parent, name, norm)
                norms += 1
            elif feed_forward is not None:
                setattr(parent, name, feed_forward)
                feed_forwards += 1
    return FusingReport(norms, feed_forwards)


def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    weights = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(weights) != ["weight"] or weights["weight"].ndim != 1 or not isinstance(eps, float):
        return None
    fused = FusedRMSNorm(weights["weight"], eps)
    return fused if _same(module, fused, len(weights["weight"])) else None


def _fused_feed_forward(module: nn.Module) -> FusedSwiGLU | None:
    parts = dict(module.named_children())
    linears = [parts.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    if set(parts) - {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    gate, up, down = linears
    if not (isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and isinstance(down, PackedLinear)):
        return None
    if gate.bias is not None or up.bias is not None:
        return None
    fused = FusedSwiGLU(gate, up, down)
    return fused if _same(module, fused, gate.in_features) else None


def _same(module: nn.Module, fused: nn.Module, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator)
    return torch.allclose(module(x), fused(x), rtol=_TOLERANCE, atol=_TOLERANCE)
