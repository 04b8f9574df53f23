"""Atomic file writes: results, checkpoints and caches are written to a temporary file that then replaces the target."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haast.errors import expanded


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` to write to. It replaces `path` when the block ends, and is deleted on errors."""
    path = path.resolve()  # replace the file that a link points to, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers create files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Raise ValueError if `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: give another folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` to fill. It becomes `path` when the block ends, and is deleted on errors.

    Raises ValueError if `path` exists and is not an empty folder, or can't be created.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        check_new_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()  # it was empty
        temporary.rename(path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}): choose another place or free space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically; "-" is stdout, a pipe or device is written directly. Raises ValueError on failure."""
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    path = expanded(path, "cannot write")
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
            return
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}): choose another place or free space") from error


def write_json(document: Any, path: str | Path | None, indent: int = 2) -> None:
    """Write a result as JSON to `path`; "-" is stdout, None does nothing. Raises ValueError on failure."""
    if path is not None:
        write_text(path, json.dumps(document, indent=indent, ensure_ascii=False) + "\n")


def check_writable(path: str | None) -> None:
    """Check before any work that a result file can be written. None and "-" (stdout) always can.

    Raises:
        ValueError: the folder is missing or read-only, or the path is a folder.
    """
    if path is None or path == "-":
        return
    file = expanded(path, "cannot write")
    if _is_special(file):
        return
    if file.is_dir():
        raise ValueError(f"cannot write {file}: it is a folder; give the path of a file")
    try:
        descriptor, probe = tempfile.mkstemp(dir=file.parent, prefix=".haast-")
        os.close(descriptor)
        Path(probe).unlink()
    except OSError as error:
        raise ValueError(f"cannot write {file} ({error.strerror}): choose another path or create the folder") from error


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, which is written directly and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()
