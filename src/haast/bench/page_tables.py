"""The report's words and tables: the plots' numbers, the machine, the command, and where texts differ.

Owns captions and HTML tables. Everything from the document is escaped here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from haast.bench.suite_rows import Document, all_main_rows, best, main_rows, named, temperatures

NO_CALIBRATION = "This machine was not calibrated when the report was made, so v(n) is not known: run haast calibrate."
ACCEPTANCE = (
    "The chance that some draft at a depth is the target\u2019s own token, given that the depth before was right. "
    "All prompts together; dashed lines are lossy decoders."
)
LENGTHS = (
    "Tokens per target forward by how much text stood before the step. All prompts together; a head drafts worse "
    "beyond the lengths that it was trained on."
)
MS = (
    "A decoding step, all prompts together: "
    '<span style="color:var(--c1)">\u25a8 draft</span>, then <span style="color:var(--c0)">\u25a0 verify</span> (the '
    'target\u2019s forward), then <span style="color:var(--c7)">\u25a0 the rest</span> (acceptance, stop rules). '
    "A longer step may still be faster: it emits more tokens."
)
NODES = (
    "v(n): a target forward over n nodes, in units of a forward over one, as haast calibrate measured it here. "
    "Rings: the mean tree of each decoder, root included. Where the curve is flat, more drafts cost next to nothing."
)
_MARKS = "\u25cf\u25c6\u25a0\u25b2"


def headline(document: Document) -> str:
    """The one finding, as a sentence."""
    found = best(document)
    if found is None:
        return "No decoder was compared with vanilla decoding."
    row = next(row for row in main_rows(document, found.temperature) if row["decoder"] == found.decoder)
    words = (
        f"<b>{escape(found.decoder)}</b> decodes <b>{found.value:.2f}\u00d7</b> as fast as vanilla "
        f"({found.low:.2f} to {found.high:.2f})"
    )
    tau_says = "" if row["tau"] is None else f", {row['tau']:.2f} tokens per target forward"
    return f"{words}{tau_says}, at temperature {found.temperature:g}."


def _key(document: Document) -> str:
    """Marks by temperature."""
    marks = [
        f'<span style="color:var(--c{turn})">{_MARKS[turn % len(_MARKS)]} temperature {temperature:g}</span>'
        for turn, temperature in enumerate(temperatures(document))
    ]
    return ", ".join(marks) + "."


def _lossy(document: Document) -> str:
    found = any(each["lossy"] for each in document["decoders"].values())
    return " Hatched: lossy, its text is not drawn from the target\u2019s law." if found else ""


def speedup_words(document: Document) -> str:
    how = document["bootstrap"]
    level = f"{how['level']:.0%} " if isinstance(how.get("level"), float) else ""
    return (
        f"Decoded tokens per second over vanilla decoding\u2019s in the same engine, with {level}bootstrap intervals "
        f"over prompts; the dashed line is vanilla. {_key(document)}{_lossy(document)}"
    )


def tau_words(document: Document) -> str:
    convention = escape(str(document["environment"].get("tau_convention", "")))
    note = escape(str(document["environment"].get("loop_filter", "looping outputs are left out")))
    return f"{convention}. Hollow marks: {note}. {_key(document)}{_lossy(document)}"


def speedup(document: Document) -> str:
    speeds = table(
        ("suite", "temperature", "decoder", "tokens/s", "spread", "with prefill"),
        [
            (
                row["suite"], row["temperature"], named(document, row["decoder"]), _number(row["tokens_per_s"], 1),
                _interval(row.get("spread"), 1), _number(row["whole_call_tokens_per_s"], 1),
            )
            for row in document["rows"]
        ],
    )  # fmt: skip
    ratios = table(
        ("suite", "temperature", "decoder", "over", "speed-up", "interval"),
        [
            (
                each["suite"], each["temperature"], named(document, each["decoder"]), each["over"],
                f"{each['ratio']:.2f}\u00d7", _interval(each, 2),
            )
            for each in document["ratios"]
        ],
    )  # fmt: skip
    return ratios + speeds


def tau(document: Document) -> str:
    shown = [row for row in document["rows"] if row["tau"] is not None]
    whole = table(
        ("suite", "temperature", "decoder", "tau", "without loops", "looping", "prompts", "nodes", "first draft right"),
        [
            (
                row["suite"], row["temperature"], named(document, row["decoder"]), _number(row["tau"], 2),
                _number(row["tau_loop_filtered"], 2), row["looping_outputs"], row["prompts"],
                _number(row["nodes_per_forward"], 1), _number((row["alpha_by_depth"] or [None])[0], 2),
            )
            for row in shown
        ],
    )  # fmt: skip
    parted = [(row, category, value) for row in shown for category, value in row["tau_by_category"].items()]
    if not parted:
        return whole
    return whole + table(
        ("suite", "temperature", "decoder", "category", "tau"),
        [
            (row["suite"], row["temperature"], named(document, row["decoder"]), category, _number(value, 2))
            for row, category, value in parted
            if row["decoder"] != "vanilla"
        ],
    )


def acceptance(document: Document) -> str:
    rows = [row for row in all_main_rows(document) if row["acceptance_by_depth"]]
    deepest = max((len(row["acceptance_by_depth"]) for row in rows), default=0)
    lines = []
    for row in rows:
        for key, words in (("acceptance_by_depth", "any draft right"), ("alpha_by_depth", "first draft right")):
            chances = [_number(chance, 2) for chance in row[key]]
            head = (row["temperature"], named(document, row["decoder"]), words)
            lines.append((*head, *chances, *[""] * (deepest - len(chances))))
    return table(("temperature", "decoder", "", *(f"depth {depth}" for depth in range(1, deepest + 1))), lines)


def lengths(document: Document) -> str:
    return table(
        ("temperature", "decoder", "tokens before the step", "steps", "tau", "a draft accepted"),
        [
            (
                row["temperature"], named(document, row["decoder"]), f"{each['begin']:g} to {each['end'] - 1:g}",
                each["target_forwards"], _number(each["tau"], 2), _number(each["acceptance"], 2),
            )
            for row in all_main_rows(document)
            for each in row.get("by_length", ())
        ],
    )  # fmt: skip


def ms(document: Document) -> str:
    parts = ("ms_draft", "ms_verify", "ms_overhead")
    rows = [row for row in document["rows"] if row["ms_verify"] is not None]
    return table(
        ("suite", "temperature", "decoder", "draft", "verify", "rest", "sum"),
        [
            (
                row["suite"], row["temperature"], named(document, row["decoder"]),
                *(_number(row[part], 2) for part in parts), _number(sum(row[part] for part in parts), 2),
            )
            for row in rows
        ],
    )  # fmt: skip


def nodes(document: Document) -> str:
    forward = document["calibration"]["forward_ms"]
    one = next(iter(forward.values()))
    return table(("nodes", "ms", "v(n)"), [(int(n), f"{each:.2f}", f"{each / one:.2f}") for n, each in forward.items()])


def differences(document: Document) -> str:
    """What is known of equal texts."""
    found = document["differences"]
    lossy = [decoder for decoder, each in document["decoders"].items() if each["lossy"]]
    note = f" Lossy decoders ({escape(', '.join(lossy))}) promise no equal text." if lossy else ""
    if not found:
        return f"<p>No answer differed from vanilla decoding\u2019s.{note}</p>"
    kinds = Counter(str(each["kind"]) for each in found)
    counts = ", ".join(f"{count} {escape(kind)}" for kind, count in sorted(kinds.items()))
    columns = list(dict.fromkeys(key for each in found for key in each))
    listed = table(columns, [tuple(each.get(key) for key in columns) for each in found])
    return (
        f"<p>Answers that differ: {counts}. A tie is two tokens equal up to rounding; precision is another arithmetic; "
        f"a bug would break the promise.{note}</p><details><summary>Which</summary>{listed}</details>"
    )


def suites(document: Document) -> str:
    """Prompt files and the decoders' settings."""
    files = table(
        ("suite", "file", "prompts", "sha256"),
        [
            (name, each.get("file"), each.get("prompts"), each.get("sha256"))
            for name, each in document["suites"].items()
        ],
    )
    drawn = table(
        ("decoder", "law", "settings"),
        [
            (name, "lossy" if each["lossy"] else "the target\u2019s", json.dumps(each["settings"], ensure_ascii=False))
            for name, each in document["decoders"].items()
        ],
    )
    return f"<section><h3>Prompts</h3>{files}<h3>Decoders</h3>{drawn}</section>"


