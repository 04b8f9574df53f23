"""Access checks before a request reaches the application: API keys, origins, hosts, sizes and rates.

Owns one ASGI middleware, with its checks in this order: request id and response headers, host and origin, key, rate,
body size. uvicorn and h11 own HTTP and guard against request smuggling: they refuse messages with two lengths or an
unknown transfer coding. This server also refuses Content-Length together with chunks, and complete but long heads.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from haast.serving.api_errors import ApiError
from haast.serving.config import ServeConfig

_LOG = logging.getLogger("haast.serving")
_OPEN = ("/", "/health", "/favicon.ico")  # need no key; nor does /static: the page asks for the key
_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
_EXTRA_REQUESTS = 64  # requests in addition to those whose answers run or wait: health checks, metrics, the page
_MAX_KEYS = 10_000  # whose rates are kept
# Limits of a body's content: Python's JSON parser blocks all threads while it runs.
_MAX_PARTS = 30_000  # objects, lists and names: a body of 4 MB of empty lists takes a second
_MAX_VALUES = 250_000  # for example token ids
_PIECE = 65_536  # bytes to scan at once
MOST_HEADERS = 32_768  # bytes of a request's headers
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": PAGE_POLICY,
}


class Bucket:
    """Token bucket: filled at `per_minute`, to at most one minute's amount."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_minute / 60, float(per_minute), clock
        self._left, self._updated = self._most, clock()

    def wait(self) -> float:
        """Seconds until one may be taken; 0 if now."""
        now = self._clock()
        self._left, self._updated = min(self._most, self._left + (now - self._updated) * self._rate), now
        return 0.0 if self._left >= 1 else (1 - self._left) / self._rate

    def take(self, count: float = 1) -> None:
        """Take `count`, even if fewer are left: the next request then waits longer."""
        self._left -= count


class Rates:
    """Limits of requests and new tokens per minute, separate for each key."""

    def __init__(self, config: ServeConfig) -> None:
        self._limits = (config.requests_per_minute, config.tokens_per_minute)
        self._buckets: OrderedDict[str, tuple[Bucket | None, Bucket | None]] = OrderedDict()

    def admit(self, key: str) -> None:
        """Count a request. Raises ApiError 429 if the key is over one of its limits."""
        requests, tokens = self._buckets_of(key)
        wait = max((bucket.wait() for bucket in (requests, tokens) if bucket is not None), default=0.0)
        if wait > 0:
            seconds = str(max(1, round(wait + 0.5)))
            raise ApiError(
                429, f"this key is over its limit per minute: try again in {seconds} s", code="rate_limit_exceeded",
                headers={"Retry-After": seconds},
            )  # fmt: skip
        if requests is not None:
            requests.take()

    def spent(self, key: str, tokens: int) -> None:
        """Count new tokens."""
        bucket = self._buckets_of(key)[1]
        if bucket is not None:
            bucket.wait()
            bucket.take(tokens)

    def _buckets_of(self, key: str) -> tuple[Bucket | None, Bucket | None]:
        if key not in self._buckets:
            first, second = (None if limit is None else Bucket(limit) for limit in self._limits)
            self._buckets[key] = first, second
            if len(self._buckets) > _MAX_KEYS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return self._buckets[key]


