"""Whether a head drafts for its target as it should: watched while it drafts, and examined by `haast check`.

Owns the test on the first steps of a process, the likely causes, and the words of the one warning. Every peer drafts on
with a head that nothing is accepted of; such a head costs time and says nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from haast.core import Accepted
from haast.errors import HeadWarning
from haast.formats.base import Question, Reading
from haast.formats.conventions import common, conventions
from haast.formats.opened import OpenedHead, facts_of, reading_of
from haast.formats.probe import ProbeResult, probe_conventions
from haast.heads.checkpoint import Head
from haast.heads.config import HeadConfig, rope_of
from haast.heads.eagle3 import Eagle3Config
from haast.target.target import Target

_USUAL = 0.55  # of first drafts that are accepted, where a head's files do not say
_FINE, _BAD = 0.5, 0.25  # of what the files say: drafting on other texts may be so bad; only a wrong head is so bad
_EVIDENCE = math.log(100)  # odds for "bad" over "fine" at which it is said
STEPS = 100  # of a process that are watched: some 200 to 500 drafted tokens
_NOTHING = 0.03  # of next tokens: what chance would draft
_HARDLY = 0.15  # of first drafts accepted: whatever the files say


class HeadWatch:
    """Counts whether first drafts are accepted, until that is known well enough. Made for one drafter.

    Wald's sequential test of two rates: what a good head has at worst, and what only a wrong one has.
    """

    def __init__(self, about: dict[str, Any], causes: Callable[[], list[str]]) -> None:
        told = expected_first(about) or _USUAL
        if told < _HARDLY:  # measured when the head was read: it hardly drafts, and that is to be said
            told = _USUAL
        fine, bad = told * _FINE, told * _BAD
        self._hit, self._miss = math.log(bad / fine), math.log((1 - bad) / (1 - fine))
        self._causes, self._told = causes, told
        self.steps = self.accepted = 0
        self._odds, self.over = 0.0, False
        self._nodes = 1

    def proposed(self, nodes: int) -> None:
        """The head's next trees have so many nodes, the roots included; 1 drafts nothing."""
        self._nodes = nodes

    def observed(self, accepted: Accepted) -> None:
        """What a step kept: nodes that others added to the trees come after the head's own. Reads nothing anew."""
        if self.over or self._nodes < 2 or accepted.verdict is None or accepted.tokens.device.type == "meta":
            return
        for row in accepted.verdict.rows:
            if row is not None:
                hit = len(row.path) > 1 and row.path[1] < self._nodes
                self.steps += 1
                self.accepted += hit
                self._odds += self._hit if hit else self._miss
        self._nodes = 1
        self.over = self.steps >= STEPS or self._odds >= _EVIDENCE
        if self._odds >= _EVIDENCE:
            rate = self.accepted / self.steps
            warnings.warn(
                f"the head's first drafts were accepted in {self.accepted} of {self.steps} steps ({rate:.2f}; "
                f"{self._told:.2f} is expected): the text stays the target's own, but drafting brings little. "
                f"{'; '.join(self._causes())}. `haast check HEAD --model TARGET` digs deeper",
                HeadWarning,
                stacklevel=3,
            )


def expected_first(about: dict[str, Any]) -> float | None:
    """How often the first draft is accepted, by what a head's files say; None where they don't."""
    found = about.get("expected")
    first = found.get("first") if isinstance(found, dict) else about.get("valid_top1")
    return float(first) if isinstance(first, int | float) and 0 < first < 1 else None


