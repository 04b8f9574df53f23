"""The server under test: sends requests to it, and keeps what was found out about it.

Owns the standard request and the meaning of HTTP statuses; knows no check. A refusal ends the running check: an error
that names a requested field is an honest refusal, any other error to a valid request is a failure.
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

# Fields of every request: an error that names one of these does not count as an honest refusal.
_USUAL = {"model", "messages", "prompt", "temperature", "max_tokens", "stream"}
# Other names of a field in the servers' error messages.
_ALIASES = {
    "response_format": ("response format", "json_schema", "json_object", "schema", "grammar", "structured"),
    "tool_choice": ("tool choice", "tools"),
    "top_logprobs": ("logprobs",),
}


class Subject:
    """A server and one of its models, with a cache of results that several checks use.

    Args:
        client: for requests to the server.
        model: the model's name on the server.
        context: context length in tokens; None if unknown.
        owner: `owned_by` in the list of models; a server of "haast" can switch drafting off per request.
        patience: minimum seconds that long requests run before their clients disconnect.
    """

    def __init__(
        self, client: Client, model: str, context: int | None = None, owner: str = "", patience: float = 3.0
    ) -> None:
        self.client, self.model, self.context, self.owner, self.patience = client, model, context, owner, patience
        self._cache: dict[str, Any] = {}
        self._lock = threading.RLock()

    def body(self, prompt: Messages, path: str = CHAT, /, **fields: Any) -> dict[str, Any]:
        """A request body: greedy and short unless the fields change that; None leaves a field out."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = {"messages": messages} if path == CHAT else {"prompt": prompt}
        whole = {"model": self.model, **text, "temperature": 0, "max_tokens": 16, **fields}
        return {name: value for name, value in whole.items() if value is not None}

    def ask(self, prompt: Messages, path: str = CHAT, /, **fields: Any) -> Answer:
        """Request a whole answer."""
        reply = self.client.post(path, self.body(prompt, path, **fields))
        self.accepted(reply, fields)
        return whole_answer(reply)

    def stream(self, prompt: Messages, path: str = CHAT, most: int | None = None, /, **fields: Any) -> Streamed:
        """Request a stream; returns its events, at most `most`."""
        streamed = self.client.stream(path, self.body(prompt, path, stream=True, **fields), most)
        if streamed.whole is not None:
            self.accepted(streamed.whole, fields)
            fail(f"stream was accepted, but no events came: content-type {short(streamed.headers.get('content-type'))}")
        return streamed

    def streamed(self, prompt: Messages, path: str = CHAT, /, **fields: Any) -> Answer:
        """Request a stream; returns its chunks joined to one answer."""
        return streamed_answer(self.stream(prompt, path, **fields))

    def accepted(self, reply: Reply, fields: Sequence[str] | dict[str, Any] = ()) -> None:
        """End the check unless the status is 200; `fields` are those that the server may refuse by name."""
        if reply.status == 200:
            return
        requested = [name for name in fields if name not in _USUAL]
        message = complaint(reply)
        if reply.status in (404, 405) and not requested:
            not_offered(f"HTTP {reply.status}")
        if reply.status in (429, 503):
            refused(f"HTTP {reply.status}, overloaded: {short(message, 120)}")
        if 400 <= reply.status < 500 or reply.status == 501:
            for name in requested:
                if named(name, message):
                    refused(f"HTTP {reply.status}: {short(message, 120)}")
            fail(f"HTTP {reply.status} to {_described(requested)}, which it does not name: {short(message, 120)}")
        fail(f"HTTP {reply.status} to {_described(requested)}: {short(message, 120)}")

    def story(self) -> Answer:
        """A greedy text of forty tokens, requested once; most checks compare with it."""
        answer = self.once("story", lambda: self.ask(STORY, max_tokens=40))
        if len(answer.text) < 20:
            self._not_comparable(answer)
        return answer

    def once(self, name: str, find: Callable[[], T]) -> T:
        """The result of `find`, which is called the first time only and cached under `name`."""
        with self._lock:
            if name not in self._cache:
                self._cache[name] = find()
            result: T = self._cache[name]
            return result

    def permitted(self, ask: Callable[[], T]) -> T | None:
        """The result of `ask`, or None if it ends the check; for requests that a check can do without."""
        try:
            return ask()
        except EndedError:
            return None

    def offers_text(self) -> bool:
        """Whether the server offers text completions."""
        reply = self.once("text", lambda: self.client.post(TEXT, self.body(PATTERN, TEXT, max_tokens=1)))
        return reply.status not in (404, 405, 501)

    def needs_text(self) -> None:
        """End the check if the server offers no text completions."""
        if not self.offers_text():
            not_offered(f"{TEXT} does not exist")

    def text_path(self) -> str:
        """The path of text completions if the server offers them, else that of chat completions."""
        return TEXT if self.offers_text() else CHAT

    def seeded(self) -> bool:
        """Whether the server accepts a seed, and gives the same text for it twice."""

        def repeats() -> bool:
            bodies = [self.body(STORY, temperature=1, seed=5, max_tokens=12) for _ in range(2)]
            replies = [self.client.post(CHAT, body) for body in bodies]
            good = all(reply.status == 200 for reply in replies)
            return good and whole_answer(replies[0]).text == whole_answer(replies[1]).text

        return self.once("seeded", repeats)

    def needs_seed(self) -> None:
        """End the check if seeds do not work; another check reports that."""
        if not self.seeded():
            not_visible("needs a seed that gives the same text again: see the check of seed")

    def at_once(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """Run all calls at the same time, in threads; returns their results in order."""
        with ThreadPoolExecutor(len(work)) as pool:
            futures = [pool.submit(each) for each in work]
            return [each.result() for each in futures]

    def _not_comparable(self, answer: Answer) -> NoReturn:
        if answer.first.reasoning:
            not_visible("all forty tokens were reasoning: there is no text to compare")
        not_visible(f"the text is too short to compare: {short(answer.text)}")


def complaint(reply: Reply) -> str:
    """An error's message and the field that it names; the whole reply if it has no error object."""
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    if isinstance(error, dict):
        return " ".join(str(error[name]) for name in ("message", "param") if error.get(name))
    return reply.text


def named(field: str, message: str) -> bool:
    """Whether an error message names a field."""
    spelled = (field, field.replace("_", " "), *_ALIASES.get(field, ()))
    return any(each in message.lower() for each in spelled)


def same_text(expected: str, got: str, of: str) -> None:
    """Fail unless two texts are equal."""
    demand(expected == got, f"{of}: {difference(expected, got)}", expected=expected, said=got)


def _described(fields: Sequence[str]) -> str:
    return "a request with " + ", ".join(fields) if fields else "a plain request"
