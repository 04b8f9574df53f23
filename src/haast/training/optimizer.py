"""The optimiser of a head: AdamW, or Muon for the matrices inside and AdamW for the rest.

Owns which parameter goes where, and one state for checkpoints. Muon's own arithmetic is in `muon`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from haast.training.config import TrainConfig
from haast.training.muon import Muon

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
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, config.learning_rate, betas, weight_decay=config.weight_decay, fused=True)
        ]
        if matrices:
            stacked = [
                (parameter, matrices[name.replace(first, second)])
                for first, second in _STACKED
                for name, parameter in matrices.items()
                if f".{first}." in name
            ]
            self.parts.append(Muon(matrices.values(), config.learning_rate, config.weight_decay, stacked=stacked))

    def step(self, learning_rate: float) -> None:
        """Apply the gradients and forget them."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad()
