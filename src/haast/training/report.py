"""What a training run tells: one progress line, log lines, and metrics.jsonl. Owns the words; knows no tensors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_SUMS = ("loss", "ce", "feature", "top1", "accepted", "views")


class RateColumn(ProgressColumn):
    """Tokens per second: the task's field `counted` over its elapsed time."""

    def render(self, task: Task) -> Text:
        """Draw the cell."""
        return Text(f"{task.fields.get('counted', 0) / max(task.elapsed or 0.0, 1e-9):.0f} tokens/s")


class Heartbeat:
    """For logs, where a progress bar draws nothing: one line a minute. On a terminal and with `quiet` it is silent."""

    def __init__(self, quiet: bool, seconds: float = 60.0) -> None:
        self._console, self._seconds = Console(stderr=True, quiet=quiet), seconds
        self._start = self._last = time.monotonic()

    def line(self, words: str, tokens: int) -> None:
        """Say how far a job is, unless the last line is fresh; `tokens` since the start give the rate."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._last < self._seconds:
            return
        self._last = now
        self._console.print(f"{words}  {tokens / (now - self._start):.0f} tokens/s", highlight=False)


class Reporter:
    """Collects sums between log lines.

    Metrics lines: step, views, loss, ce, feature, top1, accepted (probability that a draft of the head's first choices
    is kept at temperature 1), views_per_s; evaluations have the same of held-out sequences as valid_*, valid_alpha (by
    depth), tau and seconds.

    Args:
        total: views of the whole run.
        path: metrics.jsonl; lines are appended.
        quiet: write the file only.
        writes: this process writes the file; of several one does.
    """

    def __init__(self, total: int, path: Path, quiet: bool, writes: bool = True) -> None:
        self._writes = writes
        self._path, self._console, self._total = path, Console(quiet=quiet), total
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._since = time.monotonic()
        self._views = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def state(self) -> dict[str, float]:
        """The sums since the last line, for a checkpoint."""
        return dict(self._sums)

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds so far."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def start(self, step: int, sums: Mapping[str, float] | None = None) -> None:
        """Forget lines after `step` (a resumed run writes them again) and take over a checkpoint's sums."""
        self._sums |= dict(sums or {})
        if self._writes and self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            self._path.write_text("".join(line + "\n" for line in kept))

    @contextmanager
    def live(self, views: int) -> Iterator[None]:
        """Show the progress line."""
        columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} views {task.description}"))
        self._since, self._views = time.monotonic(), views
        quiet = not self._console.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=self._console, disable=quiet) as bar:
            self._bar, self._task = bar, bar.add_task("", total=self._total, completed=views)
            try:
                yield
            finally:
                self._bar = None

    def step(self, views: int, sums: Mapping[str, float], tau: float) -> None:
        """Account one step."""
        for name in _SUMS:
            self._sums[name] += sums[name]
        self._views = views
        if self._bar is not None:
            self._bar.update(self._task, completed=views, description=f"{self._words()}  tau {tau:.2f}")

    def line(self, step: int) -> None:
        """Write the means since the last line."""
        if not self._sums["views"]:
            return
        self._write({"step": step, "views": self._views, **self._means()})
        self._console.print(f"{self._views} views  {self._words()}", highlight=False)
        self._sums, self._since = dict.fromkeys(_SUMS, 0.0), time.monotonic()

    def evaluation(self, step: int, views: int, values: Mapping[str, Any], tau_is_one: bool) -> None:
        """Write an evaluation; `tau_is_one` raises the alarm."""
        alarm = "tau is about 1: nothing the head drafts is accepted; check the index shift, the target and the data"
        self._write({"step": step, "views": views, **values, **({"alarm": alarm} if tau_is_one else {})})
        words = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        self._console.print(f"{views} views  evaluation  {words}", style="bold", highlight=False)
        if tau_is_one:
            self._console.print(f"alarm: {alarm}", style="bold red")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent within out of views/s."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - start

    def _means(self) -> dict[str, float]:
        views = max(self._sums["views"], 1.0)
        means = {name: self._sums[name] / views for name in _SUMS if name != "views"}
        return means | {"views_per_s": views / max(time.monotonic() - self._since, 1e-9)}

    def _words(self) -> str:
        m = self._means()
        return (
            f"loss {m['loss']:.3f}  ce {m['ce']:.3f}  feature {m['feature']:.3f}  top-1 {m['top1']:.3f}  "
            f"{m['views_per_s']:.0f} views/s"
        )

    def _write(self, values: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _short(value: Any) -> str:
    return " ".join(f"{part:.2f}" for part in value) if isinstance(value, list) else f"{value:.3f}"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn last line
