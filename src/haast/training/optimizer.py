"""Optimiser of a head: AdamW, or Muon (Jordan et al., 2024) for the inner matrices and AdamW for the rest.

Owns the choice of optimiser per parameter, and a Muon with the precision that suits the device. Muon's constants
(momentum, coefficients, steps, step scale) and state are those of `torch.optim.Muon`, so each can resume from the
other's checkpoint. torch iterates in bf16 on all devices, which is far too slow on a CPU that emulates bf16 matmuls.
Here bf16 is used only in mixed precision, and where torch's fp32 matmuls round their inputs anyway (see
`matmul_rounds_inputs`), and fp32 elsewhere.

One step of the iteration is X <- P X with P = a I + b G + c G^2 and G = X X^T. All P are polynomials in the first G, so
they commute, and the next G is P G P. For a long X in fp32 the steps therefore only use the small (rows, rows)
matrices, and their product Q is multiplied with X once at the end. Products of these matrices are symmetric, so only
three quarters of each are computed. In bf16 the errors of Q would grow with each step: X itself is iterated, as in
torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from haast.device import multiplies_bf16
from haast.training.config import TrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: the steepest start that still ends near one
STEPS = 5
_EPS = 1e-7  # lower bound of the norm that X is divided by
_MIN_ASPECT = 9 / 7  # columns / rows: from here on Q costs fewer operations than iterating X, for any number of steps
_MIN_MIRRORED_ROWS = 64  # number of rows from which computing three quarters of a product is worth two calls


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum. Steps have AdamW's size (Moonlight, arXiv 2502.16982), for the same learning rates.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled from the gradient.
        momentum: decay of the momentum.
        stacked: tuples of parameters with the same input, stacked by rows into one matrix for the iteration: its cost
            grows with the cube of the shorter side, so one tall matrix costs less than two.
        bf16: iterate in bf16 also on devices that do not round the factors of fp32 products.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        stacked: Sequence[tuple[nn.Parameter, ...]] = (),
        bf16: bool = False,
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": STEPS}
        fixed = {"nesterov": True, "ns_coefficients": COEFFICIENTS, "eps": _EPS, "adjust_lr_fn": "match_rms_adamw"}
        super().__init__(params, settings | fixed)
        self._bf16 = bf16
        self._stacked_after = {stack[0]: stack[1:] for stack in stacked}
        self._stacked_members = {parameter for stack in stacked for parameter in stack[1:]}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon needs matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients. `closure` must be None: Muon does not evaluate the loss."""
        assert closure is None, "Muon does not evaluate the loss"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self._stacked_members:
                    self._apply([parameter, *self._stacked_after.get(parameter, ())], group)

    def _apply(self, stack: list[nn.Parameter], group: dict[str, Any]) -> None:
        momenta = [self._nesterov(parameter, float(group["momentum"])) for parameter in stack]
        whole = torch.cat(momenta) if len(momenta) > 1 else momenta[0]
        update = orthogonalise(whole, bf16=self._bf16)
        rate = float(group["lr"])
        for parameter, part in zip(stack, torch.split(update, [len(each) for each in stack]), strict=True):
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(part, alpha=-rate * 0.2 * math.sqrt(max(whole.shape)))

    def _nesterov(self, parameter: nn.Parameter, decay: float) -> Tensor:
        """Update the momentum buffer; returns Nesterov's momentum."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None, "`step` skips parameters without a gradient"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - decay)
        return gradient.lerp(momentum, decay)


def orthogonalise(matrix: Tensor, steps: int = STEPS, bf16: bool = False) -> Tensor:
    """Move the singular values of a matrix near one (0.7 to 1.2; values near zero grow less).

    Args:
        matrix: (rows, columns).
        steps: 1 or more.
        bf16: iterate in bf16 also on devices that do not round the factors of fp32 products.

    Returns:
        (rows, columns): fp64 for an fp64 matrix, else bf16 on devices that round fp32 products anyway, or with `bf16`,
        and fp32 elsewhere.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    use_bf16 = matrix.dtype is not torch.float64 and (
        bf16 or matmul_rounds_inputs(matrix.device, torch.get_float32_matmul_precision())
    )
    start = wide.to(torch.bfloat16 if use_bf16 else torch.promote_types(matrix.dtype, torch.float32))
    start = start / start.norm().clamp(min=_EPS)
    if use_bf16:
        result = _iterate_matrix(start, steps, torch.matmul)
    elif wide.shape[1] < _MIN_ASPECT * wide.shape[0]:
        result = _iterate_matrix(start, steps, symmetric_product)
    else:
        result = _iterate_gram(start, steps)
    return result if wide is matrix else result.T


