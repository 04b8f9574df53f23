"""Runs the checks against a server, in order.

Owns the steps before the first check (is the server there, which model to test), and stops sending requests to a server
that no longer answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from haast.serving.conform import (
    checks_basics,
    checks_counts,
    checks_drafting,
    checks_errors,
    checks_load,
    checks_logprobs,
    checks_sampling,
    checks_stops,
    checks_streaming,
    checks_structured,
    checks_tools,
    checks_unicode,
)
from haast.serving.conform.base import Check, EndedError, Outcome, Theme, Verdict, short
from haast.serving.conform.client import Client, Reply
from haast.serving.conform.subject import Subject
from haast.serving.conform.wire import WireError

# Checks that may bring a server down run last.
THEMES: tuple[Theme, ...] = (
    checks_basics.THEME,
    checks_streaming.THEME,
    checks_counts.THEME,
    checks_stops.THEME,
    checks_unicode.THEME,
    checks_logprobs.THEME,
    checks_sampling.THEME,
    checks_structured.THEME,
    checks_tools.THEME,
    checks_drafting.THEME,
    checks_load.THEME,
    checks_errors.THEME,
)
_CONTEXTS = ("max_model_len", "context_length", "context_window", "n_ctx", "max_context_length")
_GIVE_UP = 3  # checks in a row without an answer after which the server counts as gone
_GONE = Outcome(Verdict.NOT_VISIBLE, "not run: the server no longer answers", {"no answer": True})


def root_of(url: str) -> str:
    """The URL without /v1. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url={url!r} is not an HTTP URL: give one like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def chosen(only: str | None) -> list[tuple[Theme, Check]]:
    """The checks with the given themes, rows or names, comma-separated; all for None. Raises ValueError."""
    every = [(theme, check) for theme in THEMES for check in theme.checks]
    if only is None:
        return every
    names = {word.strip() for word in only.split(",") if word.strip()}
    known = {name for theme, check in every for name in (theme.name, check.id, *check.rows)}
    unknown = sorted(names - known)
    if unknown or not names:
        themes = ", ".join(theme.name for theme in THEMES)
        raise ValueError(
            f"only={only!r}: there is no check {', '.join(unknown)}: give a row, a name or a theme of {themes}"
        )
    return [(theme, check) for theme, check in every if names & {theme.name, check.id, *check.rows}]


def subject_at(client: Client, root: str, model: str | None, context: int | None = None) -> Subject:
    """Connect to a server and choose the model to test.

    Args:
        client: for requests to the server.
        root: the server's URL, for messages.
        model: the model to test; None for the only one that the server lists.
        context: the model's context length in tokens, if the server does not report it.

    Raises:
        ValueError: no server answers, the key is wrong, or several models are listed and `model` is None.
    """
    try:
        reply = client.get("/v1/models")
    except WireError as error:
        raise ValueError(f"no server answers at {root} ({error}): start it, or correct the URL") from error
    if reply.status in (401, 403):
        raise ValueError(f"{root} refuses the key (HTTP {reply.status}): give it with --api-key-file")
    listed = _listed(reply)
    if model is None and len(listed) != 1:
        names = ", ".join(short(name) for name in list(listed)[:5]) or "none"
        raise ValueError(f"{root} lists {len(listed)} models ({names}): name one with --model")
    name = model if model is not None else next(iter(listed))
    entry = listed.get(name, {})
    owner = entry.get("owned_by")
    return Subject(client, name, context or _context(entry), owner if isinstance(owner, str) else "")


def _listed(reply: Reply) -> dict[str, dict[str, object]]:
    data = reply.body.get("data") if isinstance(reply.body, dict) else None
    entries = [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
    return {each["id"]: each for each in entries if isinstance(each.get("id"), str)}


def _context(entry: dict[str, object]) -> int | None:
    """The context length that the server reports, under any of the usual names."""
    meta = entry.get("meta")
    for place in (entry, meta if isinstance(meta, dict) else {}):
        for name in _CONTEXTS:
            value = place.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def run(
    subject: Subject, checks: Sequence[tuple[Theme, Check]], report: Callable[[Theme, Check, Outcome], None]
) -> dict[str, Outcome]:
    """Run the checks one after the other; calls `report` after each. Returns outcomes by check id."""
    outcomes, unanswered = dict[str, Outcome](), 0
    for theme, check in checks:
        # After _GIVE_UP checks without an answer, the others do not count against the server: they were not run.
        outcome = judged(subject, check) if unanswered < _GIVE_UP else _GONE
        unanswered = unanswered + 1 if outcome.evidence.get("no answer") else 0
        outcomes[check.id] = outcome
        report(theme, check, outcome)
    return outcomes


def judged(subject: Subject, check: Check) -> Outcome:
    """Run one check. The outcome of a failed one has the last request and response as evidence."""
    client = subject.client
    began, before = client.wire.clock(), client.requests
    try:
        outcome = Outcome(Verdict.PASS, check.run(subject))
    except EndedError as error:
        outcome = error.outcome
    except WireError as error:
        outcome = Outcome(Verdict.FAIL, str(error), {"no answer": True})
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        outcome = Outcome(
            Verdict.FAIL, f"the answer does not have the structure that clients read ({type(error).__name__}: {error})"
        )
    evidence = dict(outcome.evidence)
    if outcome.verdict.failed:
        evidence |= {"sent": client.last.sent, "got": client.last.got}
    seconds = client.wire.clock() - began
    return replace(outcome, evidence=evidence, seconds=round(seconds, 3), requests=client.requests - before)
