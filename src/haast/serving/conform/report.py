"""Reports of a run: lines for the terminal, a JSON document, and a Markdown table of several documents.

Owns the document format "haast-conform-1", which contains no paths of the machine that wrote it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from haast.errors import expanded
from haast.serving.conform.base import Check, Outcome, Theme, Verdict
from haast.serving.conform.suite import chosen

KIND = "haast-conform-1"
_MOST = 240  # characters of a check's line in the terminal
_SIGNS = {
    "pass": "yes",
    "fail": "**no**",
    "silent": "**ignored**",
    "refused": "refused",
    "not offered": "none",
    "not visible": "?",
}
_LEGEND = (
    "yes: passes. **no**: fails. **ignored**: the field is accepted and has no effect. refused: an error names the "
    "field. none: the path does not exist. ?: not visible from outside."
)
# File paths, which results must not contain. Paths of URLs are kept.
_PATH = re.compile(
    r"(?:\b[A-Z]:\\(?=\w)|~/|(?:\.\./)+|/(?:tmp|work|root|home|usr|opt|var|mnt|srv|etc|data|private|Users)/)[^\s\"'<>,;:)\]}]*"
)


def line(theme: Theme, check: Check, outcome: Outcome) -> str:
    """The line of one check in the terminal."""
    rows = ",".join(check.rows) if len(check.rows) < 4 else f"{check.rows[0]}..{check.rows[-1]}"
    words = f"{theme.name:<11}{check.id:<23}{rows:<9} {outcome.verdict.value:<12}{' '.join(outcome.detail.split())}"
    return words if len(words) <= _MOST else f"{words[: _MOST - 3]}..."


def totals(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """Number of checks per verdict."""
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    return {verdict.value: counts[verdict] for verdict in Verdict}


def summary(counts: Mapping[str, int]) -> str:
    """The totals as a sentence."""
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def document(
    checks: Sequence[tuple[Theme, Check]], outcomes: Mapping[str, Outcome], server: Mapping[str, Any]
) -> dict[str, Any]:
    """The result as a JSON document; `server` holds the tested server's name, version, model and URL."""
    from haast import __version__

    whole = {
        "kind": KIND,
        "server": dict(server),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "haast": __version__,
        "totals": totals(outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes.values()), 1),
        "requests": sum(outcome.requests for outcome in outcomes.values()),
        "checks": [_entry(theme, check, outcomes[check.id]) for theme, check in checks],
    }
    cleaned: dict[str, Any] = without_paths(whole)
    return cleaned


def _entry(theme: Theme, check: Check, outcome: Outcome) -> dict[str, Any]:
    return {
        "id": check.id,
        "theme": theme.name,
        "rows": list(check.rows),
        "asks": check.asks,
        "outcome": outcome.verdict.value,
        "detail": outcome.detail,
        "evidence": dict(outcome.evidence),
        "seconds": outcome.seconds,
        "requests": outcome.requests,
    }


def without_paths(value: Any) -> Any:
    """A copy in which every file path is cut to its last name."""
    if isinstance(value, dict):
        return {without_paths(name): without_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    return _PATH.sub(_last_name, value) if isinstance(value, str) else value


def _last_name(found: re.Match[str]) -> str:
    return re.split(r"[/\\]", found[0].rstrip("/\\"))[-1] or "(a folder)"


def read_document(path: Path) -> dict[str, Any]:
    """Read a result from a file. Raises ValueError."""
    path = expanded(path, "cannot read")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): give a file that `haast conform --json` wrote") from error
    if not isinstance(read, dict) or read.get("kind") != KIND:
        raise ValueError(f"{path} is not a result of `haast conform` (kind {KIND!r}): give a file that --json wrote")
    return read


def markdown(paths: Sequence[Path]) -> str:
    """Compare several results as Markdown: one row per check, one column per server, and the reasons of failures below.

    Raises ValueError if a file is not a result.
    """
    documents = [read_document(path) for path in paths]
    names = [_column(document["server"]) for document in documents]
    outcomes = [{each["id"]: each for each in document["checks"]} for document in documents]
    lines = [f"| check | rows | asks | {' | '.join(names)} |", f"|---|---|---|{'---|' * len(names)}"]
    for theme, check in chosen(None):
        signs = [_SIGNS[column[check.id]["outcome"]] if check.id in column else "" for column in outcomes]
        lines.append(f"| {theme.name}: `{check.id}` | {' '.join(check.rows)} | {check.asks} | {' | '.join(signs)} |")
    counts = [summary(document["totals"]) for document in documents]
    lines += [f"| | | total | {' | '.join(counts)} |", "", _LEGEND, ""]
    for name, document in zip(names, documents, strict=True):
        lines += _failures(name, document)
    return "\n".join(lines).rstrip() + "\n"


def _column(server: Mapping[str, Any]) -> str:
    return " ".join(str(server[part]) for part in ("name", "version") if server.get(part)) or "?"


def _failures(name: str, document: Mapping[str, Any]) -> list[str]:
    """The failed checks of a server, with their reasons."""
    failed = [each for each in document["checks"] if each["outcome"] in ("fail", "silent")]
    lines = [f"**{name}** (model {document['server'].get('model')}, {document['date'][:10]})", ""]
    lines += [f"- `{each['id']}`: {_escaped(each['detail'])}" for each in failed] or ["- nothing failed"]
    return [*lines, ""]


def _escaped(words: str) -> str:
    """The text with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(words.split()))
