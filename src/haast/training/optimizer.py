"""The optimiser of a head: AdamW, or Muon (Jordan et al., 2024) for the matrices inside and AdamW for the rest.

Owns which parameter goes where, and Muon in the arithmetic that a device is good at. Muon's numbers (momentum,
coefficients, steps, the scale of a step) and its state are those of `torch.optim.Muon`, so that either goes on from the
other's checkpoint. torch iterates in bf16 everywhere; a CPU without bf16 products emulates them, and a run does not
advance. Here bf16 is taken where torch's fp32 products round their factors anyway, hence on devices that multiply 16
bits (see `rounds_factors`), and fp32 elsewhere.

One step of the iteration is X <- P X with P = a I + b G + c G^2 and G = X X^T. All P are polynomials in the first G, so
they commute, and the next G is P G P. In fp32 a long X is therefore not touched by the steps: they run over the small
(rows, rows) matrices, and their product Q meets X once at the end. Each product of such matrices is symmetric, so three
quarters of it are computed. In bf16 the errors of Q would grow with every step: X itself is iterated, as by torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from haast.training.config import TrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: the steepest start that still ends near one
STEPS = 5
_EPS = 1e-7  # least norm that is divided by
_LONG = 9 / 7  # columns to rows: from here on Q costs fewer operations than iterating X, whatever the number of steps
_HALVED = 64  # rows from which on leaving out a quarter of a product is worth two calls


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. A step has the size of AdamW's (Moonlight, arXiv 2502.16982), for the same rates.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled from the gradient.
        momentum: share of the old momentum.
        stacked: tuples of them with the same input that are one matrix to the iteration, rows below rows: its work
            grows with the cube of the shorter side, so that one tall matrix costs less than two.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        stacked: Sequence[tuple[nn.Parameter, ...]] = (),
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": STEPS}
        fixed = {"nesterov": True, "ns_coefficients": COEFFICIENTS, "eps": _EPS, "adjust_lr_fn": "match_rms_adamw"}
        super().__init__(params, settings | fixed)
        self._below = {stack[0]: stack[1:] for stack in stacked}
        self._not_first = {parameter for stack in stacked for parameter in stack[1:]}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients. There is no line search, hence no closure."""
        assert closure is None, "Muon computes no loss"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self._not_first:
                    self._apply([parameter, *self._below.get(parameter, ())], group)

    def _apply(self, stack: list[nn.Parameter], group: dict[str, Any]) -> None:
        ahead = [self._ahead(parameter, float(group["momentum"])) for parameter in stack]
        whole = torch.cat(ahead) if len(ahead) > 1 else ahead[0]
        update = orthogonalised(whole)
        rate = float(group["lr"])
        for parameter, part in zip(stack, torch.split(update, [len(each) for each in stack]), strict=True):
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(part, alpha=-rate * 0.2 * math.sqrt(max(whole.shape)))

    def _ahead(self, parameter: nn.Parameter, share: float) -> Tensor:
        """Nesterov's momentum."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None, "whoever has none is left out"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - share)
        return gradient.lerp(momentum, share)


def orthogonalised(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """The matrix with its singular values moved near one (to 0.7 to 1.2, but those that were nearly nothing).

    Args:
        matrix: (rows, columns).
        steps: 1 or more.

    Returns:
        (rows, columns), in fp32 (fp64 for such a matrix), or in bf16 where the device multiplies that.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    narrow = matrix.dtype is not torch.float64 and rounds_factors(matrix.device, torch.get_float32_matmul_precision())
    start = wide.to(torch.bfloat16 if narrow else torch.promote_types(matrix.dtype, torch.float32))
    start = start / start.norm().clamp(min=_EPS)
    if narrow:
        made = _iterated(start, steps, torch.matmul)
    elif wide.shape[1] < _LONG * wide.shape[0]:
        made = _iterated(start, steps, symmetric_product)
    else:
        made = _by_factor(start, steps)
    return made if wide is matrix else made.T


