"""Checks of invalid requests: each gets an error that clients can parse, and none breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from haast.serving.conform.base import Check, Theme, demand, fail, not_visible, short, silent
from haast.serving.conform.client import Reply
from haast.serving.conform.subject import CHAT, RECORD, STORY, Subject, complaint, named, same_text
from haast.serving.conform.wire import WireError

_PARTS = ("message", "type", "param", "code")
_UNKNOWN_MODEL = "haast-conform-no-such-model"
_UNKNOWN_FIELD = "haast_conform_no_such_field"
_MANY = 10_000  # words of a prompt that should exceed an unknown context length
_WORDS = ("river", "stone", "cloud", "seven", "green", "house", "paper", "night")


def error_shape(subject: Subject) -> str:
    """The error object."""
    reply = subject.client.post(CHAT, subject.body(STORY, temperature="hot"))
    _is_refusal(reply, "temperature 'hot'")
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    demand(isinstance(error, dict), f"HTTP {reply.status} without an error object: {short(reply.text)}")
    assert isinstance(error, dict)
    missing = [name for name in _PARTS if name not in error]
    demand(not missing, f"the error object lacks {', '.join(missing)}")
    demand(isinstance(error["message"], str) and error["message"], f"error.message is {short(error['message'])}")
    return f"HTTP {reply.status} with {', '.join(_PARTS)}"


def malformed_json(subject: Subject) -> str:
    """Bodies that are not a JSON object."""
    for content in (b'{"model": ', b"[1, 2]", b""):
        reply = subject.client.send(subject.client.request("POST", CHAT, content, content_type="application/json"))
        _is_refusal(reply, f"the body {content.decode()!r}")
    return "three bodies that are not a JSON object are refused"


def unknown_model(subject: Subject) -> str:
    """A model that does not exist."""
    reply = subject.client.post(CHAT, subject.body(STORY, model=_UNKNOWN_MODEL, max_tokens=1))
    if reply.status == 200 and isinstance(reply.body, dict):
        model = reply.body.get("model")
        if model == _UNKNOWN_MODEL:
            silent(f"accepted, and the answer names {_UNKNOWN_MODEL!r} as its model")
        return f"accepted; the answer names {short(model)} as its model"
    _is_refusal(reply, "an unknown model")
    return f"HTTP {reply.status}: {short(complaint(reply), 100)}"


def unknown_field(subject: Subject) -> str:
    """A field that does not exist."""
    reply = subject.client.post(CHAT, subject.body(STORY, max_tokens=1, **{_UNKNOWN_FIELD: 1}))
    if reply.status == 200:
        return "accepted"
    _is_refusal(reply, "an unknown field")
    demand(named(_UNKNOWN_FIELD, reply.text), f"HTTP {reply.status} without naming the field: {short(reply.text, 100)}")
    return f"HTTP {reply.status} that names it"


def bad_values(subject: Subject) -> str:
    """Values that are not allowed."""
    wrong: list[dict[str, Any]] = [
        {"temperature": -1}, {"top_p": 2}, {"n": 0}, {"max_tokens": "many"}, {"messages": []}, {"messages": None},
        {"presence_penalty": 100}, {"stop": 7},
    ]  # fmt: skip
    complaints = []
    for fields in wrong:
        body, limit = subject.body(STORY, **{"max_tokens": 4, **fields}), min(20.0, subject.client.timeout)
        try:
            reply = subject.client.post(CHAT, body, limit)
        except WireError as error:
            complaints.append(f"{error} for {_words(fields)}")
            break  # the server is busy with this value: the next would only wait
        if not 400 <= reply.status < 500:
            complaints.append(f"HTTP {reply.status} for {_words(fields)}")
    if complaints:
        fail("; ".join(complaints))
    return f"{len(wrong)} of {len(wrong)} get 4xx"


def stream_error(subject: Subject) -> str:
    """An invalid request for a stream."""
    streamed = subject.client.stream(CHAT, subject.body(STORY, temperature="hot", stream=True), most=2)
    demand(400 <= streamed.status < 500, f"HTTP {streamed.status}: there is no error before the stream")
    return f"HTTP {streamed.status} before any event"


def context_overflow(subject: Subject) -> str:
    """A prompt that exceeds the context length."""
    words = _MANY if subject.context is None else int(subject.context * 1.25) + 50
    text = " ".join(_WORDS[i % len(_WORDS)] for i in range(words))
    reply = subject.client.post(CHAT, subject.body(text, max_tokens=1))
    if reply.status == 200:
        usage = reply.body.get("usage") or {} if isinstance(reply.body, dict) else {}
        counted = usage.get("prompt_tokens")
        if not isinstance(counted, int) or counted < words:
            silent(f"{words} words were accepted as {short(counted)} prompt tokens: the server cut the prompt")
        if subject.context is None:
            not_visible(f"{counted} prompt tokens fit, and the context length is unknown: give --context")
        fail(f"{counted} prompt tokens were accepted for a context of {subject.context}")
    _is_refusal(reply, f"a prompt of {words} words")
    _check_both_sizes(complaint(reply), subject.context)
    return f"HTTP {reply.status}: {short(complaint(reply), 120)}"


def _check_both_sizes(message: str, context: int | None) -> None:
    numbers = {int(each) for each in "".join(c if c.isdigit() else " " for c in message.replace(",", "")).split()}
    large = {each for each in numbers if each >= 100}
    demand(len(large) >= 2, f"the message does not have both sizes: {short(message, 120)}")
    known = context is None or (any(each <= context for each in large) and any(each > context for each in large))
    demand(known, f"the message does not have the context of {context} and the prompt's size: {short(message, 120)}")


def survives(subject: Subject) -> str:
    """Requests that crashed other servers, and a valid one after them."""
    before, broken = subject.story(), list[str]()
    for words, fields in _harmful_requests():
        prompt = fields.pop("prompt", RECORD)
        reply = subject.client.post(CHAT, subject.body(prompt, **{"max_tokens": 4, **fields}))
        if reply.status >= 500 and reply.status != 501:
            broken.append(f"HTTP {reply.status} for {words}")
    after = subject.ask(STORY, max_tokens=40)
    same_text(before.text, after.text, "a valid request after the bad ones")
    demand(not broken, f"the server still answers as before, but gives {'; '.join(broken)}")
    return f"{len(list(_harmful_requests()))} bad requests, then the same answer as before"


def _harmful_requests() -> Iterator[tuple[str, dict[str, Any]]]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    for words, schema in (
        ("a schema with an unknown type", {"type": "no-such-type"}),
        ("a schema with an invalid pattern", {"type": "string", "pattern": "(["}),
        ("a schema with a broken $ref", {"$ref": "#/$defs/nowhere"}),
        ("a schema sixty levels deep", deep),
    ):
        named_schema = {"name": "bad", "schema": schema, "strict": True}
        yield words, {"response_format": {"type": "json_schema", "json_schema": named_schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "no-such-type"}}}
    yield "a tool with invalid parameters", {"tools": [tool], "tool_choice": "required"}
    yield "a logit_bias far outside the vocabulary", {"logit_bias": {"1000000000": 5}}
    yield "a million top_logprobs", {"logprobs": True, "top_logprobs": 1_000_000}
    yield "a lone surrogate in the prompt", {"prompt": "\ud800 hello"}
    yield "a thousand stops", {"stop": [f"stop {number}" for number in range(1000)]}


def _is_refusal(reply: Reply, words: str) -> None:
    demand(400 <= reply.status < 500, f"HTTP {reply.status} for {words}, not 4xx: {short(reply.text, 100)}")


def _words(fields: dict[str, Any]) -> str:
    return ", ".join(f"no {name}" if value is None else f"{name}={value!r}" for name, value in fields.items())


THEME = Theme(
    "errors",
    (
        Check("error-shape", (), "an error is 4xx with message, type, param and code", error_shape),
        Check("malformed-json", (), "a body that is not a JSON object gets 4xx", malformed_json),
        Check("unknown-model", (), "an unknown model gets 4xx, or the answer names its real model", unknown_model),
        Check("unknown-field", (), "an unknown field is ignored or named, never 5xx", unknown_field),
        Check("stream-error", (), "an invalid request for a stream gets 4xx, not a stream", stream_error),
        Check(
            "survives",
            ("A2",),
            "bad requests get no 5xx, do not crash the server, and change no later answer",
            survives,
        ),
        Check("bad-values", (), "values that are not allowed get 4xx", bad_values),
        # Runs last: a server that does not refuse the prompt may compute for minutes.
        Check("context-overflow", (), "a prompt that is too long gets 4xx with both sizes", context_overflow),
    ),
)
