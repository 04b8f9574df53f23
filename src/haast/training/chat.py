"""Chat templates: turns a conversation into tokens and marks the tokens that the model generates.

Owns rendering. Does not know answer records or models. The model's part begins where the generation prompt ends and
stops with the end-of-turn token; all other text that a template adds is not supervised:

    render             <|im_start|>user U <|im_end|> <|im_start|>assistant A <|im_end|> \\n
    generation prompt  <|im_start|>user U <|im_end|> <|im_start|>assistant
    supervised                                                            A <|im_end|>
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "haast3f9b{}x"  # for a text in a test render: no spaces to trim, nothing that a template searches for
Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class _Span:
    """Characters [start, stop) of a render. `exact`: a generation prompt ends at `start`."""

    start: int
    stop: int
    exact: bool


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the vocabulary, the same on every machine."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], thinking: bool | None = None) -> list[int]:
    """Tokens of a conversation up to the assistant's next answer. `turns` alternate user, assistant, ..., user.

    Without a chat template the turns are encoded as plain text. `thinking` is the template's `enable_thinking`; None
    keeps the template's default.
    """
    if tokenizer.chat_template is None:
        return [int(i) for i in tokenizer.encode("\n".join(turns))]
    return _tokens(tokenizer, _render(tokenizer, alternating(turns), thinking, prompt=True))


def alternating(turns: Sequence[str]) -> list[Message]:
    """A chat of alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None = None
) -> tuple[list[int], list[bool]]:
    """Tokens of a given conversation, and a mask of those that the model would have generated.

    Without a chat template one user and one assistant turn are encoded as plain text, followed by the EOS token.

    Raises:
        ValueError: several turns without a template, or an answer that is not found in the rendered text.
    """
    if tokenizer.chat_template is None:
        return _encode_plain(tokenizer, messages)
    text = _render(tokenizer, messages, thinking)
    spans = _spans(tokenizer, messages, thinking, text)
    tokens, cut = _tokens(tokenizer, text), 0
    if spans[-1].exact:
        prompt = _tokens(tokenizer, text[: spans[-1].start])
        if tokens[: len(prompt)] != prompt:  # when decoding, the prompt is tokenised alone: use those tokens
            cut = spans[-1].start
            tokens = prompt + _tokens(tokenizer, text[cut:])
    supervised = _tokens_in_spans(tokenizer, text, cut, tokens, spans)
    return tokens, [index in supervised for index in range(len(tokens))]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that does not mark the assistant's turn. No template at all is allowed (plain text).

    Raises:
        ValueError: the template drops texts or has no marker before answers; the message has the remedy.
    """
    if tokenizer.chat_template is None:
        return
    user, answer = _PLACEHOLDER.format("u"), _PLACEHOLDER.format("a")
    question = [{"role": "user", "content": user}]
    whole = _render(tokenizer, [*question, {"role": "assistant", "content": answer}], None)
    prompt = _render(tokenizer, question, None, prompt=True)
    remedy = "set tokenizer.chat_template to one that the target was trained with, or to None for plain text"
    if user not in prompt or answer not in whole:
        raise ValueError(
            f"the chat template leaves out the {'user' if user not in prompt else 'assistant'}'s text: {remedy}"
        )
    if not prompt[prompt.rindex(user) + len(user) :].strip():
        raise ValueError(f"the chat template puts no marker of the assistant's turn after the user's turn: {remedy}")
    header = whole[len(prompt) : whole.index(answer)] if whole.startswith(prompt) else ""
    if header.strip() and prompt == _render(tokenizer, question, None):
        raise ValueError(
            f"the chat template ignores add_generation_prompt, but puts {header!r} before answers: {remedy}"
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an answer; None if there is none."""
    if tokenizer.chat_template is None:
        return None
    answer = _PLACEHOLDER.format("a")
    messages = [{"role": "user", "content": _PLACEHOLDER.format("u")}, {"role": "assistant", "content": answer}]
    whole = _render(tokenizer, messages, None)
    end = _first_special(tokenizer, whole, whole.rfind(answer) + len(answer))
    return None if end is None else int(tokenizer.convert_tokens_to_ids(whole[slice(*end)]))  # type: ignore[arg-type]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError(
            f"the tokenizer has no chat template, so {len(messages)} messages cannot be written as one text: set "
            f"tokenizer.chat_template, or give one user and one assistant turn"
        )
    prompt = [int(i) for i in tokenizer.encode(messages[0]["content"])]
    answer = _tokens(tokenizer, messages[1]["content"])
    if tokenizer.eos_token_id is not None:
        answer.append(int(tokenizer.eos_token_id))
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None, prompt: bool = False
) -> str:
    """The chat as text; `prompt` appends the generation prompt. Raises ValueError if the template raises."""
    extra: Any = {} if thinking is None else {"enable_thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False, **extra)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses a chat of {', '.join(m['role'] for m in messages)} ({error}): leave out such "
            f"answers, or change their roles"
        ) from error
    return str(text)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None, text: str
) -> list[_Span]:
    """The model's part of the rendered `text`, one span per assistant message."""
    gaps = _text_around_answers(tokenizer, messages, thinking, text)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    spans: list[_Span] = []
    gap_offset = offset = 0  # the same place: in the current gap, and in `text`
    for number, place in enumerate(answers):
        prompt = _render(tokenizer, messages[:place], thinking, prompt=True)
        exact = len(prompt) >= offset and text.startswith(prompt)
        between = gaps[number][gap_offset:]
        if not exact and not text.startswith(between, offset):
            raise ValueError(
                f"assistant turn {number + 1} is not found in the conversation as the chat template renders it: give "
                f"the turns before it as one prompt, or use a template that does not change earlier turns"
            )
        start = len(prompt) if exact else offset + len(between)
        stop, gap_offset = _answer_end(tokenizer, text, start, messages[place]["content"].strip(), gaps[number + 1])
        spans.append(_Span(start, stop, exact))
        offset = stop
    return spans


