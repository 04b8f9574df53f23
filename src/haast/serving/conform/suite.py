"""All checks in their order, and how a server is put to them.

Owns what is known before the first check (the model, whether anybody answers at all) and what a lost server means.
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

# What may hurt a server comes late, so that the rest is judged before.
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
_GIVE_UP = 3  # silences in a row after which the server is taken to be gone
_GONE = Outcome(Verdict.NOT_VISIBLE, "not asked: the server no longer answers", {"no answer": True})


def root_of(url: str) -> str:
    """The address below which /v1 lies. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url={url!r} is no address: give one like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def chosen(only: str | None) -> list[tuple[Theme, Check]]:
    """The checks of the themes, rows and names in a list with commas; all for None. Raises ValueError."""
    every = [(theme, check) for theme in THEMES for check in theme.checks]
    if only is None:
        return every
    wanted = {word.strip() for word in only.split(",") if word.strip()}
    known = {name for theme, check in every for name in (theme.name, check.id, *check.rows)}
    unknown = sorted(wanted - known)
    if unknown or not wanted:
        themes = ", ".join(theme.name for theme in THEMES)
        raise ValueError(
            f"only={only!r}: there is no check {', '.join(unknown)}; give a row, a name or one of {themes}"
        )
    return [(theme, check) for theme, check in every if wanted & {theme.name, check.id, *check.rows}]


def subject_at(client: Client, root: str, model: str | None, context: int | None = None) -> Subject:
    """The server at the other end, and which of its models is asked.

    Raises:
        ValueError: nobody answers, the key is wrong, or the model must be named.
    """
    try:
        reply = client.get("/v1/models")
    except WireError as error:
        raise ValueError(f"no server answers at {root} ({error}): start it, or correct the address") from error
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
    """The context's size, under whichever name a server tells it."""
    meta = entry.get("meta")
    for place in (entry, meta if isinstance(meta, dict) else {}):
        for name in _CONTEXTS:
            value = place.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


def run(
    subject: Subject, checks: Sequence[tuple[Theme, Check]], tell: Callable[[Theme, Check, Outcome], None]
) -> dict[str, Outcome]:
    """Put the server to the checks, one after the other; `tell` hears of each at once."""
    outcomes, silences = dict[str, Outcome](), 0
    for theme, check in checks:
        # Only the checks that met the silence count against the server: nothing was seen of the others.
        outcome = judged(subject, check) if silences < _GIVE_UP else _GONE
        silences = silences + 1 if outcome.evidence.get("no answer") else 0
        outcomes[check.id] = outcome
        tell(theme, check, outcome)
    return outcomes


def judged(subject: Subject, check: Check) -> Outcome:
    """One check's outcome, with what was sent and received where it failed."""
    client = subject.client
    began, before = client.wire.clock(), client.requests
    try:
        outcome = Outcome(Verdict.PASS, check.run(subject))
    except EndedError as error:
        outcome = error.outcome
    except WireError as error:
        outcome = Outcome(Verdict.FAIL, str(error), {"no answer": True})
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:  # an answer of another shape than any client reads
        outcome = Outcome(
            Verdict.FAIL, f"the answer has another shape than clients read ({type(error).__name__}: {error})"
        )
    evidence = dict(outcome.evidence)
    if outcome.verdict.failed:
        evidence |= {"sent": client.last.sent, "got": client.last.got}
    seconds = client.wire.clock() - began
    return replace(outcome, evidence=evidence, seconds=round(seconds, 3), requests=client.requests - before)
