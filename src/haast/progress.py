"""Progress of a long job: a bar on a terminal, or one plain line every 30 s if stderr is not a terminal.

A thread prints the lines, so that they also appear while a single step takes minutes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY = 30.0  # seconds between two lines
_SPEED_PERIOD = 600.0  # seconds over which the bar averages its speed: answers differ much in length


class Progress(AbstractContextManager["Progress"]):
    """Reports a running job. Use as a context manager.

    Args:
        what: name of the job, at the start of a line: "features".
        unit: what is counted: "answers". If empty, lines have only the words and the elapsed time.
        total, before: number of units to do (None: unknown), and number that earlier runs have done.
        rate: unit of the rate if it differs from `unit`: "tokens", of answers.
        quiet: neither bar nor lines.
        console: where the bar is drawn; None is stderr.
        clock, over: time in seconds, and the event that ends the waiting between lines; for tests.
    """

    def __init__(
        self,
        what: str,
        unit: str = "",
        total: int | None = None,
        before: int = 0,
        *,
        rate: str = "",
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        over: threading.Event | None = None,
    ) -> None:
        self._what, self._unit, self._total, self._before = what, unit, total, before
        self._rate, self._clock = rate or unit, clock
        self._over = threading.Event() if over is None else over
        self.done, self.counted, self._words = before, 0, ""
        console = Console(stderr=True) if console is None else console
        drawn = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._prints_lines = not quiet and not (drawn and sys.stderr.isatty())
        words = TextColumn("{task.description}", markup=False)
        columns = [SpinnerColumn(), words] if total is None else [BarColumn(), words, TimeRemainingColumn()]
        self._bar = Bar(
            *columns,
            console=console,
            disable=not drawn,
            speed_estimate_period=_SPEED_PERIOD,
            redirect_stdout=sys.stdout.isatty(),  # other output appears above the bar, unless it goes to a file
            redirect_stderr=sys.stderr.isatty(),
        )
        self._started = clock()
        self._task = self._bar.add_task("", total=total, completed=before)
        self._printer = threading.Thread(target=self._print_lines, name=f"progress of {what}", daemon=True)

    def __enter__(self) -> Progress:
        self._started = self._clock()
        self._show()
        self._bar.start()
        if self._prints_lines:
            self._printer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._printer.is_alive():
            self._printer.join()
        self._bar.stop()

    def step(self, count: int = 1, counted: int = 0, words: str | None = None) -> None:
        """Add `count` finished units; `counted` is what they add to a rate that has another unit."""
        self.reach(self.done + count, self.counted + counted, words)

    def reach(self, done: int, counted: int = 0, words: str | None = None) -> None:
        """Set the number of finished units, earlier runs included. `words` follow the numbers; None keeps them."""
        self.done, self.counted = done, counted
        self._words = self._words if words is None else words
        self._show()

    def set_status(self, words: str) -> None:
        """Set only the words, e.g. the current part of the job or a metric."""
        self.reach(self.done, self.counted, words)

    def line(self) -> str:
        """The line of a log: job, count, rate, time left (elapsed time if nothing is done yet), words."""
        seconds, new = self._clock() - self._started, self.done - self._before
        parts = [self._count(), self._speed(seconds)]
        left = None if self._total is None or new <= 0 else seconds * max(self._total - self.done, 0) / new
        parts += [f"{_duration(seconds)} so far" if left is None else f"{_duration(left)} left", self._words]
        return f"{self._what}: " + ", ".join(filter(None, parts))

    def _count(self) -> str:
        if not self._unit:
            return ""
        return f"{self.done} {self._unit}" if self._total is None else f"{self.done} of {self._total} {self._unit}"

    def _speed(self, seconds: float) -> str:
        """The rate of this run, without earlier ones; empty if nothing is done yet."""
        counted = self.done - self._before if self._rate == self._unit else self.counted
        if not counted or seconds <= 0:
            return ""
        speed = counted / seconds
        return f"{speed:.0f} {self._rate}/s" if speed >= 10 else f"{speed:.2g} {self._rate}/s"

    def _show(self) -> None:
        """Update the bar, which has its own column for the time left."""
        parts = (self._count() or self._what, self._speed(self._clock() - self._started), self._words)
        self._bar.update(self._task, completed=self.done, description="  ".join(filter(None, parts)))

    def _print_lines(self) -> None:
        """Print a line every 30 s until the job ends."""
        while not self._over.wait(EVERY):
            try:
                print(self.line(), file=sys.stderr, flush=True)
            except (OSError, ValueError):  # a broken pipe or closed stderr must not end the job
                return


def _duration(seconds: float) -> str:
    """A duration in s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
