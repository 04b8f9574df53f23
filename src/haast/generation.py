"""Input and output types of generation: prompts, settings, streamed pieces and results. Knows no model.

one prompt                                    several prompts
"Why?"                                        ["Why?", "How?"]
[{"role": "user", "content": "Why?"}]         [[{...}], [{...}]]
[1, 2, 3], a tensor or array (n,)             [[1, 2], [3]], (rows, n): without padding, every id is a token
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from haast.core import Emission, Processor, Request, SamplingParams
from haast.errors import CancelledError, PromptError
from haast.stats import Stats
from haast.text import TextStream

Message = dict[str, str]  # a chat message: "role" and "content"
Ids = Tensor | npt.NDArray[Any]
Prompt = str | Sequence[int] | Sequence[Message] | Ids
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Sequence[Message]] | Sequence[Ids]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_FORMS = "give text, a list, tensor or array of token ids, a list of chat messages, or a list of several of these"


@dataclass(frozen=True)
class Piece:
    """A streamed piece of new text. `drafted`: its last token is an accepted draft, not a bonus token of the target."""

    text: str
    drafted: bool
    tokens: tuple[int, ...]
    finish_reason: str = ""  # set on the last piece; see `Generation`


@dataclass(frozen=True)
class Generation:
    """The text generated for one prompt.

    `finish_reason`: "stop" (an end token or stop string), "length" (`max_new_tokens`, or the context is full) or
    "deadline" (`timeout` passed; the text is incomplete).
    """

    text: str
    tokens: tuple[int, ...]
    stats: Stats
    finish_reason: str


class Settings(TypedDict, total=False):
    """Generation settings: keyword arguments of `Haast.generate`, `stream`, `astream` and of `Session` turns.

    Attributes:
        max_new_tokens: exact upper bound of new tokens; default 256.
        temperature, top_k, top_p, min_p, repetition_penalty, seed, processors: see `SamplingParams`. Processors are
            called for every text of a call: use a stateful one for a single text only.
        sampling: all of these in one object.
        eos: token ids that end the text; None for the model's own.
        stop: stop strings (or one) that end the text and are cut from it; the tokens still include them.
        chat: apply the model's chat template to a text prompt, if it has one; default True.
        timeout: seconds after the call at which the text ends, complete or not.
        prefill_chunk: prompt tokens per forward; fewer need less memory. The text does not depend on it.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    processors: Sequence[Processor]
    sampling: SamplingParams | None
    eos: Sequence[int] | None
    stop: str | Sequence[str]
    chat: bool
    timeout: float | None
    prefill_chunk: int


class TextRequest:
    """A request with the text stream that decodes its tokens."""

    def __init__(self, request: Request, stream: TextStream | None) -> None:
        self.request, self._stream = request, stream
        self._pending: list[int] = []  # tokens whose text is not final yet

    def pieces(self, emission: Emission) -> Iterator[Piece]:
        """The pieces of text that became final; without a tokenizer, one piece without text per token."""
        stream = self._stream
        for index, token in enumerate(emission.tokens):
            self._pending.append(token)
            text = "" if stream is None else stream.push(token)
            last = emission.finished and index + 1 == len(emission.tokens)
            if last and stream is not None:
                text += stream.finish()
            if text or last or stream is None:
                yield self._piece(text, index < emission.drafted, last)

    def rest(self) -> Piece:
        """The last piece of a text that ends without a final emission: the text held back."""
        return self._piece("" if self._stream is None else self._stream.finish(), False, True)

    def _piece(self, text: str, drafted: bool, last: bool) -> Piece:
        tokens, self._pending = tuple(self._pending), []
        return Piece(text, drafted, tokens, self.request.finish_reason if last else "")


def collect(pieces: Iterable[Piece], stats: Stats) -> Generation:
    """Join the pieces of a text; if its deadline passes, the pieces up to then."""
    text, tokens, reason = "", list[int](), ""
    try:
        for piece in pieces:
            text, reason = text + piece.text, piece.finish_reason
            tokens.extend(piece.tokens)
    except CancelledError:
        if reason != "deadline":
            raise
    return Generation(text, tuple(tokens), stats, reason)


def split_prompts(value: Any) -> tuple[list[str | list[int] | list[Message]], bool]:
    """The prompts in the `prompt` argument of a call, and whether it is a single one.

    Raises PromptError if the value is no prompt and no list of prompts.
    """
    plain = _as_list(value)
    single = _as_single(plain)
    if single is not None:
        return [single], True
    prompts = []
    for number, item in enumerate(plain):
        prompt = _as_single(_as_list(item)) if isinstance(item, str | Sequence | Tensor | np.ndarray) else None
        if prompt is None:
            found = f"holds a {type(item).__name__} (number {number})"
            raise PromptError(f"the prompt is a list that {found}: {_FORMS}, not a mixture")
        prompts.append(prompt)
    return prompts, False


def _as_list(value: Any) -> str | list[Any]:
    """A string as it is, anything else as a list with unchecked items. Raises PromptError for other types."""
    if isinstance(value, Tensor | np.ndarray):
        dtype = value.dtype
        integer = dtype.kind in "iu" if isinstance(dtype, np.dtype) else dtype in _INTEGERS
        if not integer or value.ndim not in (1, 2):
            raise PromptError(
                f"the prompt is a {type(value).__name__} of {dtype}, shape {tuple(value.shape)}: give token ids as "
                f"integers, (tokens,) or (prompts, tokens)"
            )
        return list(value.tolist())
    if isinstance(value, Mapping):
        remedy = "give its input_ids, or a list of messages, [message]"
        raise PromptError(f"the prompt is a {type(value).__name__}: {remedy}")
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise PromptError(f"the prompt is a {type(value).__name__}: {_FORMS}")
    return list(value)


def _as_single(plain: str | list[Any]) -> str | list[int] | list[Message] | None:
    """The value as one prompt; None if it is not one. An empty list is a prompt without tokens."""
    if isinstance(plain, str):
        return plain
    if all(_is_id(item) for item in plain):
        return [int(item) for item in plain]
    return plain if all(isinstance(item, Mapping) for item in plain) else None


def _is_id(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim == 0 and item.dtype in _INTEGERS
    return isinstance(item, Integral) and not isinstance(item, bool)
