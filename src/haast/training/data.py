"""Answers as training sequences: records, chat template, and which tokens are supervised.

Owns the text side of training. Knows nothing of models, features or losses. Supervised are the assistant's tokens, the
end-of-turn token included, and nothing else: the head is to draft what the target says, not what users say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from haast.prompts import read_json_lines

_FIELDS = {"id": str, "prompt": str, "response": str, "response_ids": list}


@dataclass(frozen=True)
class TokenSequence:
    """One conversation as tokens. `record` is the answer record it came from."""

    tokens: list[int]
    supervised: list[bool]  # same length
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells this answer from others to the same prompt."""
        return record_key(self.record)


def record_key(record: dict[str, Any]) -> str:
    """An answer's identity: prompt id and temperature."""
    return f"{record.get('id')}@{record.get('temperature', 0.0)}"


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Answer records of a .jsonl or .jsonl.gz file, as `haast regenerate` writes them.

    Raises:
        ValueError: unreadable or empty file, or a line that is no answer record (the message has its number).
    """
    records = []
    for number, value in read_json_lines(path):
        for name, kind in _FIELDS.items():
            if not isinstance(value.get(name), kind):
                raise ValueError(f"{path}, line {number}: an answer record needs `{name}` ({kind.__name__})")
        if not value["response_ids"] or not all(isinstance(i, int) and i >= 0 for i in value["response_ids"]):
            raise ValueError(f"{path}, line {number}: `response_ids` should be a non-empty list of token ids")
        records.append(value)
    if not records:
        raise ValueError(f"{path} holds no answers: make some with `haast regenerate`")
    return records


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> list[int]:
    """Tokens of a conversation up to where the assistant speaks. `turns` alternate user, assistant, ..., user.

    A tokenizer without a chat template gets the turns as plain text.
    """
    if tokenizer.chat_template is None:
        return [int(i) for i in tokenizer.encode("\n".join(turns))]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(i) for i in encoded["input_ids"]]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> TokenSequence:
    """A record as tokens: the templated prompt, then the very tokens the target answered with (never re-tokenised).

    Args:
        tokenizer: the target's.
        record: see `read_answers`.
        max_tokens: cut longer sequences at the end; None keeps all.
        vocab_size: the target's, which may be padded past the tokenizer's; None takes the tokenizer's.
    """
    prompt = encode_prompt(tokenizer, [record["prompt"]])
    answer = [int(i) for i in record["response_ids"]]
    known = len(tokenizer) if vocab_size is None else vocab_size
    if max(answer) >= known:
        raise ValueError(
            f"answer {record['id']} has token {max(answer)}, the target knows {known}: these answers are "
            f"another target's, make them with this one"
        )
    tokens = prompt + answer
    supervised = [False] * len(prompt) + [True] * len(answer)
    return TokenSequence(tokens[:max_tokens], supervised[:max_tokens], record)


def describe_supervised(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> Text:
    """The sequence as text: supervised tokens in green, the rest dim, with the counts in front."""
    count = sum(sequence.supervised)
    text = Text(f"{count} of {len(sequence.tokens)} tokens supervised\n", style="bold")
    start = 0
    for stop in range(1, len(sequence.tokens) + 1):
        if stop == len(sequence.tokens) or sequence.supervised[stop] != sequence.supervised[start]:
            piece = str(tokenizer.decode(sequence.tokens[start:stop]))
            text.append(piece, style="black on green" if sequence.supervised[start] else "dim")
            start = stop
    return text
