"""What a reply says, whole or streamed, chat or plain completion. Owns the one form in which checks compare answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from haast.serving.conform.base import demand, fail, short
from haast.serving.conform.client import Reply, Streamed


@dataclass
class Call:
    """One tool call; `arguments` is JSON as text."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class Choice:
    """One choice. `entries` are a chat's logprobs, `legacy` a plain completion's; None where there are none."""

    text: str = ""
    finish: str | None = None
    calls: list[Call] = field(default_factory=list)
    entries: list[dict[str, Any]] | None = None
    legacy: dict[str, Any] | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Answer:
    """All choices of one reply by their index; `usage` is empty where nothing was told."""

    choices: dict[int, Choice]
    usage: dict[str, Any]
    body: dict[str, Any]

    @property
    def first(self) -> Choice:
        """The choice that everybody reads."""
        return self.choices[min(self.choices)]

    @property
    def text(self) -> str:
        """Its text."""
        return self.first.text

    @property
    def finish(self) -> str | None:
        """Why it ended."""
        return self.first.finish

    @property
    def tokens(self) -> int:
        """Tokens that it took, as the server counts; fails where it does not."""
        count = self.usage.get("completion_tokens")
        demand(isinstance(count, int), f"usage.completion_tokens is {short(count)}, no count")
        return int(count or 0)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, as the server counts; fails where it does not."""
        count = self.usage.get("prompt_tokens")
        demand(isinstance(count, int), f"usage.prompt_tokens is {short(count)}, no count")
        return int(count or 0)


def whole_answer(reply: Reply) -> Answer:
    """A reply that came in one piece; fails where it is none."""
    body = reply.body
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
        fail(f"the answer has no choices: {short(reply.text)}")
    choices = dict[int, Choice]()
    for raw in body["choices"]:
        choice = choices.setdefault(_index(raw), Choice())
        _add(choice, raw, raw.get("message") or {})
    return Answer(choices, body.get("usage") or {}, body)


def streamed_answer(streamed: Streamed) -> Answer:
    """What the chunks of a stream add up to; fails where that is nothing."""
    choices, usage, first = dict[int, Choice](), dict[str, Any](), dict[str, Any]()
    for chunk in streamed.chunks:
        first = first or chunk
        usage = chunk.get("usage") or usage
        for raw in chunk.get("choices") or ():
            _add(choices.setdefault(_index(raw), Choice()), raw, raw.get("delta") or {})
    if not choices:
        told = " ".join(event.data for event in streamed.data)
        fail(f"the stream has no choices: {short(told)}")
    return Answer(choices, usage, first)


def _index(raw: Any) -> int:
    demand(isinstance(raw, dict) and isinstance(raw.get("index"), int), f"a choice without an index: {short(raw)}")
    return int(raw["index"])


def _add(choice: Choice, raw: dict[str, Any], said: dict[str, Any]) -> None:
    """Take a choice, or one chunk's part of it."""
    choice.text += said.get("content") or raw.get("text") or ""
    choice.reasoning += said.get("reasoning_content") or said.get("reasoning") or ""
    choice.finish = raw.get("finish_reason") or choice.finish
    for number, call in enumerate(said.get("tool_calls") or ()):
        _add_call(choice.calls, call.get("index", number), call)
    told = raw.get("logprobs") or {}
    if isinstance(told.get("content"), list):
        choice.entries = (choice.entries or []) + told["content"]
    elif "tokens" in told:
        before = choice.legacy or {}
        choice.legacy = {name: _joined(before.get(name), told.get(name)) for name in {*before, *told}}


def _joined(before: Any, more: Any) -> Any:
    return [*(before or []), *more] if isinstance(more, list) else before if more is None else more


def _add_call(calls: list[Call], index: int, raw: dict[str, Any]) -> None:
    while len(calls) <= index:
        calls.append(Call())
    call, function = calls[index], raw.get("function") or {}
    call.id = raw.get("id") or call.id
    call.name += function.get("name") or ""
    call.arguments += function.get("arguments") or ""


def entry_bytes(entry: dict[str, Any]) -> bytes:
    """A logprob entry's token; its bytes where they are told, since a token may hold part of a character."""
    told = entry.get("bytes")
    return bytes(told) if isinstance(told, list) else str(entry.get("token", "")).encode()


def shown(entries: Iterable[dict[str, Any]]) -> str:
    """The text of logprob entries."""
    return b"".join(entry_bytes(entry) for entry in entries).decode("utf-8", "replace")


def repeats(texts: Sequence[str]) -> int:
    """Words that occurred before in the same text: what penalties are to make fewer."""
    return sum(len(words) - len(set(words)) for words in (text.lower().split() for text in texts))
