"""Checkpoints of a training run: written atomically, the newest two kept. Owns the files, not what is in them."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from haast.files import replacing

_KEEP = 2


def write_probe(folder: Path) -> None:
    """Create `folder` and check that files can be written there, before a long run starts.

    Raises:
        ValueError: the folder is read-only or the disk is full.
    """
    probe = folder / ".haast-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another folder or free space") from error


def atomic_save(state: dict[str, Any], path: Path) -> None:
    """`torch.save` to a temporary file, then a rename: a kill or a full disk leaves the old file intact.

    Raises:
        ValueError: the disk is full or the folder read-only.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise ValueError(
            f"cannot write checkpoint {path} ({error}): free space; the run resumes from the previous checkpoint"
        ) from error


def save_state(folder: Path, state: dict[str, Any], step: int) -> None:
    """Write `state-<step>.pt`, and delete all but the newest two."""
    atomic_save(state, folder / f"state-{step:08d}.pt")
    incomplete = folder.glob(".*.tmp")  # from a run that was killed while writing
    for old in [*sorted(folder.glob("state-*.pt"))[:-_KEEP], *incomplete]:
        old.unlink()


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; None if there is none.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    paths = sorted(folder.glob("state-*.pt"), reverse=True)
    for path in paths:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, UnpicklingError):
            continue
        if "config" in state and "progress" in state:
            return state
    if paths:
        raise ValueError(f"none of the checkpoints in {folder} can be read: delete them and start again")
    return None


def check_out(out: Path, new_run: bool, main: bool = True) -> None:
    """Raise ValueError if the main process cannot write to `out`, or if `out` has another run."""
    if main:
        write_probe(out)
    if new_run and any(out.glob("state-*.pt")):
        raise ValueError(f"{out} has a training run: continue it with --resume, or choose another folder")
