"""The online correction: bounded, a function of the counts, and it finds the factor by which a curve is off."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from haast.tuning.correction import Correction

STEPS = st.lists(st.tuples(st.floats(0, 9), st.integers(0, 9)), max_size=60)


@given(STEPS)
def test_bounded_and_repeatable(steps: list[tuple[float, int]]) -> None:
    one, other = Correction(), Correction()
    for expected, accepted in steps:
        one.observe(expected, accepted)
        other.observe(expected, accepted)
        assert math.log(0.5) <= one.shift <= math.log(2)
    assert one.shift == other.shift


def test_it_finds_the_factor_and_forgets_it() -> None:
    correction = Correction()
    assert correction.shift == 0
    for _ in range(200):  # half as many as the curve says, whatever the present factor
        correction.observe(3 * math.exp(correction.shift), 2)
    assert abs(math.exp(correction.shift) - 2 / 3) < 0.05
    for _ in range(200):
        correction.observe(3 * math.exp(correction.shift), 3)
    assert abs(correction.shift) < 0.02
