"""Answers as training sequences: tokens, and which of them are supervised.

Owns the joining of records and chat templates. Knows nothing of models, features or losses. Supervised are the
assistant's tokens, the end-of-turn token included, and nothing else: the head is to draft what the target says, not
what users say. Of an own answer these are the very tokens it was made of; of given text, those of its render.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from haast.training.answers import refuse_other_tokenizer
from haast.training.chat import alternating, check_template, encode_chat, encode_prompt, tokenizer_hash


@dataclass(frozen=True)
class TokenSequence:
    """One conversation as tokens. `record` is the answer record it came from."""

    tokens: list[int]
    supervised: list[bool]  # same length
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> list[int]:
        """The supervised tokens."""
        return [token for token, mine in zip(self.tokens, self.supervised, strict=True) if mine]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict[str, Any]],
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[TokenSequence]:
    """`encode_answer` for many, with the checks that need making only once.

    Raises:
        HeadMismatchError: answers made with another tokenizer.
        ValueError: a chat template that does not tell where the assistant speaks, or a record that can't be encoded.
    """
    refuse_other_tokenizer(records, tokenizer_hash(tokenizer), "the answers")
    check_template(tokenizer)
    return [encode_answer(tokenizer, record, max_tokens, vocab_size) for record in records]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> TokenSequence:
    """A record as tokens.

    An own answer is the templated prompt (what was said before it included), then the very tokens the target answered
    with, never re-tokenised. Given text is rendered and tokenised whole, see `chat.encode_chat`.

    Args:
        tokenizer: the target's.
        record: see `answers`.
        max_tokens: cut longer sequences at the end; None keeps all.
        vocab_size: the target's, which may be padded past the tokenizer's; None takes the tokenizer's.

    Raises:
        ValueError: tokens that the target does not know, or given text in whose render an answer is not found.
    """
    if record.get("response_ids"):
        turns = [*record.get("history", []), record["prompt"]]
        prompt = encode_prompt(tokenizer, turns, record.get("thinking"))
        tokens = prompt + [int(i) for i in record["response_ids"]]
        supervised = [False] * len(prompt) + [True] * len(record["response_ids"])
    else:
        try:
            chat = alternating([*record.get("history", []), record.get("prompt", ""), record.get("response", "")])
            if "messages" in record:
                chat = [{"role": each["role"], "content": each["content"]} for each in record["messages"]]
            tokens, supervised = encode_chat(tokenizer, chat, record.get("thinking"))
        except ValueError as error:
            raise ValueError(f"answer {record.get('id')}: {error}") from error
    known = len(tokenizer) if vocab_size is None else vocab_size
    if max(tokens) >= known:
        raise ValueError(
            f"answer {record['id']} has token {max(tokens)}, the target knows {known}: these answers are "
            f"another target's, make them with this one"
        )
    return TokenSequence(tokens[:max_tokens], supervised[:max_tokens], record)


def describe_supervised(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> Text:
    """The sequence as text: supervised tokens in green, the rest dim, with the counts in front."""
    count = sum(sequence.supervised)
    text = Text(f"{count} of {len(sequence.tokens)} tokens supervised\n", style="bold")
    for mine, run in groupby(zip(sequence.supervised, sequence.tokens, strict=True), key=itemgetter(0)):
        piece = str(tokenizer.decode([token for _, token in run]))
        text.append(piece, style="black on green" if mine else "dim")
    return text
