"""What a check is, and how it ends. Owns verdicts and the words that end a check; knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from haast.serving.conform.subject import Subject


class Verdict(StrEnum):
    """How a check ended; `failed` says which of them count against the server."""

    PASS = "pass"
    FAIL = "fail"
    SILENT = "silent"  # a field was accepted and evidently ignored
    REFUSED = "refused"  # an error that names the field: a client knows where it stands
    NOT_OFFERED = "not offered"  # there is no such address
    NOT_VISIBLE = "not visible"  # nothing that a client sees decides it

    @property
    def failed(self) -> bool:
        """Whether it counts against the server."""
        return self in (Verdict.FAIL, Verdict.SILENT)


@dataclass(frozen=True)
class Outcome:
    """One check's end: the verdict, a sentence for people, and what was sent and received where it failed."""

    verdict: Verdict
    detail: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    requests: int = 0


@dataclass(frozen=True)
class Check:
    """A question to a server.

    Args:
        id: its name on the command line and in results.
        rows: of the list of complaints that it answers to (A1 to A20); empty where it is of the protocol itself.
        asks: what must hold, as one sentence.
        run: asks it; returns the sentence of a pass, and ends otherwise by `fail` and its like.
    """

    id: str
    rows: tuple[str, ...]
    asks: str
    run: Callable[[Subject], str]


@dataclass(frozen=True)
class Theme:
    """Checks that belong together, in the order in which they run."""

    name: str
    checks: tuple[Check, ...]


class EndedError(Exception):
    """A check has come to its end before its last line."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.detail)
        self.outcome = outcome


def fail(detail: str, **evidence: Any) -> NoReturn:
    """End the check: the server does it wrong."""
    raise EndedError(Outcome(Verdict.FAIL, detail, evidence))


def silent(detail: str, **evidence: Any) -> NoReturn:
    """End the check: the server accepted a field and ignored it."""
    raise EndedError(Outcome(Verdict.SILENT, detail, evidence))


def refused(detail: str) -> NoReturn:
    """End the check: the server says itself that it does not do this."""
    raise EndedError(Outcome(Verdict.REFUSED, detail))


def not_offered(detail: str) -> NoReturn:
    """End the check: there is no such address."""
    raise EndedError(Outcome(Verdict.NOT_OFFERED, detail))


def not_visible(detail: str) -> NoReturn:
    """End the check: nothing seen decides it."""
    raise EndedError(Outcome(Verdict.NOT_VISIBLE, detail))


def demand(holds: object, detail: str, **evidence: Any) -> None:
    """Fail unless it holds."""
    if not holds:
        fail(detail, **evidence)


def short(text: object, most: int = 60) -> str:
    """A text as it is quoted in a sentence."""
    quoted = repr(text)
    return quoted if len(quoted) <= most else f"{quoted[: most - 4]}...{quoted[0]}"


def difference(expected: str, got: str) -> str:
    """Where two texts part, for people."""
    shared = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), -1)
    shared = min(len(expected), len(got)) if shared < 0 else shared
    return f"from character {shared} {short(got[shared:], 40)} instead of {short(expected[shared:], 40)}"
