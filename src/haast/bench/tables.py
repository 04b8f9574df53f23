"""Markdown and text tables of measurements; every number is taken from a document and rounded.

Owns the look-ups in a suite document ("haast-suite-1") and the formatting of values. The templates own the wording and
the columns: `templates/results.md`, and `templates/suite.md` for a suite. Knows neither models nor answers: `haast
report` writes the same text from the JSON alone.
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
_LEADERS = ("eagle", "eagle+suffix")  # decoders whose ratios over all others are shown


def formatted(value: Any, form: str, unit: str = "") -> str:
    """A number, or a list of numbers, in the format `form`; an empty string for None."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(format(each, form) for each in value)
    return format(value, form) + unit


def panels(document: Document) -> list[str]:
    """The suites to show; with several, "all" comes first."""
    names = [suite for suite in document["suites"] if suite != ALL]
    return names if len(names) == 1 else [ALL, *names]


def main_rows(document: Document, temperature: float) -> list[Document]:
    """The rows over all prompts at one temperature, in decoder order."""
    order, suite = list(document["decoders"]), panels(document)[0]
    rows = [row for row in document["rows"] if row["suite"] == suite and row["temperature"] == temperature]
    return sorted(rows, key=lambda row: order.index(row["decoder"]))


def length_buckets(rows: Iterable[Document]) -> list[tuple[float, float]]:
    """The context lengths [begin, end) that occur in these rows; documents of older versions have none."""
    return sorted({(each["begin"], each["end"]) for row in rows for each in row.get("by_length", ())})


def named(document: Document, decoder: str) -> str:
    """A decoder's name, marked if it does not keep the target's distribution."""
    return f"{decoder} (lossy)" if document["decoders"][decoder]["lossy"] else decoder


def best(document: Document) -> Document | None:
    """The highest ratio of a lossless decoder over vanilla, over all prompts, at the lowest temperature."""
    selected = (panels(document)[0], min(document["temperatures"]), "vanilla")
    ratios = [
        each
        for each in document["ratios"]
        if (each["suite"], each["temperature"], each["over"]) == selected
        and each["decoder"] != "vanilla"
        and not document["decoders"][each["decoder"]]["lossy"]
    ]
    return max(ratios, key=lambda each: each["ratio"], default=None)


def markdown(template: str, part: str, *values: Any) -> str:
    """Render a macro of a Markdown template.

    Args:
        template: "results.md" or "suite.md".
        part: the macro. In "results.md" the kind of a result, with "_" for "-"; "decoders" or "taus" of `haast bench`;
            or "source". In "suite.md" "lengths"; `suite_markdown` renders the others.
        *values: a document; documents by path for "taus", "regenerate" and "interop_vllm"; a path and an environment
            for "source".

    Raises:
        KeyError: a document lacks a value that the macro shows.
    """
    try:
        return str(getattr(_markdown().get_template(template).module, part)(*values)).strip()
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def suite_markdown(document: Document, part: str = "page", name: str = "suite.json") -> str:
    """A suite's "page", "tables" or "short" table, followed by its sources; `name` is the document's path."""
    rows = {(row["temperature"], row["suite"], row["decoder"]): row for row in document["rows"]}
    ratios = {(r["temperature"], r["suite"], r["decoder"], r["over"]): r for r in document["ratios"]}
    parts = [markdown("suite.md", "short" if part == "short" else "tables", document, rows, ratios)]
    if part == "page":
        parts.insert(0, f"# Decoders on {', '.join(document['suites'])}: {document['environment']['model']}")
    return "\n\n".join([*parts, markdown("suite.md", "sources", document, name)]) + "\n"


def templates() -> Environment:
    """The Jinja environment: undefined values are errors, values of documents are escaped."""
    environment = Environment(
        loader=PackageLoader("haast.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals["named"] = named
    return environment


def text(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Render a plain text template."""
    environment = templates().overlay(autoescape=False)
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values).rstrip()


@cache
def _markdown() -> Environment:
    environment = templates().overlay(finalize=_escaped)
    environment.globals |= {"leaders": _LEADERS, "length_buckets": length_buckets}
    environment.filters |= {"f": formatted, "median": median, "stem": lambda path: Path(path).stem, "raw": Markup}
    return environment


def _escaped(value: Any) -> Markup:
    """Escape a value for a Markdown cell. Markup, the output of a macro, is left as it is."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else " ".join(str(value).replace("|", "\\|").split("\n")))
