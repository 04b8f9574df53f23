"""Curves of acceptance: monotone, fitted to what was observed, saved and loaded; damaged files are refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haast.errors import HeadMismatchError
from haast.heads.acceptance import FILE, Acceptance, Curve, Source, fit, load, save

NODES = st.lists(st.tuples(st.floats(-9, 0), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=100)
@given(NODES)
def test_every_fit_is_monotone_and_a_probability(nodes: list[tuple[float, bool]]) -> None:
    curve = fit([score for score, _ in nodes], [right for _, right in nodes])
    points = [-12 + place / 8 for place in range(97)]
    values = [curve(point) for point in points]
    assert values == sorted(values) and values[-1] <= 0
    torch.testing.assert_close(curve.apply(torch.tensor(points)), torch.tensor(values), atol=1e-5, rtol=1e-4)


def test_a_fit_recovers_a_distorted_probability() -> None:
    """Nodes are accepted with the square root of what they say; an uncalibrated curve misses that."""
    draw = random.Random(1)
    scores = [math.log(draw.uniform(0.02, 1.0)) for _ in range(20_000)]
    right = [draw.random() < math.exp(score / 2) for score in scores]
    curve = fit(scores, right)
    far = {name: max(abs(math.exp(each(math.log(p))) - p**0.5) for p in (0.15, 0.3, 0.5, 0.9))
           for name, each in {"fitted": curve, "identity": Curve()}.items()}  # fmt: skip
    assert far["fitted"] < 0.04 < 0.2 < far["identity"]


def test_ends_of_a_curve() -> None:
    curve = Curve((-2.0, -1.0), (-1.5, -0.25))
    assert [curve(score) for score in (-4.0, -2.0, -1.5, -1.0, 0.0)] == [-3.5, -1.5, -0.875, -0.25, -0.25]
    assert Curve()(-0.7) == -0.7
    assert curve.apply(torch.tensor([-math.inf])).tolist() == [-math.inf]
    assert Source(Curve(), curve).at(-2.0, 0.5) == -1.75


@pytest.mark.parametrize(
    ("scores", "chances"),
    [((), ()), ((0.0, -1.0), (-2.0, -1.0)), ((-1.0, 0.0), (-1.0, -2.0)), ((0.0,), (0.1,)), ((math.nan,), (0.0,))],
)
def test_impossible_curves_are_refused(scores: tuple[float, ...], chances: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="curve"):
        Curve(scores, chances)
    with pytest.raises(ValueError, match="no nodes"):
        fit([], [])


def test_curves_are_next_to_their_head(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    saved = Acceptance(Source(Curve((-1.0,), (-0.5,))), Source(), {"prompts": 3})
    assert save(saved, tmp_path) == tmp_path / FILE
    assert load(tmp_path) == saved
    document = json.loads((tmp_path / FILE).read_text())
    damages: list[dict[str, Any]] = [{"format": "other"}, {"head": {}}, {"text": {"greedy": {"scores": [0]}}}]
    flat = {"greedy": {"scores": [0.0], "chances": [0.0]}, "sampled": {"scores": [0.0], "chances": [0.0]}}
    damages += [  # beyond single precision, or equal in it
        {"head": flat | {"greedy": {"scores": scores, "chances": [0.0] * len(scores)}}}
        for scores in ([10**400], [-1e300], [-1.0, -1.0 + 1e-12])
    ]
    for damage in damages:
        (tmp_path / FILE).write_text(json.dumps(document | damage))
        with pytest.raises(HeadMismatchError, match="is damaged"):
            load(tmp_path)
