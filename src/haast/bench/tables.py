"""Tables of measurements; every number is a document's, rounded.

Owns the look-ups in a suite document ("haast-suite-1"), and how values become text in Markdown. The templates own the
words and the columns. Knows neither models nor answers: `haast report` makes the same text years
later from the JSON alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from haast.bench.aggregate import ALL

Document = Mapping[str, Any]
_LEADERS = ("eagle", "eagle+suffix")  # whose ratio over each other decoder has a table


def formatted(value: Any, form: str, unit: str = "") -> str:
    """A number, or a list of them, in a form; None is nothing, without the unit too."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(format(each, form) for each in value)
    return format(value, form) + unit


def panels(document: Document) -> list[str]:
    """Suites to show: all together first, where there are several."""
    names = [suite for suite in document["suites"] if suite != ALL]
    return names if len(names) == 1 else [ALL, *names]


def main_rows(document: Document, temperature: float) -> list[Document]:
    """The rows over all prompts at one temperature, in the order of the decoders."""
    order, suite = list(document["decoders"]), panels(document)[0]
    rows = [row for row in document["rows"] if row["suite"] == suite and row["temperature"] == temperature]
    return sorted(rows, key=lambda row: order.index(row["decoder"]))


def length_buckets(rows: Iterable[Document]) -> list[tuple[float, float]]:
    """The lengths of context, from and below, in which these rows decoded; documents of an older Haast have none."""
    return sorted({(each["begin"], each["end"]) for row in rows for each in row.get("by_length", ())})


def named(document: Document, decoder: str) -> str:
    """A decoder's name, which says where it does not keep the target's distribution."""
    return f"{decoder} (lossy)" if document["decoders"][decoder]["lossy"] else decoder


def best(document: Document) -> Document | None:
    """The highest lossless ratio over vanilla, over all prompts, at the lowest temperature."""
    wanted = (panels(document)[0], min(document["temperatures"]), "vanilla")
    ratios = [
        each
        for each in document["ratios"]
        if (each["suite"], each["temperature"], each["over"]) == wanted
        and each["decoder"] != "vanilla"
        and not document["decoders"][each["decoder"]]["lossy"]
    ]
    return max(ratios, key=lambda each: each["ratio"], default=None)


def markdown(template: str, part: str, *values: Any) -> str:
    """A macro of a Markdown template, filled in.

    Of "results.md": a kind of `benchmarks/readme.py`, "decoders" (`haast bench`), "taus" and "added" (documents by
    file name), or "source" (a file's name and the environment). Of "suite.md": "lengths", or through `suite_markdown`
    any other.

    Raises:
        KeyError: the document lacks what is shown.
    """
    try:
        return str(getattr(_markdown().get_template(template).module, part)(*values)).strip()
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def suite_markdown(document: Document, part: str = "page", name: str = "suite.json") -> str:
    """A suite's "page", "tables" or "short" table, with its sources; `name` is the document's file."""
    rows = {(row["temperature"], row["suite"], row["decoder"]): row for row in document["rows"]}
    ratios = {(r["temperature"], r["suite"], r["decoder"], r["over"]): r for r in document["ratios"]}
    parts = [markdown("suite.md", "short" if part == "short" else "tables", document, rows, ratios)]
    if part == "page":
        parts.insert(0, f"# Decoders on {', '.join(document['suites'])}: {document['environment']['model']}")
    return "\n\n".join([*parts, markdown("suite.md", "sources", document, name)]) + "\n"


def templates() -> Environment:
    """The templates' room: what they lack is an error, what documents say is escaped."""
    room = Environment(
        loader=PackageLoader("haast.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    room.globals["named"] = named
    return room


def text(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A template of plain text, filled in."""
    room = templates().overlay(autoescape=False)
    room.filters |= filters or {}
    return room.get_template(template).render(**values).rstrip()


@cache
def _markdown() -> Environment:
    room = templates().overlay(finalize=_escaped)
    room.globals |= {"leaders": _LEADERS, "length_buckets": length_buckets}
    room.filters |= {"f": formatted, "median": median, "stem": lambda path: Path(path).stem, "raw": Markup}
    return room


def _escaped(value: Any) -> Markup:
    """A value in a cell. Markup is what a macro made; anything else is text, for Markdown and not for HTML."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else " ".join(str(value).replace("|", "\\|").split("\n")))
