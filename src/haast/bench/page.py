"""HTML pages of suites and traces: self-contained, no network or web fonts, light and dark, usable without scripts.

Owns the values that fill the templates, and for each figure which marks are shown, panel by panel and in which order.
Computes nothing from a document's numbers except the axes. The templates own the wording and the drawing, and escape
all text of a document.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup

from haast.bench.document import FORMAT, check_format
from haast.bench.tables import Document, best, formatted, length_buckets, main_rows, named, panels, templates
from haast.bench.trace import TRACE_FORMAT, StepView, counted, percent, quoted, visible
from haast.tuning.policy import interpolate

_UNKNOWN = "\u2013"  # in place of a missing number
_MAX_NODES = 4000  # tree nodes on a page, which keeps it under 2 MB
_COLOURS = 8  # colours of series in the stylesheet
_PARTS = {"ms_draft": 1, "ms_verify": 0, "ms_overhead": 7}  # part of a step -> its colour


def trace_html(document: Document) -> str:
    """The page of a "haast-trace-1" document.

    Raises:
        ValueError: the document has another format.
    """
    check_format(document, TRACE_FORMAT)
    return _render("trace.html", document["environment"], [document])


def report_html(document: Document) -> str:
    """The page of a "haast-suite-1" document.

    Raises:
        ValueError: the document has another format.
    """
    check_format(document, FORMAT)
    main = [row for temperature in sorted(document["temperatures"]) for row in main_rows(document, temperature)]
    shown = {"document": document, "main": main, "best": best(document), "charts": charts(document, main)}
    return _render("report.html", document["environment"], document["traces"], **shown)


def _render(template: str, where: Document, traces: Sequence[Document], **more: Any) -> str:
    """Render a template; KeyError if a document lacks a value that it shows."""
    jinja = templates()
    jinja.filters |= {"counted": counted, "percent": percent, "quoted": quoted, "visible": visible}
    jinja.filters |= {"n": _number, "cell": _cell}
    assert jinja.loader is not None, "templates() sets it"
    style, script = (jinja.loader.get_source(jinja, name)[0] for name in ("page.css", "page.js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    more |= {"traced": _shown_traces(traces), "greedy": any(trace["temperature"] == 0 for trace in traces)}
    more |= {"style": Markup(style), "script": Markup(script), "script_hash": script_hash}
    try:
        return jinja.get_template(template).render(where=where, **more)
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def _shown_traces(traces: Sequence[Document]) -> list[dict[str, Any]]:
    """All traces, each with as many trees as its share of `_MAX_NODES` allows.

    `liveliest` is the step that is shown first: the one with the most accepted drafts.
    """
    shown = []
    for trace in traces:
        check_format(trace, TRACE_FORMAT)
        views, budget = list[StepView](), _MAX_NODES // len(traces)
        for step in trace["steps"]:
            view = StepView(step)
            budget -= len(view.nodes) + 2  # the text of a step counts as two nodes
            if budget < 0:
                break
            views.append(view)
        liveliest = max(range(len(views)), key=lambda number: views[number].kept, default=0)
        left = len(trace["steps"]) - len(views)
        shown.append({"document": trace, "views": views, "left": left, "liveliest": liveliest})
    return shown


def _number(value: Any, form: str, unit: str = "") -> str:
    """A formatted number; a dash for None, so that the cell does not look like an omission."""
    return formatted(value, form, unit) or _UNKNOWN


def _cell(value: Any) -> str:
    """Any JSON value as the text of a table cell."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Axis:
    """An axis from 0 to `most`, with ticks at round values."""

    most: float

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Three to six ticks: position from 0 to 1, and label."""
        unit = 10.0 ** math.floor(math.log10(self.most / 4))
        step = next(unit * times for times in (1, 2, 5, 10) if self.most / (unit * times) <= 5)
        return [(n * step / self.most, f"{n * step:g}") for n in range(int(self.most / step) + 1)]


@dataclass(frozen=True)
class Chart:
    """A figure: the panels that the template draws, and the axis of their values."""

    panels: list[dict[str, Any]]
    axis: Axis


def charts(document: Document, main: Sequence[Document]) -> dict[str, Chart]:
    """All figures for which the document has numbers, in page order. `main` are its rows over all prompts."""
    ratios = [
        {**each, "value": each["ratio"], "also": None, "words": f"{each['ratio']:.2f}\u00d7"}
        for each in document["ratios"]
        if each["over"] == "vanilla" != each["decoder"] and each["low"] is not None
    ]
    drafted = [row for row in document["rows"] if row["tau"] is not None and row["decoder"] != "vanilla"]
    taus = [
        {**row, **dict.fromkeys(("value", "low", "high"), row["tau"]), "words": f"{row['tau']:.2f}"}
        | {"also": row["tau_loop_filtered"] or None}
        for row in drafted
    ]
    depths = range(1, 1 + max((len(row["acceptance_by_depth"]) for row in main), default=0))
    lines = _lines(document, main, lambda row: dict(enumerate(row["acceptance_by_depth"])), [*map(str, depths)])
    figures = {"speedup": _dots(document, ratios), "tau": _dots(document, taus), "acceptance": Chart(lines, Axis(1.0))}
    if len(length_buckets(main)) > 1:
        figures["lengths"] = _lengths(document, [row for row in main if row["decoder"] != "vanilla"])
    figures["milliseconds"] = _milliseconds(document, [row for row in main if row["ms_verify"] is not None])
    if document["calibration"]:
        figures["nodes"] = _nodes(document)
    return figures


def _style(document: Document, name: str) -> dict[str, Any]:
    """Label, colour and lossy flag of a decoder in a figure."""
    colour = list(document["decoders"]).index(name) % _COLOURS
    return {"label": named(document, name), "colour": colour, "lossy": document["decoders"][name]["lossy"]}


def _dots(document: Document, marks: Sequence[Document]) -> Chart:
    """A panel per suite with a mark (value, low, high, also) per decoder and temperature.

    Only the first mark of a decoder has a label.
    """
    order, temps, suites = list(document["decoders"]), sorted(document["temperatures"]), panels(document)
    shown = []
    for suite in suites:
        lines = list[dict[str, Any]]()
        own = [mark for mark in marks if mark["suite"] == suite]
        for mark in sorted(own, key=lambda mark: (order.index(mark["decoder"]), mark["temperature"])):
            line = {**mark, **_style(document, mark["decoder"]), "colour": temps.index(mark["temperature"])}
            if lines and lines[-1]["decoder"] == mark["decoder"]:
                line["label"] = ""
            lines.append(line)
        name = "all prompts" if suite == "all" else suite.replace("_", " ")
        shown.append({"name": name if len(suites) > 1 else "", "marks": lines})
    return Chart(shown, Axis(max((max(mark["high"], mark["also"] or 0) for mark in marks), default=1.0)))


def _by_temperature(document: Document, rows: Sequence[Document]) -> list[tuple[str, list[Document]]]:
    """(panel name, rows) per temperature; the name is empty if there is only one."""
    temps = sorted(document["temperatures"])
    names = [f"temperature {temperature:g}" if len(temps) > 1 else "" for temperature in temps]
    return [(name, [r for r in rows if r["temperature"] == t]) for name, t in zip(names, temps, strict=True)]


def _lines(
    document: Document, rows: Sequence[Document], points: Callable[[Document], dict[int, float]], places: Sequence[str]
) -> list[dict[str, Any]]:
    """A panel per temperature with a line per decoder; `points` maps a row to {index in `places`: value}."""
    gap = 1 / max(len(places) - 1, 1)
    ticks = [(number * gap, words) for number, words in enumerate(places)]
    shown = []
    for name, own in _by_temperature(document, rows):
        lines = [
            {
                **_style(document, row["decoder"]),
                "points": [(place * gap, value) for place, value in points(row).items()],
            }
            for row in own
        ]
        shown.append({"name": name, "places": ticks, "lines": [line for line in lines if line["points"]]})
    return shown


def _lengths(document: Document, rows: Sequence[Document]) -> Chart:
    """Tokens per target forward by context length, the number of tokens before the step."""
    buckets = length_buckets(rows)
    place = {begin: number for number, (begin, _) in enumerate(buckets)}

    def points(row: Document) -> dict[int, float]:
        return {place[each["begin"]]: each["tau"] for each in row.get("by_length", ())}

    most = max((tau for row in rows for tau in points(row).values()), default=1.0)
    return Chart(_lines(document, rows, points, [f"{end - 1:g}" for _, end in buckets]), Axis(most))


def _milliseconds(document: Document, rows: Sequence[Document]) -> Chart:
    """The time of a step as stacked parts."""
    shown, most = list[dict[str, Any]](), 0.0
    for name, own in _by_temperature(document, rows):
        bars = []
        for row in own:
            total = sum(row[part] for part in _PARTS)
            most, parts = max(most, total), [(colour, row[part]) for part, colour in _PARTS.items()]
            bars.append({"label": named(document, row["decoder"]), "words": f"{total:.1f}", "parts": parts})
        shown.append({"name": name, "bars": bars})
    return Chart(shown, Axis(most or 1.0))


def _nodes(document: Document) -> Chart:
    """v(n), and rings at the mean number of nodes of each decoder."""
    forward = {int(n): ms for n, ms in document["calibration"]["forward_ms"].items()}
    costs = {n: ms / forward[min(forward)] for n, ms in sorted(forward.items())}
    budgets: dict[float, list[str]] = {}
    for row in main_rows(document, min(document["temperatures"])):
        if row["nodes_per_forward"] is not None and row["decoder"] != "vanilla":
            budgets.setdefault(round(row["nodes_per_forward"], 1), []).append(named(document, row["decoder"]))
    if (expected := document["calibration"].get("expected")) is not None:
        budgets.setdefault(round(expected["nodes"], 1), []).append("calibration\u2019s choice")
    most = max(costs)
    rings = [
        (min(n / most, 1.0), interpolate(costs, min(n, most)), own, f"{n:g}") for n, own in sorted(budgets.items())
    ]
    curve = {"label": "v(n)", "colour": 0, "lossy": False, "points": [(n / most, cost) for n, cost in costs.items()]}
    return Chart(
        [{"name": "", "places": Axis(most).ticks, "lines": [curve], "rings": rings}], Axis(max(costs.values()))
    )
