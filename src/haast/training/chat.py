"""A tokenizer and its chat template: prompts as tokens, and which characters of a rendered chat the model writes.

Owns rendering. Knows no records and no models. What the model writes begins where the generation prompt ends and stops
with the end-of-turn token; whatever a template puts around that is not supervised:

    render             <|im_start|>user U <|im_end|> <|im_start|>assistant A <|im_end|> \\n
    generation prompt  <|im_start|>user U <|im_end|> <|im_start|>assistant
    written                                                               A <|im_end|>
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

_MARK = "haast3f9b{}x"  # stands for a text in a skeleton: no spaces to trim, nothing a template looks for
Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class _Span:
    """Characters [start, stop) of a render. `exact`: a generation prompt ends at `start`."""

    start: int
    stop: int
    exact: bool


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the vocabulary, the same on every machine."""
    words = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], thinking: bool | None = None) -> list[int]:
    """Tokens of a conversation up to where the assistant speaks. `turns` alternate user, assistant, ..., user.

    A tokenizer without a chat template gets the turns as plain text. `thinking` is the template's `enable_thinking`;
    None leaves it to the template.
    """
    if tokenizer.chat_template is None:
        return [int(i) for i in tokenizer.encode("\n".join(turns))]
    return _tokens(tokenizer, _render(tokenizer, alternating(turns), thinking, prompt=True))


