"""What leads to a text and what comes of it: prompts, settings, pieces as they come, all of it. Knows no model.

one prompt                                    several
"Why?"                                        ["Why?", "How?"]
[{"role": "user", "content": "Why?"}]         [[{...}], [{...}]]
[1, 2, 3], a tensor or array (n,)             [[1, 2], [3]], (rows, n): no padding, every id counts
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
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_FORMS = "give text, a list, tensor or array of token ids, a list of chat messages, or a list of several of these"


@dataclass(frozen=True)
class Piece:
    """A stretch of new text. `drafted`: its last token was drafted and accepted; else the target's own bonus token."""

    text: str
    drafted: bool
    tokens: tuple[int, ...]
    finish_reason: str = ""  # of the last piece, see `Generation`


@dataclass(frozen=True)
class Generation:
    """What was said after one prompt.

    `finish_reason`: "stop" (an end token or stop string), "length" (`max_new_tokens`, or a full context) or "deadline"
    (`timeout`: this is what was said by then).
    """

    text: str
    tokens: tuple[int, ...]
    stats: Stats
    finish_reason: str


class Settings(TypedDict, total=False):
    """How a prompt is answered: keywords of `Haast.generate`, `stream`, `astream`, and of a `Session`'s turns.

    Attributes:
        max_new_tokens: exact upper bound of new tokens; 256 if not given.
        temperature, top_k, top_p, min_p, repetition_penalty, seed, processors: see `SamplingParams`. Processors are
            called for every text of a call: give one that remembers something to one text alone.
        sampling: all of these together.
        eos: token ids that end the text; None takes the model's own.
        stop: strings (or one) that end the text; they are cut from it (the tokens keep what completed them).
        chat: put a text prompt through the model's chat template, where it has one; True if not given.
        timeout: seconds from the call after which a text ends where it is.
        prefill_chunk: prompt tokens a forward: fewer take less memory. The text does not depend on it.
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


class Answer:
    """A request, and its text as it grows."""

    def __init__(self, request: Request, texts: TextStream | None) -> None:
        self.request, self._texts = request, texts
        self._held: list[int] = []  # tokens whose text is not settled yet

    def pieces(self, emission: Emission) -> Iterator[Piece]:
        """The new text, as far as it is settled; where there is no tokenizer, a piece without text for each token."""
        texts = self._texts
        for place, token in enumerate(emission.tokens):
            self._held.append(token)
            text = "" if texts is None else texts.push(token)
            last = emission.finished and place + 1 == len(emission.tokens)
            if last and texts is not None:
                text += texts.finish()
            if text or last or texts is None:
                yield self._piece(text, place < emission.drafted, last)

    def rest(self) -> Piece:
        """What was held back of a text that ends without a last emission."""
        return self._piece("" if self._texts is None else self._texts.finish(), False, True)

    def _piece(self, text: str, drafted: bool, last: bool) -> Piece:
        tokens, self._held = tuple(self._held), []
        return Piece(text, drafted, tokens, self.request.finish_reason if last else "")


def collected(pieces: Iterable[Piece], stats: Stats) -> Generation:
    """All of a text; one that ran into its deadline is what was said by then."""
    text, tokens, reason = "", list[int](), ""
    try:
        for piece in pieces:
            text, reason = text + piece.text, piece.finish_reason
            tokens.extend(piece.tokens)
    except CancelledError:
        if reason != "deadline":
            raise
    return Generation(text, tuple(tokens), stats, reason)


def split(given: Any) -> tuple[list[str | list[int] | list[Message]], bool]:
    """The prompts that are given, and whether it is one by itself and no list.

    Raises PromptError: what is no prompt, or a mixture of what belongs to one and what belongs to several.
    """
    plain = _plain(given)
    one = _one(plain)
    if one is not None:
        return [one], True
    several = []
    for number, item in enumerate(plain):
        found = _one(_plain(item)) if isinstance(item, str | Sequence | Tensor | np.ndarray) else None
        if found is None:
            held = f"holds a {type(item).__name__} (number {number})"
            raise PromptError(f"the prompt is a list that {held}: {_FORMS}, not a mixture")
        several.append(found)
    return several, False


def _plain(given: Any) -> str | list[Any]:
    """Text, or a list whose items may be anything."""
    if isinstance(given, Tensor | np.ndarray):
        kind = given.dtype
        whole = kind.kind in "iu" if isinstance(kind, np.dtype) else kind in _WHOLE
        if not whole or given.ndim not in (1, 2):
            raise PromptError(
                f"the prompt is a {type(given).__name__} of {kind}, shape {tuple(given.shape)}: give token ids as "
                f"whole numbers, (tokens,) or (prompts, tokens)"
            )
        return list(given.tolist())
    if isinstance(given, Mapping):
        form = "give its input_ids, or a list of messages, [message]"
        raise PromptError(f"the prompt is a {type(given).__name__}: {form}")
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise PromptError(f"the prompt is a {type(given).__name__}: {_FORMS}")
    return list(given)


def _one(plain: str | list[Any]) -> str | list[int] | list[Message] | None:
    """The prompt, where it is one; an empty list is one without tokens."""
    if isinstance(plain, str):
        return plain
    if all(_is_id(item) for item in plain):
        return [int(item) for item in plain]
    return plain if all(isinstance(item, Mapping) for item in plain) else None


def _is_id(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim == 0 and item.dtype in _WHOLE
    return isinstance(item, Integral) and not isinstance(item, bool)
