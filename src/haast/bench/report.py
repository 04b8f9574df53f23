"""What a reader needs to judge numbers: where they come from, and fingerprints. Owns the terminal table of a bench."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import haast
from haast.bench.tables import formatted
from haast.repetition import LOOP_SHARE, NGRAM
from haast.stats import TAU_CONVENTION, Stats
from haast.target.target import Target
from haast.tuning.machine import cpu_name


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
        "prompts_sha256": None if prompts is None else file_sha256(prompts),
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
    named = {"torch": str(torch.__version__), "transformers": transformers.__version__, "haast": haast.__version__}
    return {"python": platform.python_version(), **named}


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
    return folder_sha256(Path(haast.__file__).parent, "*.py", "*.cpp", "*.h")


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_sha256(folder: Path, *kinds: str) -> str:
    """Of the files in a folder (a head's, say), or of those of some kinds below it; another content is noticed."""
    found = {path for kind in kinds for path in folder.rglob(kind)} if kinds else set(folder.iterdir())
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.is_file()):
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


def show_table(document: Mapping[str, Any], console: Console) -> None:
    """The rows of a bench document as a terminal table: the same numbers, rounded."""
    columns = {
        "tokens_per_s": ("tokens/s", ".1f"), "speedup_vs_vanilla": ("vs vanilla", ".2f"),
        "speedup_vs_hf": ("vs hf", ".2f"), "tau": ("tau", ".2f"), "tau_loop_filtered": ("tau, no loops", ".2f"),
        "ms_draft": ("ms draft", ".2f"), "ms_verify": ("ms verify", ".2f"), "ms_overhead": ("ms rest", ".2f"),
        "peak_rss_mb": ("MB", ".0f"),
    }  # fmt: skip
    table = Table(title=f"{document['environment']['model']}, {document['environment']['prompts_count']} prompts")
    table.add_column("decoder")
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for row in document["rows"]:
        table.add_row(row["decoder"], *(formatted(row[key], form) or "-" for key, (_, form) in columns.items()))
    console.print(table)
    for one in document["rows"]:
        if one["alpha_by_depth"]:
            depths = "  ".join(f"{value:.2f}" for value in one["alpha_by_depth"])
            console.print(f"{one['decoder']}: first draft right, by depth: {depths}", highlight=False)
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
