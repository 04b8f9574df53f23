"""Grammars, reasoning and tool calls at every offset of a block: valid, and the same with and without drafts.

`Scripted` makes the tiny model say a given text, so that boundaries (the end of a reasoning, of a call, of a grammar)
fall where the test wants them; the drafter's mistakes then cut its blocks at every place around them.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from serving import Json, Scripted, client_of, learn, run, tiny_service
from test_serving_same import CHAT, SCHEMA, TOOL, WAY, plain, streamed

from haast.serving.service import Service
from haast.serving.structured import Gate, Grammars

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking is false %}<think>\n{% endif %}"
    "{% endif %}{# </think> <tool_call> #}"
)
PART: Json = {"type": "object", "additionalProperties": False}
LEAF: Json = {"$ref": "#/$defs/leaf"}
jsonschema = pytest.importorskip("jsonschema", reason="it comes with haast[dev]")
SCHEMAS: list[Json] = [
    SCHEMA,
    {"enum": ["a", 1, None, {"x": [True]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[A-C]{2}-[0-9]{3}$"},
    {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 7}, {"const": "none"}]},
    {
        "type": "object",
        "properties": {"in": LEAF, "out": {"type": "array", "items": LEAF, "maxItems": 2}},
        "required": ["in", "out"],
        "additionalProperties": False,
        "$defs": {"leaf": {**PART, "properties": {"v": {"enum": [1, 2]}}, "required": ["v"]}},
    },
]


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service()


async def both(service: Service, body: Json) -> Json:
    """The answer of vanilla, after drafting gave the same, whole and streamed, several times with other mistakes."""
    async with client_of(service) as client:
        vanilla = await client.post(CHAT, json={**body, "haast": {"drafter": "none"}})
        assert vanilla.status_code == 200, vanilla.text
        expected = plain(vanilla.json())
        await learn(service, CHAT, body)
        for turn in range(2):
            service.engine("auto").drafter.turn = turn  # type: ignore[attr-defined]  # other mistakes
            whole = await client.post(CHAT, json=body)
            assert plain(whole.json()) == expected
            assert await streamed(client, CHAT, body) == expected
    return expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_json_is_valid_and_vanillas(service: Service, schema: Json, temperature: float) -> None:
    body: Json = {
        "messages": [{"role": "user", "content": "JSON"}], "temperature": temperature, "seed": 7, "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }  # fmt: skip
    (choice,) = run(both(service, body))["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_forced_tokens_are_drafted_for_free(service: Service) -> None:
    """What was said before is drafted too, but the names were not: nearly all that is accepted is the grammar's."""
    names = [f"a_rather_long_name_{n}" for n in range(4)]
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in names}, "required": names,
              "additionalProperties": False}  # fmt: skip
    body: Json = {
        "messages": [{"role": "user", "content": "JSON"}], "temperature": 1, "seed": 7, "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }  # fmt: skip

    async def tau(more: Json) -> float:
        async with client_of(service) as client:
            return float((await client.post(CHAT, json=body | more)).json()["usage"]["haast"]["tau"])

    assert run(tau({"haast": {"drafter": "suffix"}})) > 3
    assert run(tau({"haast": {"drafter": "none"}})) == 1
    assert run(tau({"haast": {"max_nodes": 2}})) <= 2


TEXTS = {
    "reasoning": "I think so, since <b> it is.\n</think>\n\nHe",
    "cut off": "I think and think",
    "closed at once": "</think>Yes.",
    "marks within": "a </thin b </think> c </think> d",
}


@pytest.mark.parametrize("name", TEXTS)
def test_reasoning_is_divided(name: str) -> None:
    text = TEXTS[name]
    service = thinking(text)
    body: Json = {"messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 40}
    found = run(both(service, body))
    reasoning, mark, answer = text.partition("</think>")
    message = found["choices"][0]["message"]
    assert message["content"] == answer if mark else message["content"] == ""
    assert message.get("reasoning_content", "") == reasoning
    details = found["usage"]["completion_tokens_details"]
    assert 0 <= details["reasoning_tokens"] <= found["usage"]["completion_tokens"]


@pytest.mark.parametrize("words", ["", "so it is", "\u6728 \U0001f600 \u00e9"])
def test_a_grammar_begins_after_the_reasoning(words: str) -> None:
    """The script says no JSON at all after the mark: the grammar makes it."""
    service = thinking(f"{words}</think>\nno JSON here, on and on and on, for ever and ever and ever")
    body: Json = {
        "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMAS[0]}},
    }  # fmt: skip
    message = run(both(service, body))["choices"][0]["message"]
    assert message.get("reasoning_content", "") == words
    jsonschema.validate(json.loads(message["content"]), SCHEMAS[0])


def test_a_grammar_begins_at_once_where_reasoning_is_off() -> None:
    service = thinking("no JSON here, on and on")
    body: Json = {
        "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 100,
        "chat_template_kwargs": {"enable_thinking": False}, "choice": ["yes", "no"],
    }  # fmt: skip
    message = run(both(service, body))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "no"}


ARGUMENTS = '{"name": "go", "arguments": {"to": "here"}}'
CALLS = {
    "one": f"<tool_call>\n{ARGUMENTS}\n</tool_call>",
    "words and one": f"I look. <tool_call>{ARGUMENTS}</tool_call>",
    "two": f"<tool_call>\n{ARGUMENTS}\n</tool_call>\n<tool_call>{ARGUMENTS}</tool_call>",
    "closed and opened in one breath": f"<tool_call>{ARGUMENTS}</tool_call><tool_call>{ARGUMENTS}</tool_call> done",
    "never closed": f"Well <tool_call>{ARGUMENTS}",
    "none": "Well <tool_ca is no call",
    "no JSON": "<tool_call>go there</tool_call>",
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_come_out_of_any_blocks(service: Service, name: str) -> None:
    script = CALLS[name]
    scripted = Scripted.of(service, script)
    body: Json = {
        "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 90, "tools": [WAY],
    }  # fmt: skip
    choice = run(both(scripted, body))["choices"][0]
    whole = script.count("</tool_call>") if "JSON" not in name else 0
    calls = choice["message"].get("tool_calls", [])
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"to": "here"}] * whole
    assert (choice["finish_reason"] == "tool_calls") == bool(whole)
    if not whole:
        assert choice["message"]["content"] == script


