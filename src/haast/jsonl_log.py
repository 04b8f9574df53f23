"""A log of JSON lines that survives kills: one writer at a time, one synced line per value, a torn last line cut off.

Owns the file, its lock and the mending. Knows nothing of the values.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any, Self


class JsonlLog:
    """A log that one run appends to. Use `with`; entering reads what is there into `values`.

    Args:
        path: created where missing.
        begins: what lines begin with. Only a last line that begins so, or that is zeros, may be cut off as torn.

    Raises:
        ValueError: on entering, another run writes to the file, or a line is no JSON object.
    """

    def __init__(self, path: Path, *begins: bytes) -> None:
        self.path, self._begins = path, begins
        self._file: IO[bytes] | None = None
        self.values: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        try:
            _lock(self._file, self.path)
            self.values = mended(self.path, *self._begins)
            self.check()
        except ValueError:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None, "left without entering"
        self._file.close()

    def check(self) -> None:
        """Whether `values` may be added to; a kind of log raises ValueError where they may not."""

    def add(self, value: dict[str, Any]) -> None:
        """Append one value. Raises ValueError where the disk is full."""
        assert self._file is not None, "the file is open only within `with`"
        append(self._file, value, self.path)


def append(file: IO[bytes], value: dict[str, Any], path: Path) -> None:
    """One line, written in one call and synced. Raises ValueError where the disk is full."""
    try:
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}): free space and run again, finished answers are kept"
        ) from error


def mended(path: Path, *begins: bytes) -> list[dict[str, Any]]:
    """The values of an interrupted run's log, whose torn last line is cut off the file.

    Only what a kill or a power cut leaves is cut: a tail without its newline that begins as a line does, or zeros.

    Raises:
        ValueError: a line is no JSON object (the message has its number); the file is left as it is.
    """
    content, kept, values = path.read_bytes(), 0, []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        torn = not line.endswith(b"\n") and any(each.startswith(line[: len(each)]) for each in begins)
        if torn or (number > 1 and not content[kept:].strip(b"\0\n")):
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): mend or remove the line") from error
        if not isinstance(value, dict) or not line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: not one of this file's: is it another's? Give another --out")
        values.append(value)
        kept += len(line)
    if kept < len(content):
        os.truncate(path, kept)
    return values


def _lock(file: IO[bytes], path: Path) -> None:
    """Held until the file is closed, also by a kill. Two runs on one file would answer the same prompts twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {path}: wait for it, or give another --out") from error
    except OSError:  # a file system without locks
        return
