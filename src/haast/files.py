"""Files that are whole or not there: every result, checkpoint and cache of Haast is written behind a rename."""

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
    """A place beside `path` to write to; it becomes `path` when the block ends, and goes away where it fails."""
    path = path.resolve()  # the file behind a link, not the link, is replaced
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers make files for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Refuse a place for a new folder where something is already; an empty folder is none. Raises ValueError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: give another folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it becomes `path` when the block ends, and goes away where it fails.

    Raises ValueError where `path` holds something already, or can't be made.
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
    """Write a whole file, or to stdout for "-"; a pipe or a device is written to as it is.

    Raises ValueError where it can't be.
    """
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
    """Write a result to `path`, or to stdout for "-"; None does nothing. Raises ValueError where it can't be."""
    if path is not None:
        write_text(path, json.dumps(document, indent=indent, ensure_ascii=False) + "\n")


def check_writable(path: str | None) -> None:
    """Refuse a result file that cannot be written, before any work. None and "-" (stdout) always can.

    Raises:
        ValueError: the folder is missing or read-only, or the path is a folder.
    """
    if path is None or path == "-":
        return
    file = expanded(path, "cannot write")
    if _is_special(file):
        return
    if file.is_dir():
        raise ValueError(f"cannot write {file}: it is a folder; give a file name in it")
    try:
        descriptor, probe = tempfile.mkstemp(dir=file.parent, prefix=".haast-")
        os.close(descriptor)
        Path(probe).unlink()
    except OSError as error:
        raise ValueError(f"cannot write {file} ({error.strerror}): choose another place or make the folder") from error


def _is_special(path: Path) -> bool:
    """A pipe or a device, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()
