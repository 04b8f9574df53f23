"""How far a long job is: a bar on a terminal, and where stderr is no terminal one plain line every 30 s.

The lines come from a thread of their own, so that a job whose single step takes minutes is heard of too.
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
_STEADY = 600.0  # seconds that a bar's time left looks back on: answers differ much in length


class Progress(AbstractContextManager["Progress"]):
    """A job under way, for whoever reads along. Use `with`.

    Args:
        what: the job, which begins a line: "features".
        unit: what is counted: "answers". Empty where nothing is, and then only words and the time so far are told.
        total, before: how many there are to do (None where nobody knows), and how many earlier runs have done.
        rate: the unit of the rate where it is another than `unit`: tokens of answers.
        quiet: neither bar nor lines.
        console: where the bar is drawn; None is stderr.
        clock, over: seconds, and what is waited for between two lines and set at the end; for tests.
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
        self._told = not quiet and not (drawn and sys.stderr.isatty())
        words = TextColumn("{task.description}", markup=False)
        columns = [SpinnerColumn(), words] if total is None else [BarColumn(), words, TimeRemainingColumn()]
        self._bar = Bar(
            *columns,
            console=console,
            disable=not drawn,
            speed_estimate_period=_STEADY,
            redirect_stdout=sys.stdout.isatty(),  # what is printed meanwhile goes above the bar, unless to a file
            redirect_stderr=sys.stderr.isatty(),
        )
        self._begun = clock()
        self._task = self._bar.add_task("", total=total, completed=before)
        self._teller = threading.Thread(target=self._tell, name=f"progress of {what}", daemon=True)

    def __enter__(self) -> Progress:
        self._begun = self._clock()
        self._show()
        self._bar.start()
        if self._told:
            self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._teller.is_alive():
            self._teller.join()
        self._bar.stop()

    def step(self, count: int = 1, counted: int = 0, words: str | None = None) -> None:
        """So many more are done; `counted` is what they add to the rate where it has a unit of its own."""
        self.reach(self.done + count, self.counted + counted, words)

    def reach(self, done: int, counted: int = 0, words: str | None = None) -> None:
        """So many are done, those of earlier runs included; `words` (kept where None) stand after the numbers."""
        self.done, self.counted = done, counted
        self._words = self._words if words is None else words
        self._show()

    def say(self, words: str) -> None:
        """What is being done now, or how well it goes."""
        self.reach(self.done, self.counted, words)

    def line(self) -> str:
        """What a log is told: job, count, rate, time left (the time so far where nothing is done yet), words."""
        seconds, new = self._clock() - self._begun, self.done - self._before
        parts = [self._count(), self._speed(seconds)]
        left = None if self._total is None or new <= 0 else seconds * max(self._total - self.done, 0) / new
        parts += [f"{_spoken(seconds)} so far" if left is None else f"{_spoken(left)} left", self._words]
        return f"{self._what}: " + ", ".join(filter(None, parts))

    def _count(self) -> str:
        if not self._unit:
            return ""
        return f"{self.done} {self._unit}" if self._total is None else f"{self.done} of {self._total} {self._unit}"

    def _speed(self, seconds: float) -> str:
        """Of this run alone; empty as long as there is none."""
        counted = self.done - self._before if self._rate == self._unit else self.counted
        if not counted or seconds <= 0:
            return ""
        speed = counted / seconds
        return f"{speed:.0f} {self._rate}/s" if speed >= 10 else f"{speed:.2g} {self._rate}/s"

    def _show(self) -> None:
        """Bring the bar up to date; its own column tells the time left."""
        parts = (self._count() or self._what, self._speed(self._clock() - self._begun), self._words)
        self._bar.update(self._task, completed=self.done, description="  ".join(filter(None, parts)))

    def _tell(self) -> None:
        """Until the job is over, a line every 30 s."""
        while not self._over.wait(EVERY):
            try:
                print(self.line(), file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads any more, or stderr is closed: no reason to end a job
                return


def _spoken(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
