"""The alarm's checks: a healthy run has nothing suspect, and each planted cause is found by its own check alone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import tiny_target
from rich.console import Console

from haast.training.batches import Example, pack
from haast.training.data import TokenSequence
from haast.training.diagnostics import diagnose
from haast.training.features import stream_examples
from haast.training.losses import teacher_loss
from haast.training.report import findings_table
from haast.training.target_weights import TargetWeights, choose_draft_vocab

VOCAB, OPENING = 64, [3, 1, 4]
CHECKS = {"features", "mask", "answers", "draft vocabulary", "learning", "engine", "template"}
Evidence = dict[str, Any]  # the arguments of `diagnose`


def made(first: int) -> list[Example]:
    """Sequences that all begin with OPENING, as a chat template makes them, supervised from token `first` on."""
    draws = torch.Generator().manual_seed(2)
    tokens = [OPENING + torch.randint(VOCAB, (13 + i % 4,), generator=draws).tolist() for i in range(80)]
    sequences = [TokenSequence(t, [False] * first + [True] * (len(t) - first)) for t in tokens]
    return [example for _, example in sorted(stream_examples(tiny_target(vocab=VOCAB), sequences, topk=8))]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return made(6)


@pytest.fixture
def healthy(examples: list[Example]) -> Evidence:
    return {
        "examples": examples,
        "target_weights": TargetWeights.of(tiny_target(vocab=VOCAB)),
        "draft_vocab": choose_draft_vocab(examples, VOCAB, 60),
        "values": {"tau": 1.02, "valid_ce": 0.9, "valid_top1": 0.1},
        "records": [{"id": str(i), "model": "tiny"} for i in range(80)],
        "prompts": [[*OPENING, 9, 9], [*OPENING, 8]],
        "model": "tiny",
    }


def suspects(evidence: Evidence) -> dict[str, str]:
    return {f.check: f"{f.text}; {f.remedy}" for f in diagnose(**evidence) if f.state == "suspect"}


def test_a_healthy_run_has_nothing_suspect(healthy: Evidence) -> None:
    assert suspects(healthy) == {}
    assert {finding.check for finding in diagnose(**healthy)} == CHECKS


def shifted(evidence: Evidence) -> Evidence:
    """Every feature stands one position too late."""
    return {"examples": [replace(e, features=e.features.roll(1, 0)) for e in evidence["examples"]]}


def other_layer(evidence: Evidence) -> Evidence:
    draws = torch.Generator().manual_seed(3)
    features = [torch.randn(e.features.shape, generator=draws).half() for e in evidence["examples"]]
    return {"examples": [replace(e, features=f) for e, f in zip(evidence["examples"], features, strict=True)]}


def supervised_whole(evidence: Evidence) -> Evidence:
    return {"examples": [*evidence["examples"][:3], *made(0)[3:]]}


def hardly_supervised(evidence: Evidence) -> Evidence:
    first, *others = evidence["examples"]
    return {"examples": [first, *(replace(e, supervised=torch.zeros_like(e.supervised)) for e in others)]}


def record_field(name: str, value: Any) -> Callable[[Evidence], Evidence]:
    return lambda evidence: {"records": [r | ({name: value} if r["id"] > "5" else {}) for r in evidence["records"]]}


def values(**changes: float) -> Callable[[Evidence], Evidence]:
    return lambda evidence: {"values": evidence["values"] | changes}


@pytest.mark.parametrize(
    ("plant", "check", "words"),
    [
        (shifted, "features", r"at \d+% of positions.*extract them again"),
        (other_layer, "features", r"at \d+% of positions"),
        (supervised_whole, "mask", "61 of 64 sequences from their first token on.*--show-data"),
        (hardly_supervised, "mask", r"[01]\.\d% of tokens are supervised; 0 of 64"),
        (record_field("model", "other-7b"), "answers", r"34 of 80 are from another model \(other-7b\), 0 were"),
        (record_field("retokenised", True), "answers", "0 of 80 are from another model, 34 were tokenised"),
        (values(valid_ce=3.9), "learning", r"is 3.90, that of a uniform head 3\.\d\d.*learning_rate"),
        (values(valid_ce=float("nan")), "learning", "is nan"),
        (values(valid_top1=0.55), "engine", "agreement is 55%, tau 1.02; tau should be about 1.6 or more"),
        (lambda _: {"prompts": [[1, *OPENING, 9], [1, *OPENING]]}, "template", r"0 of 2 .* 3 tokens that begin all"),
    ],
)
def test_each_planted_cause_is_found(
    healthy: Evidence, plant: Callable[[Evidence], Evidence], check: str, words: str
) -> None:
    found = suspects(healthy | plant(healthy))
    assert set(found) == {check}
    assert re.search(words, found[check]), found[check]


def test_chance_is_what_a_uniform_head_comes_to(healthy: Evidence) -> None:
    """By the loss that is trained, over the teacher's stored mass: less than ln(vocabulary)."""
    batch = pack(healthy["examples"][:64])
    uniform = torch.zeros(batch.supervised_count, 2)
    ce = (
        teacher_loss(uniform, torch.zeros(VOCAB, 2), batch.teacher_ids, batch.teacher_probs).ce / batch.supervised_count
    )
    every = healthy | {"draft_vocab": torch.arange(VOCAB), "values": {"tau": 1.0, "valid_ce": float(ce)}}
    assert f"is {float(ce):.2f}, that of a uniform head {float(ce):.2f}" in suspects(every)["learning"]


def test_a_narrow_draft_vocabulary_is_found(healthy: Evidence) -> None:
    rare = healthy | {"draft_vocab": torch.arange(4)}
    assert "its 4 tokens cover" in suspects(rare)["draft vocabulary"]


def test_checks_without_evidence_are_left_out(healthy: Evidence) -> None:
    bare = healthy | {"values": {"tau": 1.0}, "records": [{"id": "a"}], "prompts": []}
    assert {finding.check for finding in diagnose(**bare)} == {"features", "mask", "draft vocabulary"}
    anyhow = [replace(e, tokens=e.tokens.roll(i)) for i, e in enumerate(healthy["examples"])]
    assert "template" not in {finding.check for finding in diagnose(**(healthy | {"examples": anyhow}))}
    nothing = [replace(e, supervised=torch.zeros_like(e.supervised)) for e in healthy["examples"]]
    found = diagnose(**(healthy | {"examples": nothing}))
    assert not {"features", "draft vocabulary"} & {finding.check for finding in found}
    assert "mask" in suspects(healthy | {"examples": nothing})


def test_the_table_has_suspects_first_with_their_remedy(healthy: Evidence) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(findings_table(diagnose(**(healthy | values(valid_top1=0.5)(healthy)))))
    first, *rest = [
        line for line in map(str.strip, console.export_text().splitlines()) if line.startswith(("suspect", "ok"))
    ]
    assert first.startswith("suspect  engine") and len(rest) == len(CHECKS) - 1
