"""One client connection: uvicorn's h11 protocol with time limits, a connection limit and errors in JSON.

Owns the faults below single requests: request heads that never come, clients that do not read their answer, and
too many connections. h11 owns the parsing of HTTP, the length of a message included.
"""

from __future__ import annotations

import asyncio
import json
from time import monotonic
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from haast.serving.api_errors import ApiError
from haast.serving.security import HEADERS, MOST_HEADERS

IDLE = 30  # seconds that a connection may stay open without a request
_HEAD = 15  # further seconds to receive a request's head


class Connection(H11Protocol):
    """A connection with time limits; the server calls `look` every second."""

    most = 1024  # connections at once; further ones get 503
    send_timeout = 30.0  # seconds without a byte sent

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle_since = self._last_progress = monotonic()
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._send_error(
                ApiError(503, "too many connections: try again", code="busy", headers={"Retry-After": "1"})
            )

    def on_response_complete(self) -> None:
        self._idle_since = monotonic()
        super().on_response_complete()

    def look(self) -> None:
        """Close the connection if it has waited too long for a request head or for the client to read."""
        now, unsent = monotonic(), self.transport.get_write_buffer_size()
        if not self._idle and not self.transport.is_closing():  # a running answer has its own time limits
            self._last_progress = now
            return
        if unsent == 0 or unsent < self._unsent:
            self._last_progress = now
        self._unsent = unsent
        if now - self._last_progress > self.send_timeout or (unsent == 0 and now - self._idle_since > IDLE + _HEAD):
            self.transport.abort()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) > MOST_HEADERS:
            self._send_error(
                ApiError(431, f"the headers are longer than {MOST_HEADERS} bytes", code="headers_too_large")
            )
        else:
            self._send_error(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    def _send_error(self, problem: ApiError) -> None:
        """Send an error if no response has started, then close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.body()).encode()
            headers = {**HEADERS, **problem.headers, "content-type": "application/json", "connection": "close"}
            headers["content-length"] = str(len(body))
            head = h11.Response(status_code=problem.status, headers=list(headers.items()))
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()
