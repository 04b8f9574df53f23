"""A suite document as Markdown. Owns the tables; every number is the document's, rounded.

Knows neither models nor answers: `haast report` makes the same text years later from the JSON alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from haast.bench.suite_rows import length_buckets

Document = dict[str, Any]
_LEADERS = ("eagle", "eagle+suffix")  # whose ratio over each other decoder has a table
_ALL = "all"


def suite_markdown(document: Document) -> str:
    """A page: title, tables, where the numbers come from."""
    title = f"# Decoders on {', '.join(document['suites'])}: {document['environment']['model']}"
    return "\n\n".join([title, tables(document), sources(document, "suite.json")]) + "\n"


def tables(document: Document) -> str:
    """The tables, temperature by temperature, and the notes below them."""
    parts = [f"**Warning**: {words}." for words in document["environment"].get("warnings", ())]
    for temperature in document["temperatures"]:
        parts += _at(document, temperature)
    return "\n\n".join([*parts, *_notes(document)])


def short(document: Document, name: str) -> str:
    """One table over all suites: speeds and tau at the lowest temperature, and times vanilla at every one."""
    first, *others = document["temperatures"]
    rows = {r["decoder"]: r for r in document["rows"] if (r["suite"], r["temperature"]) == (_ALL, first)}
    ratios = {(r["temperature"], r["decoder"], r["over"]): r for r in document["ratios"] if r["suite"] == _ALL}
    heads = [
        "decoder",
        "tokens/s",
        "vs stock `generate`",
        "tau",
        "vs vanilla",
        *(f"at temperature {t:g}" for t in others),
    ]
    heads += [f"{leader} over it" for leader in _LEADERS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for decoder, row in rows.items():
        label = f"{decoder} (lossy)" if document["decoders"][decoder]["lossy"] else decoder
        cells = [label, f"{row['tokens_per_s']:.1f}", _ratio(ratios.get((first, decoder, "hf"))), _tau(row)]
        cells += [_ratio(ratios.get((t, decoder, "vanilla"))) for t in (first, *others)]
        cells += [_ratio(ratios.get((first, leader, decoder))) for leader in _LEADERS]
        lines.append("| " + " | ".join(cells) + " |")
    prompts = ", ".join(f"{about['prompts']} of {about['file']}" for about in document["suites"].values())
    level = f"{document['bootstrap']['level']:.0%}"
    words = f"Temperature {first:g} where nothing else is said; prompts: {prompts}; {level} intervals over prompts."
    return "\n".join(lines) + f"\n\n{words} {_texts(document)}\n\n{sources(document, name)}\n"


def sources(document: Document, name: str) -> str:
    """One line per environment: command, machine, versions, commit. `name` is the document's file."""
    environment = document["environment"]
    return "\n".join(f"`{name}`: {_source(own)}" for own in environment.get("merged", [environment]))


def _source(environment: Document) -> str:
    versions, commit = environment["versions"], environment["commit"]
    changed = ", changed since" if commit is not None and commit["dirty"] else ""
    known = "no commit known" if commit is None else f"commit {commit['hash'][:12]}{changed}"
    return (
        f"`{environment['command']}`; {environment['cpu']}, {environment['threads']} threads, {environment['dtype']}, "
        f"packing {environment['packing']}; torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{known}."
    )


def _at(document: Document, temperature: float) -> Iterator[str]:
    rows = {(r["suite"], r["decoder"]): r for r in document["rows"] if r["temperature"] == temperature}
    present = [name for name in document["decoders"] if any(name == decoder for _, decoder in rows)]
    columns = [suite for suite in (*document["suites"], _ALL) if any(suite == own for own, _ in rows)]
    level = f"{document['bootstrap']['level']:.0%}"
    ratios = {(r["suite"], r["decoder"], r["over"]): r for r in document["ratios"] if r["temperature"] == temperature}

    def label(name: str) -> str:
        return f"{name} (lossy)" if document["decoders"][name]["lossy"] else name

    def grid(corner: str, names: Sequence[str], cell: Callable[[str, str], str]) -> str:
        lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {label(name)} | " + " | ".join(cell(suite, name) for suite in columns) + " |" for name in names]
        return "\n".join(lines)

    def times_as_fast(leader: str) -> str:
        others = [name for name in present if name != leader]
        return grid(f"{leader} over", others, lambda suite, name: _ratio(ratios.get((suite, leader, name))))

    yield f"**Temperature {temperature:g}**: tokens a second (slowest and fastest round)"
    yield grid("decoder", present, lambda suite, name: _speed(rows.get((suite, name))))
    if "vanilla" in present:
        yield f"Temperature {temperature:g}: times vanilla ({level} interval)"
        others = [name for name in present if name != "vanilla"]
        yield grid("decoder", others, lambda suite, name: _ratio(ratios.get((suite, name, "vanilla"))))
    yield f"Temperature {temperature:g}: tau (without looping answers)"
    engine = [name for name in present if any(row["tau"] is not None for (_, own), row in rows.items() if own == name)]
    yield grid("decoder", engine, lambda suite, name: _tau(rows.get((suite, name))))
    by_length = _lengths({name: rows.get((_ALL, name), {}).get("by_length", []) for name in engine}, label)
    if by_length:
        yield f"Temperature {temperature:g}: tau by the tokens before the step"
        yield by_length
    for leader in _LEADERS:
        if leader in present and len(present) > 1:
            yield f"Temperature {temperature:g}: how many times as fast {leader} is ({level} interval)"
            yield times_as_fast(leader)


