"""Tables of measurements: one description, drawn as Markdown, in the terminal or by the page's template.

Owns `Table` and the tables of every kind of document in `results/` but a suite's (see `suite_tables`). Every number is
the document's, rounded; only the ablation's predicted speed-up is computed, since its rows were timed minutes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from string import Formatter
from typing import Any

Document = Mapping[str, Any]
UNKNOWN = "\u2013"  # a dash for a number that there is not, where an empty cell would look forgotten


class _UnknownError(Exception):
    """A value that a cell shows is None, or a list without values."""


class _Cells(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or value == []:
            raise _UnknownError
        if isinstance(value, list):
            return " ".join(format(each, format_spec) for each in value)
        return format(value, format_spec)


def fill(form: str, row: Document, unknown: str = "") -> str:
    """A cell: `form` ("{tau:.2f}", "{small[tau]:.3f}") filled in from a row; `unknown` where there is no value."""
    try:
        return _Cells().vformat(form, (), row)
    except _UnknownError:
        return unknown


@dataclass(frozen=True)
class Table:
    """Heads, and rows of cells that are text already."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, rows: Iterable[Document], heads: str, forms: str, unknown: str = "") -> Table:
        """One row per document. `heads` and `forms` (see `fill`) are the lines of a Markdown table: "a | b"."""
        cells = forms.split(" | ")
        return cls(heads.split(" | "), [[fill(form, row, unknown) for form in cells] for row in rows])

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone, and stand at the right."""
        columns = zip(*self.rows, strict=True)
        return [all(not cell or cell[0].isdigit() or cell == UNKNOWN for cell in column) for column in columns]

    def markdown(self) -> str:
        """Lines of Markdown, what would end a cell escaped."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(" ".join(cell.replace("|", "\\|").splitlines()) for cell in cells) + " |"

        return "\n".join([line(self.heads), "|" + "---|" * len(self.heads), *map(line, self.rows)])


def source(name: str, where: Document) -> str:
    """Where a document's numbers come from, in a line; `name` is its file in results/."""
    versions, commit = where["versions"], where["commit"]
    changed = ", changed since" if commit is not None and commit["dirty"] else ""
    known = "no commit known" if commit is None else f"commit {commit['hash'][:12]}{changed}"
    model = f", {where['dtype']}, packing {where['packing']}" if "packing" in where else ""
    return (
        f"`{name}`: `{where['command']}`; {where['cpu']}, {where['threads']} threads{model}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}; {known}."
    )


def decoders(document: Document) -> str:
    """What `haast bench` wrote: one row per decoder."""
    settings = document["environment"]["settings"]

    def nodes(row: Document) -> str:
        """One size, or the mean where it was decided step by step; older documents have the largest only."""
        if (mean := row.get("nodes_per_forward")) is not None:
            return f"{mean:.1f}" if mean != round(mean) else f"{mean:.0f}"
        if row["decoder"] != "eagle" or settings["shape"] is None:
            return ""
        return ("" if settings.get("pace") is None else "up to ") + str(settings["shape"]["nodes"])

    rows = [{**row, "nodes": nodes(row), "first": row["alpha_by_depth"][:1]} for row in document["rows"]]
    return Table.of(
        rows,
        "decoder | nodes | tokens/s | vs vanilla | vs stock `generate` | tau | tau without loops | first right",
        "{decoder} | {nodes} | {tokens_per_s:.1f} | {speedup_vs_vanilla:.2f}x | {speedup_vs_hf:.2f}x | {tau:.2f} | "
        "{tau_loop_filtered:.2f} | {first:.2f}",
    ).markdown()


def taus(documents: Mapping[str, Document]) -> str:
    """Runs for tau alone, by file name, in one table."""
    rows = [
        {
            **row,
            "set": f"{Path(document['environment']['prompts_file']).stem} ({row['prompts']})",
            "straight": row["prompts"] - row["looping_outputs"],
            **document["environment"]["settings"],
        }
        for document in documents.values()
        for row in document["rows"]
    ]
    return Table.of(
        rows,
        "prompts | temperature | nodes | tau | tau without loops | first draft right, by depth",
        "{set} | {sampling[temperature]:g} | {shape[nodes]} | {tau:.2f} | "
        "{tau_loop_filtered:.2f} ({straight} prompts) | {alpha_by_depth:.2f}",
    ).markdown()


