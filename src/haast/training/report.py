"""What a training run tells: its progress, log lines, metrics.jsonl, and whoever follows those lines.

Owns the words and the file. Knows no tensors, and not what a watcher makes of a line.
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
    """One check that was run to explain a tau of about 1, see `diagnostics`."""

    check: str  # its name, a few words
    text: str  # what was measured
    state: Literal["ok", "suspect"]
    remedy: str  # what to do if it is suspect


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per check, suspects in red with their remedy."""
    table = Table(title="tau is about 1: nothing that the head drafts is accepted. What was checked:", box=None)
    for heading in ("", "check", "found"):
        table.add_column(heading, justify="left", overflow="fold")
    for finding in sorted(findings, key=lambda f: f.state != "suspect"):
        suspect = finding.state == "suspect"
        words = Text(finding.text + (f"; {finding.remedy}" if suspect else ""))
        table.add_row(Text(finding.state, style="bold red" if suspect else "green"), Text(finding.check), words)
    return table


Line = Mapping[str, Any]
Lines = Sequence[Line]
# What follows the metrics: it gets the lines that a run goes on from (later ones, if there were any, are void), and
# what it returns gets every new line, and None when the run is over. Either may raise ImportError (an optional package
# is missing) or OSError (nothing can be written): it is dropped, and the training goes on.
Watcher = Callable[[Lines], Callable[[Line | None], None]]


class Reporter:
    """Collects sums between log lines.

    Metrics lines: step, views, loss, ce, feature, top1, accepted (the overlap of the head's and the teacher's
    probabilities), views_per_s; evaluations have the same of held-out sequences as valid_*, valid_alpha (agreement by
    depth), tau, seconds, and where tau is about 1 `alarm`, the findings of the checks.

    Args:
        total: views of the whole run.
        path: metrics.jsonl; lines are appended.
        quiet: write files only.
        watchers: are told of every line, by the names of what they make.
        writes: of several processes one writes; the others keep their sums only.
        console: where the words go; None is stdout.
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
        self._following: dict[str, Callable[[Line | None], None]] = {}
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._since = time.monotonic()
        self._views = 0
        self._progress: Progress | None = None

    def state(self) -> dict[str, float]:
        """For a checkpoint: the sums since the last line, and how many lines there are."""
        return {**self._sums, "lines": self._lines}

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds so far."""
        values = list[Any]()
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            with suppress(ValueError):  # one that a kill has torn
                values.append(json.loads(line))
        return [each for each in values if isinstance(each, dict) and isinstance(each.get("step"), int)]

    def start(self, step: int, state: Mapping[str, float] | None = None) -> None:
        """Take over a checkpoint's state, and forget the lines written after it: a resumed run writes them again.

        Raises:
            ValueError: the file cannot be written.
        """
        state = state or {}
        self._sums |= {name: state[name] for name in _SUMS if name in state}
        if not self._writes:
            return
        kept = [values for values in self.lines() if values["step"] <= step]
        kept = kept[: int(state.get("lines", len(kept)))]  # the last step may have had lines after its checkpoint
        self._lines = len(kept)
        with self._writing(), replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(values) + "\n" for values in kept))
        for name, watcher in self._watchers.items():
            follow = self._off_the_clock(name, partial(watcher, kept))
            self._following |= {} if follow is None else {name: follow}

    def close(self) -> None:
        """Let the watchers finish."""
        self._tell(None)

    @contextmanager
    def live(self, views: int) -> Iterator[None]:
        """Tell how far the run is."""
        self._since, self._views = time.monotonic(), views
        with Progress("training", "views", self._total, views, quiet=self._quiet, console=self._console) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def evaluating(self) -> Progress:
        """Tell of an evaluation outside the run's own progress."""
        return Progress("last evaluation", quiet=self._quiet, console=self._console)

    def step(self, views: int, sums: Mapping[str, float], tau: float) -> None:
        """Account one step."""
        for name in _SUMS:
            self._sums[name] += sums[name]
        self._views = views
        if self._progress is not None:
            self._progress.reach(views, words=f"{_words(self._means())}  tau {tau:.2f}")

    def line(self, step: int) -> None:
        """Write the means since the last line."""
        if not self._sums["views"]:
            return
        means = self._means()
        self._write({"step": step, "views": self._views, **means})
        words = f"{self._views} views  {_words(means)}  {means['views_per_s']:.0f} views/s"
        self._console.print(words, highlight=False)
        self._sums, self._since = dict.fromkeys(_SUMS, 0.0), time.monotonic()

    def evaluation(self, step: int, views: int, values: Mapping[str, Any], findings: Sequence[Finding] | None) -> None:
        """Write an evaluation; `findings` are given where tau is about 1, and raise the alarm."""
        alarm = {} if findings is None else {"alarm": [asdict(finding) for finding in findings]}
        self._write({"step": step, "views": views, **values, **alarm})
        words = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        self._console.print(f"{views} views  evaluation  {words}", style="bold", highlight=False)
        if findings is not None:
            self._console.print(findings_table(findings))

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

    def _write(self, values: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        with self._writing(), self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self._lines += 1
        self._tell(values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"cannot write {self._path} ({error.strerror}): free space; the run resumes from its last checkpoint"
            ) from error

    def _tell(self, line: Line | None) -> None:
        for name, follow in list(self._following.items()):
            self._off_the_clock(name, partial(follow, line))

    def _off_the_clock(self, name: str, act: Callable[[], Any]) -> Any:
        """Let a watcher do something; one that fails is named once and dropped."""
        try:
            with self.paused():
                return act()
        except (ImportError, OSError) as error:
            self._following.pop(name, None)
            remedy = ": pip install 'haast[curves]'" if isinstance(error, ImportError) else ""
            self._console.print(f"no {name} ({error}){remedy}; training goes on", highlight=False, markup=False)
            return None


def _words(means: Mapping[str, float]) -> str:
    names = {"loss": "loss", "ce": "ce", "feature": "feature", "top1": "top-1"}
    return "  ".join(f"{word} {means[name]:.3f}" for name, word in names.items())


def _short(value: Any) -> str:
    return " ".join(f"{part:.2f}" for part in value) if isinstance(value, list) else f"{value:.3f}"
