"""What the report's figures show: marks, bars, lines and the tables that hold their numbers. The templates draw them.

Owns the choice and the order of what is shown. Knows the "haast-suite-1" document only, and computes nothing but the
axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from haast.bench.tables import UNKNOWN, Document, Table, length_buckets, main_rows, named, panels
from haast.tuning.policy import interpolate

_COLOURS = 8  # that the page has for series
_PARTS = {"ms_draft": 1, "ms_verify": 0, "ms_overhead": 7}  # of a step, with their colours


@dataclass(frozen=True)
class Axis:
    """From 0 to `most`, with round ticks."""

    most: float

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places from 0 to 1, and their words; four to ten of them."""
        unit = 10.0 ** math.floor(math.log10(self.most / 4))
        step = next(unit * times for times in (1, 2, 5, 10) if self.most / (unit * times) <= 5)
        return [(n * step / self.most, f"{n * step:g}") for n in range(int(self.most / step) + 1)]


@dataclass(frozen=True)
class Chart:
    """A figure: panels as the template draws them, the tables behind them, and the values' axis."""

    panels: list[dict[str, Any]]
    tables: list[Table]
    axis: Axis = field(default_factory=lambda: Axis(1.0))


def charts(document: Document) -> dict[str, Chart]:
    """All figures that the document has numbers for, in the page's order."""
    found = {"speedup": _speedup(document), "tau": _tau(document), "acceptance": _acceptance(document)}
    rows = _main(document)
    if len(length_buckets(rows)) > 1:
        found["lengths"] = _lengths(document, [row for row in rows if row.get("by_length")])
    found["milliseconds"] = _milliseconds(document)
    if document["calibration"]:
        found["nodes"] = _nodes(document)
    return found


def _main(document: Document) -> list[dict[str, Any]]:
    """The rows over all prompts, by temperature."""
    return _named(document, [row for each in sorted(document["temperatures"]) for row in main_rows(document, each)])


def _named(document: Document, rows: Sequence[Document]) -> list[dict[str, Any]]:
    return [{**row, "name": named(document, row["decoder"])} for row in rows]


def _speedup(document: Document) -> Chart:
    """Speed over vanilla's by suite and decoder, with bootstrap intervals."""
    ratios, unknown = _named(document, document["ratios"]), {"low": None, "high": None}
    rows = [{**row, "spread": row.get("spread") or unknown} for row in _named(document, document["rows"])]
    marks = [
        {**each, "value": each["ratio"], "also": None, "words": f"{each['ratio']:.2f}\u00d7"}
        for each in ratios
        if each["over"] == "vanilla" != each["decoder"] and each["low"] is not None
    ]
    over = Table.of(
        ratios,
        "suite | temperature | decoder | over | speed-up | interval",
        "{suite} | {temperature:g} | {name} | {over} | {ratio:.2f}\u00d7 | {low:.2f} to {high:.2f}",
        UNKNOWN,
    )
    speeds = Table.of(
        rows,
        "suite | temperature | decoder | tokens/s | spread | with prefill",
        "{suite} | {temperature:g} | {name} | {tokens_per_s:.1f} | {spread[low]:.1f} to {spread[high]:.1f} | "
        "{whole_call_tokens_per_s:.1f}",
        UNKNOWN,
    )
    return Chart(_dots(document, marks), [over, speeds], Axis(max((mark["high"] for mark in marks), default=1.0)))


def _tau(document: Document) -> Chart:
    """Tokens per target forward by suite and decoder; a second mark leaves looping answers out."""
    rows = [
        {**row, "first": row["alpha_by_depth"][:1]}
        for row in _named(document, document["rows"])
        if row["tau"] is not None
    ]
    drafted = [row for row in rows if row["decoder"] != "vanilla"]
    marks = [
        {**row, **dict.fromkeys(("value", "low", "high"), row["tau"]), "words": f"{row['tau']:.2f}"}
        | {"also": row["tau_loop_filtered"] or None}
        for row in drafted
    ]
    whole = Table.of(
        rows,
        "suite | temperature | decoder | tau | without loops | looping | prompts | nodes | first draft right",
        "{suite} | {temperature:g} | {name} | {tau:.2f} | {tau_loop_filtered:.2f} | {looping_outputs} | {prompts} | "
        "{nodes_per_forward:.1f} | {first:.2f}",
        UNKNOWN,
    )
    parted = Table.of(
        [{**row, "category": name, "own": own} for row in drafted for name, own in row["tau_by_category"].items()],
        "suite | temperature | decoder | category | tau",
        "{suite} | {temperature:g} | {name} | {category} | {own:.2f}",
    )
    most = max((max(mark["high"], mark["also"] or 0) for mark in marks), default=1.0)
    return Chart(_dots(document, marks), [whole, parted] if parted.rows else [whole], Axis(most))


def _dots(document: Document, marks: Sequence[Document]) -> list[dict[str, Any]]:
    """A panel per suite; a mark per decoder and temperature, the decoder's name at its first."""
    order, temps = list(document["decoders"]), sorted(document["temperatures"])
    shown = []
    for suite in panels(document):
        own = [mark for mark in marks if mark["suite"] == suite]
        own.sort(key=lambda mark: (order.index(mark["decoder"]), mark["temperature"]))
        labels = [mark["name"] if mark["decoder"] != before else "" for mark, before in _after(own)]
        lines = [
            {
                **mark,
                "label": label,
                "lossy": document["decoders"][mark["decoder"]]["lossy"],
                "colour": temps.index(mark["temperature"]),
            }
            for mark, label in zip(own, labels, strict=True)
        ]
        name = "all prompts" if suite == "all" else suite.replace("_", " ")
        shown.append({"name": name if len(panels(document)) > 1 else "", "marks": lines})
    return shown