class Guarded:
    """ASGI middleware with all access checks.

    Args:
        app: the application behind the checks.
        config: of the server.
        rates: counts requests here; the routes add the generated tokens.
        refused: called with the status of every request that is refused here.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, rates: Rates, refused: Callable[[int], None]) -> None:
        self._app, self._config, self._rates, self._refused = app, config, rates, refused
        self._open, self._most = 0, config.max_running + config.max_waiting + _EXTRA_REQUESTS
        self._keys = [key.encode() for key in config.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _ID.match(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        response = _Response(send, request_id)
        self._open += 1
        try:
            if self._open > self._most:  # each may hold a body
                raise ApiError(503, "too many requests at once: try again", code="busy", headers={"Retry-After": "1"})
            scope["state"]["key"] = self._check(scope, headers)
            await self._app(scope, await self._read_body(receive, headers), response.send)
        except ApiError as problem:
            if response.started:
                raise
            self._refused(problem.status)
            await _send_error(problem, response.send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope, headers: Headers) -> str:
        """Run all checks on a request's head; returns the name of its key. Raises ApiError."""
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope.get("raw_path", b"")) + len(scope["query_string"])
        if size > MOST_HEADERS:  # h11 limits incomplete heads only
            raise ApiError(431, f"the headers are longer than {MOST_HEADERS} bytes", code="headers_too_large")
        if "content-length" in headers and "transfer-encoding" in headers:
            # h11 uses the second, as HTTP demands. A proxy may use the first, and would then see another request start
            # at a different byte (request smuggling).
            raise ApiError(400, "send Content-Length or Transfer-Encoding, not both", code="invalid_http")
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        self._check_host(host)
        if origin is not None and not self._same(origin, scope, host) and origin not in self._config.origins:
            raise ApiError(403, "this page's origin is not allowed: see --allow-origin", code="origin_not_allowed")
        free = path in _OPEN or path.startswith("/static/") or scope["method"] == "OPTIONS"
        key = "anonymous" if free else self._key_of(headers)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "send Content-Type: application/json", code="unsupported_media_type")
            self._rates.admit(key)
        return key

    def _check_host(self, host: str) -> None:
        """On loopback, refuse foreign host names: they come from web pages by DNS rebinding."""
        if not self._config.local:
            return
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets that hold no address
            name = ""
        if name not in ("localhost", "127.0.0.1", "::1", self._config.host, *self._config.hosts):
            raise ApiError(403, "this host name is not allowed: see --allow-host", code="host_not_allowed")

    @staticmethod
    def _same(origin: str, scope: Scope, host: str) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == host.lower() and bool(host)
        except ValueError:
            return False

    def _key_of(self, headers: Headers) -> str:
        if not self._keys:
            return "anonymous"
        kind, _, credentials = headers.get("authorization", "").partition(" ")
        sent = credentials.strip().encode("utf-8", "surrogateescape") if kind.lower() == "bearer" else b""
        matches = [hmac.compare_digest(sent, key) for key in self._keys]  # always all of them: constant time
        if not any(matches):
            words = "no API key was sent" if not sent else "this API key is not valid"
            raise ApiError(
                401, f"{words}: send the header Authorization: Bearer <key>", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return f"key {matches.index(True)}"

    async def _read_body(self, receive: Receive, headers: Headers) -> Receive:
        """Read the whole body within its limits of size and time; returns a `receive` for it. Raises ApiError."""
        most, seconds, body, more = self._config.max_body, self._config.body_timeout, bytearray(), True
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= most):
            raise self._too_long()
        until = time.monotonic() + seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.001))
            except TimeoutError:
                raise ApiError(408, f"the body did not come within {seconds:g} s", code="body_timeout") from None
            if message["type"] != "http.request":
                raise ApiError(
                    408, "the client disconnected before its body was complete", code="client_closed_request"
                )
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise self._too_long()
        # The first count includes characters inside strings; only if it is too high, the exact count is made.
        if _is_too_complex(*_count_delimiters(body)) and _is_too_complex(
            *await run_in_threadpool(_count_outside_strings, body)
        ):
            words = f"the body holds more than {_MAX_PARTS} objects, lists and names, or {_MAX_VALUES} values"
            raise ApiError(400, words, code="too_many_values")
        read: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return read.pop() if read else await receive()

        return replayed

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._config.max_body} bytes", code="body_too_large")


def _count_delimiters(text: bytes | bytearray) -> tuple[int, int]:
    """(parts, values): number of characters that start objects, lists and named values, and of commas."""
    return text.count(b"{") + text.count(b"[") + text.count(b":"), text.count(b",")


def _is_too_complex(parts: int, values: int) -> bool:
    return parts > _MAX_PARTS or values > _MAX_VALUES


def _count_outside_strings(body: bytearray) -> tuple[int, int]:
    """The counts of `_count_delimiters` outside strings. Counts piece by piece, so that other threads can run."""
    parts = values = 0
    inside = False  # inside a string
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    for start in range(0, len(plain), _PIECE):
        runs = plain[start : start + _PIECE].split(b'"')
        more_parts, more_values = _count_delimiters(b"".join(runs[inside::2]))
        parts, values = parts + more_parts, values + more_values
        inside ^= len(runs) % 2 == 0
    return parts, values


class _Response:
    """Wraps `send`: adds the headers of every response, and records whether it has started."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id, self.started = send, request_id, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await self._send(message)


async def _send_error(problem: ApiError, send: Send) -> None:
    body = json.dumps(problem.body()).encode()
    head: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    head += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    if problem.status in (408, 413, 431) or problem.code == "invalid_http":  # the rest of the body is not read
        head.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": head})
    await send({"type": "http.response.body", "body": body})
