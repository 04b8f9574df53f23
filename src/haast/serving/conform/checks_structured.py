"""Answers of a given form: JSON, schemas, patterns. Valid at every temperature, whole and streamed, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from haast.serving.conform.answers import Answer
from haast.serving.conform.base import Check, Theme, demand, fail, not_offered, not_visible, short, silent
from haast.serving.conform.client import parsed
from haast.serving.conform.subject import CHAT, RECORD, Subject, same_text

_MOST, _MORE = 48, 64
_WATER = "Is water wet? Reply in JSON."
_PATTERN = "[0-9]{3}-[0-9]{2}"
_SAMPLED: dict[str, Any] = {"temperature": 1}
_OBJECTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (_WATER, {}),
    (_WATER, _SAMPLED),
    ("Give me a JSON object with one key.", _SAMPLED),
)


@dataclass(frozen=True)
class _Form:
    """A schema whose values are few tokens long, and what a value of it must be."""

    name: str
    schema: dict[str, Any]
    fits: Callable[[Any], bool]

    @property
    def field(self) -> dict[str, Any]:
        """The response_format."""
        return {"type": "json_schema", "json_schema": {"name": self.name, "schema": self.schema, "strict": True}}


def _object(**properties: Any) -> dict[str, Any]:
    whole = {"type": "object", "properties": properties, "required": list(properties)}
    return {**whole, "additionalProperties": False}


_COLOURS = ["red", "green", "blue"]
_FORMS = (
    _Form(
        "colour",
        _object(colour={"type": "string", "enum": _COLOURS}, loud={"type": "boolean"}),
        lambda value: set(value) == {"colour", "loud"} and value["colour"] in _COLOURS and _is(value["loud"], bool),
    ),
    _Form(
        "point",
        _object(x={"type": "integer", "enum": [1, 2, 3]}, label={"type": "null"}),
        lambda value: set(value) == {"x", "label"} and value["x"] in (1, 2, 3) and value["label"] is None,
    ),
    _Form(
        "nested",
        _object(inner=_object(ok={"type": "boolean"}), kind={"const": "leaf"}),
        lambda value: (
            set(value) == {"inner", "kind"} and _is(value["inner"].get("ok"), bool) and value["kind"] == "leaf"
        ),
    ),
)
_PATTERNED = _Form(
    "patterned",
    _object(code={"type": "string", "pattern": f"^{_PATTERN}$"}),
    lambda value: re.fullmatch(_PATTERN, str(value.get("code"))) is not None,
)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind)


def json_object(subject: Subject) -> str:
    """Any object."""
    finished = 0
    for prompt, fields in _OBJECTS:
        answer = subject.ask(prompt, max_tokens=_MORE, response_format={"type": "json_object"}, **fields)
        text = answer.text.strip()
        if not text.startswith("{"):
            _not_held(subject, answer, f"json_object gives {short(text)}", prompt)
        if answer.finish != "length":
            demand(isinstance(parsed(text), dict), f"finished, and no JSON object: {short(text)}")
            finished += 1
    if not finished:
        not_visible(f"all objects were longer than {_MORE} tokens; they begin as such")
    return f"{finished} of {len(_OBJECTS)} are whole objects, the rest were cut by the limit"


def json_schema(subject: Subject) -> str:
    """Strict schemas: enums, constants, nesting."""
    valid = sum(_held(subject, form, fields) for form in _FORMS for fields in ({}, _SAMPLED, {"temperature": 1.5}))
    if not valid:
        not_visible(f"every value was longer than {_MOST} tokens")
    return f"{valid} of {3 * len(_FORMS)} values valid, the rest cut by the limit"


def json_pattern(subject: Subject) -> str:
    """A pattern within a schema."""
    valid = sum(_held(subject, _PATTERNED, fields) for fields in ({}, _SAMPLED))
    if not valid:
        not_visible(f"both values were longer than {_MOST} tokens")
    return f"{valid} of 2 fit the pattern, the rest cut by the limit"


def _held(subject: Subject, form: _Form, fields: dict[str, Any]) -> bool:
    """Whether a value is whole; fails where it is whole and wrong."""
    answer = subject.ask(RECORD, max_tokens=_MOST, response_format=form.field, **fields)
    if answer.finish == "length" and answer.text.lstrip().startswith("{") and parsed(answer.text) is None:
        return False
    if not _fits(form, answer.text):
        _not_held(subject, answer, f"the schema {form.name} gives {short(answer.text)} at {fields or 'temperature 0'}")
    demand(answer.finish == "stop", f"a whole value ends with finish_reason {short(answer.finish)}")
    return True


def _fits(form: _Form, text: str) -> bool:
    value = parsed(text)
    return isinstance(value, dict) and form.fits(value)


def _not_held(subject: Subject, answer: Answer, words: str, prompt: str = RECORD) -> None:
    """A form that left the text as it was is swallowed; another wrong text is a mistake."""
    free = subject.once(f"free {prompt}", lambda: subject.ask(prompt, max_tokens=_MORE)).text
    (silent if free.startswith(answer.text) else fail)(words)


def json_stream(subject: Subject) -> str:
    """A schema in a stream."""
    for form in _FORMS:
        fields = {"max_tokens": _MOST, "response_format": form.field}
        whole, streamed = subject.ask(RECORD, **fields), subject.streamed(RECORD, **fields)
        if not _fits(form, whole.text):
            not_visible("the value is not valid in one piece either: see the check of json-schema")
        same_text(whole.text, streamed.text, f"the schema {form.name} in a stream")
        demand(whole.finish == streamed.finish, f"finish_reason {whole.finish!r}, streamed {streamed.finish!r}")
    return f"{len(_FORMS)} values, the same in one piece"


def regex(subject: Subject) -> str:
    """A pattern for the whole text, in any of the spellings that servers have."""
    spellings: tuple[dict[str, Any], ...] = (
        {"structured_outputs": {"regex": _PATTERN}}, {"guided_regex": _PATTERN}, {"regex": _PATTERN},
        {"response_format": {"type": "regex", "regex": _PATTERN, "pattern": _PATTERN}},
    )  # fmt: skip
    for spelling in spellings:
        body = subject.body("Give me a code.", temperature=1, **spelling)
        reply = subject.client.post(CHAT, body)
        text = (reply.body["choices"][0]["message"].get("content") or "") if reply.status == 200 else ""
        if re.fullmatch(_PATTERN, text.strip()):
            again = subject.ask("Tell me a story.", max_tokens=16, **spelling).text
            demand(re.fullmatch(_PATTERN, again.strip()), f"the second text is {short(again)}")
            return f"by {next(iter(spelling))}"
    return not_offered("none of structured_outputs, guided_regex, regex and response_format does it")


THEME = Theme(
    "structured",
    (
        Check("json-object", ("A1",), "json_object gives a JSON object", json_object),
        Check("json-schema", ("A1",), "strict schemas hold at temperature 0, 1 and 1.5", json_schema),
        Check("json-pattern", ("A1",), "a schema's pattern holds", json_pattern),
        Check("json-stream", ("A1",), "so it is in a stream", json_stream),
        Check("regex", ("A1",), "a pattern for the whole text holds, where a server has that", regex),
    ),
)
