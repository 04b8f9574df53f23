"""Plots of a training run: the curves in `OUT/curves.png` and TensorBoard events in `OUT/tensorboard`.

Owns the drawing, the fit of tau, and the event files. Uses metrics lines only (see `report.Reporter`). matplotlib and
tensorboard are optional; they are imported when a training run starts, not by other commands.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from haast.files import replacing
from haast.training.report import Line, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIN_EVALUATIONS = 3  # a line through two points shows nothing of their noise
_EVALUATED = ("tau", "valid_ce", "valid_top1")


def curves(out_dir: Path, kept: Lines) -> Callable[[Line | None], None]:
    """A `report.Watcher` that redraws `out_dir`/curves.png at each evaluation and at the end."""
    import matplotlib.figure  # noqa: F401  a missing package should raise before hours of training

    lines, drawn = list(kept), len(kept)

    def on_line(line: Line | None) -> None:
        nonlocal drawn
        lines.extend([] if line is None else [line])
        if drawn < len(lines) and (line is None or any(name in line for name in _EVALUATED)):
            draw_curves(lines, out_dir / "curves.png")
            drawn = len(lines)

    return on_line


def tensorboard(out_dir: Path, kept: Lines) -> Callable[[Line | None], None]:
    """A `report.Watcher` that writes each number of a line as a scalar (`train/ce`, `valid/ce`, `tau`), with `views`
    as the step.

    `purge_step` makes TensorBoard drop older events from the last kept step on, so that step is written again.
    """
    from torch.utils.tensorboard import SummaryWriter

    last = int(kept[-1]["views"]) if kept else 0
    writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=last)

    def on_line(line: Line | None) -> None:
        if line is None:
            with suppress(OSError):  # a failed write was already reported when its line was written
                writer.close()
            return
        for name, value in line.items():
            if name not in ("step", "views") and isinstance(value, int | float):
                tag = name if name == "tau" else f"train/{name}".replace("train/valid_", "valid/")
                writer.add_scalar(tag, value, int(line["views"]))
        writer.flush()  # a kill loses buffered events, and a resumed run does not write them again

    for line in kept:
        if line["views"] >= last:
            on_line(line)
    return on_line


def tau_trend(metrics: Lines) -> tuple[float, float] | None:
    """The least-squares line of tau over log2(views). Its slope is the gain of tau per doubling of the run.

    This is an extrapolation: it assumes that tau goes on growing at the same rate. Within one run the learning rate
    also falls, and the fit includes that effect.

    Args:
        metrics: lines of metrics.jsonl; only those with `tau` and `views` above 0 count.

    Returns:
        Slope and intercept; None with fewer than three evaluations at different views.
    """
    points = dict(_series(metrics, "tau"))
    if len(points) < _MIN_EVALUATIONS:
        return None
    fit = statistics.linear_regression([math.log2(views) for views in points], list(points.values()))
    return fit.slope, fit.intercept


def _series(metrics: Lines, name: str) -> list[tuple[float, float]]:
    """(views, value) of the lines where `name` is a finite number; 0 views are left out because the axis is a log."""
    return [
        (float(line["views"]), float(line[name]))
        for line in metrics
        if name in line and line.get("views", 0) > 0 and math.isfinite(line[name])
    ]


def draw_curves(metrics: Lines, path: Path) -> None:
    """Draw cross-entropy, top-1 agreement and tau over supervised tokens; the PNG is written atomically.

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
    canvas = FigureCanvasAgg(figure)  # without pyplot: opens no window and changes no global state
    loss, top1, tau = figure.subplots(1, 3)
    loss_curves = {"loss": ("loss", "0.7"), "ce": ("train", "tab:blue"), "valid_ce": ("held out", "tab:orange")}
    _panel(loss, metrics, "cross-entropy and loss", loss_curves)
    top1_curves = {"top1": ("train", "tab:blue"), "valid_top1": ("held out", "tab:orange")}
    _panel(top1, metrics, "top-1 agreement with the target", top1_curves)
    _panel(tau, metrics, "tau, tokens per target forward", {"tau": ("validation prompts", "tab:green")})
    _draw_trend(tau, metrics)
    with replacing(path) as temporary:
        canvas.print_figure(temporary, format="png", dpi=110)


def _panel(axes: Axes, metrics: Lines, title: str, curves: Mapping[str, tuple[str, str]]) -> None:
    """One plot; `curves` are labels and colours by the name of a metric."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for name, (label, colour) in curves.items():
        points = _series(metrics, name)
        if points:
            # Evaluations are few, so each gets a marker; a single point needs one to be visible.
            marker = "o" if name in _EVALUATED or len(points) == 1 else ""
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("supervised tokens", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")


def _draw_trend(axes: Axes, metrics: Lines) -> None:
    """The fitted line, dashed where it extrapolates to twice the tokens, with a caption."""
    trend = tau_trend(metrics)
    if trend is None:
        return
    views = [x for x, _ in _series(metrics, "tau")]
    for begin, end, style in ((min(views), max(views), "-"), (max(views), 2 * max(views), "--")):
        heights = [trend[0] * math.log2(x) + trend[1] for x in (begin, end)]
        axes.plot((begin, end), heights, color="0.4", linewidth=1, linestyle=style)
    caption = f"twice the supervised tokens: about\n{trend[0]:+.2f} tau (an extrapolation)"
    axes.text(0.97, 0.05, caption, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color="0.3")
