"""The curves of a training run as a picture, `curves.png`, and what more of the same data might bring.

Owns the drawing and the fit. Knows metrics lines only (see `report.Reporter`). matplotlib is optional and is imported
at the first drawing, never on the way to `haast generate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIT_FROM = 3  # evaluations; a line through two says nothing of their noise
_EVALUATED = ("tau", "valid_ce", "valid_top1")


class Curves:
    """A `report.Watcher` that redraws `out_dir`/curves.png at each evaluation and at the end.

    Args:
        out_dir: folder of the run.
    """

    name = "curves.png"

    def __init__(self, out_dir: Path) -> None:
        self._path = out_dir / "curves.png"
        self._lines: list[Mapping[str, Any]] = []
        self._drawn = 0  # lines in the picture

    def start(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Take over the lines of a resumed run. Raises ImportError where matplotlib is missing."""
        import matplotlib.figure  # noqa: F401  said before the hours of training, not after

        self._lines, self._drawn = list(kept), len(kept)

    def line(self, values: Mapping[str, Any]) -> None:
        """Remember a line; redraw if it is an evaluation."""
        self._lines.append(values)
        if any(name in values for name in _EVALUATED):
            self._draw()

    def close(self) -> None:
        """Draw what came after the last evaluation."""
        if self._drawn < len(self._lines):
            self._draw()

    def _draw(self) -> None:
        draw_curves(self._lines, self._path)
        self._drawn = len(self._lines)


def doubling_gain(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """How much tau another doubling of views would bring: the slope of the least-squares line of tau over log2(views).

    An extrapolation: it takes for granted that tau goes on as it went. Within one run the learning rate falls too, and
    what that brings is counted in.

    Args:
        metrics: lines of metrics.jsonl; only those with `tau` and `views` above 0 count.

    Returns:
        tau per doubling; None with fewer than three evaluations at different views.
    """
    fitted = _line_through_taus(metrics)
    return None if fitted is None else fitted[0]


def _line_through_taus(metrics: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Slope and intercept of tau over log2(views)."""
    points = dict(zip(*_series(metrics, "tau"), strict=True))
    if len(points) < _FIT_FROM:
        return None
    xs, ys = [math.log2(views) for views in points], list(points.values())
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return slope, mean_y - slope * mean_x


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Views and values of the lines that have `name` as a finite number; a log axis has no place for 0 views."""
    points = [
        (float(line["views"]), float(line[name]))
        for line in metrics
        if name in line and line.get("views", 0) > 0 and math.isfinite(line[name])
    ]
    return [x for x, _ in points], [y for _, y in points]


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw cross-entropy, top-1 agreement and tau over views, as a PNG behind a rename.

    Args:
        metrics: lines of metrics.jsonl.
        path: the PNG.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # by itself it opens no window and leaves pyplot's state alone
    loss, top1, tau = figure.subplots(1, 3)
    _panel(loss, metrics, "cross-entropy and loss", {"loss": "loss", "ce": "train", "valid_ce": "held out"})
    _panel(top1, metrics, "top-1 agreement with the target", {"top1": "train", "valid_top1": "held out"})
    _panel(tau, metrics, "tau, tokens per target forward", {"tau": "validation prompts"})
    _draw_fit(tau, metrics)
    temporary = path.with_suffix(".png.tmp")
    try:
        canvas.print_figure(temporary, format="png", dpi=110)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _panel(axes: Axes, metrics: Sequence[Mapping[str, Any]], title: str, names: Mapping[str, str]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    colours = {"loss": "0.7", "train": "tab:blue", "held out": "tab:orange", "validation prompts": "tab:green"}
    for name, label in names.items():
        xs, ys = _series(metrics, name)
        if xs:
            # Evaluations are few, so each has its mark; so has a lone point, which makes no line.
            marker = "o" if name in _EVALUATED or len(xs) == 1 else ""
            axes.plot(xs, ys, label=label, color=colours[label], marker=marker, markersize=4, linewidth=1.3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("views", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")


def _draw_fit(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """The fitted line one doubling further, dashed where nothing was measured, and what it says."""
    fitted = _line_through_taus(metrics)
    if fitted is None:
        return
    slope, intercept = fitted
    views = _series(metrics, "tau")[0]
    ends = [min(views), max(views), 2 * max(views)]
    heights = [intercept + slope * math.log2(x) for x in ends]
    axes.plot(ends[:2], heights[:2], color="0.4", linewidth=1)
    axes.plot(ends[1:], heights[1:], color="0.4", linewidth=1, linestyle="--")
    words = f"another doubling of views would bring\nabout {slope:+.2f} tau (an extrapolation)"
    axes.text(0.97, 0.05, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color="0.3")
