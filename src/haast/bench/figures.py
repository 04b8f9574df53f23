"""The report's plots, each for a wide and for a narrow screen, as SVG that follows the page's colours.

Owns the drawing. Knows the "haast-suite-1" document only; matplotlib is optional and imported at the first plot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from haast.bench.suite_rows import (
    Spot,
    labelled,
    length_buckets,
    main_rows,
    panels,
    speedups,
    taus,
    temperatures,
    titled,
)
from haast.bench.svg import INK, PAPER, RULE, SERIES, SOFT, drawing, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
MARKERS = ("o", "D", "s", "^")  # by temperature
PARTS = (("ms_draft", "draft", SERIES[1]), ("ms_verify", "verify", SERIES[0]), ("ms_overhead", "rest", SERIES[7]))
_WIDE, _NARROW = 9.4, 4.4  # inches; the page shows them at about 100 and 75 pixels an inch
_LETTERS_WIDE, _LETTERS_NARROW = 115, 40  # that fit below the curve of `nodes`


def check_matplotlib() -> None:
    """Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the report's plots need matplotlib ({error}): pip install 'haast[curves]'") from error


def speedup(document: Document, name: str, narrow: bool) -> str:
    """Speed over vanilla's by suite and decoder, with bootstrap intervals."""
    return _dots(document, name, narrow, speedups(document), "times vanilla\u2019s tokens/s", "{:.2f}\u00d7")


def tau(document: Document, name: str, narrow: bool) -> str:
    """Tokens per target forward by suite and decoder; hollow marks leave looping answers out."""
    return _dots(document, name, narrow, taus(document), "tokens per target forward", "{:.2f}")


