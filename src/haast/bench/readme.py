"""The numbers of the README and of docs/, from the JSON files in `results/` and nothing else.

Owns the text between `<!-- results:NAME -->` (or NAME+NAME: one table of tau; NAME#short: a suite's one table) and
`<!-- end -->`: a table of decoders,
of an ablation, of a training run, of the input study or of a measurement of speed, by what the JSON holds.
`python -m haast.bench.readme` rewrites it; a test keeps the two equal.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from haast.bench import suite_tables, tables

_BLOCK = re.compile(r"(<!-- results:(?P<name>[a-z0-9+-]+)(?P<short>#short)? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def render(readme: str, results: Path) -> str:
    """Replace every results block by what its JSON says.

    Raises:
        ValueError: a block names a file that is not there.
    """

    def block(match: re.Match[str]) -> str:
        documents = {f"{name}.json": _read(results / f"{name}.json") for name in match["name"].split("+")}
        if len(documents) > 1:
            table = _answers if all("added" in document for document in documents.values()) else _tau_table
            return match[1] + table(documents) + match["end"]
        ((name, document),) = documents.items()
        if match["short"]:
            return match[1] + suite_tables.short(document, f"results/{name}") + match["end"]
        return match[1] + _table(document, name) + match["end"]

    return _BLOCK.sub(block, readme)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"a page names {path.name}, which is not in {path.parent}: run the bench that writes it")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _table(document: dict[str, Any], name: str) -> str:
    if "ratios" in document:  # a suite
        return suite_tables.tables(document) + "\n\n" + suite_tables.sources(document, f"results/{name}") + "\n"
    kinds = (
        ("base", _ablation),
        ("seconds_to_tau", _training),
        ("explained_variance", _inputs),
        ("peers", tables.peers),
        ("linears", tables.roofline),
        ("contexts", tables.contexts),
        ("oracle", tables.oracle),
        ("baselines", tables.baselines),
        ("lengths", tables.lengths),
        ("forward_ms", tables.calibration),
        ("batches", tables.batches),
        ("precisions", tables.precisions),
        ("conversation", tables.conversation),
        ("optimizers", tables.optimizers),
    )
    for key, table in kinds:
        if key in document:
            return table(document) + "\n" + _provenance(document["environment"], name) + "\n"
    if not any(row["decoder"] == "vanilla" for row in document["rows"]):  # no denominator: a run for tau alone
        return _tau_table({name: document})
    lines = [
        "| decoder | nodes | tokens/s | vs vanilla | vs stock `generate` | tau | tau without loops | first right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row, document["environment"]["settings"]) for row in document["rows"]]
    return "\n".join(lines) + "\n\n" + _provenance(document["environment"], name) + "\n"


def _ablation(document: dict[str, Any]) -> str:
    """tau as measured; the speed-up is predicted from it, since a row's own times carry the machine's noise of minutes.

    Rows with heads of one size share the median of their c, and all rows the median of v(6) and o.
    """
    rows = [row["small"] for row in document["rows"]]
    v, o = median(row["v"] for row in rows), median(row["o"] for row in rows)
    sizes = [(row["parameters"], str(row["settings"].get("draft_vocab"))) for row in document["rows"]]
    shared = {
        size: median(row["c"] for row, own in zip(rows, sizes, strict=True) if own == size) for size in set(sizes)
    }
    predicted = [row["tau"] / (v + row["depth"] * shared[size] + o) for row, size in zip(rows, sizes, strict=True)]
    lines = [
        "| row | views/s | views | held-out CE | tau, 6 nodes | tau, 60 nodes | c | predicted speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, size, speedup in zip(document["rows"], sizes, predicted, strict=True):
        speed = f"**{speedup:.2f}x**" if speedup == max(predicted) else f"{speedup:.2f}x"
        lines.append(
            f"| {row['row']} | {row['views_per_s']:.0f} | {row['views'] / 1e3:.0f}k | {row['valid_ce']:.3f} | "
            f"{row['small']['tau']:.3f} | {row['large']['tau']:.3f} | {shared[size]:.3f} | {speed} |"
        )
    return "\n".join(lines) + "\n"


def _training(document: dict[str, Any]) -> str:
    lines = [
        "| views | minutes | held-out CE | agreement, by own states read | tau |",
        "|---|---|---|---|---|",
    ]
    for line in document["metrics"]:
        alphas = " ".join(f"{value:.2f}" for value in line["valid_alpha"])
        lines.append(
            f"| {line['views'] / 1e6:.2f} M | {line['seconds'] / 60:.1f} | {line['valid_ce']:.3f} | {alphas} | "
            f"{line['tau']:.3f} |"
        )
    reached = ", ".join(f"{tau} in {seconds / 60:.0f} min" for tau, seconds in document["seconds_to_tau"].items())
    return "\n".join(lines) + f"\n\nFirst evaluation with a tau of at least: {reached}. Peak memory {_gb(document)}.\n"


def _answers(documents: dict[str, dict[str, Any]]) -> str:
    lines = ["| answers | tokens/s, loading included | peak memory |", "|---|---|---|"]
    sources = []
    for name, document in documents.items():
        where = document["environment"]
        lines.append(f"| {document['added']} | {document['tokens_per_s']:.0f} | {_gb(document)} |")
        sources.append(f"`results/{name}`: `{where['command']}`; commit {where['commit']['hash'][:12]}.")
    return "\n".join(lines) + "\n\n" + "\n".join(sources) + "\n"


def _gb(document: dict[str, Any]) -> str:
    return f"{document['peak_rss_mb'] / 1e3:.1f} GB"


def _inputs(document: dict[str, Any]) -> str:
    lines = [
        "| a pair holds | 0-alpha | 1-alpha | 2-alpha | 3-alpha | 4-alpha | tau |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["inputs"]:
        alphas = " | ".join(f"{value:.2f}" for value in row["valid_alpha"])
        lines.append(f"| {row['inputs']} | {alphas} | {row['tau']:.2f} |")
    pasts = list(next(iter(document["explained_variance"].values())))
    lines += ["", "| predicted from the past | " + " | ".join(f"{p} back" for p in pasts) + " |"]
    lines.append("|---|" + "---|" * len(pasts))
    for name, values in document["explained_variance"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.0%}" for value in values.values()) + " |")
    return "\n".join(lines) + "\n"


def _tau_table(documents: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| prompts | temperature | nodes | tau | tau without loops | first draft right, by depth |",
        "|---|---|---|---|---|---|",
    ]
    sources = []
    for name, document in documents.items():
        where = document["environment"]
        settings, prompts = where["settings"], Path(where["prompts_file"]).stem
        for row in document["rows"]:
            alpha = " ".join(f"{value:.2f}" for value in row["alpha_by_depth"])
            looped = f"{row['tau_loop_filtered']:.2f} ({row['prompts'] - row['looping_outputs']} prompts)"
            lines.append(
                f"| {prompts} ({row['prompts']}) | {settings['sampling']['temperature']:g} | "
                f"{settings['shape']['nodes']} | {row['tau']:.2f} | {looped} | {alpha} |"
            )
        sources.append(_provenance(where, name))
    return "\n".join(lines) + "\n\n" + "\n".join(sources) + "\n"


def _nodes(row: dict[str, Any], settings: dict[str, Any]) -> str:
    """How large the trees were: one size, or the mean where a pace decides."""
    mean = row.get("nodes_per_forward")
    if mean is not None:
        return f"{mean:.1f}" if mean != round(mean) else f"{mean:.0f}"
    if row["decoder"] != "eagle" or settings["shape"] is None:
        return ""
    most = str(settings["shape"]["nodes"])
    return most if settings.get("pace") is None else f"up to {most}"


def _line(row: dict[str, Any], settings: dict[str, Any]) -> str:
    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    alpha = row["alpha_by_depth"][0] if row["alpha_by_depth"] else None
    cells = (
        row["decoder"],
        _nodes(row, settings),
        f"{row['tokens_per_s']:.1f}",
        times(row["speedup_vs_vanilla"]),
        times(row["speedup_vs_hf"]),
        number(row["tau"]),
        number(row["tau_loop_filtered"]),
        number(alpha),
    )
    return "| " + " | ".join(cells) + " |"


def _provenance(environment: dict[str, Any], name: str) -> str:
    versions, commit = environment["versions"], environment["commit"]
    return (
        f"`results/{name}`: `{environment['command']}`; {environment['cpu']}, {environment['threads']} threads, "
        f"{environment['dtype']}, packing {environment['packing']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {commit['hash'][:12]}."
    )


def main() -> None:
    """Rewrite README.md and docs/ in the current folder from results/."""
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = render(old, Path("results"))
        path.write_text(new, encoding="utf-8")
        sys.stdout.write(f"{path} {'is up to date' if old == new else 'rewritten'}\n")


if __name__ == "__main__":
    main()