def environment(where: Mapping[str, Any]) -> str:
    """Hardware, commit, command and settings, as a list of keys."""
    lines = []
    for key, value in where.items():
        words = _commit(value) if key == "commit" else value if isinstance(value, str) else _json(value)
        kind = ' class="mono"' if key in ("command", "commit") or isinstance(value, dict) else ""
        lines.append(f"<dt>{escape(key.replace('_', ' '))}</dt><dd{kind}>{escape(str(words))}</dd>")
    return f'<section id="environment"><h2>How it was measured</h2><dl class="keys">{"".join(lines)}</dl></section>'


def _commit(value: Any) -> str:
    if not value:
        return "not a checkout"
    return f"{value['hash']}{', with changed files' if value['dirty'] else ''}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls by itself; numbers stand at the right."""
    right = [all(_numeric(row[place]) for row in rows) for place in range(len(heads))]
    kind = [' class="n"' if each else "" for each in right]
    head = "".join(f'<th scope="col"{kind[place]}>{escape(str(each))}</th>' for place, each in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind[place]}>{escape(_cell(each))}</td>" for place, each in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(", ".join(filter(None, heads)))}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _numeric(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        or value is None
        or (isinstance(value, str) and (not value or value[0].isdigit()))
    )


def _cell(value: Any) -> str:
    if value is None:
        return "\u2013"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _interval(value: Mapping[str, Any] | None, digits: int) -> str | None:
    if not value or value.get("low") is None:
        return None
    return f"{value['low']:.{digits}f} to {value['high']:.{digits}f}"