def answers(documents: Mapping[str, Document]) -> str:
    """Runs of `haast regenerate`, by file name."""
    rows = [{**document, "gb": document["peak_rss_mb"] / 1e3} for document in documents.values()]
    heads = "answers | tokens/s, loading included | peak memory"
    return Table.of(rows, heads, "{added} | {tokens_per_s:.0f} | {gb:.1f} GB").markdown()


def ablation(document: Document) -> str:
    """tau as measured; the speed-up is predicted from it, since a row's own times carry the machine's noise of minutes.

    Rows with heads of one size share the median of their c, and all rows the median of v(6) and o.
    """
    small = [row["small"] for row in document["rows"]]
    v, o = median(row["v"] for row in small), median(row["o"] for row in small)
    sizes = [(row["parameters"], str(row["settings"].get("draft_vocab"))) for row in document["rows"]]
    costs = [median(row["c"] for row, own in zip(small, sizes, strict=True) if own == size) for size in sizes]
    gains = [row["tau"] / (v + row["depth"] * c + o) for row, c in zip(small, costs, strict=True)]
    bold = ["**" if gain == max(gains) else "" for gain in gains]
    rows = [
        {**row, "c": c, "gain": gain, "bold": mark, "thousands": row["views"] / 1e3}
        for row, c, gain, mark in zip(document["rows"], costs, gains, bold, strict=True)
    ]
    return Table.of(
        rows,
        "row | views/s | views | held-out CE | tau, 6 nodes | tau, 60 nodes | c | predicted speed-up",
        "{row} | {views_per_s:.0f} | {thousands:.0f}k | {valid_ce:.3f} | {small[tau]:.3f} | {large[tau]:.3f} | "
        "{c:.3f} | {bold}{gain:.2f}x{bold}",
    ).markdown()


def training(document: Document) -> str:
    """A training run's evaluations."""
    rows = [{**each, "millions": each["views"] / 1e6, "minutes": each["seconds"] / 60} for each in document["metrics"]]
    table = Table.of(
        rows,
        "views | minutes | held-out CE | agreement, by own states read | tau",
        "{millions:.2f} M | {minutes:.1f} | {valid_ce:.3f} | {valid_alpha:.2f} | {tau:.3f}",
    )
    reached = ", ".join(f"{tau} in {seconds / 60:.0f} min" for tau, seconds in document["seconds_to_tau"].items())
    memory = f"Peak memory {document['peak_rss_mb'] / 1e3:.1f} GB."
    return f"{table.markdown()}\n\nFirst evaluation with a tau of at least: {reached}. {memory}"


def inputs(document: Document) -> str:
    """What a head reads, and how well features are predicted from the past."""
    heads = "a pair holds | 0-alpha | 1-alpha | 2-alpha | 3-alpha | 4-alpha | tau"
    alphas = " | ".join(f"{{valid_alpha[{depth}]:.2f}}" for depth in range(5))
    read = Table.of(document["inputs"], heads, f"{{inputs}} | {alphas} | {{tau:.2f}}")
    explained = document["explained_variance"]
    backs = [f"{past} back" for past in next(iter(explained.values()))]
    predicted = [[name, *(f"{value:.0%}" for value in values.values())] for name, values in explained.items()]
    return f"{read.markdown()}\n\n{Table(['predicted from the past', *backs], predicted).markdown()}"


def peers(document: Document) -> str:
    """Haast and others on the same prompts and weights."""
    present = [row for row in document["rows"] if not row["absent"]]
    speeds = {row["peer"]: row["tokens_per_s"] for row in present}
    bases = [speeds.get("transformers fp32"), speeds.get("haast vanilla")]
    rows = [
        {"same": "", **row, "times": [row["tokens_per_s"] / base if base else None for base in bases]}
        | {"same": row.get("texts equal to transformers fp32", "")}
        for row in sorted(present, key=lambda row: -row["tokens_per_s"])
    ]
    table = Table.of(
        rows,
        "decoder | tokens/s | vs stock `generate` fp32 | vs Haast vanilla | texts equal to fp32",
        "{peer} | {tokens_per_s:.1f} | {times[0]:.2f}x | {times[1]:.2f}x | {same}",
    )
    absent = [f"{row['peer']} ({row['absent']})" for row in document["rows"] if row["absent"]]
    versions = ", ".join(f"{name} {own}" for name, own in sorted(document["environment"]["peer_versions"].items()))
    end = f" Not there: {'; '.join(absent)}." if absent else ""
    return f"{table.markdown()}\n\nVersions: {versions}.{end}"


