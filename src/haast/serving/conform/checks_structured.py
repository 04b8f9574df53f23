"""Checks of structured output: JSON, schemas, patterns. Valid at every temperature, whole and streamed, or refused."""

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
    """A schema with short values, and a function that validates a value."""

    name: str
    schema: dict[str, Any]
    valid: Callable[[Any], bool]

    @property
    def field(self) -> dict[str, Any]:
        """The value of `response_format`."""
        return {"type": "json_schema", "json_schema": {"name": self.name, "schema": self.schema, "strict": True}}


def _object(**properties: Any) -> dict[str, Any]:
    whole = {"type": "object", "properties": properties, "required": list(properties)}
    return {**whole, "additionalProperties": False}


_COLOURS = ["red", "green", "blue"]
_FORMS = (
    _Form(
        "colour",
        _object(colour={"type": "string", "enum": _COLOURS}, loud={"type": "boolean"}),
        lambda v: set(v) == {"colour", "loud"} and v["colour"] in _COLOURS and isinstance(v["loud"], bool),
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
            set(value) == {"inner", "kind"} and isinstance(value["inner"].get("ok"), bool) and value["kind"] == "leaf"
        ),
    ),
)
_PATTERNED = _Form(
    "patterned",
    _object(code={"type": "string", "pattern": f"^{_PATTERN}$"}),
    lambda value: re.fullmatch(_PATTERN, str(value.get("code"))) is not None,
)


def json_object(subject: Subject) -> str:
    """Any JSON object."""
    finished = 0
    for prompt, fields in _OBJECTS:
        answer = subject.ask(prompt, max_tokens=_MORE, response_format={"type": "json_object"}, **fields)
        text = answer.text.strip()
        if not text.startswith("{"):
            _end_invalid(subject, answer, f"json_object gives {short(text)}", prompt)
        if answer.finish != "length":
            demand(isinstance(parsed(text), dict), f"the text is complete, but not a JSON object: {short(text)}")
            finished += 1
    if not finished:
        not_visible(f"all objects were longer than {_MORE} tokens; they start with a brace")
    return f"{finished} of {len(_OBJECTS)} are complete objects, the limit cut the rest"


def json_schema(subject: Subject) -> str:
    """Strict schemas with enums, constants and nesting."""
    valid = sum(
        _is_complete(subject, form, fields) for form in _FORMS for fields in ({}, _SAMPLED, {"temperature": 1.5})
    )
    if not valid:
        not_visible(f"every value was longer than {_MOST} tokens")
    return f"{valid} of {3 * len(_FORMS)} values are valid, the limit cut the rest"


def json_pattern(subject: Subject) -> str:
    """A pattern inside a schema."""
    valid = sum(_is_complete(subject, _PATTERNED, fields) for fields in ({}, _SAMPLED))
    if not valid:
        not_visible(f"both values were longer than {_MOST} tokens")
    return f"{valid} of 2 match the pattern, the limit cut the rest"


def _is_complete(subject: Subject, form: _Form, fields: dict[str, Any]) -> bool:
    """Whether a value is complete; fails the check if it is complete and invalid."""
    answer = subject.ask(RECORD, max_tokens=_MOST, response_format=form.field, **fields)
    if answer.finish == "length" and answer.text.lstrip().startswith("{") and parsed(answer.text) is None:
        return False
    if not _is_valid(form, answer.text):
        _end_invalid(
            subject, answer, f"the schema {form.name} gives {short(answer.text)} at {fields or 'temperature 0'}"
        )
    demand(answer.finish == "stop", f"a complete value ends with finish_reason {short(answer.finish)}")
    return True


def _is_valid(form: _Form, text: str) -> bool:
    value = parsed(text)
    return isinstance(value, dict) and form.valid(value)


def _end_invalid(subject: Subject, answer: Answer, words: str, prompt: str = RECORD) -> None:
    """End the check: the format was ignored if the text is the same without it, and else violated."""
    free = subject.once(f"free {prompt}", lambda: subject.ask(prompt, max_tokens=_MORE)).text
    (silent if free.startswith(answer.text) else fail)(words)


def json_stream(subject: Subject) -> str:
    """Schemas in a stream."""
    for form in _FORMS:
        fields = {"max_tokens": _MOST, "response_format": form.field}
        whole, streamed = subject.ask(RECORD, **fields), subject.streamed(RECORD, **fields)
        if not _is_valid(form, whole.text):
            not_visible("the whole answer is not valid either: see the check json-schema")
        same_text(whole.text, streamed.text, f"the schema {form.name} in a stream")
        demand(whole.finish == streamed.finish, f"finish_reason {whole.finish!r}, streamed {streamed.finish!r}")
    return f"{len(_FORMS)} values, as in the whole answer"


def regex(subject: Subject) -> str:
    """A pattern for the whole text, in any of the fields that servers use."""
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
            return f"with {next(iter(spelling))}"
    return not_offered("none of structured_outputs, guided_regex, regex and response_format has this effect")


THEME = Theme(
    "structured",
    (
        Check("json-object", ("A1",), "json_object gives a JSON object", json_object),
        Check("json-schema", ("A1",), "strict schemas hold at temperature 0, 1 and 1.5", json_schema),
        Check("json-pattern", ("A1",), "a schema's pattern holds", json_pattern),
        Check("json-stream", ("A1",), "a strict schema holds in a stream", json_stream),
        Check("regex", ("A1",), "a pattern for the whole text holds, if the server supports one", regex),
    ),
)
