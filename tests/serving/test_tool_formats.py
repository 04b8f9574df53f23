"""Each way of writing tool calls: found in a template, read, and bound by a grammar."""

from __future__ import annotations

import json
import time
from typing import Any

import llguidance.hf
import pytest
from chats import bytes_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from haast.serving.structured import SPACING
from haast.serving.tool_formats import TAGS, CallFormat, ToolCall, call_grammar, format_of
from haast.serving.tools import CallReader
from haast.text import TextStream

_TOOL = "\uff5ctool\u2581"
BEGIN, END = f"<{_TOOL}calls\u2581begin\uff5c>", f"<{_TOOL}calls\u2581end\uff5c>"
ONE, DONE, SEP = f"<{_TOOL}call\u2581begin\uff5c>", f"<{_TOOL}call\u2581end\uff5c>", f"<{_TOOL}sep\uff5c>"
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
TEMPLATES = {
    "tags": "{{ tools }} <tool_call>",
    "functions": "{{ tools }} <tool_call>\n<function=name>",
    "pairs": "{{ tools }} <tool_call>{name}<arg_key>",
    "object": '{% if tools %} {"name": function name, "parameters": dictionary} {% endif %}',
    "list": "{{ tools }} [TOOL_CALLS]",
    "named": "{{ tools }} [TOOL_CALLS]{{ name }}[ARGS]",
    "fenced": f"{{{{ tools }}}} {BEGIN}{ONE}function{SEP}name\n```json",
    "separated": f"{{{{ tools }}}} {BEGIN}{ONE}name{SEP}",
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "at": {"type": "string"},
        "far": {"type": "integer"},
        "how": {"type": "string", "enum": ["up", "on"]},
    },
    "required": ["at"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
WAIT = {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}}
SCHEMAS: Any = {"look": SCHEMA["properties"], "wait": {}}
FIRST, SECOND = {"at": "12 <b>", "far": 3}, {"at": "sky"}
_JSON = [json.dumps(each) for each in (FIRST, SECOND)]
# The same two calls as models write them.
WRITTEN = {
    "tags": "\n".join(f'<tool_call>\n{{"name": "look", "arguments": {each}}}\n</tool_call>' for each in _JSON),
    "functions": "<tool_call>\n<function=look>\n<parameter=at>\n12 <b>\n</parameter>\n<parameter=far>\n3\n</parameter>"
    "\n</function>\n</tool_call>\n<tool_call>\n<function=look>\n<parameter=at>\nsky\n</parameter>\n</function>\n"
    "</tool_call>",
    "pairs": "<tool_call>\nlook\n<arg_key>at</arg_key>\n<arg_value>12 <b></arg_value>\n<arg_key>far</arg_key>\n"
    "<arg_value>3</arg_value>\n\n</tool_call>\n<tool_call>\nlook\n<arg_key>at</arg_key>\n<arg_value>sky</arg_value>\n\n"
    "</tool_call>",
    "list": "[TOOL_CALLS] [" + ", ".join(f'{{"name": "look", "arguments": {each}}}' for each in _JSON) + "]",
    "named": "".join(f"[TOOL_CALLS]look[ARGS]{each}" for each in _JSON),
    "fenced": BEGIN + "\n".join(f"{ONE}function{SEP}look\n```json\n{each}\n```{DONE}" for each in _JSON) + END,
    "separated": BEGIN + "\n".join(f"{ONE}look{SEP}{each}{DONE}" for each in _JSON) + END,
}
CALLS = [ToolCall("look", json.dumps(each)) for each in (FIRST, SECOND)]


def form(name: str) -> CallFormat:
    found = format_of(TEMPLATES[name])
    assert found is not None and found.name == name
    return found


def read(text: str, of: CallFormat | None, sizes: Any = None) -> list[str | ToolCall]:
    reader, at, parts = CallReader(of, SCHEMAS), 0, list[str | ToolCall]()
    while at < len(text):
        size = len(text) if sizes is None else sizes()
        parts += reader.push(text[at : at + size])
        at += size
    merged: list[str | ToolCall] = []
    for part in [*parts, *reader.finish()]:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part:
            merged.append(part)
    return merged


def test_a_template_without_tools_has_no_format() -> None:
    assert format_of("{{ messages }}") is None


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_calls_are_read_as_written(name: str) -> None:
    assert read(WRITTEN[name], form(name)) == CALLS
    assert read("I look. " + WRITTEN[name], form(name)) == ["I look.", *CALLS]
    assert read("no calls [TOOL", form(name)) == ["no calls [TOOL"]


