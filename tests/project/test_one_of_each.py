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
