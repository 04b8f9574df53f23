"""JSON-lines log that survives kills: one writer at a time, one synced line per value, repaired on opening.

Owns the file, its lock and the repair: an incomplete last line is removed. Knows nothing of the values.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any, Self


class JsonlLog:
    """A log that one run appends to. Use as a context manager; entering reads the existing lines into `values`.

    Args:
        path: created if missing.
        begins: bytes that lines start with. Only an incomplete last line that starts so, or zeros, may be removed.
        remedy: what to do if the file is in use or is not such a log; ends the error's message.
        synced: whether each value is on the disk when `add` returns; otherwise a power failure may lose the last ones.

    Raises:
        ValueError: on entering, another run writes to the file, or a line is not a JSON object.
    """

    def __init__(self, path: Path, *begins: bytes, remedy: str = "give another --out", synced: bool = True) -> None:
        self.path, self._begins, self._remedy, self._synced = path, begins, remedy, synced
        self._file: IO[bytes] | None = None
        self.values: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        try:
            _lock(self._file, self.path, self._remedy)
            self.values = read_repaired(self.path, *self._begins, remedy=self._remedy)
            self.check()
        except ValueError:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None, "left without entering"
        self._file.close()

    def check(self) -> None:
        """Overridden by subclasses: raises ValueError if `values` must not be continued."""

    def add(self, value: dict[str, Any]) -> None:
        """Append one value. Raises ValueError if the disk is full."""
        assert self._file is not None, "the file is open only within `with`"
        append(self._file, value, self.path, self._synced)


def append(file: IO[bytes], value: dict[str, Any], path: Path, synced: bool = True) -> None:
    """Append one line in a single write, and sync it if `synced`. Raises ValueError if the disk is full."""
    try:
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if synced:
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}): free disk space and run again; finished answers are kept"
        ) from error


def read_repaired(path: Path, *begins: bytes, remedy: str = "give another --out") -> list[dict[str, Any]]:
    """The values of an interrupted run's log; removes an incomplete last line from the file.

    Removes only what a kill or a power failure leaves: a tail without newline that starts like a line, or zeros.

    Raises:
        ValueError: a line is not a JSON object (the message has its number); the file is not changed.
    """
    content, kept, values = path.read_bytes(), 0, []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        torn = not line.endswith(b"\n") and any(each.startswith(line[: len(each)]) for each in begins)
        if torn or (number > 1 and not content[kept:].strip(b"\0\n")):
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): correct or remove the line") from error
        if not isinstance(value, dict) or not line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: not a line of such a log: {remedy}")
        values.append(value)
        kept += len(line)
    if kept < len(content):
        os.truncate(path, kept)
    return values


def _lock(file: IO[bytes], path: Path, remedy: str) -> None:
    """Lock the file until it is closed, also by a kill. Two runs with one file would answer the same prompts twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {path}: wait for it, or {remedy}") from error
    except OSError:  # a file system without locks
        return