def _after(marks: Sequence[Document]) -> list[tuple[Document, Any]]:
    """Each mark with the decoder of the one before it."""
    return list(zip(marks, [None, *(mark["decoder"] for mark in marks)], strict=False))


def _lines(
    document: Document,
    rows: Sequence[Document],
    points: Callable[[Document], list[tuple[int, float]]],
    places: Sequence[str],
) -> list[dict[str, Any]]:
    """A panel per temperature; a line per decoder through its points (number of the place, value)."""
    temps, order = sorted(document["temperatures"]), list(document["decoders"])
    gap = 1 / max(len(places) - 1, 1)
    return [
        {
            "name": f"temperature {temperature:g}" if len(temps) > 1 else "",
            "places": [(number * gap, words) for number, words in enumerate(places)],
            "lines": [
                {
                    "label": row["name"],
                    "colour": order.index(row["decoder"]) % _COLOURS,
                    "dashed": document["decoders"][row["decoder"]]["lossy"],
                    "points": [(number * gap, value) for number, value in points(row)],
                }
                for row in rows
                if row["temperature"] == temperature
            ],
        }
        for temperature in temps
    ]


def _acceptance(document: Document) -> Chart:
    """The chance that some draft at a depth is right, given that the depth before was."""
    rows = [row for row in _main(document) if row["acceptance_by_depth"]]
    depths = range(1, 1 + max((len(row["acceptance_by_depth"]) for row in rows), default=0))
    shown = _lines(document, rows, lambda row: list(enumerate(row["acceptance_by_depth"])), [*map(str, depths)])
    chances = [
        {**row, "words": words, **{f"at{n}": f"{chance:.2f}" for n, chance in enumerate(row[key], 1)}}
        for row in rows
        for key, words in (("acceptance_by_depth", "any draft right"), ("alpha_by_depth", "first draft right"))
    ]
    cells = [
        [f"{row['temperature']:g}", row["name"], row["words"], *(row.get(f"at{n}", "") for n in depths)]
        for row in chances
    ]
    return Chart(shown, [Table(["temperature", "decoder", "", *(f"depth {n}" for n in depths)], cells)])


def _lengths(document: Document, rows: Sequence[Document]) -> Chart:
    """Tokens per target forward by the tokens that stood before the step."""
    drafted = [row for row in rows if row["decoder"] != "vanilla"]
    buckets = length_buckets(drafted)
    place = {begin: number for number, (begin, _) in enumerate(buckets)}

    def points(row: Document) -> list[tuple[int, float]]:
        return [(place[each["begin"]], each["tau"]) for each in row["by_length"]]

    shown = _lines(document, drafted, points, [f"{end - 1:g}" for _, end in buckets])
    table = Table.of(
        [{**row, **each, "last": each["end"] - 1} for row in rows for each in row["by_length"]],
        "temperature | decoder | tokens before the step | steps | tau | a draft accepted",
        "{temperature:g} | {name} | {begin:g} to {last:g} | {target_forwards} | {tau:.2f} | {acceptance:.2f}",
    )
    return Chart(shown, [table], Axis(max((tau for row in drafted for _, tau in points(row)), default=1.0)))


def _milliseconds(document: Document) -> Chart:
    """A step's time by part, stacked."""
    rows = [
        {**row, "sum": sum(row[part] for part in _PARTS)}
        for row in _named(document, document["rows"])
        if row["ms_verify"] is not None
    ]
    temps, suite = sorted(document["temperatures"]), panels(document)[0]
    shown = [
        {
            "name": f"temperature {temperature:g}" if len(temps) > 1 else "",
            "bars": [
                {
                    "label": row["name"],
                    "words": f"{row['sum']:.1f}",
                    "parts": [(c, row[part]) for part, c in _PARTS.items()],
                }
                for row in rows
                if (row["suite"], row["temperature"]) == (suite, temperature)
            ],
        }
        for temperature in temps
    ]
    table = Table.of(
        rows,
        "suite | temperature | decoder | draft | verify | rest | sum",
        "{suite} | {temperature:g} | {name} | {ms_draft:.2f} | {ms_verify:.2f} | {ms_overhead:.2f} | {sum:.2f}",
    )
    return Chart(shown, [table], Axis(max((row["sum"] for row in rows if row["suite"] == suite), default=1.0)))


def _nodes(document: Document) -> Chart:
    """v(n), and the nodes that each decoder ran over."""
    forward = {int(n): ms for n, ms in document["calibration"]["forward_ms"].items()}
    costs = {n: ms / forward[min(forward)] for n, ms in sorted(forward.items())}
    budgets: dict[float, list[str]] = {}
    for row in _named(document, main_rows(document, min(document["temperatures"]))):
        if row["nodes_per_forward"] is not None and row["decoder"] != "vanilla":
            budgets.setdefault(round(row["nodes_per_forward"], 1), []).append(row["name"])
    if (expected := document["calibration"].get("expected")) is not None:
        budgets.setdefault(round(expected["nodes"], 1), []).append("calibration\u2019s choice")
    wide, found = Axis(max(costs)), sorted(budgets.items())
    panel = {
        "name": "",
        "places": wide.ticks,
        "lines": [
            {"label": "v(n)", "colour": 0, "dashed": False, "points": [(n / wide.most, v) for n, v in costs.items()]}
        ],
        "rings": [
            (min(n / wide.most, 1.0), interpolate(costs, min(n, wide.most)), words, f"{n:g}") for n, words in found
        ],
    }
    rows = [{"nodes": n, "ms": ms, "v": costs[n]} for n, ms in forward.items()]
    table = Table.of(rows, "nodes | ms | v(n)", "{nodes} | {ms:.2f} | {v:.2f}")
    return Chart([panel], [table], Axis(max(costs.values())))