def causes(target: Target, config: Any, about: dict[str, Any], model: str | None = None) -> list[str]:
    """What may be wrong with a head for this target, the suspicious first, then what was checked and is right."""
    name = model or str(getattr(target.model, "name_or_path", "") or type(target.model).__name__)
    found: list[tuple[bool, str]] = []  # whether it looks right, and the words
    trained, precision = about.get("target"), about.get("precision")
    if isinstance(trained, str):
        mine, theirs = (each.rstrip("/").split("/")[-1].lower() for each in (name, trained))
        found.append(
            (mine.startswith(theirs) or theirs.startswith(mine), f"target (trained for {trained}, this is {name})")
        )
    else:
        found.append((False, "another target or fine-tune (its files do not name one)"))
    if isinstance(precision, str):
        here = target.precision
        found.append((precision == here, f"quantisation (trained on {precision}, this is {here})"))
    if isinstance(config, HeadConfig):
        rope, own = rope_of(target.config), config.rope_parameters or {}
        same = all(rope.get(key) == own.get(key) for key in ("rope_theta", "rope_type", "factor"))
        found.append((same, "rope scaling" if same else f"rope scaling (the head's {own}, the target's {rope})"))
    if isinstance(config, Eagle3Config):
        usual = facts_of(target).default_layers
        found.append((config.layer_ids == usual, f"layer ids {list(config.layer_ids)} (usual are {list(usual)})"))
    if isinstance(config, Eagle3Config) or getattr(config, "own_embedding", False):
        found.append((True, "vocabulary"))  # its own tensors fit the target's
    found.append((False, "prompts without the chat template that it was trained with"))
    wrong, right = ([words for fine, words in found if fine is wanted] for wanted in (False, True))
    return [f"likely: {', '.join(wrong)}", f"looks right: {', '.join(right)}"]


@dataclass(frozen=True)
class Diagnosis:
    """What `haast check` found."""

    settled: ProbeResult
    findings: list[str]
    expected: float | None

    @property
    def fine(self) -> bool:
        """Whether the head drafts as it should, read as its files say."""
        first = self.settled.agreement.first
        return first >= max(_HARDLY, (self.expected or 0.0) * 0.7) and not self.settled.changed

    @property
    def verdict(self) -> str:
        """One line."""
        first, told = self.settled.agreement.first, self.expected
        beside = "" if told is None else f", its files say {told:.2f}"
        if self.settled.changed:
            return f"the head drafts better when it is read otherwise ({first:.2f}{beside}): `haast import` keeps that"
        if self.fine:
            return f"the head drafts for this target ({first:.2f} of next tokens{beside})"
        return f"the head hardly drafts for this target ({first:.2f} of next tokens{beside}): see what is likely above"

    def document(self) -> dict[str, Any]:
        """For --json."""
        tried = [
            {
                "question": e.question,
                "answer": e.answer,
                "first": e.agreement.first,
                "tau": e.agreement.tau,
                "kept": e.kept,
            }
            for e in self.settled.tried
        ]
        found = self.settled.agreement
        return {
            "fine": self.fine,
            "verdict": self.verdict,
            "first": found.first,
            "chain_tau": found.tau,
            "positions": len(found.accepted),
            "expected_first": self.expected,
            "tried": tried,
            "unsure": list(self.settled.unsure),
            "findings": self.findings,
        }


def diagnose(
    target: Target, head: Head | OpenedHead, model: str, say: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Measure a head on the target's own text, each convention both ways. Raises HeadMismatchError."""
    if isinstance(head, OpenedHead):
        fitted, settled = head.fitted(target, report=say)
        if settled is None:
            settled = probe_conventions(target, reading_of(fitted), [], report=say)
        about: dict[str, Any] = {key: value for key, value in fitted.about.items() if key != "expected"}
        config: Any = fitted.module.config
    else:
        reading = reading_of(head)
        settled = probe_conventions(target, reading, _questions(reading, target), report=say)
        about, config = head.about, reading.config
    found = causes(target, config, about, model)
    if settled.agreement.first < _NOTHING:
        found.insert(0, "hardly anything is drafted: the weights may be damaged, untrained or another model's")
    return Diagnosis(settled, found, expected_first(about))


def _questions(reading: Reading, target: Target) -> list[Question]:
    facts, config = facts_of(target), reading.config
    if isinstance(config, Eagle3Config):
        return conventions(config, facts)
    return common(config, facts) if isinstance(config, HeadConfig) else []
