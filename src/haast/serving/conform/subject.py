"""The server under test: what it is called, what it offers, and how it is asked.

Owns the usual request and what follows from a status; knows no check. Refusals end a check by themselves: an error that
names a field asked for is an honest one, any other to a good request is a failure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from haast.serving.conform.answers import Answer, streamed_answer, whole_answer
from haast.serving.conform.base import EndedError, demand, difference, fail, not_offered, not_visible, refused, short
from haast.serving.conform.client import Client, Reply, Streamed

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STORY = "Tell me a short story about a fox and a lighthouse."
COUNT = "Write the numbers from one to fifty as words."
RECORD = "Give me a short JSON record."
PATTERN = "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"

Messages = str | list[dict[str, Any]]
T = TypeVar("T")

# Fields of every request: an error that names one of these is no honest refusal of what a check asks for.
_USUAL = {"model", "messages", "prompt", "temperature", "max_tokens", "stream"}
# Other words under which servers speak of a field.
_ALIASES = {
    "response_format": ("response format", "json_schema", "json_object", "schema", "grammar", "structured"),
    "tool_choice": ("tool choice", "tools"),
    "top_logprobs": ("logprobs",),
}


class Subject:
    """A server, one of its models, and what has been found out.

    Args:
        client: the way there.
        model: its name there.
        context: tokens that fit, where somebody knows.
        owner: who owns the model, as its list says; "haast" can be asked without drafting.
        patience: seconds, at least, that long requests run before their clients leave.
    """

    def __init__(
        self, client: Client, model: str, context: int | None = None, owner: str = "", patience: float = 3.0
    ) -> None:
        self.client, self.model, self.context, self.owner, self.patience = client, model, context, owner, patience
        self._known: dict[str, Any] = {}
        self._guard = threading.RLock()

    def body(self, prompt: Messages, path: str = CHAT, /, **fields: Any) -> dict[str, Any]:
        """A request: greedy and short unless the fields say otherwise; None leaves a field out."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        asked = {"messages": messages} if path == CHAT else {"prompt": prompt}
        whole = {"model": self.model, **asked, "temperature": 0, "max_tokens": 16, **fields}
        return {name: value for name, value in whole.items() if value is not None}

    def ask(self, prompt: Messages, path: str = CHAT, /, **fields: Any) -> Answer:
        """An answer in one piece."""
        reply = self.client.post(path, self.body(prompt, path, **fields))
        self.accepted(reply, fields)
        return whole_answer(reply)

    def stream(self, prompt: Messages, path: str = CHAT, most: int | None = None, /, **fields: Any) -> Streamed:
        """An answer as its events."""
        streamed = self.client.stream(path, self.body(prompt, path, stream=True, **fields), most)
        if streamed.whole is not None:
            self.accepted(streamed.whole, fields)
            fail(f"stream was accepted, but no events came: content-type {short(streamed.headers.get('content-type'))}")
        return streamed

    def streamed(self, prompt: Messages, path: str = CHAT, /, **fields: Any) -> Answer:
        """What a stream adds up to."""
        return streamed_answer(self.stream(prompt, path, **fields))

    def accepted(self, reply: Reply, fields: Sequence[str] | dict[str, Any] = ()) -> None:
        """End the check unless the request was answered; `fields` are those that may be refused by name."""
        if reply.status == 200:
            return
        asked = [name for name in fields if name not in _USUAL]
        told = complaint(reply)
        if reply.status in (404, 405) and not asked:
            not_offered(f"HTTP {reply.status}")
        if reply.status in (429, 503):
            refused(f"HTTP {reply.status}, turned away: {short(told, 120)}")
        if 400 <= reply.status < 500 or reply.status == 501:
            for name in asked:
                if named(name, told):
                    refused(f"HTTP {reply.status}: {short(told, 120)}")
            fail(f"HTTP {reply.status} to {_asked(asked)}, which it does not name: {short(told, 120)}")
        fail(f"HTTP {reply.status} to {_asked(asked)}: {short(told, 120)}")

    def story(self) -> Answer:
        """A greedy text of forty tokens, asked for once: most checks compare with it."""
        answer = self.once("story", lambda: self.ask(STORY, max_tokens=40))
        if len(answer.text) < 20:
            self._no_text(answer)
        return answer

    def once(self, name: str, find: Callable[[], T]) -> T:
        """Find something out, the first time."""
        with self._guard:
            if name not in self._known:
                self._known[name] = find()
            found: T = self._known[name]
            return found

    def permitted(self, ask: Callable[[], T]) -> T | None:
        """An answer to what a server may refuse, where the check goes on without it."""
        try:
            return ask()
        except EndedError:
            return None

    def offers_text(self) -> bool:
        """Whether plain completions are offered."""
        found = self.once("text", lambda: self.client.post(TEXT, self.body(PATTERN, TEXT, max_tokens=1)))
        return found.status not in (404, 405, 501)

    def needs_text(self) -> None:
        """End the check where plain completions are not offered."""
        if not self.offers_text():
            not_offered(f"{TEXT} is not there")

    def text_path(self) -> str:
        """Where a text is continued as it stands, if anywhere; else the chat."""
        return TEXT if self.offers_text() else CHAT

    def seeded(self) -> bool:
        """Whether a seed is accepted and has an effect that a client can rely on."""

        def tried() -> bool:
            bodies = [self.body(STORY, temperature=1, seed=5, max_tokens=12) for _ in range(2)]
            replies = [self.client.post(CHAT, body) for body in bodies]
            good = all(reply.status == 200 for reply in replies)
            return good and whole_answer(replies[0]).text == whole_answer(replies[1]).text

        return self.once("seeded", tried)

    def needs_seed(self) -> None:
        """End the check where seeds can't be relied on: another check tells of that."""
        if not self.seeded():
            not_visible("needs a seed that gives the same text again: see the check of seed")

    def at_once(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """Do all of it at the same time."""
        with ThreadPoolExecutor(len(work)) as pool:
            waiting = [pool.submit(each) for each in work]
            return [each.result() for each in waiting]

    def _no_text(self, answer: Answer) -> NoReturn:
        if answer.first.reasoning:
            not_visible("all forty tokens went into reasoning; nothing is left to compare")
        not_visible(f"the model says too little to compare: {short(answer.text)}")


def complaint(reply: Reply) -> str:
    """What an error says: its message and the field it names, or else the whole reply."""
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    if isinstance(error, dict):
        return " ".join(str(error[name]) for name in ("message", "param") if error.get(name))
    return reply.text


def named(field: str, words: str) -> bool:
    """Whether an error's words name a field."""
    spelled = (field, field.replace("_", " "), *_ALIASES.get(field, ()))
    return any(each in words.lower() for each in spelled)


def same_text(expected: str, got: str, of: str) -> None:
    """Fail unless two texts are one."""
    demand(expected == got, f"{of}: {difference(expected, got)}", expected=expected, said=got)


def _asked(fields: Sequence[str]) -> str:
    return "a request with " + ", ".join(fields) if fields else "a plain request"
