"""HTTP transport of the checks. Owns connections, time limits and the clock; knows neither JSON nor events.

`Wire` is the part of HTTP that the checks need, so tests can replace it with a server without sockets and real time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

_CONNECT = 10.0  # seconds to connect


@dataclass(frozen=True)
class Request:
    """A request; `path` is relative to the server's root, and `timeout` limits each wait for bytes, in seconds."""

    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 60.0


@dataclass(frozen=True)
class Opened:
    """A response whose head has arrived; `pieces` yields the body as it arrives. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]


class WireError(Exception):
    """No complete response: the time limit passed (`late`), or the connection was lost or refused."""

    def __init__(self, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class Wire(Protocol):
    """A transport to one server."""

    def open(self, request: Request) -> AbstractContextManager[Opened]:
        """Send a request; leaving the block early closes the connection. Raises WireError."""
        ...

    def clock(self) -> float:
        """A monotonic time in seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait some seconds."""
        ...


class HttpWire:
    """Transport over HTTP. Ignores proxy settings of the environment."""

    def __init__(self, root: str) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise ValueError("conform needs the httpx2 package, which is not installed: pip install httpx2") from error
        self._httpx = httpx2
        # One connection per request: a server that closes a connection after an error must not fail the next request.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._client = httpx2.Client(base_url=root, trust_env=False, follow_redirects=False, limits=limits)

    @contextmanager
    def open(self, request: Request) -> Iterator[Opened]:
        """Send a request; leaving the block early closes the connection. Raises WireError."""
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
        """A monotonic time in seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait some seconds."""
        time.sleep(seconds)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
