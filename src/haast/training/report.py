"""Reporting of a training run: progress bar, log lines, metrics.jsonl, and the watchers of its lines.

Owns the console output and the file. Does not know tensors, or what a watcher does with a line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from haast.files import replacing
from haast.progress import Progress

_SUMS = ("loss", "ce", "feature", "top1", "accepted", "views")


@dataclass(frozen=True)
class Finding:
    """Result of one check for the cause of a tau of about 1, see `diagnostics`."""

    check: str  # short name
    text: str  # what was measured
    state: Literal["ok", "suspect"]
    remedy: str  # what to do if it is suspect


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per check, suspect ones in red with their remedy."""
    table = Table(title="tau is about 1: the target accepts none of the head's drafts. Checks:", box=None)
    for heading in ("", "check", "found"):
        table.add_column(heading, justify="left", overflow="fold")
    for finding in sorted(findings, key=lambda f: f.state != "suspect"):
        suspect = finding.state == "suspect"
        result = Text(finding.text + (f"; {finding.remedy}" if suspect else ""))
        table.add_row(Text(finding.state, style="bold red" if suspect else "green"), Text(finding.check), result)
    return table


Line = Mapping[str, Any]
Lines = Sequence[Line]
# Called at the start with the metrics lines that the run continues from (later lines of an older run are void). Returns
# a function that is called with each new line, and with None at the end of the run. Both may raise ImportError (an
# optional package is missing) or OSError (a failed write): the watcher is then dropped and training continues.
Watcher = Callable[[Lines], Callable[[Line | None], None]]


class Reporter:
    """Collects sums between log lines, and writes the lines.

    Metrics lines: step, views (supervised tokens so far), loss, ce, feature, top1, accepted (the overlap of the head's
    and the teacher's probabilities), views_per_s; evaluations have the same of held-out sequences as valid_*,
    valid_alpha (agreement by depth), tau, seconds, and if tau is about 1 `alarm`, the findings of the checks.

    Args:
        total: supervised tokens of the whole run.
        path: metrics.jsonl; lines are appended.
        quiet: write files only.
        watchers: called with every line; keys are the names of their outputs, for messages.
        writes: whether this process writes files; with several processes one does, the others only keep sums.
        console: for messages; None is stdout.
    """

    def __init__(
        self,
        total: int,
        path: Path,
        quiet: bool,
        watchers: Mapping[str, Watcher] | None = None,
        writes: bool = True,
        console: Console | None = None,
    ) -> None:
        self._writes, self._quiet = writes, quiet
        self._path, self._total = path, total
        self._console = Console(quiet=True) if quiet else console or Console()
        self._watchers, self._lines = watchers or {}, 0
        self._callbacks: dict[str, Callable[[Line | None], None]] = {}
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._since = time.monotonic()
        self._views = 0
        self._progress: Progress | None = None

    def state(self) -> dict[str, float]:
        """For a checkpoint: the sums since the last line, and the number of lines."""
        return {**self._sums, "lines": self._lines}

    def lines(self) -> list[dict[str, Any]]:
        """The lines in metrics.jsonl so far."""
        values = list[Any]()
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            with suppress(ValueError):  # a line cut by a kill
                values.append(json.loads(line))
        return [each for each in values if isinstance(each, dict) and isinstance(each.get("step"), int)]

    def start(self, step: int, state: Mapping[str, float] | None = None) -> None:
        """Load a checkpoint's state, and delete lines written after it: a resumed run writes them again.

        Raises:
            ValueError: the file cannot be written.
        """
        state = state or {}
        self._sums |= {name: state[name] for name in _SUMS if name in state}
        if not self._writes:
            return
        kept = [values for values in self.lines() if values["step"] <= step]
        kept = kept[: int(state.get("lines", len(kept)))]  # lines of the same step may be newer than its checkpoint
        self._lines = len(kept)
        with self._explain_write_errors(), replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(values) + "\n" for values in kept))
        for name, watcher in self._watchers.items():
            callback = self._call_watcher(name, partial(watcher, kept))
            self._callbacks |= {} if callback is None else {name: callback}

    def close(self) -> None:
        """Notify the watchers that the run is over."""
        self._notify(None)

    @contextmanager
    def live(self, views: int) -> Iterator[None]:
        """Show the run's progress bar inside the context."""
        self._since, self._views = time.monotonic(), views
        with Progress(
            "training", "supervised tokens", self._total, views, quiet=self._quiet, console=self._console
        ) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def evaluating(self) -> Progress:
        """Progress of an evaluation after the end of training."""
        return Progress("last evaluation", quiet=self._quiet, console=self._console)

    def step(self, views: int, sums: Mapping[str, float], tau: float) -> None:
        """Add the sums of one step."""
        for name in _SUMS:
            self._sums[name] += sums[name]
        self._views = views
        if self._progress is not None:
            self._progress.reach(views, words=f"{_format_means(self._means())}  tau {tau:.2f}")

    def line(self, step: int) -> None:
        """Write the means since the last line."""
        if not self._sums["views"]:
            return
        means = self._means()
        self._write({"step": step, "views": self._views, **means})
        # One line of at most 80 columns; all tokens are supervised ones.
        text = f"{self._views} tokens  {_format_means(means)}  {means['views_per_s']:.0f} tokens/s"
        self._console.print(text, highlight=False)
        self._sums, self._since = dict.fromkeys(_SUMS, 0.0), time.monotonic()

    def evaluation(self, step: int, views: int, values: Mapping[str, Any], findings: Sequence[Finding] | None) -> None:
        """Write an evaluation. With `findings` (tau is about 1) also write and print the alarm."""
        alarm = {} if findings is None else {"alarm": [asdict(finding) for finding in findings]}
        self._write({"step": step, "views": views, **values, **alarm})
        text = "  ".join(f"{name} {_format_value(value)}" for name, value in values.items())
        self._console.print(f"{views} tokens  evaluation  {text}", style="bold", highlight=False)
        if findings is not None:
            self._console.print(findings_table(findings))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context from the training speed."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - start

    def _means(self) -> dict[str, float]:
        views = max(self._sums["views"], 1.0)
        means = {name: self._sums[name] / views for name in _SUMS if name != "views"}
        return means | {"views_per_s": views / max(time.monotonic() - self._since, 1e-9)}

    def _write(self, values: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        with self._explain_write_errors(), self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self._lines += 1
        self._notify(values)

    @contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"cannot write {self._path} ({error.strerror}): free space; the run resumes from its last checkpoint"
            ) from error

    def _notify(self, line: Line | None) -> None:
        for name, callback in list(self._callbacks.items()):
            self._call_watcher(name, partial(callback, line))

    def _call_watcher(self, name: str, call: Callable[[], Any]) -> Any:
        """Call a watcher; one that fails is reported and dropped."""
        try:
            with self.paused():
                return call()
        except (ImportError, OSError) as error:
            self._callbacks.pop(name, None)
            remedy = ": pip install 'haast[curves]'" if isinstance(error, ImportError) else ""
            self._console.print(f"no {name} ({error}){remedy}; training continues", highlight=False, markup=False)
            return None


def _format_means(means: Mapping[str, float]) -> str:
    names = {"loss": "loss", "ce": "ce", "feature": "feature", "top1": "top-1"}
    return "  ".join(f"{label} {means[name]:.3f}" for name, label in names.items())


def _format_value(value: Any) -> str:
    return " ".join(f"{part:.2f}" for part in value) if isinstance(value, list) else f"{value:.3f}"
