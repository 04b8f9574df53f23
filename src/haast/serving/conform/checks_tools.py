"""Checks of tool calls: present if required, with valid JSON arguments, whole and streamed."""

from __future__ import annotations

from typing import Any

from haast.serving.conform.answers import Answer, Call
from haast.serving.conform.base import Check, Theme, demand, fail, not_visible, short, silent
from haast.serving.conform.client import parsed
from haast.serving.conform.subject import Messages, Subject

_QUESTION = "What is the weather in Paris?"
_MOST = 96  # enough for a call whose JSON is written on several lines


def _tool(name: str, about: str, **properties: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": list(properties)}
    parameters["additionalProperties"] = False
    # Without `strict`, arguments only have to be JSON.
    function = {"name": name, "description": about, "parameters": parameters, "strict": True}
    return {"type": "function", "function": function}


_UNITS = ["celsius", "fahrenheit"]
_CITIES = ["Paris", "London", "Tokyo"]
_TOOLS = [
    _tool("get_weather", "Tells the weather.", city={"type": "string", "enum": _CITIES}, unit={"enum": _UNITS}),
    _tool("get_time", "Tells the time.", city={"type": "string", "enum": _CITIES}),
]
_NAMES = {"get_weather": {"city", "unit"}, "get_time": {"city"}}


def required(subject: Subject) -> str:
    """tool_choice "required"."""
    for fields in ({}, {"temperature": 1}):
        answer = subject.ask(_QUESTION, max_tokens=_MOST, tools=_TOOLS, tool_choice="required", **fields)
        _has_calls(answer, "tool_choice='required'")
        cut = answer.finish == "length"  # inside a further call; the calls before it are complete
        demand(cut or answer.finish == "tool_calls", f"finish_reason is {short(answer.finish)}, not 'tool_calls'")
    return f"calls {answer.first.calls[0].name}, arguments {short(answer.first.calls[0].arguments)}"


def by_name(subject: Subject) -> str:
    """tool_choice with the name of a tool."""
    choice = {"type": "function", "function": {"name": "get_time"}}
    answer = subject.ask(_QUESTION, max_tokens=_MOST, tools=_TOOLS, tool_choice=choice)
    _has_calls(answer, "tool_choice of get_time")
    names = {call.name for call in answer.first.calls}
    demand(names == {"get_time"}, f"{short(names)} was called instead of get_time")
    return "the tool that was named"


def none(subject: Subject) -> str:
    """tool_choice "none"."""
    answer = subject.ask(_QUESTION, max_tokens=_MOST, tools=_TOOLS, tool_choice="none")
    demand(not answer.first.calls, f"{answer.first.calls} with tool_choice='none'")
    demand(answer.text, "no text and no call")
    return "text without a call"


def in_a_stream(subject: Subject) -> str:
    """Calls joined from deltas."""
    fields = {"max_tokens": _MOST, "tools": _TOOLS, "tool_choice": "required"}
    whole = subject.ask(_QUESTION, **fields)
    if not whole.first.calls:
        not_visible("the whole answer has no calls either: see the check tool-required")
    streamed = subject.streamed(_QUESTION, **fields)
    _has_calls(streamed, "tool_choice='required' in a stream")
    demand(_pairs(whole) == _pairs(streamed), f"{short(_pairs(streamed))} streamed, {short(_pairs(whole))} whole")
    demand(streamed.finish == whole.finish, f"finish_reason {whole.finish!r}, streamed {streamed.finish!r}")
    return f"{len(streamed.first.calls)} call, the same as in the whole answer"


def result(subject: Subject) -> str:
    """A conversation that continues after a call."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"city": "Paris"}'}}
    messages: Messages = [
        {"role": "user", "content": "What time is it in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    answer = subject.ask(messages, tools=_TOOLS, tool_choice="none")
    demand(answer.text, "no text after a tool's result")
    return "a text follows a tool's result"


def _pairs(answer: Answer) -> list[tuple[str, Any]]:
    return [(call.name, parsed(call.arguments)) for call in answer.first.calls]


def _has_calls(answer: Answer, words: str) -> None:
    """Fail unless there are calls, and each is valid."""
    if not answer.first.calls:
        if answer.finish == "length" and not answer.text:
            not_visible(f"{words}: {_MOST} tokens were not enough for a call")
        silent(f"{words} gives no call, but {short(answer.text)}")
    for call in answer.first.calls:
        _check_call(call, words)
    ids = [call.id for call in answer.first.calls]
    demand(all(ids) and len(set(ids)) == len(ids), f"{words}: the calls' ids are {ids}")


def _check_call(call: Call, words: str) -> None:
    if call.name not in _NAMES:
        fail(f"{words}: calls {short(call.name)}, which is not one of the tools")
    arguments = parsed(call.arguments)
    demand(isinstance(arguments, dict), f"{words}: the arguments are not a JSON object: {short(call.arguments)}")
    demand(_NAMES[call.name] == set(arguments), f"{words}: the arguments of {call.name} are {short(arguments)}")
    good = arguments["city"] in _CITIES and arguments.get("unit", _UNITS[0]) in _UNITS
    demand(good, f"{words}: the arguments do not match their schema: {short(arguments)}")


THEME = Theme(
    "tools",
    (
        Check("tool-required", ("A3",), "tool_choice 'required' gives a call with valid arguments", required),
        Check("tool-named", ("A3",), "tool_choice with a name calls this tool", by_name),
        Check("tool-none", ("A3",), "tool_choice 'none' gives no call", none),
        Check("tool-stream", ("A3",), "the deltas of a stream add up to the same call", in_a_stream),
        Check("tool-result", ("A3",), "a conversation continues after a tool's result", result),
    ),
)
