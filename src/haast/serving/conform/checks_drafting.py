"""Checks of drafting: of servers that can switch it off per request, and placeholders for what clients can't see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from haast.serving.conform.base import Check, Theme, demand, not_visible, short
from haast.serving.conform.client import Reply
from haast.serving.conform.subject import CHAT, COUNT, RECORD, STORY, Subject

_WITHOUT = {"haast": {"drafter": "none"}}
_DIFFERING = {"id", "created", "haast", "timings"}  # fields that differ between answers; the rest must be equal
_SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
_REQUESTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("greedy", STORY, {"max_tokens": 32}),
    ("sampled", STORY, {"max_tokens": 24, "temperature": 1, "seed": 3}),
    ("cut", COUNT, {"max_tokens": 7}),
    ("stopped", COUNT, {"max_tokens": 32, "stop": ["four", "x"]}),
    ("logprobs", COUNT, {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}),
    ("penalties", STORY, {"max_tokens": 24, "frequency_penalty": 1.0, "presence_penalty": 0.5}),
    ("two choices", STORY, {"max_tokens": 12, "n": 2, "temperature": 1, "seed": 4}),
    ("min_tokens", "Say yes.", {"max_tokens": 20, "min_tokens": 12}),
    (
        "truncated sampling",
        STORY,
        {"max_tokens": 16, "temperature": 1, "seed": 5, "min_p": 0.1, "top_k": 20, "top_p": 0.9},
    ),
    (
        "schema",
        RECORD,
        {"max_tokens": 32, "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": _SCHEMA}}},
    ),
)


def drafting_unseen(subject: Subject) -> str:
    """Requests of every kind, with and without drafting."""
    if subject.owner != "haast":
        not_visible("the server is not Haast: drafting can't be switched off per request")
    compared = 0
    for words, prompt, fields in _REQUESTS:
        body = subject.body(prompt, **fields)
        drafted, plain = (subject.client.post(CHAT, {**body, **more}) for more in ({}, _WITHOUT))
        if drafted.status == 200:
            subject.accepted(plain, _WITHOUT)
        demand(drafted.status == plain.status, f"{words}: HTTP {drafted.status} drafted, {plain.status} without")
        if drafted.status == 200:
            _same(words, drafted, plain)
            compared += 1
    demand(compared, "no request was answered")
    return f"{compared} answers, each field is the same without drafting"


def _same(words: str, drafted: Reply, plain: Reply) -> None:
    left, right = (_comparable(reply.body) for reply in (drafted, plain))
    for name in sorted({*left, *right}):
        one, two = left.get(name), right.get(name)
        demand(_close(one, two), f"{words}: {name} is {short(one, 90)} drafted, {short(two, 90)} without")


def _comparable(body: dict[str, Any]) -> dict[str, Any]:
    """An answer without the fields that may differ: ids, and counts of drafted or cached tokens."""
    kept = {name: value for name, value in body.items() if name not in _DIFFERING}
    usage = body.get("usage") or {}
    return {**kept, "usage": {name: value for name, value in usage.items() if isinstance(value, int)}}


def _close(one: Any, two: Any) -> bool:
    """Whether two values are equal; floats may differ by rounding."""
    if isinstance(one, dict) and isinstance(two, dict):
        return set(one) == set(two) and all(_close(one[name], two[name]) for name in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(_close(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, float):
        return abs(one - two) <= 2e-3
    return bool(one == two)


def _invisible(reason: str) -> Callable[[Subject], str]:
    def check(subject: Subject) -> str:
        not_visible(reason)

    return check


THEME = Theme(
    "drafting",
    (
        Check(
            "drafting-unseen",
            ("A4", "A5", "A6", "A7", "A8", "A9", "A10"),
            "each field of an answer is the same with and without drafting",
            drafting_unseen,
        ),
        Check(
            "untrimmable-cache",
            ("A12",),
            "a cache that can't be trimmed is refused at load",
            _invisible("decided when the model is loaded; the other checks would find a wrong text"),
        ),
        Check(
            "published-tau",
            ("A15",),
            "a published head reaches its published tau",
            _invisible("answers do not contain the head's published tau"),
        ),
        Check(
            "training-tau",
            ("A16",),
            "tau when served equals tau in training",
            _invisible("clients do not see the training"),
        ),
        Check(
            "never-slower",
            ("A17", "A18"),
            "drafting is never slower than vanilla decoding",
            _invisible("needs a benchmark: a client has no server without drafting to compare with"),
        ),
    ),
)
