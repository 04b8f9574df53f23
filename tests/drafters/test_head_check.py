"""A head that hardly drafts is told, once, early and with likely causes; a good one never is; `diagnose` digs."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from fakes import decode, random_head, tiny_target
from test_formats import _by_heart

from haast.core import Accepted, RowVerdict, SamplingParams, Verdict
from haast.drafters.factory import head_drafter
from haast.drafters.head_check import STEPS, HeadWatch, causes, diagnose, expected_first
from haast.drafters.tree_shape import DraftShape
from haast.errors import HeadWarning
from haast.formats import probe
from haast.formats.opened import open_head
from haast.heads.checkpoint import Head
from haast.target.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=8, std=0.3)


@pytest.fixture(scope="module")
def by_heart(target: Target) -> Head:
    texts = probe.own_text(target, range(target.layers + 1))
    return _by_heart(target, others.eagle3(target, None), texts)


def kept(*nodes: int | None) -> Accepted:
    """A step whose rows accepted this node below their roots; None is none."""
    rows = [RowVerdict((0,) if node is None else (0, node), (7,) if node is None else (5, 7), ()) for node in nodes]
    tokens, counts = torch.zeros(len(rows), 2, dtype=torch.long), torch.tensor([len(row.path) for row in rows])
    return Accepted(tokens, torch.zeros(len(rows), 2, 4), counts, verdict=Verdict.of_rows(rows, torch.device("cpu")))


def told(rate: float, seed: int, about: dict[str, Any] | None = None) -> tuple[int, int]:
    """Warnings of a head whose first drafts are accepted at this rate, and after how many steps it was sure."""
    watch, chance = HeadWatch(about or {}, lambda: ["because"]), random.Random(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while not watch.over:
            watch.proposed(3)
            watch.observed(kept(2 if chance.random() < rate else None))
        steps = watch.steps
        for _ in range(10):
            watch.proposed(3)
            watch.observed(kept(None))
    assert watch.steps == steps, "nothing is counted any more"
    return len(caught), steps


def test_noise_is_told_within_200_drafted_tokens_and_good_heads_never_are() -> None:
    noise = [told(0.02, seed) for seed in range(200)]
    assert sum(count for count, _ in noise) >= 199 and all(count <= 1 for count, _ in noise)
    assert sorted(steps for _, steps in noise)[190] * 5 <= 200  # trees of six nodes, the default: five drafts a step
    for rate in (0.4, 0.55, 0.8):
        assert sum(told(rate, seed)[0] for seed in range(200)) == 0


def test_what_files_say_is_what_is_expected() -> None:
    assert expected_first({}) is None and expected_first({"expected": {"first": 0.7}}) == 0.7
    strong = {"expected": {"first": 0.9}}
    assert sum(told(0.2, seed, strong)[0] for seed in range(100)) > 90  # far below what its files say
    assert sum(told(0.2, seed, {"expected": {"first": 0.3}})[0] for seed in range(100)) < 5  # as it should be


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_head_of_another_target_is_told_while_it_drafts(target: Target, by_heart: Head, temperature: float) -> None:
    other = tiny_target(layers=8, std=0.3, seed=7)  # the same shape, other weights
    shape = DraftShape(nodes=4, depth=2, top_k=2, width=2)
    for of, count in ((other, 1), (target, 0)):
        about = {"target": "someone/one", "expected": {"first": 0.95}}
        head = Head(type(by_heart.module)(by_heart.module.config), None, about)  # type: ignore[arg-type]
        head.module.load_state_dict(by_heart.module.state_dict())
        drafter = head_drafter(of, head, shape)
        prompts = probe._prompts(of)[:4]
        sampling = [SamplingParams(temperature=temperature, top_k=1 if of is target else 0, seed=i) for i in range(4)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            decode(of, drafter, prompts, 48, sampling)
        said = [str(each.message) for each in caught if each.category is HeadWarning]
        assert len(said) == count, said
        for words in said:
            assert "haast check" in words and "target (trained for someone/one" in words and "layer ids" in words


def test_only_the_heads_own_drafts_are_counted() -> None:
    watch = HeadWatch({}, list)
    for _ in range(STEPS):
        watch.observed(kept(1, 2))  # nothing was proposed
        watch.proposed(1)
        watch.observed(kept(1, 2))  # a match of the text, without the head
    assert watch.steps == 0
    watch.proposed(3)
    watch.observed(kept(1, 3, None))  # node 3 came from a match: the head's own are 1 and 2
    assert (watch.steps, watch.accepted) == (3, 1)


def test_causes_are_sorted_by_what_looks_wrong(target: Target) -> None:
    config = others.eagle3(target, ids=(1, 4, 6)).module.config
    likely, right = causes(target, config, {"target": "a/b", "precision": "int8"}, "a/b")
    assert "layer ids [1, 4, 6] (usual are [2, 4, 5])" in likely and "trained on int8, this is float64" in likely
    assert "target (trained for a/b" in right and "rope scaling" in right


def test_diagnosis(target: Target, by_heart: Head, tmp_path: Path) -> None:
    good = diagnose(target, by_heart, "tiny")
    assert good.fine and "fits this target" in good.verdict and good.document()["first"] > 0.8
    wrong = open_head(others.official_eagle3(tmp_path, by_heart, target, eagle_aux_hidden_state_layer_ids=[3, 5, 6]))
    found = diagnose(target, wrong, "tiny")
    assert not found.fine and "with other conventions" in found.verdict
    bad = diagnose(target, random_head(target), "tiny")
    assert not bad.fine and "rarely right" in bad.verdict and any("likely" in line for line in bad.findings)


def test_a_foreign_head_that_was_measured_to_draft_nothing_is_told(tmp_path: Path) -> None:
    target = tiny_target(layers=8, std=0.3)
    found = open_head(others.speculators(tmp_path, others.eagle3(target), target))
    with pytest.warns(HeadWarning, match="the text stays the target's own"):
        decode(target, head_drafter(target, found), [[1, 2, 3]], 120)
