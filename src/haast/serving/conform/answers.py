"""Parses replies, whole or streamed, of chat and text completions. Owns `Answer`, the form that checks compare."""

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
    """One choice. `entries` are the logprobs of chat, `legacy` those of text completions; None if absent."""

    text: str = ""
    finish: str | None = None
    calls: list[Call] = field(default_factory=list)
    entries: list[dict[str, Any]] | None = None
    legacy: dict[str, Any] | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Answer:
    """All choices of one reply by index; `usage` is empty if the reply has none."""

    choices: dict[int, Choice]
    usage: dict[str, Any]
    body: dict[str, Any]

    @property
    def first(self) -> Choice:
        """The choice with the lowest index."""
        return self.choices[min(self.choices)]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.first.text

    @property
    def finish(self) -> str | None:
        """The finish_reason of the first choice."""
        return self.first.finish

    @property
    def tokens(self) -> int:
        """Completion tokens in `usage`; fails the check if there is no count."""
        count = self.usage.get("completion_tokens")
        demand(isinstance(count, int), f"usage.completion_tokens is {short(count)}, not a number")
        return int(count or 0)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens in `usage`; fails the check if there is no count."""
        count = self.usage.get("prompt_tokens")
        demand(isinstance(count, int), f"usage.prompt_tokens is {short(count)}, not a number")
        return int(count or 0)


def whole_answer(reply: Reply) -> Answer:
    """Parse a whole reply; fails the check if it has no choices."""
    body = reply.body
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
        fail(f"the answer has no choices: {short(reply.text)}")
    choices = dict[int, Choice]()
    for raw in body["choices"]:
        choice = choices.setdefault(_index(raw), Choice())
        _add(choice, raw, raw.get("message") or {})
    return Answer(choices, body.get("usage") or {}, body)


def streamed_answer(streamed: Streamed) -> Answer:
    """Join the chunks of a stream; fails the check if they have no choices."""
    choices, usage, first = dict[int, Choice](), dict[str, Any](), dict[str, Any]()
    for chunk in streamed.chunks:
        first = first or chunk
        usage = chunk.get("usage") or usage
        for raw in chunk.get("choices") or ():
            _add(choices.setdefault(_index(raw), Choice()), raw, raw.get("delta") or {})
    if not choices:
        data = " ".join(event.data for event in streamed.data)
        fail(f"the stream has no choices: {short(data)}")
    return Answer(choices, usage, first)


def _index(raw: Any) -> int:
    demand(isinstance(raw, dict) and isinstance(raw.get("index"), int), f"a choice without an index: {short(raw)}")
    return int(raw["index"])


def _add(choice: Choice, raw: dict[str, Any], message: dict[str, Any]) -> None:
    """Add a whole choice, or one chunk's part of it; `message` is its message or delta."""
    choice.text += message.get("content") or raw.get("text") or ""
    choice.reasoning += message.get("reasoning_content") or message.get("reasoning") or ""
    choice.finish = raw.get("finish_reason") or choice.finish
    for number, call in enumerate(message.get("tool_calls") or ()):
        _add_call(choice.calls, call.get("index", number), call)
    logprobs = raw.get("logprobs") or {}
    if isinstance(logprobs.get("content"), list):
        choice.entries = (choice.entries or []) + logprobs["content"]
    elif "tokens" in logprobs:
        before = choice.legacy or {}
        choice.legacy = {name: _joined(before.get(name), logprobs.get(name)) for name in {*before, *logprobs}}


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
    """The bytes of a logprob entry's token, from `bytes` if present: a token may hold part of a character."""
    values = entry.get("bytes")
    return bytes(values) if isinstance(values, list) else str(entry.get("token", "")).encode()


def shown(entries: Iterable[dict[str, Any]]) -> str:
    """The text of logprob entries."""
    return b"".join(entry_bytes(entry) for entry in entries).decode("utf-8", "replace")


def repeats(texts: Sequence[str]) -> int:
    """Number of words that occurred before in the same text, which penalties should reduce."""
    return sum(len(words) - len(set(words)) for words in (text.lower().split() for text in texts))
