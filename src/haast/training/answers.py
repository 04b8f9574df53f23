"""The answers file: JSON lines that `haast regenerate` writes and `haast train` reads.

Owns the forms of a record, reading, and appending that survives kills: a lock, one synced line per answer, and a torn
last line that is cut off on resume. Knows no tokenizer and no model.

    own answer     id, prompt, response, response_ids; after earlier turns also history: [user, assistant, ...]
    given text     prompt and response, without response_ids
    given chat     messages: [{role, content}, ...]

Besides, a record may say whose it is (`model`, `tokenizer`), its `temperature`, `thinking`, `source` and `licence`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from haast.errors import HeadMismatchError
from haast.prompts import read_json_lines

_RECORD_BEGINS = b'{"id": '


def record_key(record: dict[str, Any]) -> str:
    """An answer's identity: prompt id, temperature, and a hash of what was said, since ids of two sets may be alike."""
    return f"{record.get('id')}@{record.get('temperature', 0.0)}:{_hash(record, 'response_ids', 'thinking')}"


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Answer records of a .jsonl or .jsonl.gz file. Given text without an `id` is known by a hash of what was said.

    Raises:
        ValueError: unreadable or empty file, or a line that is no answer record (the message has its number).
    """
    records = []
    for number, value in read_json_lines(path):
        problem = _problem(value)
        if problem:
            raise ValueError(f"{path}, line {number}: {problem}")
        records.append(value if "id" in value else {"id": _hash(value), **value})
    if not records:
        raise ValueError(f"{path} holds no answers: make some with `haast regenerate`")
    return records


def _problem(value: dict[str, Any]) -> str:
    """What is wrong with a record; empty where nothing is."""
    if not isinstance(value.get("id", ""), str):
        return f"`id` should be a text, not {value['id']!r}"
    if not isinstance(value.get("thinking"), bool | None):
        return f"`thinking` should be true or false, not {value['thinking']!r}"
    if "messages" in value:
        return _problem_of_messages(value["messages"])
    if not all(isinstance(value.get(name), str) for name in ("prompt", "response")):
        return "an answer record needs `prompt` and `response` (texts; `response_ids` besides), or `messages`"
    history = value.get("history", [])
    if not isinstance(history, list) or len(history) % 2 or not all(isinstance(turn, str) for turn in history):
        return "`history` should be the texts before `prompt`: user, assistant, ..., an even number of them"
    ids = value.get("response_ids")
    if ids is None:
        return "" if value["response"].strip() else "`response` is empty and there are no `response_ids`"
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        return "`response_ids` should be a non-empty list of token ids"
    return "" if "id" in value else "an answer with `response_ids` needs its `id`"


def _problem_of_messages(messages: Any) -> str:
    wanted = "`messages` should be a list of {role, content}, both texts, that begins with the system or the user"
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return wanted
    if not all(isinstance(message.get(name), str) for message in messages for name in ("role", "content")):
        return wanted
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        return wanted
    return "" if "assistant" in roles else "`messages` have no assistant turn, so there is nothing to learn"


def _hash(value: dict[str, Any], *more: str) -> str:
    said = json.dumps([value.get(name) for name in ("messages", "history", "prompt", "response", *more)])
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def refuse_other_tokenizer(records: Sequence[dict[str, Any]], tokenizer: str, where: str) -> None:
    """Refuse records that say they were made with another tokenizer; those that do not say pass.

    Args:
        records: see `read_answers`.
        tokenizer: `chat.tokenizer_hash` of the target's.
        where: begins the message.

    Raises:
        HeadMismatchError: the first such record.
    """
    for record in records:
        if record.get("tokenizer", tokenizer) != tokenizer:
            raise HeadMismatchError(
                f"{where}: answer {record.get('id')} was made with tokenizer {record['tokenizer']}, the target's is "
                f"{tokenizer}: make answers with this target (`haast regenerate`)"
            )


class AnswersFile:
    """An answers file that one run adds to. Use `with`.

    Args:
        path: created where missing.
        model: the target's name; a file with another's answers is refused.
        tokenizer: its hash, likewise.

    Raises:
        ValueError: on entering, another run is writing to the file, it is no answers file, or it is another target's.
    """

    def __init__(self, path: Path, model: str, tokenizer: str) -> None:
        self._path, self._model, self._tokenizer = path, model, tokenizer
        self._file: IO[bytes] | None = None
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> AnswersFile:
        self._file = self._path.open("ab", buffering=0)
        try:
            _lock(self._file, self._path)
            before = mend_answers(self._path)
            _refuse_other_model(before, self._model, self._path)
            refuse_other_tokenizer(before, self._tokenizer, str(self._path))
        except ValueError:
            self._file.close()
            raise
        self.records = {str(record.get("id")): record for record in before}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None, "left without entering"
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write one record, synced. Raises ValueError where the disk is full."""
        assert self._file is not None, "the file is open only within `with`"
        append_record(self._file, record, self._path)
        self.records[record["id"]] = record


def mend_answers(path: Path) -> list[dict[str, Any]]:
    """Read an answers file of an interrupted run, cutting a torn last line off the file.

    Only what a kill leaves is cut: a tail without its newline that begins as a record does.

    Raises:
        ValueError: a line is no answer record (the message has its number); the file is left as it is.
    """
    if not path.exists():
        return []
    content, kept, records = path.read_bytes(), 0, []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n") and _RECORD_BEGINS.startswith(line[: len(_RECORD_BEGINS)]):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): mend or remove the line") from error
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: no answer record: is this an answers file? Give another --out")
        records.append(record)
        kept += len(line)
    if kept < len(content):
        os.truncate(path, kept)
    return records


def append_record(file: IO[bytes], record: dict[str, Any], path: Path) -> None:
    """One line, written in one call and synced. Raises ValueError where the disk is full."""
    try:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}): free space and run again, finished answers are kept"
        ) from error


def _refuse_other_model(records: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    others = sorted({str(record["model"]) for record in records if record.get("model", name) != name})
    if others:
        raise ValueError(f"{path} holds answers of {', '.join(others)}, not of {name}: give another --out")


def _lock(file: IO[bytes], path: Path) -> None:
    """Held until the file is closed, also by a kill. Two runs on one file would answer the same prompts twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {path}: wait for it, or give another --out") from error
    except OSError:  # a file system without locks
        return
