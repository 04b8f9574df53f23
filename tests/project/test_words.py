"""Private words stay out: what an engineer of the field would not guess has a plain word instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A word, and what to write instead. Whole words, in any case; code, comments and docs alike.
BANNED = {
    "laws?": "distribution",
    "anew": "again",
    "whitened|whitening": "RMS scaling per dimension",
    "seams?": "compat, private API",
    "loans?": "lock",
    "arms?": "decoder",
    "slabs?": "KV buffer",
    "somebody|nobody|everybody|whoever": "name the caller, user, request or process",
    "beside": "next to, in addition to",
}
PATTERN = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)


def files() -> Iterator[Path]:
    yield from sorted((ROOT / "src/haast").rglob("*.py"))
    yield from sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/models.md"})  # it quotes recorded refusals
    yield from (ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))


def found(text: str) -> list[str]:
    """Banned words of a text, generated tables and quoted papers left out."""
    text = re.sub(r'<!-- results:.*?<!-- end -->|"laws"', "", text, flags=re.DOTALL)  # a key of older JSON files
    return [match[0] for match in PATTERN.finditer(text)]


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_words(path: Path) -> None:
    words = found(path.read_text(encoding="utf-8"))
    assert not words, f"{path.name} has {words}: see BANNED for what to write instead"


def test_a_private_word_would_be_found() -> None:
    assert found("the law of a text, made anew by somebody") == ["law", "anew", "somebody"]
    assert found("lawful, flawed, harms") == []
