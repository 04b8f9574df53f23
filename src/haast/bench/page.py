"""One self-contained HTML page: no network, no fonts of others, light and dark, whole without scripts.

Owns what the pages are filled with beside the figures (`charts`). The templates own the words and the drawing, and
escape what documents say.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup

from haast.bench.charts import charts
from haast.bench.document import FORMAT, check_format
from haast.bench.tables import Document, best, formatted, main_rows, templates
from haast.bench.trace import TRACE_FORMAT, StepView, counted, percent, quoted, visible

_UNKNOWN = "\u2013"
_MOST_NODES = 4000  # of the trees of a page, which stays under 2 MB


def trace_html(document: Document) -> str:
    """A "haast-trace-1" document as a page.

    Raises:
        ValueError: another kind of document.
    """
    check_format(document, TRACE_FORMAT)
    return _render("trace.html", document["environment"], [document])


def report_html(document: Document) -> str:
    """A "haast-suite-1" document as a page.

    Raises:
        ValueError: another kind of document.
    """
    check_format(document, FORMAT)
    main = [row for temperature in sorted(document["temperatures"]) for row in main_rows(document, temperature)]
    shown = {"document": document, "main": main, "best": best(document), "charts": charts(document, main)}
    return _render("report.html", document["environment"], document["traces"], **shown)


def _render(template: str, where: Document, traces: Sequence[Document], **more: Any) -> str:
    """A template filled in; KeyError where a document lacks what it shows."""
    room = templates()
    room.filters |= {"counted": counted, "percent": percent, "quoted": quoted, "visible": visible}
    room.filters |= {"n": _number, "cell": _cell}
    assert room.loader is not None, "just given"
    style, script = (room.loader.get_source(room, name)[0] for name in ("page.css", "page.js"))
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    more |= {"traced": _traced(traces), "greedy": any(trace["temperature"] == 0 for trace in traces)}
    more |= {"style": Markup(style), "script": Markup(script), "script_hash": known}
    try:
        return room.get_template(template).render(where=where, **more)
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def _traced(traces: Sequence[Document]) -> list[dict[str, Any]]:
    """All traces, each with as many trees as its share of the page allows; the step shown first kept the most."""
    found = []
    for trace in traces:
        check_format(trace, TRACE_FORMAT)
        views, room = list[StepView](), _MOST_NODES // len(traces)
        for step in trace["steps"]:
            view = StepView(step)
            room -= len(view.nodes) + 2  # a step's own words take room too
            if room < 0:
                break
            views.append(view)
        liveliest = max(range(len(views)), key=lambda at: views[at].kept, default=0)
        left = len(trace["steps"]) - len(views)
        found.append({"document": trace, "views": views, "left": left, "liveliest": liveliest})
    return found


def _number(value: Any, form: str, unit: str = "") -> str:
    """A number in a form; a dash where there is none, since an empty cell would look forgotten."""
    return formatted(value, form, unit) or _UNKNOWN


def _cell(value: Any) -> str:
    """Any JSON value in a table."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