def test_an_object_is_a_whole_answer() -> None:
    assert read('{"name": "look", "parameters": {"at": "sky"}}', form("object")) == CALLS[1:]
    assert read('so {"name": "look", "parameters": {}}', form("object")) == ['so {"name": "look", "parameters": {}}']


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_what_is_no_call_stays_text(name: str) -> None:
    of = form(name)
    for text in (
        f"{of.open}go there{of.close}",
        f"{of.open}{{}}{of.close}",
        f"Well {of.open}",
        WRITTEN[name][:-1] + "\u00e9",
    ):
        parts = read(text, of)
        assert "".join(each for each in parts if isinstance(each, str)).strip(), (text, parts)
        assert len(parts) == 1 or name in ("tags", "functions", "pairs")


def test_other_ways_between_the_same_tags_are_read_too() -> None:
    assert read(WRITTEN["tags"], form("functions")) == read(WRITTEN["functions"], form("tags")) == CALLS
    assert read("<tool_call>nobody\n<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", form("pairs")) != []


@pytest.mark.parametrize("arguments", ['{"at": NaN}', '{"at": -Infinity}', '{"at": 1e999}'])
def test_numbers_that_json_lacks_are_no_arguments(arguments: str) -> None:
    text = f'<tool_call>{{"name": "look", "arguments": {arguments}}}</tool_call>'
    assert read(text, TAGS) == [text]


@pytest.mark.parametrize("sizes", [None, lambda: 1])
def test_a_string_of_a_call_may_hold_the_mark_that_ends_calls(sizes: Any) -> None:
    held = json.dumps({"at": 'so: "</tool_call>" and \\ </tool_call>'})
    text = f'<tool_call>{{"name": "look", "arguments": {held}}}</tool_call>'
    assert read(text + " " + text, TAGS, sizes) == [ToolCall("look", held)] * 2
    # A string that is never closed ends with the call, and what follows is read.
    broken = '<tool_call>{"name": "look, "arguments": {}}</tool_call>'
    assert read(broken + " Hm. " + text + " So.", TAGS, sizes) == [broken + " Hm.", ToolCall("look", held), " So."]
    assert read(broken, TAGS, sizes) == [broken]
    # Values that are text may have quotes as they like.
    quote = '<tool_call>\n<function=look>\n<parameter=at>\n6" wide\n</parameter>\n</function>\n</tool_call>'
    assert read(quote, TAGS, sizes) == [ToolCall("look", json.dumps({"at": '6" wide'}))]


def test_half_a_surrogate_pair_stays_escaped() -> None:
    call = read('<tool_call>{"name": "look", "arguments": {"at": "\\ud83d \\ud83d\\ude00"}}</tool_call>', TAGS)[0]
    assert call == ToolCall("look", '{"at": "\\ud83d \U0001f600"}')


def test_an_object_without_arguments_is_no_call() -> None:
    assert read('{"name": "Bob", "age": 3}', form("object")) == ['{"name": "Bob", "age": 3}']


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("named", "[TOOL_CALLS]look" + " " * 100_000 + "x"),
        ("named", "[TOOL_CALLS]look[CALL_ID]" + " " * 100_000 + "x"),
        ("named", "[TOOL_CALLS]look" + " " * 100_000 + "{x"),
        ("tags", '<tool_call>{"name": "' + "</tool_call>" * 20_000),
        ("pairs", "<tool_call>look" + "<arg_key>a</arg_key><arg_value>" * 20_000 + "</tool_call>"),
    ],
)
def test_what_is_nearly_a_call_is_read_in_linear_time(name: str, text: str) -> None:
    start = time.process_time()
    assert read(text, form(name)) == [text]
    assert time.process_time() - start < 5, "backtracking takes minutes here"


@given(st.text(alphabet='<>tool_cal/{}"[]ARGS=name:x\n', max_size=40), st.sampled_from(sorted(TEMPLATES)), st.data())
def test_calls_are_read_alike_however_a_text_is_cut(text: str, name: str, data: st.DataObject) -> None:
    written = WRITTEN.get(name, '{"name": "look", "parameters": {}}')
    whole = data.draw(st.sampled_from([text, text + written, written + text, text + written + " " + written + text]))
    for of in (form(name), None):
        assert read(whole, of, lambda: data.draw(st.integers(1, 9))) == read(whole, of)


# ---------------------------------------------------------------- grammars


