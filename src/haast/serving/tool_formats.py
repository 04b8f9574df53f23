"""The ways in which models write tool calls: which one a chat template teaches, how to read it, its grammar.

    tags        <tool_call>{"name": "f", "arguments": {...}}</tool_call>
                Qwen 2.5 and 3, Hermes, and templates without any
    functions   <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
                Qwen 3 Coder, Qwen 3.5
    pairs       <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>
                GLM 4.5 and 4.6
    object      {"name": "f", "parameters": {...}} as the whole answer
                Llama 3
    list        [TOOL_CALLS] [{"name": "f", "arguments": {...}}] up to the end
                Mistral, to 2024
    named       [TOOL_CALLS]f[ARGS]{...} up to the next mark or the end
                Mistral, since 2025
    fenced      as below, with function<sep>f and then {...} in a block of ```json
                DeepSeek V3 and R1
    separated   <begin of calls><begin of call>f<sep>{...}<end of call><end of calls>
                DeepSeek V3.1

In `functions` and `pairs` a value is text; the tool's schema says whether it is a string or JSON. Knows nothing of
tokens or drafting.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

# Parameters' schemas by name, by tool.
Schemas = Mapping[str, Mapping[str, Any]]

_DEEPSEEK = "\uff5ctool\u2581"  # in all of DeepSeek's marks
_CALLS_BEGIN, _CALLS_END = f"<{_DEEPSEEK}calls\u2581begin\uff5c>", f"<{_DEEPSEEK}calls\u2581end\uff5c>"
_CALL_BEGIN, _CALL_END = f"<{_DEEPSEEK}call\u2581begin\uff5c>", f"<{_DEEPSEEK}call\u2581end\uff5c>"
_SEPARATOR = f"<{_DEEPSEEK}sep\uff5c>"
_MISTRAL, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
# Atomic groups and possessive quantifiers keep the time linear for texts that are nearly calls.
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_PAIRS = re.compile(r"\s*([^\s<]+)\s*(.*)", re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>(?>(.*?)</arg_key>)\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_FENCED = re.compile(r"\w*" + _SEPARATOR + r"([^\n]+)\n```json\n(.*)\n```\s*", re.DOTALL)
_BY_NAME = re.compile(r"\s*+([^\s\[{]++)\s*+(?:\[CALL_ID\][^\[{]*+)?(?:\[ARGS\])?\s*+(\{.*\})\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it; `arguments` is a JSON object as text."""

    name: str
    arguments: str

    def id_of(self, answer: str, number: int) -> str:
        """The call's id: a hash of the answer's id and the call's number."""
        return f"call_{hashlib.sha256(f'{answer} {number}'.encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class CallFormat:
    """One way of writing tool calls.

    Attributes:
        name: as in this module's docstring.
        open: mark before calls; empty if a call is the whole answer.
        close: mark after calls; empty if they end with the answer.
        read: the calls in the text between the marks; None if it is no call.
        marks: all marks. Some tokenizers have them as special tokens, whose text must be kept then.
    """

    name: str
    open: str
    close: str
    read: Callable[[str, Schemas], list[ToolCall] | None]
    marks: tuple[str, ...] = ()


def read_object(text: str, _schemas: Schemas | None = None) -> list[ToolCall] | None:
    """One call as a JSON object, with `arguments` or `parameters`."""
    call = _call_of(_json(text))
    return None if call is None else [call]


def _read_answer(text: str, _schemas: Schemas) -> list[ToolCall] | None:
    """A whole answer that is a call. Other objects may have a name too, so the arguments must be there."""
    read = _json(text)
    call = _call_of(read) if isinstance(read, dict) and {"arguments", "parameters"} & read.keys() else None
    return None if call is None else [call]


def _read_list(text: str, schemas: Schemas) -> list[ToolCall] | None:
    read = _json(text)
    if isinstance(read, list):
        calls = [_call_of(each) for each in read]
        found = [call for call in calls if call is not None]
        return found if found and len(found) == len(calls) else None
    return _read_named(text, schemas)


def _read_named(text: str, schemas: Schemas) -> list[ToolCall] | None:
    calls = []
    for piece in text.split(_MISTRAL):
        match = _BY_NAME.fullmatch(piece)
        call = _call_of({"name": match[1], "arguments": _json(match[2])}) if match else None
        if call is None:
            return None
        calls.append(call)
    return calls


