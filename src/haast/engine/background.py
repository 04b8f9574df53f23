"""Steps for asynchronous readers, who must not wait in the thread of their event loop.

Owns one worker thread per scheduler. It takes steps as long as somebody waits for a token, tells everybody who has got
one, and sleeps otherwise. Knows no event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from haast.core import Request


class Background:
    """Takes steps for whoever waits with `served`."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="haast")  # its thread starts at first use
        self._lock = threading.Lock()
        self._readers: list[tuple[Request, Future[None]]] = []
        self._idle = True

    def served(self, request: Request, advance: Callable[[], None]) -> Future[None]:
        """Done when the request has something to read or has ended; cancelling it ends the wait, not the request.

        Args:
            request: of the reader.
            advance: takes one step for all requests, or waits for another thread's.
        """
        future: Future[None] = Future()
        with self._lock:
            self._readers.append((request, future))
            if self._idle:
                self._idle = False
                self._worker.submit(self._run, advance)
        return future

    def _run(self, advance: Callable[[], None]) -> None:
        while self._tell():
            try:
                advance()
            except BaseException as error:
                with self._lock:
                    failed, self._readers, self._idle = self._readers, [], True
                for _, future in failed:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(error)
                return

    def _tell(self) -> bool:
        """Tell those who have been served; whether anybody else waits."""
        left, told = list[tuple[Request, Future[None]]](), list[Future[None]]()
        with self._lock:
            for request, future in self._readers:
                if request.emissions or request.finished:
                    told.append(future)
                elif not future.cancelled():
                    left.append((request, future))
            self._readers, self._idle = left, not left
        for future in told:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
        return bool(left)
