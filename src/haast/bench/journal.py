"""Journal of a suite run: a header and one JSON line per answer, so that a stopped run can be resumed.

Owns the file and its checks; runs nothing. The header holds commit, sources, machine, settings and prompts. A resumed
run must match it, because answers of two machines or commits are not one measurement. An incomplete last line, left by
a kill, is dropped.
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
JOURNAL = "journal.jsonl"  # file name in the folder of a suite run
_MAY_DIFFER = ("environment.command", "environment.date", "environment.load_average")  # when a run is resumed
_LISTED = 4  # differences that an error message names


class Journal(JsonlLog):
    """The journal of one run. Use `with`.

    Args:
        path: created if missing.
        header: describes the run, in JSON values. `self.header` is that of an existing journal, if there is one.
        resume: whether the journal may exist already.

    Raises:
        ValueError: the journal exists and `resume` is not set; on entering, it belongs to another run, is damaged, or
            another process writes to it.
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
            raise ValueError(f"{self.path} is not a journal of format {FORMAT}: give another --out")
        others = differing(header, self.header)
        if others:
            words = "; ".join(others[:_LISTED]) + (" ..." if len(others) > _LISTED else "")
            raise ValueError(
                f"{self.path} belongs to another run ({words}): repeat the settings of that run, or give another --out"
            )
        self.header = header
        for number, line in enumerate(lines, start=2):
            try:
                turn, answer = _from_json(line)
                self.answers[turn] = answer
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is not an answer ({error}): give another --out"
                ) from error

    def keep(self, turn: Turn, answer: DecoderRun) -> None:
        """Write one answer. Raises ValueError if it cannot be written, as on a full disk."""
        self.add(asdict(turn) | asdict(answer))
        self.answers[turn] = answer


def check_absent(path: Path, resume: bool) -> None:
    """Raise ValueError if the journal exists and the run is not a resumed one."""
    if path.exists() and not resume:
        raise ValueError(f"{path} already exists: continue it with --resume, or give another --out")


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Sentences on the values in which two headers differ, by path; date, command and load may differ."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    paths = [path for path in {**old, **new} if old.get(path) != new.get(path) and path not in _MAY_DIFFER]
    return [f"{path} was {short(old.get(path))}, now {short(new.get(path))}" for path in paths]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _leaves(own, f"{path}.{key}" if path else key)
    else:
        yield path, value


def short(value: Any) -> str:
    """A JSON value for a message, cut if it is long."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}..."


def _from_json(line: dict[str, Any]) -> tuple[Turn, DecoderRun]:
    """Raises KeyError, TypeError or ValueError if the line is not an answer that `keep` wrote."""
    turn = Turn(**{each.name: line[each.name] for each in fields(Turn)})
    stats = None if line["stats"] is None else Stats(**line["stats"])
    if (stats is None) != (turn.decoder == "hf"):
        raise ValueError("every decoder but hf has stats")
    tokens = line["tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int and 0 <= t < 1 << 31 for t in tokens):
        raise ValueError("tokens is not a list of token ids")
    times = {name: line[name] for name in ("ms_prefill", "ms_decode", "peak_rss_mb")}
    for name, value in (times | ({} if stats is None else asdict(stats))).items():
        is_list = name.endswith(("_by_depth", "_by_length"))
        if isinstance(value, list) != is_list or not all(map(_is_amount, value if is_list else [value])):
            raise ValueError(f"{name}={value!r} is not a {'list of numbers' if is_list else 'number'} from 0 on")
    return turn, DecoderRun(tuple(tokens), stats=stats, **times)


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
