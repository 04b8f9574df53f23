"""Checks of paths, keys, and the structure of an answer. Does not look at the text."""

from __future__ import annotations

import time
from typing import Any

from haast.serving.conform.base import Check, Theme, demand, fail, not_offered, not_visible, short
from haast.serving.conform.client import Client
from haast.serving.conform.subject import CHAT, STORY, TEXT, Subject

_DAY = 86400
_ENDS = {"stop", "length", "tool_calls", "content_filter", "function_call"}
_ID_HEADERS = ("x-request-id", "request-id", "x-correlation-id")


def models(subject: Subject) -> str:
    """The list of models."""
    body = subject.client.get("/v1/models").body
    demand(isinstance(body, dict) and body.get("object") == "list", f"not an object 'list': {short(body)}")
    for each in body["data"]:
        demand(each.get("object") == "model", f"{short(each.get('id'))} is not marked as object 'model'")
        demand(isinstance(each.get("id"), str) and each["id"], f"a model without an id: {short(each)}")
    return f"{len(body['data'])} in the list"


def health(subject: Subject) -> str:
    """The health path."""
    reply = subject.client.get("/health")
    if reply.status == 404:
        not_offered("HTTP 404")
    demand(reply.status == 200, f"HTTP {reply.status} from a server that answers")
    return "HTTP 200"


def auth(subject: Subject) -> str:
    """A wrong key."""
    if subject.client.key is None:
        not_visible("no key was given: the server may not need one")
    wrong = Client(subject.client.wire, "wrong", subject.client.timeout)
    for client, words in ((wrong, "a wrong key"), (Client(wrong.wire, None, wrong.timeout), "no key")):
        reply = client.post(CHAT, subject.body(STORY, max_tokens=1))
        demand(reply.status == 401, f"HTTP {reply.status} for {words}, not 401")
    return "a wrong key and a missing key both get 401"


def request_id(subject: Subject) -> str:
    """A response header that identifies the request in the server's log."""
    replies = [subject.client.post(CHAT, subject.body(STORY, max_tokens=1)) for _ in range(2)]
    for name in _ID_HEADERS:
        first, second = (reply.headers.get(name) for reply in replies)
        if first:
            demand(first != second, f"{name} is {short(first)} for two requests")
            return name
    return fail(f"none of the headers {', '.join(_ID_HEADERS)}")


def answer_shape(subject: Subject) -> str:
    """The fields of an answer."""
    bodies = [subject.ask(STORY, max_tokens=2).body for _ in range(2)]
    _check_shape(bodies[0], "chat.completion")
    message = bodies[0]["choices"][0].get("message") or {}
    demand(message.get("role") == "assistant", f"message.role is {short(message.get('role'))}")
    demand(bodies[0]["id"] != bodies[1]["id"], f"two answers have the id {short(bodies[0]['id'])}")
    if subject.offers_text():
        _check_shape(subject.ask("One, two,", TEXT, max_tokens=2).body, "text_completion")
    return "id, object, created, model, choices"


def _check_shape(body: dict[str, Any], kind: str) -> None:
    demand(body.get("object") == kind, f"object is {short(body.get('object'))}, not {kind!r}")
    demand(isinstance(body.get("id"), str) and body["id"], f"id is {short(body.get('id'))}")
    demand(isinstance(body.get("model"), str) and body["model"], f"model is {short(body.get('model'))}")
    created = body.get("created")
    now = isinstance(created, int) and abs(created - time.time()) < _DAY
    demand(now, f"created is {short(created)}, not the current Unix time in seconds")
    finish = body["choices"][0].get("finish_reason")
    demand(finish in _ENDS, f"finish_reason is {short(finish)}")


THEME = Theme(
    "basics",
    (
        Check("models", (), "GET /v1/models lists objects of type model", models),
        Check("health", (), "GET /health returns 200", health),
        Check("auth", (), "a wrong key gets 401", auth),
        Check("request-id", (), "every reply has a header with a request id", request_id),
        Check("answer-shape", (), "an answer has id, object, created, model and a finish_reason", answer_shape),
    ),
)
