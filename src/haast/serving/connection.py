"""One client's connection: uvicorn's over h11, which waits for nobody for ever and says its own errors in JSON.

Owns what happens below requests: heads that never come, bodies that nobody wants, answers that nobody reads, and too
many connections. What HTTP is, the length of a message included, is h11's.
"""

from __future__ import annotations

import asyncio
import json
from time import monotonic
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from haast.serving.problems import ApiError
from haast.serving.security import HEADERS, MOST_HEADERS

IDLE = 30  # seconds that a connection may stay without a request
_HEAD = 15  # further seconds within which a request's head has to be whole


class Connection(H11Protocol):
    """A connection whose server looks at it now and then (`look`)."""

    most = 1024  # connections at once; more are told to come again
    send_timeout = 30.0  # seconds without a byte going out

    def __init__(self, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        self._free_since = self._moved = monotonic()
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._say(ApiError(503, "too many connections: try again", code="busy", headers={"Retry-After": "1"}))

    def on_response_complete(self) -> None:
        self._free_since = monotonic()
        super().on_response_complete()

    def look(self) -> None:
        """Close it where it has been waiting too long; called every second."""
        now, unsent = monotonic(), self.transport.get_write_buffer_size()
        if not self._free and not self.transport.is_closing():  # its answer has times of its own
            self._moved = now
            return
        if unsent == 0 or unsent < self._unsent:
            self._moved = now
        self._unsent = unsent
        if now - self._moved > self.send_timeout or (unsent == 0 and now - self._free_since > IDLE + _HEAD):
            self.transport.abort()

    @property
    def _free(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) > MOST_HEADERS:
            self._say(ApiError(431, f"the headers are longer than {MOST_HEADERS} bytes", code="headers_too_large"))
        else:
            self._say(ApiError(400, "this is no HTTP request", code="invalid_http"))

    def _say(self, problem: ApiError) -> None:
        """Tell what is wrong, where an answer may still begin, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.body()).encode()
            told = {**HEADERS, **problem.headers, "content-type": "application/json", "connection": "close"}
            told["content-length"] = str(len(body))
            head = h11.Response(status_code=problem.status, headers=list(told.items()))
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()
