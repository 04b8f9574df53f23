"""What is said after a prompt: pieces as they come, all of it, and the settings that lead to it.

Owns the step from tokens to text for one request. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from haast.core import Emission, Processor, Request, SamplingParams
from haast.errors import CancelledError
from haast.stats import Stats
from haast.text import TextStream


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
