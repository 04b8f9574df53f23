"""The mark `one_of_each`: every value of every parameter is in the default suite."""

from __future__ import annotations

from itertools import product

import pytest
from conftest import on_diagonal


@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 3), (2, 7), (3, 3, 7), (2, 2, 2), (6, 3, 2), (4, 4, 4)])
def test_every_value_is_met_by_the_fewest_combinations(sizes: tuple[int, ...]) -> None:
    counts = {f"p{i}": size for i, size in enumerate(sizes)}
    every = [dict(zip(counts, chosen, strict=True)) for chosen in product(*map(range, sizes))]
    taken = [chosen for chosen in every if on_diagonal(chosen, counts)]
    assert len(taken) == max(sizes)
    assert all({chosen[name] for chosen in taken} == set(range(size)) for name, size in counts.items())


def test_values_of_equally_many_kinds_do_not_always_go_together() -> None:
    counts = {"name": 9, "cost": 3, "law": 3}
    every = [dict(zip(counts, chosen, strict=True)) for chosen in product(range(9), range(3), range(3))]
    taken = [chosen for chosen in every if on_diagonal(chosen, counts)]
    assert len({(chosen["cost"], chosen["law"]) for chosen in taken}) == 9


@pytest.mark.parametrize("letter", "abcd")
@pytest.mark.parametrize("number", [10**6, 10**7])
@pytest.mark.one_of_each
def test_the_default_suite_takes_a_diagonal(request: pytest.FixtureRequest, letter: str, number: int) -> None:
    name = request.node.originalname
    alike = [item for item in request.session.items if getattr(item, "originalname", None) == name]
    fast = [vars(getattr(item, "callspec"))["params"] for item in alike if not item.get_closest_marker("slow")]  # noqa: B009
    assert len(fast) <= 4
    if len(fast) > 1:  # else only this one was asked for
        assert {each["letter"] for each in fast} == set("abcd") and {each["number"] for each in fast} == {10**6, 10**7}
    assert {"letter": letter, "number": number} in fast or request.node.get_closest_marker("slow")
