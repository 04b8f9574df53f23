"""A training run to look at: its curves as a picture, `OUT/curves.png`, and its metrics in `OUT/tensorboard`.

Owns the drawing, the fit of tau, and the event files. Knows metrics lines only (see `report.Reporter`). matplotlib and
tensorboard are optional and are imported when a run starts, never on the way to `haast generate`.
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

_FIT_FROM = 3  # evaluations; a line through two says nothing of their noise
_EVALUATED = ("tau", "valid_ce", "valid_top1")


def curves(out_dir: Path, kept: Lines) -> Callable[[Line | None], None]:
    """A `report.Watcher` that redraws `out_dir`/curves.png at each evaluation and at the end."""
    import matplotlib.figure  # noqa: F401  said before the hours of training, not after

    lines, drawn = list(kept), len(kept)

    def follow(line: Line | None) -> None:
        nonlocal drawn
        lines.extend([] if line is None else [line])
        if drawn < len(lines) and (line is None or any(name in line for name in _EVALUATED)):
            draw_curves(lines, out_dir / "curves.png")
            drawn = len(lines)

    return follow


def tensorboard(out_dir: Path, kept: Lines) -> Callable[[Line | None], None]:
    """A `report.Watcher` that writes every number of a line as a scalar over views: `train/ce`, `valid/ce`, `tau`.

    Readers forget what older event files hold from the last kept views on, so that is repeated.
    """
    from torch.utils.tensorboard import SummaryWriter

    last = int(kept[-1]["views"]) if kept else 0
    writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=last)

    def follow(line: Line | None) -> None:
        if line is None:
            with suppress(OSError):  # an event that could not be written was told of at its line
                writer.close()
            return
        for name, value in line.items():
            if name not in ("step", "views") and isinstance(value, int | float):
                tag = name if name == "tau" else f"train/{name}".replace("train/valid_", "valid/")
                writer.add_scalar(tag, value, int(line["views"]))
        writer.flush()  # what waits in memory is lost by a kill, and a resume does not repeat it

    for line in kept:
        if line["views"] >= last:
            follow(line)
    return follow


def tau_trend(metrics: Lines) -> tuple[float, float] | None:
    """The least-squares line of tau over log2(views): what another doubling of views would bring, and the intercept.

    An extrapolation: it takes for granted that tau goes on as it went. Within one run the learning rate falls too, and
    what that brings is counted in.

    Args:
        metrics: lines of metrics.jsonl; only those with `tau` and `views` above 0 count.

    Returns:
        Slope and intercept; None with fewer than three evaluations at different views.
    """
    points = dict(_series(metrics, "tau"))
    if len(points) < _FIT_FROM:
        return None
    fit = statistics.linear_regression([math.log2(views) for views in points], list(points.values()))
    return fit.slope, fit.intercept


def _series(metrics: Lines, name: str) -> list[tuple[float, float]]:
    """(views, value) of the lines that have `name` as a finite number; a log axis has no place for 0 views."""
    return [
        (float(line["views"]), float(line[name]))
        for line in metrics
        if name in line and line.get("views", 0) > 0 and math.isfinite(line[name])
    ]


def draw_curves(metrics: Lines, path: Path) -> None:
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
            # Evaluations are few, so each has its mark; so has a lone point, which makes no line.
            marker = "o" if name in _EVALUATED or len(points) == 1 else ""
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.3)
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


def _draw_trend(axes: Axes, metrics: Lines) -> None:
    """The fitted line one doubling further, dashed where nothing was measured, and what it says."""
    trend = tau_trend(metrics)
    if trend is None:
        return
    views = [at for at, _ in _series(metrics, "tau")]
    for begin, end, style in ((min(views), max(views), "-"), (max(views), 2 * max(views), "--")):
        heights = [trend[0] * math.log2(at) + trend[1] for at in (begin, end)]
        axes.plot((begin, end), heights, color="0.4", linewidth=1, linestyle=style)
    words = f"another doubling of views would bring\nabout {trend[0]:+.2f} tau (an extrapolation)"
    axes.text(0.97, 0.05, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color="0.3")
