"""Who may ask, and how much: keys, origins, hosts, sizes and rates, before a request reaches the application.

Owns plain ASGI middleware, outermost first: a request's id and the headers of every answer, hosts and origins, keys,
rates, sizes. HTTP itself, request smuggling included, is uvicorn's and h11's: they refuse messages of two lengths and
of unknown codings. What they take and this server refuses is a length beside chunks, and heads that are whole but long.
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

from haast.serving.config import ServeConfig
from haast.serving.problems import ApiError

_LOG = logging.getLogger("haast.serving")
_OPEN = ("/", "/health", "/favicon.ico")  # without a key; so is /static, the page that asks for one
_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
_BESIDE = 64  # requests beside those whose answers run or wait: health checks, metrics, the page
_MOST_KEYS = 10_000  # whose rates are remembered
# What a body may hold beside its size, since nobody else is answered while Python reads one, in whatever thread.
_MOST_PARTS = 30_000  # objects, lists and names: a body of 4 MB of empty lists takes a second
_MOST_VALUES = 250_000  # tokens, say
_PIECE = 65_536  # bytes that are looked at in one go
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
    """So many a minute: filled steadily, never above a minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_minute / 60, float(per_minute), clock
        self._left, self._at = self._most, clock()

    def wait(self) -> float:
        """Seconds until one may be taken; 0 now."""
        now = self._clock()
        self._left, self._at = min(self._most, self._left + (now - self._at) * self._rate), now
        return 0.0 if self._left >= 1 else (1 - self._left) / self._rate

    def take(self, count: float = 1) -> None:
        """Take some, more than there are if need be: then the next has to wait."""
        self._left -= count


class Rates:
    """Requests and new tokens a minute, of each key by itself."""

    def __init__(self, config: ServeConfig) -> None:
        self._limits = (config.requests_per_minute, config.tokens_per_minute)
        self._known: OrderedDict[str, tuple[Bucket | None, Bucket | None]] = OrderedDict()

    def admit(self, key: str) -> None:
        """Count a request. Raises ApiError 429 where a key has used up its minute."""
        requests, tokens = self._of(key)
        wait = max((bucket.wait() for bucket in (requests, tokens) if bucket is not None), default=0.0)
        if wait > 0:
            seconds = str(max(1, round(wait + 0.5)))
            raise ApiError(
                429, f"this key has used up its minute: try again in {seconds} s", code="rate_limit_exceeded",
                headers={"Retry-After": seconds},
            )  # fmt: skip
        if requests is not None:
            requests.take()

    def spent(self, key: str, tokens: int) -> None:
        """Count new tokens."""
        bucket = self._of(key)[1]
        if bucket is not None:
            bucket.wait()
            bucket.take(tokens)

    def _of(self, key: str) -> tuple[Bucket | None, Bucket | None]:
        if key not in self._known:
            first, second = (None if limit is None else Bucket(limit) for limit in self._limits)
            self._known[key] = first, second
            if len(self._known) > _MOST_KEYS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


