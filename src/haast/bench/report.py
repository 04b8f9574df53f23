"""From records to rows, and to what a reader needs to judge them. Owns the JSON schema and the terminal table."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import haast
from haast.bench.runner import BenchPrompt, Difference, Record, Records
from haast.repetition import LOOP_SHARE, NGRAM, loop_share, loops
from haast.stats import TAU_CONVENTION, Stats
from haast.target.target import Target
from haast.tuning.machine import cpu_name

_COUNTS = (
    "accepted_by_depth", "reached_by_depth", "first_choice_by_depth", "forwards_by_length", "decoded_by_length",
    "reached_by_length", "accepted_by_length",
)  # fmt: skip


def build_rows(records: Records, prompts: Sequence[BenchPrompt]) -> list[dict[str, Any]]:
    """One row per decoder. Times are medians over rounds per prompt, summed over prompts; counts are the first round's.

    `tokens_per_s` is decoded tokens over decode time by one rule for all decoders; `whole_call_tokens_per_s` counts
    every token and the prefill. ms_draft, ms_verify, ms_overhead are per decoding step. `peak_rss_mb` is the process's
    peak while that decoder ran, with all decoders' models in memory.
    """
    rows = [_row(name, own, prompts) for name, own in records.items()]
    speeds = {row["decoder"]: row["tokens_per_s"] for row in rows}
    for row in rows:
        for base in ("vanilla", "hf"):
            there = speeds.get(base)
            row[f"speedup_vs_{base}"] = row["tokens_per_s"] / there if there else None
    return rows


def _row(name: str, own: Sequence[Record], prompts: Sequence[BenchPrompt]) -> dict[str, Any]:
    engine = own[0].runs[0].stats is not None
    total = _merged(own)
    straight = [record for record in own if not loops(record.tokens)]
    steps = max(total.target_forwards, 1)
    categories = sorted({prompt.category for prompt in prompts if prompt.category})
    by_category = {
        category: _merged([r for r, p in zip(own, prompts, strict=True) if p.category == category]).tau
        for category in categories
    }
    per_step = {
        part: sum(record.ms_part(part) for record in own) / steps if engine else None
        for part in ("ms_draft", "ms_verify", "ms_overhead")
    }
    return {
        "decoder": name,
        "tokens_per_s": rate(sum(r.decoded for r in own), sum(r.ms_decode for r in own)),
        "whole_call_tokens_per_s": rate(sum(len(r.tokens) for r in own), sum(r.ms_whole for r in own)),
        "tau": total.tau if engine else None,
        "tau_loop_filtered": _merged(straight).tau if engine else None,
        "looping_outputs": len(own) - len(straight),
        "tau_by_category": by_category if engine else {},
        "alpha_by_depth": total.alpha_by_depth,
        "acceptance_by_depth": total.acceptance_by_depth,
        "reached_by_depth": total.reached_by_depth,
        "by_length": total.by_length,
        **per_step,
        "peak_rss_mb": max(record.peak_rss_mb for record in own),
        "tokens": sum(len(record.tokens) for record in own),
        "decoded_tokens": sum(record.decoded for record in own),
        "target_forwards": total.target_forwards if engine else None,
        "nodes_per_forward": total.nodes / steps if engine else None,
        "prompts": len(own),
    }


def _merged(own: Sequence[Record]) -> Stats:
    """The counts of several prompts' first rounds."""
    total = Stats()
    for stats in (record.runs[0].stats for record in own):
        if stats is None:
            continue
        total.decoded_tokens += stats.decoded_tokens
        total.target_forwards += stats.target_forwards
        total.nodes += stats.nodes
        for name in _COUNTS:
            mine, theirs = getattr(total, name), getattr(stats, name)
            mine.extend([0] * (len(theirs) - len(mine)))
            for depth, count in enumerate(theirs):
                mine[depth] += count
    return total


def rate(tokens: int, ms: float) -> float:
    """Tokens a second; 0 where no time was taken."""
    return 1e3 * tokens / ms if ms else 0.0


