"""Reads and checks prompt files: JSON lines with `turns` or `prompt`. Knows no tokenizer."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt: the user's turns in order, and the other fields of its line in `extra`."""

    id: str
    turns: tuple[str, ...]
    category: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a .jsonl or .jsonl.gz file; blank lines are skipped.

    Raises ValueError if the file can't be read, or a line is no JSON object (the message has its number).
    """
    path = Path(path)
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                    if "\\ud" in line.lower():  # an escaped lone surrogate decodes, but can't be encoded again
                        json.dumps(value, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}): fix or remove the line") from error
                if not isinstance(value, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}")
                yield number, value
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        where = f" after line {number}" if number else ""
        raise ValueError(f"cannot read {path}{where}: {error}") from error


def read_prompts(path: str | Path, limit: int | None = None, spread: bool = False) -> list[Prompt]:
    """The first `limit` prompts of a file, or all for None; `spread` takes them evenly from the whole file.

    Lines have `turns` (a list of strings) or `prompt` (one string); `id` and `category` are optional. A prompt without
    `id` (or `question_id`) gets a hash of its turns as its id. Raises ValueError for a limit below 1, an unreadable or
    empty file, or a malformed line (the message has its number).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not allowed: give 1 or more prompts")
    prompts: list[Prompt] = []
    for number, value in read_json_lines(path):
        if limit is not None and not spread and len(prompts) == limit:
            break
        prompts.append(_prompt(value, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompts: give JSON lines with `turns` or `prompt`")
    return prompts if limit is None else evenly(prompts, limit)


def read_suites(
    folder: str | Path, only: Sequence[str] | None = None, limit: int | None = None
) -> dict[Path, list[Prompt]]:
    """Read the prompt files (*.jsonl) of a folder; each is a suite named after the file.

    `only` selects suites by name, in this order; None takes all, sorted. `limit` prompts of each are used, evenly from
    the whole file. Raises ValueError for a missing or empty folder, an unknown or duplicate name, a file without
    prompts, or one with duplicate ids.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give a folder with prompt files (*.jsonl)")
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.is_file()}
    if not files:
        raise ValueError(f"{folder} holds no suites: add prompt files (*.jsonl with `turns` or `prompt`)")
    names = list(files if only is None else only)
    unknown = [name for name in names if name not in files]
    if unknown or not names:
        raise ValueError(f"no suites {unknown} in {folder}: choose some of {', '.join(files)}")
    if len(set(names)) < len(names):
        raise ValueError(f"only={','.join(names)!r} lists a suite twice: list each once")
    if "all" in names:
        raise ValueError(f"{files['all']}: the name 'all' is reserved for all suites together; rename the file")
    return {files[name]: _suite(files[name], limit) for name in names}


def _suite(path: Path, limit: int | None) -> list[Prompt]:
    try:
        prompts = read_prompts(path, limit, spread=True)
    except ValueError as error:
        raise ValueError(f"{error}; or select other files of the folder with --only") from error
    duplicate = next((name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1), None)
    if duplicate is not None:
        raise ValueError(f"{path} has two prompts with the id {duplicate!r}: give each its own id")
    return prompts


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` items, evenly spaced over all of them; all if there are no more."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _prompt(value: dict[str, Any], where: str) -> Prompt:
    rest = dict(value)
    turns, single = rest.pop("turns", None), rest.pop("prompt", None)
    turns = [single] if turns is None else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError(f"{where}: expected `turns` (a list of non-empty strings) or `prompt` (a non-empty string)")
    name = rest.pop("question_id", None)
    name = rest.pop("id", name)
    name = hashlib.sha256("\0".join(turns).encode()).hexdigest()[:12] if name is None else name
    return Prompt(str(name), tuple(turns), str(rest.pop("category", "")), rest)