def roofline(document: Document) -> str:
    """Linear layers by rows against what the machine can do at most."""
    heads, forms = "rows | ms | roofline ms | times the roofline", "{rows} | {ms:.2f} | {roofline_ms:.2f} | {times:.2f}"
    return (
        f"{Table.of(document['linears'], heads, forms).markdown()}\n\nRoofline: {document['bandwidth'] / 1e9:.1f} GB/s "
        f"read, {document['peak'] / 1e9:.0f} GFLOP/s, {document['weight_bytes'] / 1e6:.0f} MB of weights."
    )


def contexts(document: Document) -> str:
    """Tokens a second by context."""
    return Table.of(
        document["contexts"],
        "context | vanilla tokens/s | EAGLE tokens/s | tau | ms a vanilla forward | least for keys and values",
        "{context} | {vanilla_tokens_per_s:.1f} | {eagle_tokens_per_s:.1f} | {eagle_tau:.2f} | "
        "{vanilla_ms_verify:.2f} | {kv_read_ms:.2f}",
    ).markdown()


def oracle(document: Document) -> str:
    """Speed-up over the chance that a draft is right."""
    points = {(p["depth"], p["chance"]): fill("{speedup:.2f}x (tau {tau:.2f})", p) for p in document["oracle"]}
    depths, chances = (sorted({key[place] for key in points}) for place in (0, 1))
    rows = [[f"{depth} drafts", *(points[depth, chance] for chance in chances)] for depth in depths]
    return Table(["chain", *(f"{chance:g}" for chance in chances)], rows).markdown()


def baselines(document: Document) -> str:
    """Settings of decoders without an EAGLE head, fastest first within a family; the best of each in bold."""
    best, families = document["best"], list(document["best"])
    points = sorted(document["baselines"], key=lambda p: (families.index(p["family"]), -p["tokens_per_s"]))
    rows = [
        {
            **point,
            "bold": "**" if point["settings"] == best[point["family"]] else "",
            "words": ", ".join(f"{name} {value}" for name, value in point["settings"].items()),
        }
        for point in points
    ]
    forms = "{family} | {bold}{words}{bold} | {tokens_per_s:.1f} | {speedup_vs_vanilla:.2f}x | {tau:.2f}"
    return Table.of(rows, "decoder | setting | tokens/s | vs vanilla | tau", forms).markdown()


def batches(document: Document) -> str:
    """Tokens a second of all rows together, by batch size."""
    points = {(p["decoder"], p["batch"]): p for p in document["batches"]}
    names, sizes = dict.fromkeys(name for name, _ in points), sorted({size for _, size in points})
    rows = []
    for name in names:
        own = [points[name, n] | {"times": points["vanilla", n]["tokens_per_s"]} for n in sizes]
        rows.append([name, *(f"{p['tokens_per_s']:.0f} ({p['tokens_per_s'] / p['times']:.2f}x)" for p in own)])
        if name == "eagle, as pays":
            cells = (fill("tau {tau:.2f}, {undrafted:.0%}", p) for p in own)
            rows.append(["its tau, and steps without a draft", *cells])
    return Table(["decoder", *(f"batch {size}" for size in sizes)], rows).markdown()


def lengths(document: Document) -> str:
    """tau, speed and the prompt's time by the prompt's length; memory at one length."""
    points = {(each["decoder"], each["length"]): each for each in document["lengths"] if not each["memory_alone"]}
    names, sizes = (list(dict.fromkeys(key[place] for key in points)) for place in (0, 1))
    parts = []
    for title, key, scale, form in (
        ("tau", "tau", 1.0, ".2f"), ("tokens/s", "tokens_per_s", 1.0, ".1f"), ("prompt, s", "prefill_ms", 1e-3, ".1f"),
    ):  # fmt: skip
        rows = [[_windowed(name), *(format(points[name, n][key] * scale, form) for n in sizes)] for name in names]
        parts.append(Table([title, *(f"{n} tokens" for n in sizes)], rows).markdown())
    memory = document["memory"]
    peaks = {each["decoder"]: each["peak_rss_mb"] for each in document["lengths"] if each["length"] == memory["length"]}
    rows = [[_windowed(name), f"{peaks[name]:.0f}", f"{more:.2f}"] for name, more in memory["times_vanilla"].items()]
    parts.append(Table([f"peak memory, {memory['length']} tokens", "MB", "times vanilla"], rows).markdown())
    return "\n\n".join(parts)