def _dots(document: Document, name: str, narrow: bool, spots: Sequence[Spot], label: str, form: str) -> str:
    from matplotlib.figure import Figure

    suites = [suite for suite in panels(document) if any(spot.suite == suite for spot in spots)]
    decoders = [one for one in document["decoders"] if any(spot.decoder == one for spot in spots)]
    columns = 1 if narrow else 2 if len(suites) == 4 else min(len(suites), 3)
    lines = -(-len(suites) // columns) if suites else 1
    temps = temperatures(document)
    tall = max(len(decoders), 1) * (0.2 + 0.2 * len(temps)) + 0.75
    with drawing(name, 11 if narrow else 9):
        figure = Figure(figsize=(_NARROW if narrow else _WIDE, lines * tall), layout="constrained")
        _apart_panels(figure)
        grid = figure.subplots(lines, max(columns, 1), sharex=True, squeeze=False)
        most = max((spot.high for spot in spots), default=1.0)
        for place, axes in enumerate(grid.flat):
            if place >= len(suites):
                axes.set_visible(False)
                continue
            own = [spot for spot in spots if spot.suite == suites[place]]
            _dot_panel(axes, document, own, decoders, temps, form)
            axes.set_title(titled(suites[place]) if len(suites) > 1 else "", pad=8)
            axes.set_xlim(0, most * (1.22 if narrow else 1.3))
            if place % columns:
                axes.set_yticklabels([])
            if place + columns >= len(suites):
                axes.set_xlabel(label)
                axes.tick_params(labelbottom=True)
        return inline(figure, name)


def _dot_panel(
    axes: Axes, document: Document, spots: Sequence[Spot], decoders: Sequence[str], temps: Sequence[float], form: str
) -> None:
    heights = {decoder: -float(place) for place, decoder in enumerate(decoders)}
    for decoder, height in heights.items():
        if document["decoders"][decoder]["lossy"]:
            axes.axhspan(height - 0.42, height + 0.42, facecolor="none", edgecolor=RULE, hatch="////", linewidth=0)
    axes.axvline(1, color=SOFT, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    for spot in spots:
        turn = temps.index(spot.temperature)
        height = heights[spot.decoder] + 0.19 * (len(temps) - 1) - 0.38 * turn
        colour, marker = SERIES[turn], MARKERS[turn % len(MARKERS)]
        axes.plot([spot.low, spot.high], [height] * 2, color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
        if spot.also is not None:
            axes.plot([spot.also], [height], marker, color=PAPER, markeredgecolor=colour, markersize=4.5, zorder=3)
        axes.plot([spot.value], [height], marker, color=colour, markersize=5, zorder=4)
        beside = max(spot.high, spot.value, spot.also or 0)
        axes.annotate(
            form.format(spot.value), (beside, height), (5, 0), textcoords="offset points", va="center", color=INK,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"},
        )  # fmt: skip
    axes.set_yticks([*heights.values()], [labelled(document, decoder) for decoder in decoders])
    axes.set_ylim(-len(decoders) + 0.45, 0.55)
    _calm(axes, "x")


def acceptance(document: Document, name: str, narrow: bool) -> str:
    """The chance that some draft at a depth is right, given that the depth before was."""
    return _by_temperature(document, name, narrow, _acceptance_panel, 3.4)


def _acceptance_panel(axes: Axes, document: Document, rows: Sequence[Mapping[str, Any]]) -> None:
    ends: list[tuple[float, float, str, str]] = []
    deepest = max((len(row["acceptance_by_depth"]) for row in rows), default=0)
    for row in rows:
        chances, decoder = row["acceptance_by_depth"], row["decoder"]
        if chances:
            colour = _colour(document, decoder)
            lossy = document["decoders"][decoder]["lossy"]
            depths = range(1, len(chances) + 1)
            axes.plot(depths, chances, "o--" if lossy else "o-", color=colour, linewidth=1.6, markersize=4)
            ends.append((chances[-1], len(chances), labelled(document, decoder), colour))
    _name_ends(axes, ends, deepest, 1.0)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("depth in the tree", loc="left")
    _calm(axes, "y")


def lengths(document: Document, name: str, narrow: bool) -> str:
    """Tokens per target forward by the tokens that stood before the step."""
    return _by_temperature(document, name, narrow, _lengths_panel, 3.4)


def _lengths_panel(axes: Axes, document: Document, rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [row for row in rows if row.get("by_length") and row["decoder"] != "vanilla"]
    buckets = length_buckets(shown)
    places = {begin: place for place, (begin, _) in enumerate(buckets, 1)}
    ends: list[tuple[float, float, str, str]] = []
    for row in shown:
        decoder, colour = row["decoder"], _colour(document, row["decoder"])
        spots = [(places[each["begin"]], each["tau"]) for each in row["by_length"]]
        axes.plot(*zip(*spots, strict=True), "o-", color=colour, linewidth=1.6, markersize=4)
        ends.append((spots[-1][1], spots[-1][0], labelled(document, decoder), colour))
    most = max((each["tau"] for row in shown for each in row["by_length"]), default=1.0)
    _name_ends(axes, ends, len(buckets), most)
    axes.set_ylim(0, most * 1.05)
    axes.set_xticks([*places.values()], [f"{end - 1:g}" for _, end in buckets])
    axes.set_xlabel("tokens before the step, up to", loc="left")
    _calm(axes, "y")


def _colour(document: Document, decoder: str) -> str:
    return SERIES[list(document["decoders"]).index(decoder) % len(SERIES)]


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]], last: int, most: float) -> None:
    """Name lines at their right ends (value, place, words, colour); `last` is the last place, `most` the highest."""
    ends.sort()
    for height, (value, place, words, colour) in zip(_apart([end[0] for end in ends], most), ends, strict=True):
        axes.plot([place + 0.06, last + 0.2], [value, height], color=RULE, linewidth=0.7)
        axes.text(last + 0.25, height, words, color=colour, va="center")
    axes.set_xlim(0.8, last + 0.25 + max(last * 0.5, 1.2))


def _apart(heights: Sequence[float], most: float) -> list[float]:
    """Ascending heights moved up until words beside them fit, and down again as far as `most` allows."""
    least = 0.055 * most
    placed: list[float] = []
    for height in heights:
        placed.append(height if not placed else max(height, placed[-1] + least))
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], most - least * (len(placed) - 1 - place))
    return placed


def milliseconds(document: Document, name: str, narrow: bool) -> str:
    """A step's time by part, stacked."""
    tall = 0.95 + 0.34 * len(document["decoders"])
    return _by_temperature(document, name, narrow, _ms_panel, tall)