def alternating(turns: Sequence[str]) -> list[Message]:
    """What user and assistant say in turn, as a chat."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None = None
) -> tuple[list[int], list[bool]]:
    """A given conversation as tokens, and which of them the model would have written.

    Without a chat template one user and one assistant turn are plain text, with the tokenizer's end token after them.

    Raises:
        ValueError: several turns without a template, or a template in whose render an answer cannot be found.
    """
    if tokenizer.chat_template is None:
        return _encode_plain(tokenizer, messages)
    text = _render(tokenizer, messages, thinking)
    spans = _spans(tokenizer, messages, thinking, text)
    tokens, cut = _tokens(tokenizer, text), 0
    if spans[-1].exact:
        prompt = _tokens(tokenizer, text[: spans[-1].start])
        if tokens[: len(prompt)] != prompt:  # the model reads the prompt by itself, so its tokens are those
            cut = spans[-1].start
            tokens = prompt + _tokens(tokenizer, text[cut:])
    places = _places(tokenizer, text, cut, tokens, spans)
    return tokens, [place in places for place in range(len(tokens))]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that does not tell where the assistant speaks. None at all is fine: plain text.

    Raises:
        ValueError: what the template does, and the remedy.
    """
    if tokenizer.chat_template is None:
        return
    user, answer = _MARK.format("u"), _MARK.format("a")
    asked = [{"role": "user", "content": user}]
    whole = _render(tokenizer, [*asked, {"role": "assistant", "content": answer}], None)
    prompt = _render(tokenizer, asked, None, prompt=True)
    remedy = "set tokenizer.chat_template to one that the target was trained with, or to None for plain text"
    if user not in prompt or answer not in whole:
        raise ValueError(
            f"the chat template leaves out what {'users say' if user not in prompt else 'answers say'}: {remedy}"
        )
    if not prompt[prompt.rindex(user) + len(user) :].strip():
        raise ValueError(f"the chat template has no marker of the assistant's turn, not even after a user's: {remedy}")
    header = whole[len(prompt) : whole.index(answer)] if whole.startswith(prompt) else ""
    if header.strip() and prompt == _render(tokenizer, asked, None):
        raise ValueError(
            f"the chat template ignores add_generation_prompt, though answers begin with {header!r} in it: {remedy}"
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an answer; None where it puts none."""
    if tokenizer.chat_template is None:
        return None
    answer = _MARK.format("a")
    messages = [{"role": "user", "content": _MARK.format("u")}, {"role": "assistant", "content": answer}]
    whole = _render(tokenizer, messages, None)
    end = _first_special(tokenizer, whole, whole.rfind(answer) + len(answer))
    return None if end is None else int(tokenizer.convert_tokens_to_ids(whole[slice(*end)]))  # type: ignore[arg-type]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError(
            f"the tokenizer has no chat template, so {len(messages)} messages cannot be told apart as text: set "
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
    """The chat as text; `prompt` ends it with the generation prompt. Raises ValueError where the template does."""
    extra: Any = {} if thinking is None else {"enable_thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False, **extra)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses a chat of {', '.join(m['role'] for m in messages)} ({error}): leave such "
            f"answers out, or change their roles"
        ) from error
    return str(text)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None, text: str
) -> list[_Span]:
    """What the model wrote in the render `text`, one span per assistant message."""
    gaps = _gaps(tokenizer, messages, thinking, text)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    spans: list[_Span] = []
    skeleton = done = 0  # the same place in the marked and in the true render
    for number, place in enumerate(answers):
        prompt = _render(tokenizer, messages[:place], thinking, prompt=True)
        exact = len(prompt) >= done and text.startswith(prompt)
        between = gaps[number][skeleton:]
        if not exact and not text.startswith(between, done):
            raise ValueError(
                f"assistant turn {number + 1} can't be found in what the chat template makes of the conversation: "
                f"give the turns before it as one prompt, or a template that leaves earlier turns as they are"
            )
        start = len(prompt) if exact else done + len(between)
        stop, skeleton = _stop(tokenizer, text, start, messages[place]["content"].strip(), gaps[number + 1])
        spans.append(_Span(start, stop, exact))
        done = stop
    return spans


def _gaps(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool | None, text: str
) -> list[str]:
    """What a template writes before, between and after answers: the render split at marks in their places."""
    marks, marked = [], []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            marks.append(_MARK.format(place))
            if marks[-1] in text:
                raise ValueError(f"the word {marks[-1]} stands for answers in Haast: leave this conversation out")
            message = {**message, "content": marks[-1]}
        marked.append(message)
    rest, gaps = _render(tokenizer, marked, thinking), []
    for number, mark in enumerate(marks, start=1):
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(
                f"the chat template leaves out or changes assistant turn {number}: set tokenizer.chat_template to one "
                f"that shows every answer"
            )
        gaps.append(before)
    return [*gaps, rest]


def _stop(tokenizer: PreTrainedTokenizerBase, text: str, start: int, content: str, gap: str) -> tuple[int, int]:
    """Where an answer that begins at `start` of `text` stops, and where that is in the gap after it.

    The end is the special token that the gap begins with; without one, the end of the answer's own words.
    """
    at = text.find(content, start)
    end = _first_special(tokenizer, gap, 0)
    if at >= 0 and end is not None and gap[slice(*end)] in text[start:at]:
        at = -1  # these are the same words in a later turn
    said = start if at < 0 else at + len(content)  # a template may have taken words (earlier thinking) out
    if end is not None and not gap[: end[0]].strip():
        place = text.find(gap[slice(*end)], said)
        if place >= 0:
            return place + end[1] - end[0], end[1]
    if at < 0:
        raise ValueError(f"the answer {content[:40]!r} is not in what the chat template makes of it: leave it out")
    return said, 0


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> tuple[int, int] | None:
    """Characters of the first special token at or after `start`."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first))).search(text, start) if longest_first else None
    return None if found is None else found.span()


def _places(
    tokenizer: PreTrainedTokenizerBase, text: str, cut: int, tokens: list[int], spans: Sequence[_Span]
) -> set[int]:
    """Places of the tokens that lie in one of the spans; the text was tokenised in two parts, up to `cut` and on.

    A token that runs into a span belongs to it if it only brings spaces along.
    """
    if not tokenizer.is_fast:
        return {i for s in spans for i in range(*(_count(tokenizer, text[:end], tokens) for end in (s.start, s.stop)))}
    offsets: list[tuple[int, int]] = []
    for part, begin in ((text[:cut], 0), (text[cut:], cut)):
        encoded: Any = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        offsets += [(begin + start, begin + stop) for start, stop in encoded["offset_mapping"]]
    return {
        place
        for place, (start, stop) in enumerate(offsets)
        for span in spans
        if start < span.stop and stop > span.start and not text[start : span.start].strip()
    }


def _count(tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[int]) -> int:
    """How many of `tokens` a prefix of their text is: for tokenizers that don't tell which characters a token is."""
    prefix = _tokens(tokenizer, text)
    if tokens[: len(prefix)] != prefix:
        raise ValueError(
            f"{type(tokenizer).__name__} tells no offsets, and its tokens run across the beginning or end of an "
            f"answer: use a fast tokenizer (a folder with tokenizer.json)"
        )
    return len(prefix)