def _read_tags(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """All that stands in <tool_call> tags: a model that was taught one of these ways may fall into another."""
    return read_object(text) or _read_function(text, schemas) or _read_pairs(text, schemas)


def _read_function(text: str, schemas: Schemas) -> list[ToolCall] | None:
    match = _FUNCTION.fullmatch(text)
    return None if match is None else _read_values(match[1], match[2], _PARAMETER, schemas)


def _read_pairs(text: str, schemas: Schemas) -> list[ToolCall] | None:
    match = _PAIRS.fullmatch(text)
    return None if match is None or match[1] not in schemas else _read_values(match[1], match[2], _PAIR, schemas)


def _read_values(name: str, text: str, pattern: re.Pattern[str], schemas: Schemas) -> list[ToolCall] | None:
    values, at, own = dict[str, Any](), 0, schemas.get(name, {})
    while at < len(text.rstrip()):
        match = pattern.match(text, at)
        if match is None:
            return None
        values[match[1]], at = _value(match[2], own.get(match[1])), match.end()
    call = _call(name, values)
    return None if call is None else [call]


def _value(text: str, schema: Any) -> Any:
    """A parameter's value: its text, or what the text says in JSON unless its schema wants a string."""
    wants = schema.get("type") if isinstance(schema, dict) else None
    if wants == "string":
        return text
    value = _json(text)
    return text if value is None and text.strip() != "null" else value


def _read_deepseek(text: str, schemas: Schemas) -> list[ToolCall] | None:
    calls = []
    for piece in text.split(_CALL_BEGIN)[1:]:
        body = piece.partition(_CALL_END)[0]
        fenced = _FENCED.fullmatch(body)
        name, _, arguments = body.partition(_SEPARATOR)
        name, arguments = (fenced[1], fenced[2]) if fenced else (name, arguments)
        call = _call_of({"name": name.strip(), "arguments": _json(arguments)})
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _call_of(read: Any) -> ToolCall | None:
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        return None
    arguments = read.get("arguments", read.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return _call(read["name"], arguments) if isinstance(arguments, dict) else None


def _call(name: str, arguments: dict[str, Any]) -> ToolCall | None:
    """The call; None if JSON can't hold the arguments: numbers that are too large, or too many levels."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return ToolCall(_unicode(name), _unicode(text))


def _unicode(text: str) -> str:
    """The text with halves of surrogate pairs, which no encoding can send, as JSON's escapes."""
    return text.encode(errors="backslashreplace").decode()


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON, as with NaN and Infinity."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


TAGS = CallFormat("tags", "<tool_call>", "</tool_call>", _read_tags)
_FUNCTIONS = CallFormat("functions", TAGS.open, TAGS.close, _read_tags)
_PAIRED = CallFormat("pairs", TAGS.open, TAGS.close, _read_tags)
_OBJECT = CallFormat("object", "", "", _read_answer)
_MISTRAL_MARKS = (_MISTRAL, _ARGS, _CALL_ID)
_LIST = CallFormat("list", _MISTRAL, "", _read_list, _MISTRAL_MARKS)
_NAMED = CallFormat("named", _MISTRAL, "", _read_named, _MISTRAL_MARKS)
_DEEPSEEK_MARKS = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEPARATOR)
_FENCES = CallFormat("fenced", _CALLS_BEGIN, _CALLS_END, _read_deepseek, _DEEPSEEK_MARKS)
_SEPARATED = CallFormat("separated", _CALLS_BEGIN, _CALLS_END, _read_deepseek, _DEEPSEEK_MARKS)


def format_of(template: str) -> CallFormat | None:
    """The format of tool calls that a chat template teaches; None if it teaches none that is supported."""
    if TAGS.open in template:
        return _FUNCTIONS if "<function=" in template else _PAIRED if "<arg_key>" in template else TAGS
    if _MISTRAL in template:
        return _NAMED if _ARGS in template else _LIST
    if _CALLS_BEGIN in template:
        return _FENCES if "```json" in template else _SEPARATED
    if "tools" in template and '"parameters"' in template and '"name"' in template:
        return _OBJECT
    return None


# ---------------------------------------------------------------- grammars


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    form: CallFormat,
    several: bool,
    spacing: Mapping[str, Any],
    free: bool = False,
    special: Mapping[str, int] | None = None,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A Lark grammar for calls of these tools.

    Args:
        tools: in OpenAI's format, `{"type": "function", "function": {...}}`.
        form: format of the calls.
        several: allow several calls instead of exactly one.
        spacing: llguidance's options for JSON.
        free: also allow any text without a call.
        special: token ids of marks that are special tokens, which no text of a grammar matches.
        answer: schema of a JSON text that may stand instead of calls; not together with `free`.
    """
    special, rules, names = special or {}, list[str](), list[str]()
    other = " | answer" if answer is not None else ""
    if answer is not None:
        rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': dict(spacing)})}")
    for number, tool in enumerate(tools):
        names.append(f"call_{number}")
        rules += _one_call(names[-1], tool["function"], form, spacing, special)
    one = f"({' | '.join(names)})"
    if form.name == "object":
        words = ["start: call | words", r"words: /[^{](.|\n)*/"] if free else [f"start: call{other}"]
        return "\n".join([*words, f"call: {one}", *rules])
    start = _mark(form.open, special)
    if form.name == "list":
        body = f'" [" {one}' + (f' (", " {one})*' if several else "") + ' "]"'
    elif form.name == "named":
        body = one + (f" ({start} {one})*" if several else "")
    elif form.marks:
        body = one + (f' ("\\n" {one})*' if several else "") + f" {_mark(form.close, special)}"
    else:
        body = f'"\\n" {one} "\\n{form.close}"'
    # Calls in tags have a pair of marks each; those of the others stand between one pair.
    more = rf' ("\n" {start} {body})*' if several and not form.marks else ""
    calls = [f"start: {start} {body}{more}{other}"]
    return "\n".join([*(_start_free(form, start, body, more, special) if free else calls), *rules])


def _start_free(form: CallFormat, start: str, body: str, more: str, special: Mapping[str, int]) -> list[str]:
    """Rules for words, with or without calls after them."""
    if form.open in special:  # no text holds the mark
        return [f"start: WORDS | WORDS {start} {body}{more}", r"WORDS: /(.|\n)*/"]
    mark = re.escape(form.open).replace("/", r"\/")
    return [  # text without the mark, or text up to the mark and then a call
        f"start: WORDS | lead {body}{more}",
        rf"lead[lazy]: /(.|\n)*{mark}/",
        rf"WORDS: /(.|\n)*/ & ~/(.|\n)*{mark}(.|\n)*/",
    ]


def _one_call(
    rule: str, function: Mapping[str, Any], form: CallFormat, spacing: Mapping[str, Any], special: Mapping[str, int]
) -> list[str]:
    """Rules of one call without the marks around all calls; the first is named `rule`."""
    name, arguments = function["name"], function.get("parameters") or {"type": "object"}
    if form.name in ("functions", "pairs"):
        return _values_grammar(rule, name, arguments, form, spacing)
    if form.name in ("tags", "object", "list"):
        schema = _call_schema(name, arguments, "parameters" if form.name == "object" else "arguments")
        return [f"{rule}: %json {json.dumps({**schema, 'x-guidance': dict(spacing)})}"]
    values = f"{rule}_arguments: %json {json.dumps({**arguments, 'x-guidance': dict(spacing)})}"
    if form.name == "named":
        return [f"{rule}: {_quoted(name)} {_mark(_ARGS, special)} {rule}_arguments", values]
    begin, separator, end = (_mark(mark, special) for mark in (_CALL_BEGIN, _SEPARATOR, _CALL_END))
    if form.name == "separated":
        return [f"{rule}: {begin} {_quoted(name)} {separator} {rule}_arguments {end}", values]
    fenced = rf'{_quoted(name)} "\n```json\n" {rule}_arguments "\n```"'
    return [f'{rule}: {begin} "function" {separator} {fenced} {end}', values]


def _values_grammar(
    rule: str, name: str, arguments: Mapping[str, Any], form: CallFormat, spacing: Mapping[str, Any]
) -> list[str]:
    """A call whose parameters are written one by one, in the schema's order; optional ones may be left out."""
    around = {
        "functions": ("<parameter={}>\n", "\n</parameter>\n"),
        "pairs": ("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"),
    }[form.name]
    rules, parts = list[str](), list[str]()
    end = around[1].strip()
    # What the reader takes as an end may not stand in a text.
    ended = _pattern(f"(.|\n)*{around[1]}")
    once = _pattern(f"(.|\n)*({end}(.|\n)*{end}|{form.close})(.|\n)*")
    for number, (key, schema) in enumerate(arguments.get("properties", {}).items()):
        value = f"{rule}_{number}"
        wants = schema.get("type") if isinstance(schema, dict) else None
        if wants == "string" and "enum" in schema:
            rules.append(f"{value}: ({' | '.join(_quoted(each) for each in schema['enum'])}) {_quoted(around[1])}")
        elif wants == "string":
            rules += [f"{value}[lazy]: {value.upper()}", f"{value.upper()}: {ended} & ~{once}"]
        else:
            own = {**_alone(key, arguments), "x-guidance": dict(spacing)} if isinstance(schema, dict) else {}
            rules += [f"{value}: {value}_json {_quoted(around[1])}", f"{value}_json: %json {json.dumps(own)}"]
        part = f"{_quoted(around[0].format(key))} {value}"
        parts.append(part if key in arguments.get("required", ()) else f"({part})?")
    opening, closing = (f"<function={name}>\n", "</function>") if form.name == "functions" else (f"{name}\n", "")
    return [" ".join([f"{rule}: {_quoted(opening)}", *parts, *([_quoted(closing)] if closing else [])]), *rules]


def _call_schema(name: str, arguments: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: _moved(arguments, f"#/properties/{key}")},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _alone(key: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one parameter; with all of the tool's if it refers to them."""
    schema: dict[str, Any] = arguments["properties"][key]
    if '"$ref"' not in json.dumps(schema):
        return schema
    place = quote(key.replace("~", "~0").replace("/", "~1"), safe="~")
    return {"$ref": f"#/$defs/all/properties/{place}", "$defs": {"all": _moved(arguments, "#/$defs/all")}}


def _moved(schema: Any, place: str) -> Any:
    """A schema that becomes a part of another one, at `place`: what it refers to in itself is there too."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(refers := schema.get("$ref"), str) and refers.startswith("#"):
        moved["$ref"] = place + refers[1:]
    return moved


def _mark(mark: str, special: Mapping[str, int]) -> str:
    """A mark in a grammar: the special token, or its text."""
    return f"<[{special[mark]}]>" if mark in special else _quoted(mark)


def _pattern(pattern: str) -> str:
    """A regular expression in a grammar."""
    return "/" + pattern.replace("/", r"\/").replace("\n", r"\n") + "/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
