"""How sure a ratio of speeds is: the percentile bootstrap over prompts. Owns the resampling; knows no decoders.

The prompts are the sample (another run of the same prompts says nothing of other prompts), so prompts are drawn with
replacement, all decoders with the same draw since they answered the same prompts. Several suites are strata: each is
drawn from within itself and keeps its size. Source: Efron and Tibshirani, "An Introduction to the Bootstrap", ch. 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bootstrap:
    """How often prompts are drawn, by which seed, and the share of the draws that an interval holds."""

    samples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seed < 0 or not 0 < self.level < 1:
            raise ValueError(f"{self} is not allowed: give 1 sample or more, a seed from 0 on, a level within 0 and 1")

    def draws(self, strata: Sequence[int]) -> NDArray[np.int64]:
        """Prompt numbers (samples, prompts); `strata` are the sizes of the suites, one after the other."""
        generator, begin = np.random.default_rng(self.seed), 0
        parts = []
        for size in strata:
            parts.append(begin + generator.integers(size, size=(self.samples, size)))
            begin += size
        return np.concatenate(parts, axis=1)

    def interval(self, values: NDArray[np.float64]) -> tuple[float, float] | None:
        """The middle `level` of the values (samples,); None where one of them is no number."""
        if not np.isfinite(values).all():
            return None
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def rates(tokens: Sequence[int], ms: Sequence[float], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens a second (samples,) of every draw: all its tokens over all its time; nan where it took none.

    Args:
        tokens: per prompt.
        ms: per prompt.
        draws: prompt numbers (samples, prompts).
    """
    counts, times = (np.asarray(values, dtype=np.float64)[draws].sum(1) for values in (tokens, ms))
    return ratio(1e3 * counts, times)


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """One over the other (samples,); nan or inf where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = numerator / denominator
    return found
