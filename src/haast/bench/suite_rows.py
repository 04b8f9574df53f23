"""What the report's plots and tables look up in a "haast-suite-1" document. Computes nothing that is not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]
ALL = "all"
_LABEL = 24  # letters


@dataclass(frozen=True)
class Spot:
    """One value of one decoder on one suite, with its interval."""

    suite: str
    temperature: float
    decoder: str
    value: float
    low: float
    high: float
    also: float | None = None  # another reading of the same: tau without loops


def panels(document: Document) -> list[str]:
    """Suites to show: all together first, where there are several."""
    names = [suite for suite in document["suites"] if suite != ALL]
    return names if len(names) == 1 else [ALL, *names]


def main_suite(document: Document) -> str:
    """The suite whose rows stand for the whole."""
    return panels(document)[0]


def temperatures(document: Document) -> list[float]:
    """Ascending."""
    return sorted(document["temperatures"])


def main_rows(document: Document, temperature: float) -> list[Mapping[str, Any]]:
    """The rows over all prompts at one temperature, in the order of the decoders."""
    order = list(document["decoders"])
    suite = main_suite(document)
    rows = [row for row in document["rows"] if row["suite"] == suite and row["temperature"] == temperature]
    return sorted(rows, key=lambda row: order.index(row["decoder"]))


def all_main_rows(document: Document) -> list[Mapping[str, Any]]:
    """`main_rows` of every temperature, the lowest first."""
    return [row for temperature in temperatures(document) for row in main_rows(document, temperature)]


def length_buckets(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The lengths of context, from and below, in which these rows decoded; documents of an older Haast have none."""
    return sorted({(each["begin"], each["end"]) for row in rows for each in row.get("by_length", ())})


def labelled(document: Document, decoder: str) -> str:
    """`named`, short enough to stand beside a plot."""
    name = named(document, decoder)
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}\u2026"


def named(document: Document, decoder: str) -> str:
    """A decoder's name, which says where it does not keep the target's law."""
    return f"{decoder} (lossy)" if document["decoders"][decoder]["lossy"] else decoder


def titled(suite: str) -> str:
    """A suite's name above its plot."""
    return "all prompts" if suite == ALL else suite.replace("_", " ")


def speedups(document: Document, over: str = "vanilla") -> list[Spot]:
    """Ratios of speed over one decoder's."""
    return [
        Spot(each["suite"], each["temperature"], each["decoder"], each["ratio"], each["low"], each["high"])
        for each in document["ratios"]
        if each["over"] == over and each["decoder"] != over
    ]


def taus(document: Document) -> list[Spot]:
    """Tokens per target forward of the decoders that draft."""
    return [
        Spot(
            row["suite"], row["temperature"], row["decoder"], row["tau"], row["tau"], row["tau"],
            row["tau_loop_filtered"] or None,
        )
        for row in document["rows"]
        if row["tau"] is not None and row["decoder"] != "vanilla"
    ]  # fmt: skip


def best(document: Document) -> Spot | None:
    """The fastest decoder that keeps the target's law, over all prompts, at the lowest temperature."""
    suite, temperature = main_suite(document), temperatures(document)[0]
    spots = [
        spot
        for spot in speedups(document)
        if (spot.suite, spot.temperature) == (suite, temperature) and not document["decoders"][spot.decoder]["lossy"]
    ]
    return max(spots, key=lambda spot: spot.value, default=None)