def _windowed(name: str) -> str:
    """A decoder of benchmarks/long_context.py in words."""
    plain = "plain modules: " if name.startswith("plain-") else ""
    base, _, window = name.removeprefix("plain-").partition("-")
    base = "stock `generate`" if base == "hf" else base
    return f"{plain}{base}" + (f", window {window}" if window else "")


def precisions(document: Document) -> str:
    """tau of one head by the target's precision."""
    trained = document["environment"]["settings"]["trained_on"]
    base = next(row["tau"] for row in document["precisions"] if row["precision"] == trained)
    rows = [{**row, "share": row["tau"] / base} for row in document["precisions"]]
    heads = "target held in | tau | of the first | text as the first's, up to the first difference"
    return Table.of(rows, heads, "{precision} | {tau:.2f} | {share:.2f} | {agrees:.0%}").markdown()


def conversation(document: Document) -> str:
    """Positions computed and the time to the first text, turn by turn, with a `Session` and from scratch."""
    turns = document["conversation"]
    rows = [
        [f"{name}: {words}", *(f"{turn[what][arm]:.0f}" for turn in turns)]
        for what, words in (("prefilled", "prompt positions computed"), ("ms_first", "ms to the first text"))
        for arm, name in (("session", "Session"), ("scratch", "from scratch"))
    ]
    session, scratch = (sum(turn["prefilled"][arm] for turn in turns) for arm in ("session", "scratch"))
    table = Table(["turn", *(str(turn["turn"]) for turn in turns)], rows)
    return f"{table.markdown()}\n\nTogether {session} positions instead of {scratch}; the same text."


def calibration(document: Document) -> str:
    """What a step costs."""
    forward, one = document["forward_ms"], document["forward_ms"]["1"]
    rows = [[title, *(f"{ms / unit:.2f}" for ms in forward.values())] for title, unit in (("ms", 1.0), ("v(n)", one))]
    levels = ", ".join(f"{ms / one:.3f} at width {width}" for width, ms in document["level_ms"].items())
    shape, first, rest = document["shape"], document["first_ms"] / one, document["overhead_ms"] / one
    return (
        f"{Table(['nodes', *forward], rows).markdown()}\n\nFirst draft level, observing included: {first:.3f} of a "
        f"forward; every level more: {levels}; bookkeeping {rest:.3f}. Chosen: depth {shape.get('depth', 0)}, width "
        f"{shape.get('width', 0)}, {document['expected']['nodes']:.1f} nodes on average."
    )


def optimizers(document: Document) -> str:
    """What of a training step goes to the optimiser."""
    table = Table.of(
        document["optimizers"],
        "hidden size | optimiser | positions a batch | model, ms | optimiser, ms | its share | its share, counted",
        "{hidden} | {optimizer} | {batch_tokens} | {model_ms:.0f} | {optimizer_ms:.0f} | {share:.0%} | {counted:.0%}",
    ).markdown()
    words = (
        "A step for one matrix of {shape[0]} x {shape[1]}: {haast_ms:.0f} ms, with `torch.optim.Muon` {torch_ms:.0f}"
    )
    return f"{table}\n\n{fill(words, document['matrix'])} ms." if "matrix" in document else table


# The kind of a document is told by a key that only this kind has.
KINDS: dict[str, Callable[[Document], str]] = {
    "base": ablation, "seconds_to_tau": training, "explained_variance": inputs, "peers": peers, "linears": roofline,
    "contexts": contexts, "oracle": oracle, "baselines": baselines, "lengths": lengths, "forward_ms": calibration,
    "batches": batches, "precisions": precisions, "conversation": conversation, "optimizers": optimizers,
}  # fmt: skip