def _text_around_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None, text: str
) -> list[str]:
    """The text before, between and after answers: a render with placeholders for the answers, split at them."""
    placeholders, replaced = [], []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            placeholders.append(_PLACEHOLDER.format(place))
            if placeholders[-1] in text:
                raise ValueError(
                    f"the conversation contains {placeholders[-1]}, which Haast uses as a placeholder: leave it out"
                )
            message = {**message, "content": placeholders[-1]}
        replaced.append(message)
    rest, gaps = _render(tokenizer, replaced, thinking), []
    for number, placeholder in enumerate(placeholders, start=1):
        before, found, rest = rest.partition(placeholder)
        if not found:
            raise ValueError(
                f"the chat template leaves out or changes assistant turn {number}: set tokenizer.chat_template to one "
                f"that renders every answer unchanged"
            )
        gaps.append(before)
    return [*gaps, rest]


def _answer_end(tokenizer: PreTrainedTokenizerBase, text: str, start: int, content: str, gap: str) -> tuple[int, int]:
    """End of the answer that begins at `start` of `text`, as an offset in `text` and one in the gap after the answer.

    The answer ends with the special token that the gap begins with; without one, with the answer's own text.
    """
    found = text.find(content, start)
    end = _first_special(tokenizer, gap, 0)
    if found >= 0 and end is not None and gap[slice(*end)] in text[start:found]:
        found = -1  # the same text in a later turn
    content_end = start if found < 0 else found + len(content)  # a template may have removed text (earlier thinking)
    if end is not None and not gap[: end[0]].strip():
        place = text.find(gap[slice(*end)], content_end)
        if place >= 0:
            return place + end[1] - end[0], end[1]
    if found < 0:
        raise ValueError(f"the chat template does not render the answer {content[:40]!r} as given: leave it out")
    return content_end, 0


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> tuple[int, int] | None:
    """Characters of the first special token at or after `start`."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first))).search(text, start) if longest_first else None
    return None if found is None else found.span()


def _tokens_in_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, cut: int, tokens: list[int], spans: Sequence[_Span]
) -> set[int]:
    """Indices of the tokens in one of the spans; the text was tokenised in two parts, before and after `cut`.

    A token that begins before a span belongs to it if it has only spaces before the span.
    """
    if not tokenizer.is_fast:
        return {
            i
            for s in spans
            for i in range(*(_prefix_length(tokenizer, text[:end], tokens) for end in (s.start, s.stop)))
        }
    offsets: list[tuple[int, int]] = []
    for part, begin in ((text[:cut], 0), (text[cut:], cut)):
        encoded: Any = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        offsets += [(begin + start, begin + stop) for start, stop in encoded["offset_mapping"]]
    return {
        index
        for index, (start, stop) in enumerate(offsets)
        for span in spans
        if start < span.stop and stop > span.start and not text[start : span.start].strip()
    }


def _prefix_length(tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[int]) -> int:
    """Number of `tokens` that encode the prefix `text`: for tokenizers that do not return offsets."""
    prefix = _tokens(tokenizer, text)
    if tokens[: len(prefix)] != prefix:
        raise ValueError(
            f"{type(tokenizer).__name__} returns no offsets, and one of its tokens crosses the beginning or end of an "
            f"answer: use a fast tokenizer (a folder with tokenizer.json)"
        )
    return len(prefix)
