"""A real server in a thread of this process, on the tests' tiny model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serving import NAME, tiny_haast

from haast.serving.config import ServeConfig
from haast.serving.run import Server, make_server
from haast.serving.service import Service


@dataclass
class Live:
    """A server in a thread of this process."""

    port: int
    service: Service
    server: Server

    @property
    def here(self) -> tuple[int, int]:
        """Requests that run and wait."""
        scheduler = self.service.engine("auto").scheduler
        return scheduler.running, scheduler.waiting

    def until(self, state: Callable[[], bool], seconds: float = 10.0) -> float:
        """Seconds until something is so."""
        begun = time.monotonic()
        while not state():
            assert time.monotonic() - begun < seconds, f"{self.here} run and wait"
            time.sleep(0.005)
        return time.monotonic() - begun


@contextmanager
def live(send_buffer: int | None = None, **fields: Any) -> Iterator[Live]:
    """A real server on a free port. `send_buffer` bounds what the system takes off its hands for a slow reader."""
    config = ServeConfig(port=0, **fields)
    haast = tiny_haast(config)
    server = make_server(lambda: haast, NAME, config)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until = time.monotonic() + 60
        while server._state.loaded is None:
            assert thread.is_alive() and time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        yield Live(listening.getsockname()[1], server._state.loaded, server)
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()
    assert not thread.is_alive(), "the server has ended"
