"""Running the application: uvicorn, signals, and an end at which every accepted request is answered or told."""

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
from haast.serving.app import Host, make_app
from haast.serving.config import ServeConfig
from haast.serving.connection import IDLE, Connection
from haast.serving.security import MOST_HEADERS
from haast.serving.service import Service, loader
from haast.serving.structured import GrammarError

_LOG = logging.getLogger("haast.serving")
_ARENA_MAX, _HEAPS = -8, 2  # mallopt's number for it, and how many
_BESIDE = 512  # connections beside those whose answers run or wait; most of them are idle


class Server(uvicorn.Server):
    """uvicorn, whose shutdown lets running answers end, and after a while ends and tells them."""

    def __init__(self, config: uvicorn.Config, host: Host) -> None:
        super().__init__(config)
        self._host, self._tidied = host, 0

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # a second
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.look()
            served = self.server_state.total_requests
            if served != self._tidied and not self.server_state.tasks:
                self._tidied = served
                await asyncio.to_thread(_tidy)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        self._host.close()
        timer = asyncio.get_running_loop().call_later(self._host.config.grace, self._host.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._host.end_all()


def _tidy() -> None:
    """Give the system what the C library keeps of freed memory: a flood of large bodies leaves hundreds of MB there."""
    _call_c("malloc_trim", 0)


def _share_heaps() -> None:
    """Let all threads allocate from few heaps of the C library, which makes one for each thread otherwise.

    Threads come and go with requests, and what is freed in the heap of one serves no other: thousands of bodies left
    170 MB there that no trimming gives back, in which nothing lived. glibc takes this as long as it has few heaps.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _call_c("mallopt", _ARENA_MAX, _HEAPS)


def _call_c(name: str, *numbers: int) -> None:
    """Call a function of the C library, where it has it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*numbers)


def _settle(service: Service) -> None:
    """Do once what would stop everybody later, in the middle of answers.

    Python's collector looks through all objects again and again, the half a million of the libraries and the model
    too: a quarter of a second in which no thread runs, several times for a large body. What is here now stays here.
    """
    with suppress(GrammarError):  # models without grammars
        service.facts.grammars.prepare()
    gc.collect()
    gc.freeze()


def make_server(
    load: Callable[[], Haast], name: str, config: ServeConfig, loaded: Callable[[Service], None] | None = None
) -> Server:
    """A server that is ready to `run`; `load` is called when it does, and `loaded` once that is done."""
    stop = list[Callable[[], None]]()
    app, host = make_app(loader(load, name, config, loaded), config, name, lambda: stop[0]())
    bounds = {"most": config.max_running + config.max_waiting + _BESIDE, "send_timeout": config.send_timeout}
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
    server = Server(setup, host)
    stop.append(lambda: setattr(server, "should_exit", True))
    return server


def serve(load: Callable[[], Haast], name: str, config: ServeConfig) -> None:
    """Serve until a signal says stop. Raises what went wrong in loading, ValueError where the port is taken."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    _share_heaps()
    gc.freeze()  # what was imported so far; loading makes many objects
    server = make_server(load, name, config, _settle)
    with _listening(config) as listening:
        _LOG.info("listening on http://%s:%d (model %s)", config.host, listening.getsockname()[1], name)
        server.run(sockets=[listening])
    host = server._host
    if host.failure is not None:
        raise host.failure


def _listening(config: ServeConfig) -> socket.socket:
    """The socket of a server. Raises ValueError where the address can't be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host.strip("[]"), config.port), family=family, backlog=512)
    except OSError as error:
        raise ValueError(
            f"host={config.host!r}, port={config.port} can't be listened on ({error.strerror}): choose another"
        ) from error