@functools.cache
def rounds_factors(device: torch.device, precision: str) -> bool:
    """Whether fp32 matrices are multiplied in fewer bits: in TF32 or bf16, by units made for 16-bit factors.

    So do NVIDIA's GPUs since Ampere and CPUs with AMX, where `torch.set_float32_matmul_precision` allows it. It is
    tried, since torch tells it of GPUs only.

    Args:
        device: where.
        precision: what `torch.get_float32_matmul_precision` says now.
    """
    assert precision == torch.get_float32_matmul_precision(), "only the present setting can be tried"
    factor = torch.full((256, 256), 1 + 2**-12, device=device)  # TF32 has 10 bits after the point, bf16 has 7
    return float((factor @ factor)[0, 0]) == 256.0  # and not 256.125


def _iterated(x: Tensor, steps: int, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """X <- P X, so many times. X is (rows, columns); `product` makes the two symmetric products of a step."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = product(x, x.T)
        x = torch.addmm(x, gram.mul(b).add_(product(gram, gram), alpha=c), x, beta=a)
    return x


def _by_factor(x: Tensor, steps: int) -> Tensor:
    """Q X, where Q (rows, rows) is the product of all P."""
    a, b, c = COEFFICIENTS
    gram, factor = symmetric_product(x, x.T), None
    for number in range(steps):
        p = gram.mul(b).add_(symmetric_product(gram, gram), alpha=c)
        p.diagonal().add_(a)
        factor = p if factor is None else symmetric_product(factor, p)
        if number < steps - 1:
            gram = symmetric_product(symmetric_product(gram, p), p)
    assert factor is not None, "there is a step"
    return factor @ x


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right where that is known to be symmetric: (n, k) times (k, n), or two symmetric matrices that commute.

    The lower left quarter is mirrored from the upper right one instead of computed.
    """
    n = len(left)
    if n < _HALVED:
        return left @ right
    half, made = n // 2, left.new_empty(n, n)
    torch.mm(left[:half], right, out=made[:half])
    torch.mm(left[half:], right[:, half:], out=made[half:, half:])
    made[half:, :half] = made[:half, half:].T
    return made


_ENDS = ("lm_head", "embed", "rows")  # names of modules; those of Medusa's LM heads are numbers
_STACKED = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read the same, and are one matrix to Muon


class HeadOptimizer:
    """Steps all parameters with one learning rate.

    Args:
        parameters: (name, parameter) of the head; embeddings and LM heads, which are no maps between states, stay with
            AdamW.
        config: `optimizer`, `beta1`, `beta2`, `weight_decay`.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        betas, muonic = (config.beta1, config.beta2), config.optimizer == "muon"
        matrices, others = dict[str, nn.Parameter](), list[nn.Parameter]()
        for name, parameter in parameters:
            owner = name.removesuffix(".parametrizations.weight.original").removesuffix(".weight").rpartition(".")[2]
            inside = parameter.ndim == 2 and owner not in _ENDS and not owner.isdigit()
            if muonic and inside:
                matrices[name] = parameter
            else:
                others.append(parameter)
        rate, decay = config.learning_rate, config.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, rate, betas, weight_decay=decay, fused=True)
        ]
        if matrices:
            stacked = [
                (parameter, matrices[name.replace(first, second)])
                for first, second in _STACKED
                for name, parameter in matrices.items()
                if f".{first}." in name
            ]
            self.parts.append(Muon(matrices.values(), rate, decay, stacked=stacked))

    def step(self, learning_rate: float) -> None:
        """Apply the gradients and forget them."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Below "highest" fp32 products may be rounded to TF32 or bf16 where the hardware multiplies those.

    On x86 it also moves them from MKL to oneDNN, in full fp32 where there is no AMX: measured on two Zen 5 cores, 480
    against 205 GFLOP/s and 1.6 times the views a second.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
