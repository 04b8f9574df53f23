"""Bytes to a server and back. Owns the connection, its time limits and its clock; knows neither JSON nor events.

`Wire` is all that the checks need of HTTP, so that tests can put a server in its place that has no socket and no time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

_CONNECT = 10.0  # seconds that a server may take to pick up


@dataclass(frozen=True)
class Request:
    """What is sent; `path` lies below the server's root, and no wait for bytes is longer than `timeout`."""

    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 60.0


@dataclass(frozen=True)
class Opened:
    """A reply whose head has come; `pieces` are the body's bytes as they arrive. Header names are in small letters."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]


class WireError(Exception):
    """No reply: the server took too long (`late`), hung up, or was never there."""

    def __init__(self, words: str, late: bool = False) -> None:
        super().__init__(words)
        self.late = late


class Wire(Protocol):
    """A way to a server."""

    def open(self, request: Request) -> AbstractContextManager[Opened]:
        """Send it; leaving the block early drops the connection. Raises WireError."""
        ...

    def clock(self) -> float:
        """Seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class HttpWire:
    """The way over HTTP. Proxies of the surroundings are not asked: the address means what it says."""

    def __init__(self, root: str) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise ValueError("conform needs the httpx2 package, which is not installed: pip install httpx2") from error
        self._httpx = httpx2
        # A connection of its own for every request: one that a server has closed after an error must not fail the next.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._client = httpx2.Client(base_url=root, trust_env=False, follow_redirects=False, limits=limits)

    @contextmanager
    def open(self, request: Request) -> Iterator[Opened]:
        """Send it; leaving the block early drops the connection. Raises WireError."""
        limit = self._httpx.Timeout(request.timeout, connect=min(_CONNECT, request.timeout))
        try:
            with self._client.stream(
                request.method, request.path, content=request.content, headers=dict(request.headers), timeout=limit
            ) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                yield Opened(response.status_code, headers, response.iter_bytes())
        except self._httpx.TimeoutException as error:
            raise WireError(f"no answer within {request.timeout:g} s", late=True) from error
        except (self._httpx.TransportError, self._httpx.InvalidURL, self._httpx.DecodingError) as error:
            raise WireError(f"the connection was lost ({str(error) or type(error).__name__})") from error

    def clock(self) -> float:
        """Seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()