class Guarded:
    """An application behind all checks.

    Args:
        app: what answers.
        config: of the server.
        rates: counts requests; tokens are counted by who writes them.
        refused: told the status of every answer of its own.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, rates: Rates, refused: Callable[[int], None]) -> None:
        self._app, self._config, self._rates, self._refused = app, config, rates, refused
        self._open, self._most = 0, config.max_running + config.max_waiting + _BESIDE
        self._keys = [key.encode() for key in config.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.match(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id)
        self._open += 1
        try:
            if self._open > self._most:  # each may hold a body
                raise ApiError(503, "too many requests at once: try again", code="busy", headers={"Retry-After": "1"})
            scope["state"]["key"] = self._check(scope, headers)
            await self._app(scope, await self._whole(receive, headers), answer.send)
        except ApiError as problem:
            if answer.begun:
                raise
            self._refused(problem.status)
            await _reply(problem, answer.send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope, headers: Headers) -> str:
        """Who asks. Raises ApiError."""
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MOST_HEADERS:  # h11 bounds part of one
            raise ApiError(431, f"the headers are longer than {MOST_HEADERS} bytes", code="headers_too_large")
        if "content-length" in headers and "transfer-encoding" in headers:
            # h11 takes the second, as HTTP says; whoever stands before this server may take the first, and see another
            # request begin.
            raise ApiError(400, "send Content-Length or Transfer-Encoding, not both", code="invalid_http")
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        self._check_host(host)
        if origin is not None and not self._same(origin, scope, host) and origin not in self._config.origins:
            raise ApiError(403, "this page's origin is not allowed here: see --allow-origin", code="origin_not_allowed")
        free = path in _OPEN or path.startswith("/static/") or scope["method"] == "OPTIONS"
        key = "anonymous" if free else self._key_of(headers)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "send Content-Type: application/json", code="unsupported_media_type")
            self._rates.admit(key)
        return key

    def _check_host(self, host: str) -> None:
        """On loopback a name that is not this machine's is a page of somebody else's that was pointed here."""
        if not self._config.local:
            return
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets that hold no address
            name = ""
        if name not in ("localhost", "127.0.0.1", "::1", self._config.host, *self._config.hosts):
            raise ApiError(403, "this host name is not served here: see --allow-host", code="host_not_allowed")

    @staticmethod
    def _same(origin: str, scope: Scope, host: str) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == host.lower() and bool(host)
        except ValueError:
            return False

    def _key_of(self, headers: Headers) -> str:
        if not self._keys:
            return "anonymous"
        kind, _, given = headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("utf-8", "surrogateescape") if kind.lower() == "bearer" else b""
        known = [hmac.compare_digest(sent, key) for key in self._keys]  # all of them, whichever fits
        if not any(known):
            words = "no API key was sent" if not sent else "this API key is not known"
            raise ApiError(
                401, f"{words}: send the header Authorization: Bearer <key>", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return f"key {known.index(True)}"

    async def _whole(self, receive: Receive, headers: Headers) -> Receive:
        """`receive` with the whole body read: at most so many bytes, within so many seconds. Raises ApiError."""
        most, seconds, body, more = self._config.max_body, self._config.body_timeout, bytearray(), True
        told = headers.get("content-length", "0")
        if not (told.isascii() and told.isdigit() and len(told) < 16 and int(told) <= most):
            raise self._too_long()
        until = time.monotonic() + seconds
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.001))
            except TimeoutError:
                raise ApiError(408, f"the body did not come within {seconds:g} s", code="body_timeout") from None
            if message["type"] != "http.request":
                raise ApiError(408, "the client has left before its body was whole", code="client_closed_request")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise self._too_long()
        # Signs in texts count too at first: few texts have so many that they have to be told apart.
        if _holds_too_much(*_signs(body)) and _holds_too_much(*await run_in_threadpool(_signs_of_json, body)):
            words = f"the body holds more than {_MOST_PARTS} objects, lists and names, or {_MOST_VALUES} values"
            raise ApiError(400, words, code="too_many_values")
        read: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return read.pop() if read else await receive()

        return replayed

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._config.max_body} bytes", code="body_too_large")


def _signs(text: bytes | bytearray) -> tuple[int, int]:
    """Signs that begin objects, lists and the values of names; and those between values."""
    return text.count(b"{") + text.count(b"[") + text.count(b":"), text.count(b",")


def _holds_too_much(parts: int, values: int) -> bool:
    return parts > _MOST_PARTS or values > _MOST_VALUES


def _signs_of_json(body: bytearray) -> tuple[int, int]:
    """The signs of a JSON text that stand outside its strings, counted piece by piece: others want to run too."""
    parts = values = 0
    inside = False  # of a string
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    for start in range(0, len(plain), _PIECE):
        runs = plain[start : start + _PIECE].split(b'"')
        found = _signs(b"".join(runs[inside::2]))
        parts, values, inside = parts + found[0], values + found[1], inside ^ (len(runs) % 2 == 0)
    return parts, values


class _Answer:
    """`send` with the headers of every answer; knows whether it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id, self.begun = send, request_id, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await self._send(message)


async def _reply(problem: ApiError, send: Send) -> None:
    body = json.dumps(problem.body()).encode()
    head: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    head += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    if problem.status in (408, 413, 431) or problem.code == "invalid_http":  # the rest of the body is not read
        head.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": head})
    await send({"type": "http.response.body", "body": body})
