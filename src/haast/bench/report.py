"""Provenance of results: machine, versions, commit, settings, and hashes of prompts, weights and sources."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import haast
from haast.device import cpu_name
from haast.stats import LOOP_SHARE, NGRAM, TAU_CONVENTION, Stats
from haast.target.target import Target


def environment(
    target: Target, model: str, prompts: Path | None, count: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The environment entry of a result: machine, model and settings; `prompts` is None for the built-in prompts."""
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
    """The part of the environment that needs no target: CPU, load, versions, commit, command, date."""
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
    """Versions of the packages that affect speed or results, and of Python."""
    packages = {"torch": str(torch.__version__), "transformers": transformers.__version__, "haast": haast.__version__}
    return {"python": platform.python_version(), **packages}


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that Haast runs from, and whether the package has changes; None outside a checkout."""
    folder = Path(haast.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails in a repository that only contains the installation
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def sources_sha256() -> str:
    """Hash of the package's code, which tells apart two states of a checkout with changes, or two installed copies."""
    return folder_sha256(Path(haast.__file__).parent, "*.py", "*.cpp", "*.h")


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_sha256(folder: Path, *patterns: str) -> str:
    """Hash of names and contents of the files in a folder, or of all files below it that match a pattern."""
    matched = {path for pattern in patterns for path in folder.rglob(pattern)} if patterns else set(folder.iterdir())
    digest = hashlib.sha256()
    for path in sorted(path for path in matched if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def weights_sha256(target: Target) -> str:
    """Hash of a model's weights: names, shapes and up to 4,096 values of every tensor.

    Detects that another model was saved under the same path. May miss a change of a few values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(target.model.state_dict().items()):
        values = tensor.detach().flatten()
        sampled = values[:: max(values.numel() // 4096, 1)].contiguous().cpu()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + sampled.view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def stats_document(stats: Stats) -> dict[str, Any]:
    """The statistics of one run as JSON values, derived ones included."""
    derived = ("tau", "tokens_per_s", "acceptance_by_depth", "alpha_by_depth", "by_length")
    return {**asdict(stats), **{name: getattr(stats, name) for name in derived}}
