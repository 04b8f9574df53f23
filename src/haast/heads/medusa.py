"""MedusaHeads: several heads that each predict a token further ahead (Medusa, arXiv 2401.10774, section 3.1).

    position          t            t + 1        t + 2        the target's own LM head on f_t predicts x_{t+1};
    token             x_t          x_{t+1}      x_{t+2}      head i on f_t predicts x_{t+2+i}, i = 0, 1, ...,
    feature           f_t                                    without the tokens between

All blocks and heads have their own weights. Tensor names are the official ones: `{i}.{j}.linear.weight` and `.bias` for
block j of head i, `{i}.{blocks}.weight` for its LM head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from haast.heads.config import HeadSizes


@dataclass(frozen=True)
class MedusaConfig(HeadSizes):
    """Sizes of MedusaHeads: `heads` heads, each with `blocks` residual blocks and its own LM head."""

    heads: int = 3
    blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("heads", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed for Medusa heads: give 1 or more")

    @classmethod
    def for_target(cls, config: PretrainedConfig, heads: int, blocks: int) -> Self:
        """Sizes for the target with this (text) configuration."""
        return cls(int(config.hidden_size), int(config.vocab_size), heads, blocks)


class MedusaBlock(nn.Module):
    """x + SiLU(W x + b). Initialised as the identity, with W and b zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return states + functional.silu(self.linear(states))


class MedusaHeads(nn.ModuleList):
    """Head i is `self[i]`: its blocks, then its LM head over `draft_vocab_size` tokens (None: the whole vocabulary)."""

    def __init__(self, config: MedusaConfig, draft_vocab_size: int | None = None) -> None:
        vocab = config.vocab_size if draft_vocab_size is None else draft_vocab_size
        super().__init__(
            nn.Sequential(
                *(MedusaBlock(config.hidden_size) for _ in range(config.blocks)),
                nn.Linear(config.hidden_size, vocab, bias=False),
            )
            for _ in range(config.heads)
        )
        self.config = config

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., hidden) -> logits (heads, ..., draft vocabulary)."""
        return torch.stack([head(features) for head in self])
