"""What a suite run has done so far: a header and one JSON line per answer. Owns the file; runs nothing.

The header fixes commit, sources, machine, settings and prompts. A run that goes on must have the same, since answers of
two machines or two commits are not one measurement. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from haast.bench.decoders import DecoderRun
from haast.bench.runner import Turn
from haast.engine.engine import Stats
from haast.jsonl_log import JsonlLog

FORMAT = "haast-suite-journal-1"
JOURNAL = "journal.jsonl"  # its name in a suite's folder
_FREE = ("environment.command", "environment.date", "environment.load_average")  # may differ when a run goes on
_NAMED = 4  # differences that a refusal spells out


class Journal(JsonlLog):
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
        super().__init__(path, f'{{"format": "{FORMAT}"'.encode(), b'{"round": ')
        check_absent(path, resume)
        self.header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **header}))
        self.answers: dict[Turn, DecoderRun] = {}

    def check(self) -> None:
        if not self.values:
            self.add(self.header)
            return
        header, *lines = self.values
        if header.get("format") != FORMAT:
            raise ValueError(f"{self.path} is no journal of {FORMAT}: give another --out")
        others = differing(header, self.header)
        if others:
            words = "; ".join(others[:_NAMED]) + (" ..." if len(others) > _NAMED else "")
            raise ValueError(f"{self.path} is of another run: {words}: run it as it was, or give another --out")
        self.header = header
        for number, line in enumerate(lines, start=2):
            try:
                turn, answer = _from_json(line)
                self.answers[turn] = answer
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path}, line {number}: no answer ({error}): give another --out") from error

    def keep(self, turn: Turn, answer: DecoderRun) -> None:
        """Write one answer. Raises ValueError where the disk is full."""
        self.add(asdict(turn) | asdict(answer))
        self.answers[turn] = answer


def check_absent(path: Path, resume: bool) -> None:
    """Refuse a journal that is there without being asked for. Raises ValueError."""
    if path.exists() and not resume:
        raise ValueError(f"{path} is there already: go on with --resume, or give another --out")


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two headers differ in, named by the path to it; date, command and load may differ."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    paths = [path for path in {**old, **new} if old.get(path) != new.get(path) and path not in _FREE]
    return [f"{path} was {short(old.get(path))}, now {short(new.get(path))}" for path in paths]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _leaves(own, f"{path}.{key}" if path else key)
    else:
        yield path, value


def short(value: Any) -> str:
    """A JSON value in a message, cut where it is long."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}..."


def _from_json(line: dict[str, Any]) -> tuple[Turn, DecoderRun]:
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
    return turn, DecoderRun(tuple(tokens), stats=stats, **times)


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
