"""OpenAI's Responses API, stateless: an answer as items and as named events.

Owns the translation of a Responses request into a chat completion request, and of an answer into items. Keeps nothing
between requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from haast.serving.api_errors import ApiError, refused
from haast.serving.conversation import joined
from haast.serving.generation import Delta, Generation
from haast.serving.plan import check_unknown
from haast.serving.schema import ChatRequest, InputItem, NamedResponseTool, ResponsesRequest
from haast.serving.shapes import ChatShape, Json
from haast.serving.streaming import api_error, event, join, merged

_STATE = "this server stores no answers: send all items, and store: false"


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """Translate into a chat completion request. Raises ApiError for unsupported fields, and those that need state."""
    check_unknown(body)
    if body.store:
        raise refused("store", _STATE)
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += [_message(item) for item in body.input]
    form = body.text.format
    wanted: Json | None = None
    if form.type == "json_schema":
        wanted = {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_, "strict": form.strict}}
    elif form.type == "json_object":
        wanted = {"type": form.type}
    choice: Any = body.tool_choice
    if isinstance(choice, NamedResponseTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    names = ("name", "description", "parameters", "strict")
    tools = [
        {"type": "function", "function": {name: getattr(tool, name) for name in names}} for tool in body.tools or ()
    ]
    shared = {name: getattr(body, name) for name in ("model", "temperature", "top_p", "top_k", "min_p", "seed")}
    effort = None if body.reasoning is None else body.reasoning.effort
    return ChatRequest.model_validate(
        {
            **shared,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "stream": body.stream,
            "response_format": wanted,
            "tools": tools or None,
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "logprobs": body.top_logprobs is not None,
            "top_logprobs": body.top_logprobs,
            "reasoning_effort": effort,
            "haast": body.haast.model_dump(),
        }
    )


def _message(item: InputItem) -> Json:
    if item.type == "function_call":
        call = {"name": item.name or "", "arguments": item.arguments or "{}"}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "function": call}]}
    if item.type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output, "tool")}
    if item.type != "message" or item.role is None:
        words = f"input holds an item of type {item.type!r}: give messages, function_call and function_call_output"
        raise ApiError(400, words, param="input", code="invalid_value")
    return {"role": item.role, "content": joined(item.content, item.role)}


class Response(ChatShape):
    """JSON of one response."""

    def items(self, delta: Delta, status: str) -> list[Json]:
        """The items of an answer: reasoning, a message, calls."""
        items: list[Json] = []
        if delta.reasoning:
            items.append(self._reasoning(delta.reasoning))
        if delta.content or not delta.calls:
            items.append(self._message(delta, status))
        for number, call in enumerate(delta.calls):
            fields = self._call(0, number, call)
            items.append(
                {
                    "type": "function_call",
                    "id": f"fc_{fields['id'][5:]}",
                    "call_id": fields["id"],
                    "name": call.name,
                    "arguments": call.arguments,
                    "status": status,
                }
            )
        return items

    def body(self, status: str, output: Sequence[Json] = (), generations: Sequence[Generation] = ()) -> Json:
        """The response object with a status and the items so far."""
        cut = status == "incomplete"
        answer: Json = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.service.name,
            "output": list(output),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": self.plan.sampling.temperature,
            "top_p": self.plan.sampling.top_p,
            "max_output_tokens": self.plan.max_tokens,
            "tool_choice": "auto",
            "tools": [],
            "store": False,
        }
        if generations:
            usage = self.usage(generations)
            answer["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens_details": usage["completion_tokens_details"],
                "haast": usage["haast"],
            }
        return answer

    def whole(self, deltas: Sequence[Delta], generations: Sequence[Generation]) -> Json:
        status = _status(generations[0])
        return self.body(status, self.items(deltas[0], status), generations)

    def _reasoning(self, text: str) -> Json:
        part = {"type": "reasoning_text", "text": text}
        return {"type": "reasoning", "id": f"rs_{self.id[5:]}", "summary": [], "content": [part]}

    def _message(self, delta: Delta, status: str) -> Json:
        return {
            "type": "message",
            "id": f"msg_{self.id[5:]}",
            "role": "assistant",
            "status": status,
            "content": [self._part_of(delta)],
        }

    def _part_of(self, delta: Delta) -> Json:
        entries = self._logprobs(delta, always=True)
        logprobs = [] if entries is None else entries["content"]
        return {"type": "output_text", "text": delta.content, "annotations": [], "logprobs": logprobs}


def _status(generation: Generation) -> str:
    return "incomplete" if generation.finish_reason == "length" else "completed"


async def response_events(response: Response, generations: Sequence[Generation]) -> AsyncGenerator[bytes, None]:
    """The response as a stream of named, numbered events."""
    number = 0

    def numbered(name: str, fields: Json, long: bool) -> bytes:
        nonlocal number
        number += 1
        return event({"type": name, "sequence_number": number - 1, **fields}, name, long)

    def short(name: str, **fields: Any) -> bytes:
        return numbered(name, fields, long=False)

    yield short("response.created", response=response.body("in_progress"))
    yield short("response.in_progress", response=response.body("in_progress"))
    try:
        delta, opened = Delta(), list[str]()  # kinds of items that were opened, in order
        async with aclosing(merged(generations)) as parts:
            async for _, part in parts:
                if part is None:
                    continue
                join(delta, part)
                for kind, text in (("reasoning", part.reasoning), ("message", part.content)):
                    if not text:
                        continue
                    if kind not in opened:
                        opened.append(kind)
                        for name, fields in _opening(response, kind, len(opened) - 1):
                            yield short(name, **fields)
                    name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
                    place = {"output_index": opened.index(kind), "content_index": 0, "item_id": _id(response, kind)}
                    yield short(name, delta=text, **place, **({"logprobs": []} if kind == "message" else {}))
        status = _status(generations[0])

        def final_events() -> list[bytes]:
            items = response.items(delta, status)
            order = sorted(items, key=lambda item: (*opened, item["type"]).index(item["type"]))
            events = [
                numbered(name, fields, long=True)
                for index, item in enumerate(order)
                for name, fields in _closing(response, item, index, item["type"] in opened)
            ]
            ended = {"response": response.body(status, order, generations)}
            return [*events, numbered(f"response.{status}", ended, long=True)]

        # In a thread: these events repeat the whole text and all logprobs.
        for each in await asyncio.to_thread(final_events):
            yield each
    except Exception as error:
        problem = api_error(error)
        failed = response.body("failed") | {"error": {"code": problem.code or "error", "message": problem.message}}
        yield short("response.failed", response=failed)


def _id(response: Response, kind: str) -> str:
    return f"{'msg' if kind == 'message' else 'rs'}_{response.id[5:]}"


def _opening(response: Response, kind: str, index: int) -> list[tuple[str, Json]]:
    """Events that open an item."""
    empty = Delta()
    item = response.items(empty, "in_progress")[0] if kind == "message" else None
    if item is None:
        item = {"type": "reasoning", "id": _id(response, kind), "summary": [], "content": []}
        return [("response.output_item.added", {"output_index": index, "item": item})]
    part = item["content"][0]
    item = item | {"content": []}
    where = {"item_id": item["id"], "output_index": index, "content_index": 0}
    return [
        ("response.output_item.added", {"output_index": index, "item": item}),
        ("response.content_part.added", {**where, "part": part}),
    ]


def _closing(response: Response, item: Json, index: int, opened: bool) -> list[tuple[str, Json]]:
    """Events that close an item, after those that open it if no delta opened it before."""
    events: list[tuple[str, Json]] = []
    where = {"item_id": item.get("id"), "output_index": index}
    if item["type"] == "function_call":
        started = item | {"arguments": "", "status": "in_progress"}
        events = [
            ("response.output_item.added", {"output_index": index, "item": started}),
            ("response.function_call_arguments.delta", {**where, "delta": item["arguments"]}),
            ("response.function_call_arguments.done", {**where, "arguments": item["arguments"], "name": item["name"]}),
        ]
    elif not opened:
        events = _opening(response, item["type"], index)
    if item["type"] == "message":
        part = item["content"][0]
        here = {**where, "content_index": 0}
        done = {**here, "text": part["text"], "logprobs": part["logprobs"]}
        events += [("response.output_text.done", done), ("response.content_part.done", {**here, "part": part})]
    elif item["type"] == "reasoning":
        done = {**where, "content_index": 0, "text": item["content"][0]["text"]}
        events.append(("response.reasoning_text.done", done))
    return [*events, ("response.output_item.done", {"output_index": index, "item": item})]