@pytest.fixture(scope="module")
def guided() -> Any:
    tokenizer = bytes_tokenizer("x", "<|im_end|>", ["<|im_end|>", *SPECIAL])
    return tokenizer, llguidance.hf.from_tokenizer(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def fits(guided: Any, text: str, name: str, **options: Any) -> bool:
    tokenizer, tokens = guided
    special = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in form(name).marks if mark in SPECIAL}
    tools, several = options.pop("tools", [LOOK, WAIT]), options.pop("several", True)
    grammar = call_grammar(tools, form(name), several, SPACING, special=special, **options)
    matcher = LLMatcher(tokens, llguidance.grammar_from("grammar", grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_answer_may_be_calls_or_follow_its_own_schema(guided: Any, name: str) -> None:
    schema = {"type": "object", "properties": {"blue": {"type": "boolean"}}, "required": ["blue"]}
    text = WRITTEN.get(name, '{"name": "look", "parameters": {"at": "sky"}}')
    assert fits(guided, text, name, answer=schema) and fits(guided, '{"blue": true}', name, answer=schema)
    assert not fits(guided, "words", name, answer=schema) and not fits(guided, '{"blue": 1}', name, answer=schema)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_grammars_take_the_calls_of_their_format_only(guided: Any, name: str) -> None:
    text = WRITTEN[name]
    assert fits(guided, text, name)
    assert not fits(guided, text, name, several=False), "two calls where one is wanted"
    assert not fits(guided, "I look. " + text, name) and not fits(guided, "words", name)
    assert fits(guided, "I look. " + text, name, free=True) and fits(guided, "words", name, free=True)
    assert not fits(guided, text.replace("look", "leap"), name), "a tool that is not there"
    assert not fits(guided, text.replace("3", '"x"'), name), "far is an integer"
    assert not fits(guided, text.replace("12 <b>", "12", 1).replace("at", "to", 1), name), "no such parameter"


@pytest.mark.parametrize("name", ["functions", "pairs"])
def test_a_text_may_not_hold_the_mark_that_ends_it(guided: Any, name: str) -> None:
    """Texts that the grammar takes are read as calls."""
    mark = {"functions": "</parameter>", "pairs": "</arg_value>"}[name]
    one = WRITTEN[name].partition("\n<tool_call>")[0]
    assert fits(guided, one.replace("<b>", "</b>"), name)
    for inside in (mark, "</tool_call>"):
        assert not fits(guided, one.replace("<b>", inside + " b"), name)


@pytest.mark.parametrize(
    "written",
    [
        'tags: <tool_call>\n{"name": "look", "arguments": {"a": VALUE}}\n</tool_call>',
        "functions: <tool_call>\n<function=look>\n<parameter=a>\nVALUE\n</parameter>\n</function>\n</tool_call>",
        "pairs: <tool_call>\nlook\n<arg_key>a</arg_key>\n<arg_value>VALUE</arg_value>\n\n</tool_call>",
        'named: [TOOL_CALLS]look[ARGS]{"a": VALUE}',
        'object: {"name": "look", "parameters": {"a": VALUE}}',
    ],
)
@pytest.mark.parametrize(
    ("refers", "right", "wrong"),
    [("#/$defs/n", "1", "true"), ("#/properties/b~1 c", "true", "1"), ("#", '{"b/ c": true}', '{"b/ c": 1}')],
)
def test_references_within_the_parameters(guided: Any, written: str, refers: str, right: str, wrong: str) -> None:
    properties = {"a": {"$ref": refers.replace(" ", "%20")}, "b/ c": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "$defs": {"n": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    name, _, text = written.partition(": ")
    assert fits(guided, text.replace("VALUE", right), name, tools=tools)
    assert not fits(guided, text.replace("VALUE", wrong), name, tools=tools)


def test_marks_that_are_special_tokens_keep_their_text() -> None:
    tokenizer = bytes_tokenizer("x", "<|im_end|>", ["<|im_end|>", *SPECIAL])
    ids = tokenizer(WRITTEN["named"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    texts = []
    marks: Any = tokenizer.convert_tokens_to_ids(SPECIAL)
    none: list[int] = []
    for shown in (marks, none):
        stream = TextStream(tokenizer, shown=shown)
        texts.append("".join([*map(stream.push, ids), stream.finish()]))
    assert texts[0] == WRITTEN["named"] and "[ARGS]" not in texts[1]
    assert read(texts[0], form("named")) == CALLS


def test_templates_without_tools_are_taught_tags() -> None:
    assert TAGS.name == "tags" and read(WRITTEN["tags"], TAGS) == CALLS
