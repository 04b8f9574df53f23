"""What a suite run has done so far: a header and one JSON line per answer. Owns the file; runs nothing.

The header fixes commit, sources, machine, settings and prompts. A run that goes on must have the same, since answers of
two machines or two commits are not one measurement. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from haast.bench.decoders import DecoderRun
from haast.bench.runner import Answer, Turn
from haast.engine.engine import Stats

FORMAT = "haast-suite-journal-1"
_FREE = ("environment.command", "environment.date", "environment.load_average")  # may differ when a run goes on
_NAMED = 4  # differences that a refusal spells out


class Journal:
    """The journal of one run. Use `with`.

    Args:
        path: created where missing.
        header: what the run is; JSON values. Of a journal that is there, its own header counts (`header`).
        resume: whether a journal may be there.

    Raises:
        ValueError: on entering, a journal is there and `resume` is not set, it is another run's or damaged, or another
            process writes to it.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self._path, self._resume = path, resume
        self.header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **header}))
        self.answers: dict[Turn, Answer] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        check_absent(self._path, self._resume)
        self._file = self._path.open("ab", buffering=0)
        try:
            self._lock()
            self._read()
        except ValueError:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None, "left without entering"
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Write one answer. Raises ValueError where the disk is full."""
        self._write(_to_json(answer))
        self.answers[answer.turn] = answer

    def _read(self) -> None:
        lines, kept = _whole_lines(self._path)
        if kept < self._path.stat().st_size:
            os.truncate(self._path, kept)
        if not lines:
            self._write(self.header)
            return
        header = lines[0]
        if header.get("format") != FORMAT:
            raise ValueError(f"{self._path} is no journal of {FORMAT}: give another --out")
        others = differing(header, self.header)
        if others:
            words = "; ".join(others[:_NAMED]) + (" ..." if len(others) > _NAMED else "")
            raise ValueError(f"{self._path} is of another run: {words}: run it as it was, or give another --out")
        self.header = header
        for number, line in enumerate(lines[1:], start=2):
            try:
                answer = _from_json(line)
                self.answers[answer.turn] = answer
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self._path}, line {number}: no answer ({error}): give another --out") from error

    def _write(self, value: dict[str, Any]) -> None:
        assert self._file is not None, "the file is open only within `with`"
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError("No space left on device")
        except OSError as error:
            raise ValueError(f"cannot write {self._path} ({error}): free space and go on with --resume") from error

    def _lock(self) -> None:
        assert self._file is not None, "called while entering"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run writes to {self._path}: wait for it, or give another --out") from error
        except OSError:  # a file system without locks
            return


def check_absent(path: Path, resume: bool) -> None:
    """Refuse a journal that is there without being asked for. Raises ValueError."""
    if path.exists() and not resume:
        raise ValueError(f"{path} is there already: go on with --resume, or give another --out")


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two headers differ in, named by the path to it; date, command and load may differ."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    paths = [path for path in {**old, **new} if old.get(path) != new.get(path) and path not in _FREE]
    return [f"{path} was {_short(old.get(path))}, now {_short(new.get(path))}" for path in paths]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _leaves(own, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _short(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}..."


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines and the bytes they take, without a last line that is torn. Raises ValueError for another damage."""
    found, kept = list[dict[str, Any]](), 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it is cut short")
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            if number == len(lines) > 1 or (number == 1 and _begun_header(line)):
                break
            raise ValueError(f"{path}, line {number}: damaged ({error}): give another --out") from error
        found.append(value)
        kept += len(line)
    return found, kept


def _begun_header(line: bytes) -> bool:
    """Whether a kill within the first line left this; another file's text is never cut off."""
    begin = f'{{"format": "{FORMAT}"'.encode()
    return not line.endswith(b"\n") and (line.startswith(begin) or begin.startswith(line))


def _to_json(answer: Answer) -> dict[str, Any]:
    run = answer.run
    return {
        **asdict(answer.turn),
        "tokens": list(run.tokens),
        "ms_prefill": run.ms_prefill,
        "ms_decode": run.ms_decode,
        "stats": None if run.stats is None else asdict(run.stats),
        "peak_rss_mb": answer.peak_rss_mb,
    }


def _from_json(line: dict[str, Any]) -> Answer:
    """Raises KeyError, TypeError or ValueError where the line is no answer that `add` wrote."""
    turn = Turn(**{each.name: line[each.name] for each in fields(Turn)})
    stats = None if line["stats"] is None else Stats(**line["stats"])
    if (stats is None) != (turn.decoder == "hf"):
        raise ValueError("stats belong to every decoder but hf")
    tokens = line["tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int and 0 <= t < 1 << 31 for t in tokens):
        raise ValueError("tokens are no list of ids")
    times = {name: line[name] for name in ("ms_prefill", "ms_decode", "peak_rss_mb")}
    for name, value in (times | ({} if stats is None else asdict(stats))).items():
        listed = name.endswith(("_by_depth", "_by_length"))
        if isinstance(value, list) != listed or not all(map(_is_amount, value if listed else [value])):
            raise ValueError(f"{name}={value!r} is no number from 0 on, or no list of them")
    return Answer(turn, DecoderRun(tuple(tokens), times["ms_prefill"], times["ms_decode"], stats), times["peak_rss_mb"])


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
