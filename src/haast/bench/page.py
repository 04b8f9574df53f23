"""One self-contained HTML page: no network, no fonts of others, light and dark, whole without scripts.

Owns the shell (style, script, what a browser may load) and the escaping of what documents say. The figures are
`figures`', the tables `page_tables`', the trees `accept_tree`'s.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from haast.bench import page_tables as tables
from haast.bench.accept_tree import trace_section
from haast.bench.steps import check_trace
from haast.bench.suite_rows import all_main_rows, length_buckets

SUITE_FORMAT = "haast-suite-1"
_MOST_TREES = 1_200_000  # bytes of trees on a page; the page stays under 2 MB
_NODES = "Cost of a forward by its nodes"
_Draw = Callable[[Mapping[str, Any], str, bool], str]
_Tabulate = Callable[[Mapping[str, Any]], str]
_ASSETS = Path(__file__).parent.parent / "data" / "page"


def trace_html(document: Mapping[str, Any]) -> str:
    """A "haast-trace-1" document as a page.

    Raises:
        ValueError: another kind of document.
    """
    check_trace(document)
    where = document["environment"]
    model = f"{escape(str(where['model']))} on " if "model" in where else ""
    body = (
        f"<header><h1>Accept trees</h1><p>What was drafted, what the target accepted, and why the rest was rejected. "
        f"{model}{escape(str(where.get('cpu', 'an unknown machine')))}.</p>"
        f"</header>\n<main>{_traces([document])}\n{_law_note([document])}{tables.environment(where)}</main>"
    )
    return _shell("Accept trees", body)


def report_html(document: Mapping[str, Any]) -> str:
    """A "haast-suite-1" document as a page, its figures drawn with matplotlib.

    Raises:
        ValueError: another kind of document, or matplotlib is missing.
    """
    if document.get("format") != SUITE_FORMAT:
        raise ValueError(
            f"format={document.get('format')!r} is not {SUITE_FORMAT!r}: give what `haast bench --suite --json` wrote"
        )
    from haast.bench import figures

    figures.check_matplotlib()
    parts: list[tuple[str, str, str, _Draw, _Tabulate]] = [
        ("speedup", "Speed-up", tables.speedup_words(document), figures.speedup, tables.speedup),
        ("tau", "Tokens per target forward", tables.tau_words(document), figures.tau, tables.tau),
        ("acceptance", "Acceptance by depth", tables.ACCEPTANCE, figures.acceptance, tables.acceptance),
        ("milliseconds", "Where a step\u2019s milliseconds go", tables.MS, figures.milliseconds, tables.ms),
    ]
    if _by_length(document):
        parts.insert(3, ("lengths", "Tau by length of context", tables.LENGTHS, figures.lengths, tables.lengths))
    if document["calibration"]:
        parts.append(("nodes", _NODES, tables.NODES, figures.nodes, tables.nodes))
    sections = [_figure(*part, document) for part in parts]
    if not document["calibration"]:
        sections.append(f"<section><h2>{_NODES}</h2><p>{tables.NO_CALIBRATION}</p></section>")
    body = f"{_header(document)}\n<main>{''.join(sections)}{_tree_section(document)}{_facts(document)}</main>"
    return _shell(f"Haast report: {document['environment']['model']}", body)


def _header(document: Mapping[str, Any]) -> str:
    where = document["environment"]
    links = [("speedup", "Speed-up"), ("tau", "Tau"), ("acceptance", "Acceptance")]
    links += [("lengths", "Tau by length")] if _by_length(document) else []
    links += [("milliseconds", "Milliseconds")]
    links += [("nodes", "Cost by nodes")] if document["calibration"] else []
    links += [("trees", "Accept trees")] if document["traces"] else []
    links += [("differences", "Same text?"), ("environment", "How it was measured")]
    listed = "".join(f'<a href="#{target}">{words}</a>' for target, words in links)
    model, cpu = escape(str(where["model"])), escape(str(where["cpu"]))
    count = f"{where['threads']} thread{'' if where['threads'] == 1 else 's'}"
    return (
        f"<header><h1>{model}, drafted and plain</h1>"
        f'<p class="lead">{tables.headline(document)}</p>'
        f"<p>{cpu}, {escape(count)}, {escape(str(where['dtype']))}, packing {escape(str(where['packing']))}; "
        f'{escape(str(where["date"])[:10])}.</p><nav aria-label="On this page">{listed}</nav></header>'
    )


def _by_length(document: Mapping[str, Any]) -> bool:
    """Whether there is more than one length of context to compare."""
    return len(length_buckets(all_main_rows(document))) > 1


def _figure(name: str, title: str, words: str, draw: _Draw, tabulate: _Tabulate, document: Mapping[str, Any]) -> str:
    """A heading, the caption, the picture for wide and for narrow screens, and its numbers."""
    label = escape(f"{title}; the same numbers are in the table below")
    wide, narrow = (draw(document, f"{name}-{size}", size == "narrow") for size in ("wide", "narrow"))
    return (
        f'<section><h2>{title}</h2><figure id="{name}"><figcaption>{words}</figcaption>'
        f'<div class="wide" role="img" aria-label="{label}">{wide}</div>'
        f'<div class="narrow" role="img" aria-label="{label}">{narrow}</div></figure>'
        f"<details><summary>The numbers</summary>{tabulate(document)}</details></section>\n"
    )


def _tree_section(document: Mapping[str, Any]) -> str:
    if not document["traces"]:
        return ""
    for trace in document["traces"]:
        check_trace(trace)
    return (
        '<section id="trees"><h2>Accept trees</h2><p>A few prompts, step by step: the drafted tree, what the target '
        "accepted of it, and its probability at every branch. Tokens of the answer are links to their step; pick a "
        f"node to see why it was accepted or not.</p>{_traces(document['traces'])}{_law_note(document['traces'])}"
        "</section>\n"
    )


def _traces(traces: Sequence[Mapping[str, Any]]) -> str:
    """All traces, each with as many trees as its share of the page allows."""
    share, made = _MOST_TREES // max(len(traces), 1), []
    for number, trace in enumerate(traces):
        whole = trace_section(trace, number, None, number == 0)
        if len(whole.encode()) > share:
            fitting = int(len(trace["steps"]) * share / len(whole.encode()) * 0.9)
            whole = trace_section(trace, number, fitting, number == 0)
        made.append(whole)
    return "\n".join(made)


def _law_note(traces: Sequence[Mapping[str, Any]]) -> str:
    greedy = any(trace["temperature"] == 0 for trace in traces)
    words = "Probabilities are the target\u2019s, at the node\u2019s parent, under the law that was sampled"
    if greedy:
        words += "; greedy decoding always takes the likeliest token, so its are those before that choice (softmax)"
    return (
        f'<p class="quiet">{words}. \u00b7 is a space, \u21b5 a new line, \\x.. a byte of an unfinished character.</p>'
    )


def _facts(document: Mapping[str, Any]) -> str:
    return (
        f'<section id="differences"><h2>Same text?</h2>{tables.differences(document)}</section>\n'
        f"{tables.environment(document['environment'])}{tables.suites(document)}"
    )


def _shell(title: str, body: str) -> str:
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing may be loaded, and no script may run but ours: what a document says stays text even if escaping failed.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{known}'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
