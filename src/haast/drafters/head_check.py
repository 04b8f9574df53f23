"""Detects heads whose drafts are rarely accepted: a warning while drafting, and the diagnosis of `haast check`.

Owns the test on the first steps of a process, the list of likely causes, and the text of the warning. Without it, a
wrong head only costs time: the text stays correct, so nothing shows the fault.
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
from haast.formats.conventions import common, conventions, mtp_conventions
from haast.formats.opened import OpenedHead, facts_of, reading_of
from haast.formats.probe import ProbeResult, probe_conventions
from haast.heads.checkpoint import Head
from haast.heads.config import FusedConfig, HeadConfig, rope_of
from haast.heads.eagle3 import Eagle3Config
from haast.heads.mtp import MtpConfig
from haast.target.target import Target

_DEFAULT_RATE = 0.55  # share of first drafts accepted, if a head's files do not state it
_GOOD, _BAD = 0.5, 0.25  # times the stated rate: the lowest of a good head on other texts; that of a wrong head
_EVIDENCE = math.log(100)  # log odds of "bad" over "good" at which a warning is issued
STEPS = 100  # steps of a process that are watched: about 200 to 500 drafted tokens
_CHANCE_RATE = 0.03  # share of next tokens: about that of random drafts
_MIN_RATE = 0.15  # share of first drafts accepted below which a head is bad, whatever its files state


class HeadWatch:
    """Counts accepted first drafts until the test decides. One per drafter.

    Wald's sequential probability ratio test of two acceptance rates: the lowest of a good head, and a wrong head's.
    """

    def __init__(self, about: dict[str, Any], causes: Callable[[], list[str]]) -> None:
        expected = expected_first(about) or _DEFAULT_RATE
        if expected < _MIN_RATE:  # measured when the head was imported, and too low: it must be reported
            expected = _DEFAULT_RATE
        good, bad = expected * _GOOD, expected * _BAD
        self._hit, self._miss = math.log(bad / good), math.log((1 - bad) / (1 - good))
        self._causes, self._expected = causes, expected
        self.steps = self.accepted = 0
        self._odds, self.over = 0.0, False
        self._nodes = 1

    def proposed(self, nodes: int) -> None:
        """Set the number of nodes of the head's next trees, roots included; 1 is no draft."""
        self._nodes = nodes

    def observed(self, accepted: Accepted) -> None:
        """Count a step. Nodes that others added come after the head's own. Adds no read from the device."""
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
                f"{self._expected:.2f} is expected): the text stays the target's own, but drafting gains little. "
                f"{'; '.join(self._causes())}. Run `haast check HEAD --model TARGET` for a diagnosis",
                HeadWarning,
                stacklevel=3,
            )


def expected_first(about: dict[str, Any]) -> float | None:
    """The acceptance rate of first drafts that a head's files state; None if they do not."""
    expected = about.get("expected")
    first = expected.get("first") if isinstance(expected, dict) else about.get("valid_top1")
    return float(first) if isinstance(first, int | float) and 0 < first < 1 else None


def causes(target: Target, config: Any, about: dict[str, Any], model: str | None = None) -> list[str]:
    """Two lines on a head for this target: what may be wrong, and what was checked and looks right."""
    name = model or str(getattr(target.model, "name_or_path", "") or type(target.model).__name__)
    found: list[tuple[bool, str]] = []  # whether it looks right, and its description
    trained, precision = about.get("target"), about.get("precision")
    if isinstance(trained, str):
        here, expected = (each.rstrip("/").split("/")[-1].lower() for each in (name, trained))
        found.append(
            (here.startswith(expected) or expected.startswith(here), f"target (trained for {trained}, this is {name})")
        )
    else:
        found.append((False, "another target or fine-tune (the head's files name none)"))
    if isinstance(precision, str):
        found.append(
            (precision == target.precision, f"quantisation (trained on {precision}, this is {target.precision})")
        )
    if isinstance(config, HeadConfig):
        rope, head_rope = rope_of(target.config), config.rope_parameters or {}
        same = all(rope.get(key) == head_rope.get(key) for key in ("rope_theta", "rope_type", "factor"))
        found.append((same, "rope scaling" if same else f"rope scaling (the head's {head_rope}, the target's {rope})"))
    if isinstance(config, FusedConfig):
        usual = facts_of(target).default_layers
        found.append((config.layer_ids == usual, f"layer ids {list(config.layer_ids)} (usual are {list(usual)})"))
    if isinstance(config, FusedConfig) or getattr(config, "own_embedding", False):
        found.append((True, "vocabulary"))  # their sizes were compared when the head was loaded
    found.append((False, "prompts without the chat template that it was trained with"))
    wrong, right = ([text for fine, text in found if fine is wanted] for wanted in (False, True))
    return [f"likely: {', '.join(wrong)}", f"looks right: {', '.join(right)}"]


@dataclass(frozen=True)
class Diagnosis:
    """The result of `haast check`."""

    settled: ProbeResult
    findings: list[str]
    expected: float | None

    @property
    def fine(self) -> bool:
        """Whether the head, with the conventions that its files state, drafts about as well as they state."""
        first = self.settled.agreement.first
        return first >= max(_MIN_RATE, (self.expected or 0.0) * 0.7) and not self.settled.changed

    @property
    def verdict(self) -> str:
        """The result in one line."""
        first = self.settled.agreement.first
        expected = "" if self.expected is None else f", expected {self.expected:.2f}"
        if self.settled.changed:
            return (
                f"the head drafts better with other conventions than its files state ({first:.2f} of next "
                f"tokens{expected}): `haast import` saves them"
            )
        if self.fine:
            return f"the head fits this target ({first:.2f} of next tokens{expected})"
        return f"the head's drafts are rarely right ({first:.2f} of next tokens{expected}): see the likely causes above"

    def document(self) -> dict[str, Any]:
        """The result as JSON, for --json."""
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
    """Measure a head on the target's own text, with all alternatives of each convention. Raises HeadMismatchError."""
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
    if settled.agreement.first < _CHANCE_RATE:
        found.insert(0, "almost no draft is right: the weights may be damaged, untrained or another model's")
    return Diagnosis(settled, found, expected_first(about))


def _questions(reading: Reading, target: Target) -> list[Question]:
    facts, config = facts_of(target), reading.config
    if isinstance(config, MtpConfig):
        return mtp_conventions(config)
    if isinstance(config, Eagle3Config):
        return conventions(config, facts)
    return common(config, facts) if isinstance(config, HeadConfig) else []