def _ms_panel(axes: Axes, document: Document, rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [row for row in rows if row["ms_verify"] is not None]
    for place, row in enumerate(shown):
        left = 0.0
        for part, words, colour in PARTS:
            hatch = "////" if words == "draft" else None  # told apart without colours too
            axes.barh(-place, row[part], 0.62, left, color=colour, edgecolor=PAPER, hatch=hatch, linewidth=0.8)
            left += row[part]
        axes.annotate(f"{left:.1f}", (left, -place), (5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks([-place for place in range(len(shown))], [labelled(document, row["decoder"]) for row in shown])
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per step", loc="left")
    _calm(axes, "x")


def _by_temperature(
    document: Document,
    name: str,
    narrow: bool,
    panel: Callable[[Axes, Document, Sequence[Mapping[str, Any]]], None],
    tall: float,
) -> str:
    """One panel a temperature, beside or below one another."""
    from matplotlib.figure import Figure

    temps = temperatures(document)
    with drawing(name, 11 if narrow else 9):
        size = (_NARROW, tall * len(temps)) if narrow else (_WIDE, tall)
        figure = Figure(figsize=size, layout="constrained")
        _apart_panels(figure)
        grid = figure.subplots(len(temps) if narrow else 1, 1 if narrow else len(temps), squeeze=False)
        for axes, temperature in zip(grid.flat, temps, strict=True):
            panel(axes, document, main_rows(document, temperature))
            if len(temps) > 1:
                axes.set_title(f"temperature {temperature:g}", pad=8)
        return inline(figure, name)


def nodes(document: Document, name: str, narrow: bool) -> str:
    """v(n), and the nodes that each decoder ran over."""
    from matplotlib.figure import Figure

    forward = {int(n): ms for n, ms in document["calibration"]["forward_ms"].items()}
    counts = sorted(forward)
    costs = [forward[n] / forward[counts[0]] for n in counts]
    with drawing(name, 11 if narrow else 9):
        figure = Figure(figsize=(_NARROW, 3.6) if narrow else (_WIDE, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(counts, costs, "o-", color=SERIES[0], linewidth=1.8, markersize=4)
        axes.annotate("v(n)", (counts[-1], costs[-1]), (-4, 8), textcoords="offset points", ha="right", color=SERIES[0])
        lane = 0.065 * max(costs)
        letter = counts[-1] / (_LETTERS_NARROW if narrow else _LETTERS_WIDE)
        budgets = _lanes(_budgets(document), letter)
        for n, words, number in budgets:
            height, cost = 0.85 * costs[0] - lane * number, _between(n, counts, costs)
            axes.plot([n, n], [height, cost], color=SOFT, linewidth=0.8)
            axes.plot([n], [cost], "o", color=PAPER, markeredgecolor=INK, markersize=6, zorder=5)
            axes.annotate(words, (n, height), (3, 0), textcoords="offset points", color=INK, va="center")
        lowest = 0.85 * costs[0] - lane * max((number for _, _, number in budgets), default=0)
        axes.set_xlim(0, counts[-1] * 1.03)
        axes.set_ylim(min(0.0, lowest - lane), max(costs) * 1.1)
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= max(costs) * 1.1])
        axes.set_xlabel("nodes in a forward", loc="left")
        axes.set_ylabel("cost, times one node\u2019s")
        _calm(axes, "y")
        return inline(figure, name)


def _budgets(document: Document) -> list[tuple[float, str]]:
    """Mean nodes by decoder, equal ones together, ascending; and what the calibration expected."""
    together: dict[float, list[str]] = {}
    for row in main_rows(document, temperatures(document)[0]):
        if row["nodes_per_forward"] is not None and row["decoder"] != "vanilla":
            together.setdefault(round(row["nodes_per_forward"], 1), []).append(labelled(document, row["decoder"]))
    found = [(n, f"{', '.join(names)}: {n:g}") for n, names in together.items()]
    expected = document["calibration"].get("expected")
    if expected is not None:
        found.append((expected["nodes"], f"calibration\u2019s choice: {expected['nodes']:.1f}"))
    return sorted(found)


def _lanes(budgets: Sequence[tuple[float, str]], letter: float) -> list[tuple[float, str, int]]:
    """A lane for every label, right to left, each below those that begin over it: no line crosses a word."""
    placed: list[tuple[float, str, int]] = []
    for n, words in reversed(budgets):
        over = [lane for other, _, lane in placed if other <= n + letter * (len(words) + 2)]
        placed.append((n, words, max(over, default=-1) + 1))
    return placed


def _between(n: float, counts: Sequence[int], costs: Sequence[float]) -> float:
    """v at n, straight between measured points."""
    for (low, cheap), (high, dear) in pairwise(zip(counts, costs, strict=True)):
        if n <= high:
            return cheap + (dear - cheap) * (n - low) / (high - low)
    return costs[-1]


def _apart_panels(figure: Figure) -> None:
    """Room between panels, in inches."""
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=0.08, w_pad=0.06)


def _calm(axes: Axes, grid: str) -> None:
    """Only what helps to read a value."""
    axes.grid(axis=grid, color=RULE, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(grid == "y")
    axes.spines["bottom"].set_color(RULE)
