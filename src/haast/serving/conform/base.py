"""Checks, verdicts and outcomes. Owns the functions that end a check with a verdict; knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from haast.serving.conform.subject import Subject


class Verdict(StrEnum):
    """Result of a check; `failed` is true for those that count against the server."""

    PASS = "pass"
    FAIL = "fail"
    SILENT = "silent"  # a field was accepted and ignored
    REFUSED = "refused"  # an error names the field, so the client knows that it is not supported
    NOT_OFFERED = "not offered"  # the path does not exist
    NOT_VISIBLE = "not visible"  # can't be decided from responses

    @property
    def failed(self) -> bool:
        """Whether it counts against the server."""
        return self in (Verdict.FAIL, Verdict.SILENT)


@dataclass(frozen=True)
class Outcome:
    """Result of one check: verdict, a sentence for people, and, if it failed, the last request and response."""

    verdict: Verdict
    detail: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    requests: int = 0


@dataclass(frozen=True)
class Check:
    """One conformance check.

    Args:
        id: its name on the command line and in results.
        rows: rows of the list of known complaints that it covers (A1 to A20); empty for checks of the protocol.
        asks: the property that must hold, as one sentence.
        run: sends the requests; returns a sentence if the check passes, and else calls `fail` or a similar function.
    """

    id: str
    rows: tuple[str, ...]
    asks: str
    run: Callable[[Subject], str]


@dataclass(frozen=True)
class Theme:
    """A group of checks, in the order in which they run."""

    name: str
    checks: tuple[Check, ...]


class EndedError(Exception):
    """Ends a check early with its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.detail)
        self.outcome = outcome


def fail(detail: str, **evidence: Any) -> NoReturn:
    """End the check: the server violates the property."""
    raise EndedError(Outcome(Verdict.FAIL, detail, evidence))


def silent(detail: str, **evidence: Any) -> NoReturn:
    """End the check: the server accepted a field and ignored it."""
    raise EndedError(Outcome(Verdict.SILENT, detail, evidence))


def refused(detail: str) -> NoReturn:
    """End the check: the server reports that it does not support this."""
    raise EndedError(Outcome(Verdict.REFUSED, detail))


def not_offered(detail: str) -> NoReturn:
    """End the check: the path does not exist."""
    raise EndedError(Outcome(Verdict.NOT_OFFERED, detail))


def not_visible(detail: str) -> NoReturn:
    """End the check: the responses do not decide it."""
    raise EndedError(Outcome(Verdict.NOT_VISIBLE, detail))


def demand(condition: object, detail: str, **evidence: Any) -> None:
    """Fail the check unless the condition is true."""
    if not condition:
        fail(detail, **evidence)


def short(text: object, most: int = 60) -> str:
    """The text's repr, cut to `most` characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= most else f"{quoted[: most - 4]}...{quoted[0]}"


def difference(expected: str, got: str) -> str:
    """Describe where two texts differ, for people."""
    shared = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), -1)
    shared = min(len(expected), len(got)) if shared < 0 else shared
    return f"from character {shared} {short(got[shared:], 40)} instead of {short(expected[shared:], 40)}"
