"""Runs the application with uvicorn: signals, periodic checks, and a shutdown that answers every accepted request."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn

from haast.api import Haast
from haast.serving.app import AppState, make_app
from haast.serving.config import ServeConfig
from haast.serving.connection import IDLE, Connection
from haast.serving.security import MOST_HEADERS
from haast.serving.service import Service, loader
from haast.serving.structured import GrammarError

_LOG = logging.getLogger("haast.serving")
_M_ARENA_MAX, _ARENAS = -8, 2  # mallopt's option, and its value
_EXTRA_CONNECTIONS = 512  # connections in addition to those whose answers run or wait; most of them are idle


class Server(uvicorn.Server):
    """uvicorn with a grace period: at a shutdown running answers may finish, and get an error after it."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self._state, self._trimmed_at = state, 0

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once per second
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.look()
            served = self.server_state.total_requests
            if served != self._trimmed_at and not self.server_state.tasks:
                self._trimmed_at = served
                await asyncio.to_thread(_trim_memory)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        self._state.close()
        timer = asyncio.get_running_loop().call_later(self._state.config.grace, self._state.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._state.end_all()


def _trim_memory() -> None:
    """Return freed memory to the system: after many large bodies the C library keeps hundreds of MB."""
    _call_c("malloc_trim", 0)


def _limit_arenas() -> None:
    """Limit glibc's malloc to a few arenas; by default it makes one for each thread.

    Threads come and go with requests, and memory freed in one arena is not reused in others: after thousands of bodies
    170 MB stayed allocated that malloc_trim did not return. Must run before many arenas exist.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _call_c("mallopt", _M_ARENA_MAX, _ARENAS)


def _call_c(name: str, *numbers: int) -> None:
    """Call a function of the C library, if it exists."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*numbers)


def _prepare_service(service: Service) -> None:
    """After loading, do slow work that would block all requests later.

    Python's garbage collector visits all objects each time, including half a million of the libraries and the model: a
    quarter of a second in which no thread runs, several times per large body. Freezing excludes the present objects.
    """
    with suppress(GrammarError):  # the model does not support grammars
        service.limits.grammars.prepare()
    gc.collect()
    gc.freeze()


def make_server(
    load: Callable[[], Haast], name: str, config: ServeConfig, loaded: Callable[[Service], None] | None = None
) -> Server:
    """Build a server that is ready to `run`; then it calls `load` in the background, and `loaded` with the service."""
    stop = list[Callable[[], None]]()
    app, state = make_app(loader(load, name, config, loaded), config, name, lambda: stop[0]())
    bounds = {"most": config.max_running + config.max_waiting + _EXTRA_CONNECTIONS, "send_timeout": config.send_timeout}
    setup = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=type("BoundConnection", (Connection,), bounds),
        ws="none",
        lifespan="on",
        server_header=False,
        date_header=True,
        proxy_headers=False,
        access_log=False,
        log_config=None,
        h11_max_incomplete_event_size=MOST_HEADERS,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=int(config.grace) + 10,
        backlog=512,
    )
    server = Server(setup, state)
    stop.append(lambda: setattr(server, "should_exit", True))
    return server


def serve(load: Callable[[], Haast], name: str, config: ServeConfig) -> None:
    """Serve until a signal stops it. Raises the error of loading, and ValueError if the port is taken."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    _limit_arenas()
    gc.freeze()  # excludes the imported modules: loading makes many objects
    server = make_server(load, name, config, _prepare_service)
    with _listening_socket(config) as listening:
        _LOG.info("listening on http://%s:%d (model %s)", config.host, listening.getsockname()[1], name)
        server.run(sockets=[listening])
    state = server._state
    if state.failure is not None:
        raise state.failure


def _listening_socket(config: ServeConfig) -> socket.socket:
    """A listening socket. Raises ValueError if the address can't be used."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host.strip("[]"), config.port), family=family, backlog=512)
    except OSError as error:
        raise ValueError(
            f"host={config.host!r}, port={config.port} can't be listened on ({error.strerror}): choose another"
        ) from error
