"""Sends JSON and reads server-sent events over a `Wire`. `answers` interprets the replies.

Keeps events as they came, including comments and broken ones, because checks test the framing too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from haast.serving.conform.wire import Opened, Request, Wire, WireError

DONE = "[DONE]"
_KEPT = 1500  # characters of a reply that are kept as evidence
_PATIENCE = 4  # a whole reply may take this many time limits; each single wait may take one


@dataclass(frozen=True)
class Reply:
    """A whole reply; `body` is its JSON, or None if it is not JSON."""

    status: int
    headers: Mapping[str, str]
    text: str
    body: Any
    seconds: float = 0.0


@dataclass(frozen=True)
class Event:
    """One server-sent event or comment; `at` is the arrival of its last byte, in seconds after the request."""

    data: str
    at: float
    name: str = ""
    comment: bool = False


@dataclass(frozen=True)
class Streamed:
    """A reply read event by event; `whole` is set instead if the server sent no event stream, as for errors."""

    status: int
    headers: Mapping[str, str]
    events: tuple[Event, ...] = ()
    whole: Reply | None = None
    torn: bool = False  # an event is not valid UTF-8: a character was cut in two
    rest: str = ""  # what came after the last complete event
    seconds: float = 0.0

    @property
    def data(self) -> list[Event]:
        """The events with data, without comments."""
        return [event for event in self.events if not event.comment]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The data of all events that are JSON objects."""
        read = (parsed(event.data) for event in self.data)
        return [each for each in read if isinstance(each, dict)]


@dataclass
class Exchange:
    """The last request and reply, as evidence."""

    sent: str = ""
    got: str = ""


@dataclass
class Client:
    """Requests to one server.

    Args:
        wire: transport to the server.
        key: sent as bearer token; None sends no key.
        timeout: maximum seconds to wait for output.
    """

    wire: Wire
    key: str | None = None
    timeout: float = 60.0
    requests: int = 0
    last: Exchange = field(default_factory=Exchange)

    def request(
        self, method: str, path: str, body: Any = None, timeout: float | None = None, **headers: str
    ) -> Request:
        """Build a request; `body` is sent as JSON, bytes unchanged. Header names have underscores for hyphens."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = {"content-type": "application/json"} if content else {}
        if self.key is not None:
            head["authorization"] = f"Bearer {self.key}"
        head.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.requests += 1
        self.last = Exchange(f"{method} {path} {content[:_KEPT].decode('utf-8', 'replace')}".strip())
        return Request(method, path, content, head, self.timeout if timeout is None else timeout)

    def send(self, request: Request) -> Reply:
        """Send a request and read the whole reply. Raises WireError."""
        began, exchange = self.wire.clock(), self.last
        try:
            with self.wire.open(request) as opened:
                content = b"".join(self._within(opened.pieces, began, request.timeout))
                reply = _reply(opened, content, self.wire.clock() - began)
        except WireError as error:
            exchange.got = str(error)
            raise
        exchange.got = f"HTTP {reply.status} {reply.text[:_KEPT]}"
        return reply

    def get(self, path: str, timeout: float | None = None, **headers: str) -> Reply:
        """Send a GET request. Raises WireError."""
        return self.send(self.request("GET", path, None, timeout, **headers))

    def post(self, path: str, body: Any, timeout: float | None = None, **headers: str) -> Reply:
        """Send a POST request with JSON, or bytes unchanged. Raises WireError."""
        return self.send(self.request("POST", path, body, timeout, **headers))

    def stream(self, path: str, body: Any, most: int | None = None) -> Streamed:
        """Send a POST request and read its events, at most `most`. Raises WireError."""
        request, began = self.request("POST", path, body), self.wire.clock()
        exchange = self.last
        try:
            with self.wire.open(request) as opened:
                streamed = self._read(opened, began, request.timeout, most)
        except WireError as error:
            exchange.got = str(error)
            raise
        if streamed.whole is not None:
            exchange.got = f"HTTP {streamed.status} {streamed.whole.text[:_KEPT]}"
        else:
            exchange.got = f"HTTP {streamed.status} {' | '.join(event.data for event in streamed.events)[-_KEPT:]}"
        return streamed

    def _read(self, opened: Opened, began: float, timeout: float, most: int | None) -> Streamed:
        """Read a stream's events, or the whole reply if it is not a stream."""
        pieces = self._within(opened.pieces, began, timeout)
        if "text/event-stream" not in opened.headers.get("content-type", ""):
            whole = _reply(opened, b"".join(pieces), self.wire.clock() - began)
            return Streamed(opened.status, opened.headers, whole=whole, seconds=whole.seconds)
        reader = EventReader()
        for piece in pieces:
            reader.feed(piece, self.wire.clock() - began)
            if most is not None and len(reader.events) >= most:
                break
        seconds = self.wire.clock() - began
        return Streamed(opened.status, opened.headers, tuple(reader.events), None, reader.torn, reader.rest, seconds)

    def _within(self, pieces: Iterator[bytes], began: float, timeout: float) -> Iterator[bytes]:
        """Yield the pieces; raises WireError if the whole reply takes too long, which single waits do not show."""
        for piece in pieces:
            yield piece
            if self.wire.clock() - began > _PATIENCE * timeout:
                raise WireError(f"the answer was not complete within {_PATIENCE * timeout:g} s", late=True)


class EventReader:
    """Parses server-sent events from bytes, which may be cut anywhere."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.torn = False
        self._bytes = b""

    @property
    def rest(self) -> str:
        """What came after the last complete event."""
        return self._bytes.decode("utf-8", "replace").strip()

    def feed(self, piece: bytes, at: float) -> None:
        """Add received bytes; `at` is their arrival in seconds."""
        # A CR at the end may be the first half of CR LF.
        self._bytes = (self._bytes + piece).replace(b"\r\n", b"\n")
        *whole, self._bytes = self._bytes.split(b"\n\n")
        for block in whole:
            self._take(block, at)

    def _take(self, block: bytes, at: float) -> None:
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError:
            text, self.torn = block.decode("utf-8", "replace"), True
        fields: dict[str, list[str]] = {"data": [], "event": [], "": []}
        for line in text.split("\n"):
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
        self.events += [Event(comment, at, comment=True) for comment in fields[""] if comment]
        if fields["data"]:
            self.events.append(Event("\n".join(fields["data"]), at, "".join(fields["event"])))


def parsed(text: str) -> Any:
    """Parse JSON; None if it is not valid."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _reply(opened: Opened, content: bytes, seconds: float) -> Reply:
    text = content.decode("utf-8", "replace")
    return Reply(opened.status, opened.headers, text, parsed(text), seconds)