@functools.cache
def matmul_rounds_inputs(device: torch.device, precision: str) -> bool:
    """Whether fp32 matmuls round their inputs to TF32 or bf16, which means that the device has 16-bit matmul units.

    NVIDIA GPUs since Ampere and CPUs with AMX do, if `torch.set_float32_matmul_precision` allows it. The function
    measures this, since torch reports it for GPUs only.

    Args:
        device: the device to test.
        precision: the current `torch.get_float32_matmul_precision()`; part of the cache key.
    """
    assert precision == torch.get_float32_matmul_precision(), "only the current setting can be measured"
    factor = torch.full((256, 256), 1 + 2**-12, device=device)  # TF32 has 10 bits after the point, bf16 has 7
    return float((factor @ factor)[0, 0]) == 256.0  # and not 256.125


def _iterate_matrix(x: Tensor, steps: int, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply X <- P X `steps` times. X is (rows, columns); `product` computes the two symmetric products of a step."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = product(x, x.T)
        x = torch.addmm(x, gram.mul(b).add_(product(gram, gram), alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Tensor, steps: int) -> Tensor:
    """Q X, where Q (rows, rows) is the product of all P."""
    a, b, c = COEFFICIENTS
    gram, factor = symmetric_product(x, x.T), None
    for number in range(steps):
        p = gram.mul(b).add_(symmetric_product(gram, gram), alpha=c)
        p.diagonal().add_(a)
        factor = p if factor is None else symmetric_product(factor, p)
        if number < steps - 1:
            gram = symmetric_product(symmetric_product(gram, p), p)
    assert factor is not None, "steps is at least 1"
    return factor @ x


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for a symmetric result: (n, k) times its transpose, or two symmetric matrices that commute.

    The lower left quarter is copied from the upper right one instead of computed.
    """
    n = len(left)
    if n < _MIN_MIRRORED_ROWS:
        return left @ right
    half, result = n // 2, left.new_empty(n, n)
    torch.mm(left[:half], right, out=result[:half])
    torch.mm(left[half:], right[:, half:], out=result[half:, half:])
    result[half:, :half] = result[:half, half:].T
    return result


# Embeddings and LM heads, and vectors that are stored as matrices. Medusa's LM heads have numbers.
_EMBEDDINGS = {"lm_head", "embed", "rows", "markov_w1", "markov_w2", "mask_embedding", "confidence_head"}
_STACKED = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))  # pairs with the same input: one matrix for Muon


class HeadOptimizer:
    """Steps all parameters with one learning rate.

    Args:
        parameters: (name, parameter) of the head; AdamW also takes embeddings and LM heads, since they do not map
            states to states.
        config: `optimizer`, `beta1`, `beta2`, `weight_decay`, `mixed_precision`.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        betas, use_muon = (config.beta1, config.beta2), config.optimizer == "muon"
        matrices, others = dict[str, nn.Parameter](), list[nn.Parameter]()
        for name, parameter in parameters:
            owner = name.removesuffix(".parametrizations.weight.original").removesuffix(".weight").rpartition(".")[2]
            inside = parameter.ndim == 2 and not _EMBEDDINGS & set(name.split(".")) and not owner.isdigit()
            if use_muon and inside:
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
            bf16 = config.mixed_precision == "bf16" and multiplies_bf16()  # emulated, it would take most of the time
            self.parts.append(Muon(matrices.values(), rate, decay, stacked=stacked, bf16=bf16))

    def step(self, learning_rate: float) -> None:
        """Apply the gradients and reset them."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's fp32 matmul precision inside the context.

    Below "highest", matmuls may round their inputs to TF32 or bf16 if the hardware has such units. On x86 they also
    move from MKL to oneDNN, in full fp32 without AMX: measured on two Zen 5 cores, 480 against 205 GFLOP/s and 1.6
    times the supervised tokens per second.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
