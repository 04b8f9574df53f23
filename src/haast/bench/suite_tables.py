"""A suite document ("haast-suite-1") looked up, and as Markdown. Owns what a suite's tables show.

Every number is the document's, rounded. Knows neither models nor answers: `haast report` makes the same text years
later from the JSON alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from haast.bench.aggregate import ALL
from haast.bench.tables import Table, source

Document = Mapping[str, Any]
Row = Mapping[str, Any]
_LEADERS = ("eagle", "eagle+suffix")  # whose ratio over each other decoder has a table


def panels(document: Document) -> list[str]:
    """Suites to show: all together first, where there are several."""
    names = [suite for suite in document["suites"] if suite != ALL]
    return names if len(names) == 1 else [ALL, *names]


def main_rows(document: Document, temperature: float) -> list[Row]:
    """The rows over all prompts at one temperature, in the order of the decoders."""
    order, suite = list(document["decoders"]), panels(document)[0]
    rows = [row for row in document["rows"] if row["suite"] == suite and row["temperature"] == temperature]
    return sorted(rows, key=lambda row: order.index(row["decoder"]))


def length_buckets(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The lengths of context, from and below, in which these rows decoded; documents of an older Haast have none."""
    return sorted({(each["begin"], each["end"]) for row in rows for each in row.get("by_length", ())})


def named(document: Document, decoder: str) -> str:
    """A decoder's name, which says where it does not keep the target's distribution."""
    return f"{decoder} (lossy)" if document["decoders"][decoder]["lossy"] else decoder


def best(document: Document) -> Row | None:
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


def short(document: Document) -> str:
    """One table over all suites: speeds and tau at the lowest temperature, and times vanilla at every one."""
    first, *others = document["temperatures"]
    rows = {r["decoder"]: r for r in document["rows"] if (r["suite"], r["temperature"]) == (ALL, first)}
    ratios = {(r["temperature"], r["decoder"], r["over"]): r for r in document["ratios"] if r["suite"] == ALL}
    heads = ["decoder", "tokens/s", "vs stock `generate`", "tau", "vs vanilla"]
    heads += [*(f"at temperature {t:g}" for t in others), *(f"{leader} over it" for leader in _LEADERS)]
    lines = []
    for name, row in rows.items():
        wanted = [(first, name, "hf"), *((t, name, "vanilla") for t in (first, *others))]
        wanted += [(first, leader, name) for leader in _LEADERS]
        over_hf, *more = (_ratio(ratios.get(key)) for key in wanted)
        lines.append([named(document, name), f"{row['tokens_per_s']:.1f}", over_hf, _tau(row), *more])
    words = f"Temperature {first:g} where nothing else is said; prompts: {_prompts(document)}; "
    words += f"{document['bootstrap']['level']:.0%} intervals over prompts. {_texts(document)}"
    return f"{Table(heads, lines).markdown()}\n\n{words}"


def sources(document: Document, name: str) -> str:
    """One line per environment: command, machine, versions, commit. `name` is the document's file."""
    environment = document["environment"]
    return "\n".join(source(name, own) for own in environment.get("merged", [environment]))