def _lengths(found: dict[str, list[Document]], label: Callable[[str], str]) -> str:
    """Decoders by buckets of the context's length; empty where all steps are in one."""
    buckets = length_buckets([{"by_length": own} for own in found.values()])
    if len(buckets) < 2:
        return ""
    heads = [f"{begin:g} to {end - 1:g}" for begin, end in buckets]
    lines = ["| decoder | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, own in found.items():
        taus = {each["begin"]: f"{each['tau']:.2f}" for each in own}
        lines.append(f"| {label(name)} | " + " | ".join(taus.get(begin, "") for begin, _ in buckets) + " |")
    return "\n".join(lines)


def _speed(row: Document | None) -> str:
    if row is None:
        return ""
    low, high = row["spread"]["low"], row["spread"]["high"]
    return f"{row['tokens_per_s']:.1f}" + (f" ({low:.1f} to {high:.1f})" if low != high else "")


def _ratio(found: Document | None) -> str:
    if found is None or found["ratio"] is None:
        return ""
    interval = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['ratio']:.2f}x{interval}"


def _tau(row: Document | None) -> str:
    if row is None or row["tau"] is None:
        return ""
    return f"{row['tau']:.2f}" + (f" ({row['tau_loop_filtered']:.2f})" if row["looping_outputs"] else "")


def _notes(document: Document) -> Iterator[str]:
    environment, bootstrap = document["environment"], document["bootstrap"]
    prompts = ", ".join(f"{about['prompts']} of {about['file']}" for about in document["suites"].values())
    yield (
        f"Prompts: {prompts}; batch 1; {document['rounds']} rounds, medians per prompt; prefill and warm-up not "
        f"counted. Intervals: bootstrap over prompts, {bootstrap['samples']} draws, suites as strata."
    )
    yield f"{environment['tau_convention']}. Loops: {environment['loop_filter']}."
    yield _texts(document)
    for each in environment.get("skipped", ()):
        yield f"{each['decoder']} did not run at temperature {each['temperature']:g}: {each['why']}."
    drawn = [name for name, own in document["decoders"].items() if own["rule"] != "match" and not own["lossy"]]
    if drawn and any(document["temperatures"]):
        yield f"The target's law, but above temperature 0 texts of their own, not compared there: {', '.join(drawn)}."
    lossy = [name for name, own in document["decoders"].items() if own["lossy"]]
    if lossy:
        yield f"Lossy, so its text may differ from the target's own: {', '.join(lossy)}."
    if "merged" in environment:
        yield (
            f"Merged from {len(environment['merged'])} runs: decoders of different runs did not run interleaved, and "
            f"of their texts only the lengths were compared."
        )


def _texts(document: Document) -> str:
    """How many answers were compared, and how many differ for which reason."""
    ruled = {name for name, own in document["decoders"].items() if own["rule"] != "match"}
    reference = "vanilla" if "vanilla" in document["decoders"] else next(iter(document["decoders"]), "")
    others = [answer for answer in document["answers"] if answer["decoder"] != reference]
    compared = sum(a["temperature"] == 0 or a["decoder"] not in ruled for a in others)
    kinds = [each["kind"] for each in document["differences"]]
    reasons = (
        ("tie", "by a floating-point tie"), ("precision", "by another arithmetic (hf)"), ("bug", "by a BUG"),
    )  # fmt: skip
    found = [f"{kinds.count(kind)} {words}" for kind, words in reasons if kind in kinds]
    words = ", ".join(found) if found else "none"
    return f"Texts compared with {reference}'s, token by token: {compared}; different: {words}."