def describe_differences(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """Differences as JSON; `kind` is tie, bug, or precision (another arithmetic: reported, not judged)."""
    return [
        {
            "prompt": each.prompt,
            "decoder": each.decoder,
            "reference": each.reference,
            "index": each.index,
            "kind": "precision" if each.verdict is None else each.verdict.kind,
            "gap": None if each.verdict is None else each.verdict.gap,
        }
        for each in found
    ]


def per_prompt(records: Records, prompts: Sequence[BenchPrompt]) -> list[dict[str, Any]]:
    """What each decoder did with each prompt."""
    listed = []
    for place, prompt in enumerate(prompts):
        one: dict[str, Any] = {"id": prompt.id, "category": prompt.category, "prompt_tokens": len(prompt.tokens)}
        for name, own in records.items():
            record = own[place]
            stats = record.runs[0].stats
            one[name] = {
                "tokens": len(record.tokens),
                "tokens_per_s": rate(record.decoded, record.ms_decode),
                "tau": None if stats is None else stats.tau,
                "loop_share": loop_share(record.tokens),
            }
        listed.append(one)
    return listed


def environment(
    target: Target, model: str, prompts: Path | None, count: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Where and how the numbers came about; `prompts` is None for Haast's own few."""
    return machine() | {
        "device": str(target.device),
        "model": model,
        "dtype": str(target.dtype).removeprefix("torch."),
        "packing": target.packing,
        "compile": target.compiling,
        "prompts_file": None if prompts is None else str(prompts),
        "prompts_sha256": None if prompts is None else hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "prompts_count": count,
        "settings": settings,
        "tau_convention": TAU_CONVENTION,
        "loop_filter": f"outputs with more than {LOOP_SHARE:.0%} repeated {NGRAM}-grams are left out",
    }


def machine() -> dict[str, Any]:
    """What ran on what, without a target."""
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of what decides speed and results."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "haast": haast.__version__,
    }


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that Haast runs from, and whether the package was changed; None outside a checkout."""
    folder = Path(haast.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a checkout of Haast, not of what contains it
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def sources_sha256() -> str:
    """Of the package's own code: tells two states of a changed checkout apart, and installed copies."""
    folder, digest = Path(haast.__file__).parent, hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in folder.rglob(kind)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def weights_sha256(target: Target) -> str:
    """A fingerprint of a model's weights: names, shapes and up to 4,096 values of every tensor.

    It tells apart models that lie in one place at different times; two that differ in a few values it may not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(target.model.state_dict().items()):
        values = tensor.detach().flatten()
        some = values[:: max(values.numel() // 4096, 1)].contiguous().cpu()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + some.view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """Of the files in a head's folder, so that another head behind the same name is noticed."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def show_table(document: dict[str, Any], console: Console) -> None:
    """The rows of a bench document as a terminal table: the same numbers, rounded."""
    table = Table(title=f"{document['environment']['model']}, {document['environment']['prompts_count']} prompts")
    columns = (
        ("decoder", "decoder", ""),
        ("tokens_per_s", "tokens/s", ".1f"),
        ("speedup_vs_vanilla", "vs vanilla", ".2f"),
        ("speedup_vs_hf", "vs hf", ".2f"),
        ("tau", "tau", ".2f"),
        ("tau_loop_filtered", "tau, no loops", ".2f"),
        ("ms_draft", "ms draft", ".2f"),
        ("ms_verify", "ms verify", ".2f"),
        ("ms_overhead", "ms rest", ".2f"),
        ("peak_rss_mb", "MB", ".0f"),
    )
    for _, title, form in columns:
        table.add_column(title, justify="right" if form else "left")
    for row in document["rows"]:
        table.add_row(*("-" if row[key] is None else format(row[key], form) for key, _, form in columns))
    console.print(table)
    for one in document["rows"]:
        if one["alpha_by_depth"]:
            depths = "  ".join(f"{value:.2f}" for value in one["alpha_by_depth"])
            console.print(f"{one['decoder']}: first draft right, by depth: {depths}", highlight=False)
    for one in document["rows"]:
        if len(one["by_length"]) > 1:
            console.print(f"{one['decoder']}: tau by context: {by_length_words(one['by_length'])}", highlight=False)
    if "v_curve" in document:
        points = "  ".join(f"v({p['nodes']})={p['v']:.2f}" for p in document["v_curve"]["points"])
        console.print(f"{points}  (v(1) = {document['v_curve']['points'][0]['ms']:.1f} ms)", highlight=False)
    for each in document["differences"]:
        console.print("differs: {prompt}, {decoder} from {reference}, token {index}: {kind}".format(**each))


def by_length_words(found: Sequence[dict[str, Any]]) -> str:
    """`Stats.by_length` in a line."""
    return "  ".join(f"{each['begin']:.0f}-{each['end']:.0f}: {each['tau']:.2f}" for each in found)


def stats_document(stats: Stats) -> dict[str, Any]:
    """One run's statistics as JSON."""
    return {
        **asdict(stats),
        "tau": stats.tau,
        "tokens_per_s": stats.tokens_per_s,
        "acceptance_by_depth": stats.acceptance_by_depth,
        "alpha_by_depth": stats.alpha_by_depth,
        "by_length": stats.by_length,
    }