def _at(document: Document, temperature: float) -> Iterator[str]:
    rows = {(r["suite"], r["decoder"]): r for r in document["rows"] if r["temperature"] == temperature}
    ratios = {(r["suite"], r["decoder"], r["over"]): r for r in document["ratios"] if r["temperature"] == temperature}
    present = [name for name in document["decoders"] if any(name == decoder for _, decoder in rows)]
    columns = [suite for suite in (*document["suites"], ALL) if any(suite == own for own, _ in rows)]
    engine = [name for name in present if any(r["tau"] is not None for (_, own), r in rows.items() if own == name)]
    level = f"{document['bootstrap']['level']:.0%}"

    def grid(corner: str, names: Sequence[str], cell: Callable[[str, str], str]) -> str:
        lines = [[named(document, name), *(cell(suite, name) for suite in columns)] for name in names]
        return Table([corner, *columns], lines).markdown()

    yield f"**Temperature {temperature:g}**: tokens a second (slowest and fastest round)"
    yield grid("decoder", present, lambda suite, name: _speed(rows.get((suite, name))))
    if "vanilla" in present:
        yield f"Temperature {temperature:g}: times vanilla ({level} interval)"
        others = [name for name in present if name != "vanilla"]
        yield grid("decoder", others, lambda suite, name: _ratio(ratios.get((suite, name, "vanilla"))))
    yield f"Temperature {temperature:g}: tau (without looping answers)"
    yield grid("decoder", engine, lambda suite, name: _tau(rows.get((suite, name))))
    by_length = {named(document, name): rows.get((ALL, name), {}).get("by_length", []) for name in engine}
    if found := lengths(by_length):
        yield f"Temperature {temperature:g}: tau by the tokens before the step"
        yield found
    for leader in _LEADERS if len(present) > 1 else ():
        if leader in present:
            yield f"Temperature {temperature:g}: how many times as fast {leader} is ({level} interval)"
            over = {key[::2]: _ratio(each) for key, each in ratios.items() if key[1] == leader}
            others = [name for name in present if name != leader]
            yield grid(f"{leader} over", others, lambda suite, name, over=over: over.get((suite, name), ""))  # type: ignore[misc]


def lengths(found: Mapping[str, list[Row]]) -> str:
    """tau of decoders by buckets of the context's length; empty where all steps are in one."""
    buckets = length_buckets([{"by_length": own} for own in found.values()])
    if len(buckets) < 2:
        return ""
    taus = {(name, each["begin"]): f"{each['tau']:.2f}" for name, own in found.items() for each in own}
    lines = [[name, *(taus.get((name, begin), "") for begin, _ in buckets)] for name in found]
    return Table(["decoder", *(f"{begin:g} to {end - 1:g}" for begin, end in buckets)], lines).markdown()


def _speed(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = row["spread"]["low"], row["spread"]["high"]
    return f"{row['tokens_per_s']:.1f}" + (f" ({low:.1f} to {high:.1f})" if low != high else "")


def _ratio(found: Row | None) -> str:
    if found is None or found["ratio"] is None:
        return ""
    interval = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['ratio']:.2f}x{interval}"


def _tau(row: Row | None) -> str:
    if row is None or row["tau"] is None:
        return ""
    return f"{row['tau']:.2f}" + (f" ({row['tau_loop_filtered']:.2f})" if row["looping_outputs"] else "")


def _prompts(document: Document) -> str:
    return ", ".join(f"{about['prompts']} of {about['file']}" for about in document["suites"].values())


def _notes(document: Document) -> Iterator[str]:
    environment, decoders = document["environment"], document["decoders"]
    yield (
        f"Prompts: {_prompts(document)}; batch 1; {document['rounds']} rounds, medians per prompt; prefill and warm-up "
        f"not counted. Intervals: bootstrap over prompts, {document['bootstrap']['samples']} draws, suites as strata."
    )
    yield f"{environment['tau_convention']}. Loops: {environment['loop_filter']}."
    yield _texts(document)
    for each in environment.get("skipped", ()):
        yield f"{each['decoder']} did not run at temperature {each['temperature']:g}: {each['why']}."
    drawn = [name for name, own in decoders.items() if own["rule"] != "match" and not own["lossy"]]
    if drawn and any(document["temperatures"]):
        yield (
            f"The target's distribution, but above temperature 0 texts of their own, not compared there: "
            f"{', '.join(drawn)}."
        )
    lossy = [name for name, own in decoders.items() if own["lossy"]]
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
    reasons = {"tie": "by a floating-point tie", "precision": "by another arithmetic (hf)", "bug": "by a BUG"}
    found = [f"{kinds.count(kind)} {words}" for kind, words in reasons.items() if kind in kinds]
    words = ", ".join(found) if found else "none"
    return f"Texts compared with {reference}'s, token by token: {compared}; different: {words}."