def test_strict_tools_bind_only_what_is_called(service: Service) -> None:
    body: Json = {
        "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 200, "tools": [TOOL],
        "parallel_tool_calls": False,
    }  # fmt: skip
    free = run(both(Scripted.of(service, "No call is needed."), body))["choices"][0]
    assert free["message"] == {"role": "assistant", "content": "No call is needed."}
    called = run(both(Scripted.of(service, 'I <tool_call>\n{"name": "look", "arguments": {"nonsense": 1}}'), body))
    choice = called["choices"][0]
    assert choice["message"]["content"] == "I" and choice["finish_reason"] == "tool_calls"
    jsonschema.validate(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]), SCHEMA)


def test_with_tools_and_a_format_an_answer_is_one_or_the_other(service: Service) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMAS[0]}}
    body: Json = {
        "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 200, "tools": [WAY],
        "response_format": form,
    }  # fmt: skip
    choice = run(both(Scripted.of(service, "{ no JSON follows here, on and on"), body))["choices"][0]
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMAS[0])
    choice = run(both(Scripted.of(service, f"<tool_call>\n{ARGUMENTS}\n</tool_call>"), body))["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
    forced: Json = {"tool_choice": "required"}
    choice = run(both(Scripted.of(service, f"<tool_call>\n{ARGUMENTS}\n</tool_call>"), body | forced))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stop", [" sky", "sky is", "is b", "\n", "The"])
def test_stop_strings_at_every_offset(service: Service, stop: str, keep: bool) -> None:
    script = "The sky is blue.\nThe sea is blue."
    body: Json = {
        "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 40, "stop": stop,
        "include_stop_str_in_output": keep, "logprobs": True,
    }  # fmt: skip
    choice = run(both(Scripted.of(service, script), body))["choices"][0]
    before = script.partition(stop)[0]
    assert choice["message"]["content"] == before + (stop if keep else "")
    tokens = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert tokens.startswith(before) and script.startswith(tokens), "no logprob of a token that was cut off whole"


def test_least_lengths_hold_ends_back(service: Service) -> None:
    for least in range(9):
        body: Json = {
            "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": 20,
            "min_tokens": least,
        }  # fmt: skip
        found = run(both(Scripted.of(service, "Yes, so"), body))
        length = found["usage"]["completion_tokens"]
        assert length == (4 if least < 4 else length) and length >= least


def test_exact_lengths(service: Service) -> None:
    for length in (1, 2, 3, 5, 8):
        body: Json = {
            "messages": [{"role": "user", "content": "?"}], "temperature": 0, "seed": 1, "max_tokens": length,
            "ignore_eos": True,
        }  # fmt: skip
        found = run(both(Scripted.of(service, "Yes, so"), body))
        assert (found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]) == (length, "length")


def test_a_matcher_follows_any_walk(service: Service) -> None:
    """Told any histories in any order, as interrupted steps tell them, a guide masks as a fresh one does."""
    words, limits = service.tokenizer, service.limits
    grammars = Grammars(words, limits.vocab_size, limits.ends)
    grammar = grammars.json_schema(SCHEMA, "response_format")
    text = words.encode('{"name": "ab", "kind": "dark blue", "sizes": [1, 22]}', add_special_tokens=False)
    thought = words.encode("hm, so </think>", add_special_tokens=False)
    scores, coins = torch.zeros(1, limits.vocab_size, dtype=torch.float64), random.Random(3)
    for before in (list[int](), thought):
        walker = grammars.guide(grammar, 2, Gate(words, "</think>", True) if before else None)
        whole: list[int] = [*before, *text, limits.ends[0], 5, 5]
        for _ in range(60):
            length = coins.randrange(len(whole) + 1)
            history = torch.tensor([[0, 0, *whole[:length]]])
            fresh = grammars.guide(grammar, 2, Gate(words, "</think>", True) if before else None)
            assert torch.equal(walker(history, scores), fresh(history, scores))
            assert walker.paths(history[0].tolist(), [], 16) == fresh.paths(history[0].tolist(), [], 16)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"regex": "(ab"}, "regex can't be used"),
        ({"grammar": "start: nothing_here"}, "grammar can't be used"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objec"}}}}, "response_format"),
        ({"choice": []}, "holds no text"),
        ({"regex": "a", "choice": ["b"]}, "ask for several"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens and regex together"),
        ({"regex": "a", "tools": [WAY]}, "regex and tools together"),
        ({"grammar": "start: " + "x" * 300_000}, "300007 characters"),
    ],
)
def test_wrong_grammars_are_refused(service: Service, field: Json, words: str) -> None:
    async def ask() -> Any:
        async with client_of(service) as client:
            return await client.post(CHAT, json={"messages": [{"role": "user", "content": "?"}], **field})

    reply = run(ask())
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text


def thinking(script: str) -> Service:
    """A service whose template opens a reasoning, and whose model says the script."""
    return Scripted.of(tiny_service(template=THINKING), script)
