"""The answers file: JSON lines that `haast regenerate` writes and `haast train` reads.

Owns the forms of a record, and whose answers a file holds. Knows no tokenizer and no model.

    own answer     id, prompt, response, response_ids; after earlier turns also history: [user, assistant, ...]
    given text     prompt and response, without response_ids
    given chat     messages: [{role, content}, ...]

Besides, a record may say whose it is (`model`, `tokenizer`), its `temperature`, `thinking`, `source` and `licence`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haast.errors import HeadMismatchError
from haast.jsonl_log import JsonlLog
from haast.prompts import read_json_lines


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
    listed = messages if isinstance(messages, list) and all(isinstance(message, dict) for message in messages) else []
    roles = [message.get("role") for message in listed]
    texts = [*roles, *(message.get("content") for message in listed)]
    if not roles or not all(isinstance(text, str) for text in texts) or roles[0] == "assistant":
        return "`messages` should be a list of {role, content}, both texts, that begins with the system or the user"
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


class AnswersFile(JsonlLog):
    """An answers file that one run adds to. Use `with`.

    Args:
        path: created where missing.
        model: the target's name; a file with another's answers is refused.
        tokenizer: its hash, likewise.

    Raises:
        ValueError: on entering, another run is writing to the file, it is no answers file, or it is another target's.
    """

    def __init__(self, path: Path, model: str, tokenizer: str) -> None:
        super().__init__(path, b'{"id": ')
        self._model, self._tokenizer = model, tokenizer
        self.records: dict[str, dict[str, Any]] = {}  # by id

    def check(self) -> None:
        others = sorted({str(r["model"]) for r in self.values if r.get("model", self._model) != self._model})
        if others:
            raise ValueError(
                f"{self.path} holds answers of {', '.join(others)}, not of {self._model}: give another --out"
            )
        refuse_other_tokenizer(self.values, self._tokenizer, str(self.path))
        self.records = {str(record.get("id")): record for record in self.values}

    def add(self, value: dict[str, Any]) -> None:
        super().add(value)
        self.records[value["id"]] = value
