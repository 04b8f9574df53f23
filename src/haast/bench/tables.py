"""Tables of the measurements of speed, as Markdown, for `readme`. Each takes the JSON's document; none computes."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]


def peers(document: Document) -> str:
    """Haast and others on the same prompts and weights."""
    rows = document["rows"]
    speeds = {row["peer"]: row["tokens_per_s"] for row in rows if not row["absent"]}
    stock, vanilla = speeds.get("transformers fp32"), speeds.get("haast vanilla")
    lines = [
        "| decoder | tokens/s | vs stock `generate` fp32 | vs Haast vanilla | texts equal to fp32 |",
        "|---|---|---|---|---|",
    ]
    present = sorted((row for row in rows if not row["absent"]), key=lambda row: -row["tokens_per_s"])
    for row in present:
        speed = row["tokens_per_s"]
        cells = [_times(speed, stock), _times(speed, vanilla), str(row.get("texts equal to transformers fp32", ""))]
        lines.append(f"| {row['peer']} | {speed:.1f} | " + " | ".join(cells) + " |")
    absent = [f"{row['peer']} ({row['absent']})" for row in rows if row["absent"]]
    listed = sorted(document["environment"]["peer_versions"].items())
    versions = ", ".join(f"{name} {version}" for name, version in listed)
    end = f"\n\nVersions: {versions}." + (f" Not there: {'; '.join(absent)}." if absent else "")
    return "\n".join(lines) + end + "\n"


def _times(speed: float, base: float | None) -> str:
    return f"{speed / base:.2f}x" if base else ""


def roofline(document: Document) -> str:
    """Linear layers by rows against what the machine can do at most."""
    lines = ["| rows | ms | roofline ms | times the roofline |", "|---|---|---|---|"]
    lines += [
        f"| {p['rows']} | {p['ms']:.2f} | {p['roofline_ms']:.2f} | {p['times']:.2f} |" for p in document["linears"]
    ]
    return (
        "\n".join(lines)
        + f"\n\nRoofline: {document['bandwidth'] / 1e9:.1f} GB/s read, {document['peak'] / 1e9:.0f} GFLOP/s, "
        + f"{document['weight_bytes'] / 1e6:.0f} MB of weights.\n"
    )


def contexts(document: Document) -> str:
    """Tokens a second by context."""
    lines = [
        "| context | vanilla tokens/s | EAGLE tokens/s | tau | ms a vanilla forward | least for keys and values |",
        "|---|---|---|---|---|---|",
    ]
    for each in document["contexts"]:
        lines.append(
            f"| {each['context']} | {each['vanilla_tokens_per_s']:.1f} | {each['eagle_tokens_per_s']:.1f} | "
            f"{each['eagle_tau']:.2f} | {each['vanilla_ms_verify']:.2f} | {each['kv_read_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def oracle(document: Document) -> str:
    """Speed-up over the chance that a draft is right."""
    chances = sorted({point["chance"] for point in document["oracle"]})
    lines = ["| chain | " + " | ".join(f"{chance:g}" for chance in chances) + " |", "|---|" + "---|" * len(chances)]
    for depth in sorted({point["depth"] for point in document["oracle"]}):
        points = {p["chance"]: p for p in document["oracle"] if p["depth"] == depth}
        cells = [f"{points[c]['speedup']:.2f}x (tau {points[c]['tau']:.2f})" for c in chances]
        lines.append(f"| {depth} drafts | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def baselines(document: Document) -> str:
    """Settings of decoders without an EAGLE head, fastest first within a family; the best of each in bold."""
    lines = ["| decoder | setting | tokens/s | vs vanilla | tau |", "|---|---|---|---|---|"]
    for family, best in document["best"].items():
        points = [point for point in document["baselines"] if point["family"] == family]
        for point in sorted(points, key=lambda each: -each["tokens_per_s"]):
            words = ", ".join(f"{name} {value}" for name, value in point["settings"].items())
            words = f"**{words}**" if point["settings"] == best else words
            numbers = f"{point['tokens_per_s']:.1f} | {point['speedup_vs_vanilla']:.2f}x | {point['tau']:.2f}"
            lines.append(f"| {family} | {words} | {numbers} |")
    return "\n".join(lines) + "\n"


def batches(document: Document) -> str:
    """Tokens a second of all rows together, by batch size."""
    sizes = sorted({point["batch"] for point in document["batches"]})
    lines = ["| decoder | " + " | ".join(f"batch {size}" for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
    points = {(p["decoder"], p["batch"]): p for p in document["batches"]}
    for name in dict.fromkeys(p["decoder"] for p in document["batches"]):
        own = [points[name, size] for size in sizes]
        base = [points["vanilla", size]["tokens_per_s"] for size in sizes]
        cells = [f"{p['tokens_per_s']:.0f} ({p['tokens_per_s'] / one:.2f}x)" for p, one in zip(own, base, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if name == "eagle, as pays":
            details = (f"tau {p['tau']:.2f}, {p['undrafted']:.0%}" for p in own)
            lines.append("| its tau, and steps without a draft | " + " | ".join(details) + " |")
    return "\n".join(lines) + "\n"


def lengths(document: Document) -> str:
    """tau, speed and the prompt's time by the prompt's length; memory at one length."""
    points = {(each["decoder"], each["length"]): each for each in document["lengths"] if not each["memory_alone"]}
    names, sizes = (list(dict.fromkeys(key[i] for key in points)) for i in (0, 1))
    parts = []
    for title, key, scale, form in (
        ("tau", "tau", 1.0, ".2f"), ("tokens/s", "tokens_per_s", 1.0, ".1f"), ("prompt, s", "prefill_ms", 1e-3, ".1f"),
    ):  # fmt: skip
        lines = [f"| {title} | " + " | ".join(f"{n} tokens" for n in sizes) + " |", "|---|" + "---|" * len(sizes)]
        for name in names:
            cells = [format(points[name, size][key] * scale, form) for size in sizes]
            lines.append(f"| {_windowed(name)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    memory = document["memory"]
    peaks = {each["decoder"]: each["peak_rss_mb"] for each in document["lengths"] if each["length"] == memory["length"]}
    lines = [f"| peak memory, {memory['length']} tokens | MB | times vanilla |", "|---|---|---|"]
    for name, times in memory["times_vanilla"].items():
        lines.append(f"| {_windowed(name)} | {peaks[name]:.0f} | {times:.2f} |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _windowed(name: str) -> str:
    """A decoder of benchmarks/long_context.py in words."""
    plain = "plain modules: " if name.startswith("plain-") else ""
    base, _, window = name.removeprefix("plain-").partition("-")
    base = "stock `generate`" if base == "hf" else base
    return f"{plain}{base}" + (f", window {window}" if window else "")


def precisions(document: Document) -> str:
    """tau of one head by the target's precision."""
    rows = document["precisions"]
    trained = document["environment"]["settings"]["trained_on"]
    base = next(row["tau"] for row in rows if row["precision"] == trained)
    lines = [
        "| target held in | tau | of the first | text as the first's, up to the first difference |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['precision']} | {row['tau']:.2f} | {row['tau'] / base:.2f} | {row['agrees']:.0%} |")
    return "\n".join(lines) + "\n"


