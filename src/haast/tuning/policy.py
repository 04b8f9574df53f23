"""How far to draft and how much to verify: what a step may cost for the tokens that it can bring.

A run's speed is a ratio of sums, tokens over time. It is greatest where every step maximises tokens - rate * time, rate
being the speed itself (Dinkelbach 1967): so a level, or a node, pays if it is expected to bring more tokens than the
machine makes in the time that it takes. Every decision is a function of the prefix alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class CostModel:
    """What steps cost here, and the speed that they have to keep up.

    Attributes:
        forward_ms: [n - 1] is a target forward over n nodes of every row.
        level_ms: one more level of drafting, for all rows.
        rate: tokens per ms that a row makes as a whole.
        trust: accepted tokens per unit of probability that the head gives to the nodes of its trees.
        follow: chance that a level below a right node holds a right node too.
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
            raise ValueError(f"forward_ms={self.forward_ms} is not allowed: give numbers of ms above 0")
        for name in ("level_ms", "rate", "trust", "follow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give a number above 0")

    def deeper(self, frontier: Tensor) -> bool:
        """Whether another level pays below these nodes: `frontier` (rows, width) log-probabilities of their paths."""
        expected = self.trust * self.follow * float(frontier.exp().sum(1).mean())
        return expected > self.rate * self.level_ms

    def nodes(self, best: Tensor) -> int:
        """How many nodes to verify, root included; `best` (rows, n) are log-probabilities of paths, descending.

        1 where no draft is likely enough to be worth its place.
        """
        most = min(len(self.forward_ms), best.shape[1] + 1)
        gained = pad(self.trust * best[:, : most - 1].exp().mean(0).cumsum(0), (1, 0))  # by 1, 2, ... nodes
        spent = self.rate * torch.tensor(self.forward_ms[:most])
        return 1 + int((gained - spent.to(gained)).argmax())

    def affords(self, nodes: int, more: int, tokens: float) -> bool:
        """Whether `more` nodes of every row pay beside `nodes`, if a row is expected to gain `tokens` by them."""
        points = dict(enumerate(self.forward_ms, start=1))
        return tokens > self.rate * (interpolate(points, nodes + more) - interpolate(points, nodes))


def interpolate(points: dict[int, float], at: float) -> float:
    """The straight line between measured points; beyond the last, its slope goes on."""
    known = sorted(points)
    if not known:
        raise ValueError("there is no measured point")
    if len(known) == 1 or at <= known[0]:
        return points[known[0]]
    right = next((k for k in known if k >= at), known[-1])
    left = known[max(known.index(right) - 1, 0)]
    return points[left] + (points[right] - points[left]) * (at - left) / (right - left)
