"""Training sequences: turns answer records into tokens and a supervision mask.

Owns the joining of records and chat templates. Does not know models, features or losses. Only assistant tokens are
supervised, the end-of-turn token included: the head drafts what the target generates, not what users write. For the
target's own answers these are the generated ids; for given text they are the tokens of the rendered chat.
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
        return [token for token, supervised in zip(self.tokens, self.supervised, strict=True) if supervised]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict[str, Any]],
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[TokenSequence]:
    """`encode_answer` for many records; tokenizer and template are checked once.

    Raises:
        HeadMismatchError: answers made with another tokenizer.
        ValueError: a chat template that does not mark the assistant's turn, or a record that cannot be encoded.
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
    """Tokens and supervision mask of one record.

    For the target's own answers: the templated prompt (with earlier turns), then the generated ids, which are not
    tokenised again. Given text is rendered and tokenised as a whole, see `chat.encode_chat`.

    Args:
        tokenizer: the target's.
        record: see `answers`.
        max_tokens: cut longer sequences at the end; None keeps all.
        vocab_size: of the target, which may be padded beyond the tokenizer's; None uses the tokenizer's.

    Raises:
        ValueError: a token outside the target's vocabulary, or given text that the template does not render.
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
    size = len(tokenizer) if vocab_size is None else vocab_size
    if max(tokens) >= size:
        raise ValueError(
            f"answer {record['id']} has token {max(tokens)}, but the target's vocabulary has {size}: these answers are "
            f"another target's, generate them with this one"
        )
    return TokenSequence(tokens[:max_tokens], supervised[:max_tokens], record)


def describe_supervised(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> Text:
    """The sequence as text after a line with the counts: supervised tokens in green, the others dim."""
    count = sum(sequence.supervised)
    text = Text(f"{count} of {len(sequence.tokens)} tokens supervised\n", style="bold")
    for supervised, run in groupby(zip(sequence.supervised, sequence.tokens, strict=True), key=itemgetter(0)):
        piece = str(tokenizer.decode([token for _, token in run]))
        text.append(piece, style="black on green" if supervised else "dim")
    return text