def conversation(document: Document) -> str:
    """Positions computed and the time to the first text, turn by turn, with a `Session` and from scratch."""
    turns = document["conversation"]
    lines = ["| turn | " + " | ".join(str(turn["turn"]) for turn in turns) + " |", "|---|" + "---|" * len(turns)]
    for what, words in (("prefilled", "prompt positions computed"), ("ms_first", "ms to the first text")):
        for arm, name in (("session", "Session"), ("scratch", "from scratch")):
            cells = " | ".join(f"{turn[what][arm]:.0f}" for turn in turns)
            lines.append(f"| {name}: {words} | {cells} |")
    both = {arm: sum(turn["prefilled"][arm] for turn in turns) for arm in ("session", "scratch")}
    return "\n".join(lines) + f"\n\nTogether {both['session']} positions instead of {both['scratch']}; the same text.\n"


def calibration(document: Document) -> str:
    """What a step costs."""
    one = document["forward_ms"]["1"]
    nodes = document["forward_ms"]
    lines = ["| nodes | " + " | ".join(nodes) + " |", "|---|" + "---|" * len(nodes)]
    lines.append("| ms | " + " | ".join(f"{ms:.2f}" for ms in nodes.values()) + " |")
    lines.append("| v(n) | " + " | ".join(f"{ms / one:.2f}" for ms in nodes.values()) + " |")
    levels = ", ".join(f"{ms / one:.3f} at width {width}" for width, ms in document["level_ms"].items())
    shape, expected = document["shape"], document["expected"]
    first, rest = document["first_ms"] / one, document["overhead_ms"] / one
    return (
        "\n".join(lines)
        + f"\n\nFirst draft level, observing included: {first:.3f} of a forward; every level more: {levels}; "
        + f"bookkeeping {rest:.3f}. Chosen: depth {shape.get('depth', 0)}, width {shape.get('width', 0)}, "
        + f"{expected['nodes']:.1f} "
        + "nodes on average.\n"
    )


def optimizers(document: Document) -> str:
    """What of a training step goes to the optimiser."""
    lines = [
        "| hidden size | optimiser | positions a batch | model, ms | optimiser, ms | its share | its share, counted |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['hidden']} | {row['optimizer']} | {row['batch_tokens']} | {row['model_ms']:.0f} | "
        f"{row['optimizer_ms']:.0f} | {row['share']:.0%} | {row['counted']:.0%} |"
        for row in document["optimizers"]
    ]
    one = document.get("matrix")
    if one is None:
        return "\n".join(lines) + "\n"
    rows, columns = one["shape"]
    return "\n".join(lines) + (
        f"\n\nA step for one matrix of {rows} x {columns}: {one['haast_ms']:.0f} ms, with `torch.optim.Muon` "
        f"{one['torch_ms']:.0f} ms.\n"
    )
