"""How likely drafts are accepted: monotone curves from a source's score to a probability, stored next to a head.

Owns the curves, their fit and the file `acceptance.json`. Scores and probabilities are natural logarithms. A head's
score is the log-probability that it gives to a node's path; a text match's is computed from the length of the match
and from how often each continuation followed it. The fit is isotonic regression by pool-adjacent-violators (Ayer et
al. 1955; for probabilities of classifiers Zadrozny and Elkan 2002), since a higher score never means less acceptance.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from ctypes import c_float
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from haast.errors import HeadMismatchError
from haast.files import write_json

FILE, FORMAT = "acceptance.json", "haast-acceptance-1"
SOURCES = ("head", "text")
_LEAST_STEP = 1e-3  # between the scores of two knots
_BINS = 24  # before neighbours that are not monotone are joined


def _single(number: float) -> float:
    """The nearest number of single precision. Raises ValueError if there is none."""
    try:
        return c_float(float(number)).value
    except OverflowError as error:
        raise ValueError(f"a number with {len(str(number))} digits is too large") from error


@dataclass(frozen=True)
class Curve:
    """A non-decreasing, piecewise linear map of log-scores (at most 0) to log-probabilities of acceptance.

    Below the first knot the ratio of probability and score is that of the first knot; above the last one the
    probability is that of the last knot. Without knots, or with one at (0, 0), a score is its own log-probability.

    Raises ValueError if the knots do not ascend, or a probability is above 1 or not finite.
    """

    scores: tuple[float, ...] = (0.0,)
    chances: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        # Trees are drafted with single precision, so the knots must differ and be finite there.
        object.__setattr__(self, "scores", tuple(map(_single, self.scores)))
        object.__setattr__(self, "chances", tuple(map(_single, self.chances)))
        ascending = all(a < b for a, b in pairwise(self.scores)) and all(a <= b for a, b in pairwise(self.chances))
        finite = all(map(math.isfinite, (*self.scores, *self.chances)))
        if not (self.scores and len(self.scores) == len(self.chances) and ascending and finite):
            raise ValueError(f"the curve {self.scores} -> {self.chances} is not finite and ascending in both")
        if self.chances[-1] > 0:
            raise ValueError(f"the curve ends at the log-probability {self.chances[-1]}: it must be 0 or below")

    def __call__(self, score: float) -> float:
        """The log-probability of acceptance at a log-score."""
        place = bisect_right(self.scores, score)
        if place == 0:
            return self.chances[0] + min(score - self.scores[0], 0.0)
        if place == len(self.scores):
            return self.chances[-1]
        left, right = self.scores[place - 1], self.scores[place]
        low, high = self.chances[place - 1], self.chances[place]
        return min(low + (high - low) * (score - left) / (right - left), high)  # rounding must not reorder scores

    def apply(self, scores: Tensor) -> Tensor:
        """The log-probabilities for a tensor of log-scores, of any shape; -inf stays -inf."""
        below = self.chances[0] + (scores - self.scores[0]).clamp_max(0.0)
        for left, right, low, high in zip(self.scores, self.scores[1:], self.chances, self.chances[1:], strict=False):
            below = below + (high - low) * ((scores - left) / (right - left)).clamp(0.0, 1.0)
        return below


@dataclass(frozen=True)
class Source:
    """The curves of one source: of greedy texts, and of texts sampled at temperature 1."""

    greedy: Curve = Curve()
    sampled: Curve = Curve()

    def at(self, score: float, warmth: float) -> float:
        """The log-probability at a log-score, where the sampled curve has the share `warmth` (0 to 1)."""
        if warmth == 0:
            return self.greedy(score)
        if warmth == 1:
            return self.sampled(score)
        return (1 - warmth) * self.greedy(score) + warmth * self.sampled(score)


@dataclass(frozen=True)
class Acceptance:
    """The curves of a head's drafts and of copies from the text, and how they were measured."""

    head: Source = Source()
    text: Source = Source()
    about: dict[str, Any] | None = None


def fit(scores: Sequence[float], right: Sequence[bool], weight: float = 1.0) -> Curve:
    """The isotonic curve of observed nodes: their log-scores, and whether each was accepted.

    `weight` is the number of imaginary nodes per bin that were accepted as often as their score says, so that no
    probability is 0 or 1. Raises ValueError without nodes.
    """
    if not scores:
        raise ValueError("there are no nodes to fit a curve to: give longer texts, or more of them")
    blocks = list[list[float]]()  # sum of scores, accepted, nodes
    for part in _bins(sorted(zip(scores, right, strict=True))):
        middle = sum(score for score, _ in part) / len(part)
        count = len(part) + weight
        blocks.append([middle * count, sum(ok for _, ok in part) + weight * math.exp(middle), count])
        while len(blocks) > 1 and not _ascend(*blocks[-2:]):
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    knots = sorted((total / nodes, min(math.log(accepted / nodes), 0.0)) for total, accepted, nodes in blocks)
    return Curve(tuple(score for score, _ in knots), tuple(chance for _, chance in knots))


def _ascend(lower: Sequence[float], upper: Sequence[float]) -> bool:
    """Whether two neighbouring blocks differ in their mean scores and ascend in acceptance."""
    apart = upper[0] / upper[2] - lower[0] / lower[2] > _LEAST_STEP
    return apart and lower[1] / lower[2] < upper[1] / upper[2]


def _bins(nodes: Sequence[tuple[float, bool]]) -> Iterator[Sequence[tuple[float, bool]]]:
    """Sorted nodes in parts of equal expected acceptance: equal numbers would leave few bins for likely nodes."""
    share = sum(math.exp(score) for score, _ in nodes) / _BINS
    start, mass = 0, 0.0
    for end, (score, _) in enumerate(nodes, start=1):
        mass += math.exp(score)
        if mass >= share or end == len(nodes):
            yield nodes[start:end]
            start, mass = end, 0.0


def save(acceptance: Acceptance, folder: Path) -> Path:
    """Write the curves next to a head, atomically; returns the file."""
    curves = {
        name: {kind: vars(getattr(getattr(acceptance, name), kind)) for kind in ("greedy", "sampled")}
        for name in SOURCES
    }
    write_json({"format": FORMAT, **curves, "about": acceptance.about}, folder / FILE)
    return folder / FILE


def load(folder: Path) -> Acceptance | None:
    """The curves of a head's folder; None if it has none. Raises HeadMismatchError if the file is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r} is not {FORMAT}")
        sources = {name: Source(*(Curve(**document[name][kind]) for kind in ("greedy", "sampled"))) for name in SOURCES}
        return Acceptance(**sources, about=document.get("about"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise HeadMismatchError(f"{path} is damaged ({error}): fit it again, or remove it") from error
