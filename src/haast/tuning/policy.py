"""Cost model: decides how deep to draft and how many nodes to verify, by expected tokens and measured costs.

A run's speed is a ratio of sums, tokens over time. It is greatest if every step maximises tokens - rate * time, where
rate is that speed (Dinkelbach 1967): so a level, or a node, pays if its expected tokens exceed those that decoding
generates in the same time. Every decision is a function of the prefix only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class CostModel:
    """Costs of a step, and the speed that each node must justify.

    Attributes:
        forward_ms: [n - 1]: ms of a target forward over n nodes of every row.
        level_ms: ms of one more draft level, for all rows.
        rate: tokens per ms of one row, over the whole run.
        trust: accepted tokens per unit of probability that the head assigns to the nodes of its trees.
        follow: probability that the level below a right node has a right node too.
    """

    forward_ms: tuple[float, ...]
    level_ms: float
    rate: float
    trust: float = 1.0
    follow: float = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward_ms", tuple(map(float, self.forward_ms)))
        if len(self.forward_ms) < 2:
            raise ValueError(f"forward_ms has {len(self.forward_ms)} entries: give the cost of 1, 2, ... nodes")
        if not all(0 < ms < math.inf for ms in self.forward_ms):
            raise ValueError(f"forward_ms={self.forward_ms} is not allowed: give ms above 0")
        for name in ("level_ms", "rate", "trust", "follow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give a number above 0")

    def deeper(self, frontier: Tensor) -> bool:
        """Whether another level pays below a frontier: (rows, width) log-probabilities of its nodes' paths."""
        expected = self.trust * self.follow * float(frontier.exp().sum(1).mean())
        return expected > self.rate * self.level_ms

    def nodes(self, best: Tensor) -> int:
        """Number of nodes to verify, root included; `best` (rows, n) are log-probabilities of paths, descending.

        1 if no draft is likely enough to pay.
        """
        most = min(len(self.forward_ms), best.shape[1] + 1)
        gain = pad(self.trust * best[:, : most - 1].exp().mean(0).cumsum(0), (1, 0))  # tokens, for 1, 2, ... nodes
        cost = self.rate * torch.tensor(self.forward_ms[:most])
        return 1 + int((gain - cost.to(gain)).argmax())


def interpolate(points: dict[int, float], at: float) -> float:
    """Linear interpolation between measured points; the last segment is extrapolated. ValueError without a point."""
    measured = sorted(points)
    if not measured:
        raise ValueError("there is no measured point")
    if len(measured) == 1 or at <= measured[0]:
        return points[measured[0]]
    right = next((k for k in measured if k >= at), measured[-1])
    left = measured[max(measured.index(right) - 1, 0)]
    return points[left] + (points[right] - points[left]) * (at - left) / (right - left)
