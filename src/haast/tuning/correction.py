"""Corrects a source's calibrated acceptance by what a request accepted: a bounded factor from counts, no clock."""

from __future__ import annotations

import math

_LEAST, _MOST = 0.5, 2.0  # bounds of the factor
_KEEP = 0.97  # decay of the counts per step, so that recent steps count more
_PRIOR = 6.0  # expected and accepted nodes of a new request


class Correction:
    """Accepted nodes over expected ones of one source in one request.

    Equal counts give equal factors, so that a run repeats; draws that are still to come never enter.

    Attributes:
        shift: the natural logarithm of the factor: to be added to log-probabilities, between log 0.5 and log 2.
    """

    __slots__ = ("_accepted", "_expected", "shift")

    def __init__(self) -> None:
        self._expected = self._accepted = _PRIOR
        self.shift = 0.0

    def observe(self, expected: float, accepted: int) -> None:
        """Count a step whose tree was expected to have `expected` accepted nodes of the source; it had `accepted`.

        The expectation includes the present factor, which is taken out here.
        """
        back = (1 - _KEEP) * _PRIOR  # the counts decay to those of a new request, not to 0
        self._expected = _KEEP * self._expected + expected * math.exp(-self.shift) + back
        self._accepted = _KEEP * self._accepted + accepted + back
        self.shift = math.log(min(max(self._accepted / self._expected, _LEAST), _MOST))
