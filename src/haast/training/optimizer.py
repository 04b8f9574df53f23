"""The optimiser of a head: AdamW, or Muon for the matrices inside and AdamW for the rest.

Owns which parameter goes where, and one state for checkpoints. Muon (Jordan et al., 2024) orthogonalises each matrix's
momentum. Its step is scaled to the size of AdamW's (Moonlight, arXiv 2502.16982), so both take the same learning rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from haast.training.config import TrainConfig

_ENDS = ("lm_head", "markov_embed", "markov_rows")


class HeadOptimizer:
    """Steps all parameters with one learning rate.

    Args:
        parameters: (name, parameter) of the head; embeddings and LM heads, which are no maps between states, stay with
            AdamW.
        config: `optimizer`, `beta1`, `beta2`, `weight_decay`.

    Raises:
        ValueError: Muon is asked for and this torch has none.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        betas, muonic = (config.beta1, config.beta2), config.optimizer == "muon"
        matrices, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in parameters:
            inside = parameter.ndim == 2 and name.rsplit(".", 1)[-1] not in _ENDS
            (matrices if muonic and inside else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, config.learning_rate, betas, weight_decay=config.weight_decay, fused=True)
        ]
        if matrices:
            muon: Any = getattr(torch.optim, "Muon", None)
            if muon is None:
                raise ValueError(f"optimizer='muon' needs torch 2.9 or newer, this is {torch.__version__}: use 'adamw'")
            rate, decay = config.learning_rate, config.weight_decay
            self.parts.append(muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, learning_rate: float) -> None:
        """Apply the gradients and forget them."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad()
