"""Validation prompts from the answers themselves: a fixed share of the prompts is measured, and never trained on.

Owns the split. Whether a prompt is held out depends on its text alone, so it stays held out in every run, also in one
with more answers or one that starts from an earlier head. All turns and answers of a held-out prompt are left out of
training, and so are near-duplicates of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from haast.training.duplicates import NearDuplicates

_ONE_IN = 50
_FEWEST = 100  # prompts; fewer are all trained on


def split(records: Sequence[dict[str, Any]], count: int) -> tuple[list[bool], list[str]]:
    """Which answer records are trained on, and at most `count` prompts for measuring tau.

    With fewer than a hundred different prompts all are trained on, and there are none for measuring.
    """
    texts = [first_turn(record) for record in records]
    different = set(texts)
    held_out = {text for text in different if _place(text) % _ONE_IN == 0}
    if len(different) < _FEWEST or not held_out:
        return [True] * len(records), []
    near = NearDuplicates()
    for text in sorted(held_out):
        near.add(text)
    similar = {text for text in different if near.has(text)}
    return [text not in similar for text in texts], sorted(held_out, key=_place)[:count]


def first_turn(record: dict[str, Any]) -> str:
    """The user's first message in an answer record (formats: see `answers`)."""
    if "messages" in record:
        return next((str(each["content"]) for each in record["messages"] if each["role"] == "user"), "")
    history = record.get("history") or [record.get("prompt", "")]
    return str(history[0])


def _place(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
