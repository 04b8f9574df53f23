"""Incremental detokenisation: complete characters only, with stop strings that may span several tokens.

Owns the search for stop strings, and the display of single tokens. Knows nothing about decoding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # SentencePiece's token for a single byte


def stop_strings(stops: Any, name: str = "stop") -> tuple[str, ...]:
    """The value of argument `name` as a tuple of stop strings; it may be one string. Raises ValueError."""
    if not isinstance(stops, Sequence) or isinstance(stops, bytes):
        raise ValueError(f"{name}={stops!r} is not allowed: give a string, or a list of strings")
    strings = (stops,) if isinstance(stops, str) else tuple(stops)
    for stop in strings:
        if not isinstance(stop, str) or not stop:
            reason = "an empty stop string would end every text at once"
            raise ValueError(f"{name} holds {stop!r}: give strings of one character or more ({reason})")
    return strings


def checked_stops(tokenizer: PreTrainedTokenizerBase, stops: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings that can occur in this tokenizer's texts.

    Raises ValueError for one that is not a string, is empty, or has a character that no token of the tokenizer covers.
    """
    strings = stop_strings(stops)
    for stop in strings:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        decoded = str(tokenizer.decode(ids, skip_special_tokens=False)).lower()
        lost = [letter for letter in stop if not letter.isspace() and letter.lower() not in decoded]
        if lost:
            raise ValueError(
                f"stop string {stop!r} can't occur: the tokenizer has no tokens for {lost[0]!r}; leave it out"
            )
    return strings


class TextStream:
    """Turns a stream of tokens into text that never has to be retracted.

    Holds text back while it may be the start of a stop string, or is an incomplete character.

    Args:
        tokenizer: decodes the tokens.
        stops: stop strings; the text ends before the first one.
        after: number of tokens after which stop strings are searched for.
        keep_stop: keep the stop string at the end of the text.
        shown: ids of special tokens that are shown; other special tokens have no text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        *,
        after: int = 0,
        keep_stop: bool = False,
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stop_strings(stops)
        self._after, self._keep_stop = after, keep_stop
        added = tokenizer.added_tokens_decoder if shown else {}
        self._hidden = {token for token, piece in added.items() if piece.special} - set(shown)
        self._tokens: list[int] = []
        self._window = 0  # the text of tokens before this index is final
        self._prefix = 0  # start of the context for decoding the window; some tokenizers need earlier tokens
        self._pending = ""  # decoded, but possibly the start of a stop string
        self.text = ""  # all text returned so far
        self.stopped = False

    @property
    def decoded(self) -> int:
        """The number of characters decoded so far, including those held back."""
        return len(self.text) + len(self._pending)

    def push(self, token: int) -> str:
        """Add one token. Returns the text that became final, cut before a stop string."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        context = self._decode(self._prefix, self._window)
        decoded = self._decode(self._prefix, len(self._tokens))
        # Keep the window for an incomplete character, which the next token completes, and for a token without text
        # (a special token), which is no context for later ones.
        if decoded.endswith("\ufffd") or decoded == context:
            return ""
        self._pending += decoded[len(context) :]
        self._prefix, self._window = self._window, len(self._tokens)
        return self._release(final=False)

    def finish(self, whole: bool = False) -> str:
        """End the stream. Returns the text held back; `whole` drops an incomplete character at its end."""
        if self.stopped:
            return ""
        context = self._decode(self._prefix, self._window)
        rest = self._decode(self._prefix, len(self._tokens))[len(context) :]
        self._pending += rest.rstrip("\ufffd") if whole else rest
        self._prefix = self._window = len(self._tokens)
        return self._release(final=True)

    def _decode(self, begin: int, end: int) -> str:
        tokens = self._tokens[begin:end]
        if not self._hidden:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        shown = [token for token in tokens if token not in self._hidden]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False))

    def _release(self, final: bool) -> str:
        searching = len(self._tokens) > self._after
        matches = [(index, stop) for stop in self._stops if searching and (index := self._pending.find(stop)) >= 0]
        if matches:
            self.stopped = True
            index, stop = min(matches)
            return self._emit(index + len(stop) if self._keep_stop else index)
        held = 0
        if not final and searching:
            for stop in self._stops:
                longest = min(len(stop) - 1, len(self._pending))
                held = max(held, next((n for n in range(longest, 0, -1) if self._pending.endswith(stop[:n])), 0))
        return self._emit(len(self._pending) - held)

    def _emit(self, count: int) -> str:
        out, self._pending = self._pending[:count], self._pending[count:]
        self.text += out
        return out


class StopWatch:
    """A stop rule for one request: called with its new tokens so far, returns whether their text has a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, after: int = 0) -> None:
        self._new_stream = partial(TextStream, tokenizer, tuple(stops), after=after)
        self._stream, self._seen = self._new_stream(), 0

    def __call__(self, new: Sequence[int]) -> bool:
        if len(new) < self._seen:  # a step was interrupted, and its tokens are sampled again
            self._stream, self._seen = self._new_stream(), 0
        for token in new[self._seen :]:
            self._stream.push(token)
        self._seen = len(new)
        return self._stream.stopped


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a single token for display, with its leading space if it has one.

    A special token gives its name. A part of a character gives its bytes, as in `\\xe2\\x96`.
    """
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if "\ufffd" in text and (encoded := _piece_bytes(piece)) is not None:
        return encoded.decode("utf-8", errors="backslashreplace")
    if piece.startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops the space of the first word
        return " " + text
    return text


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The UTF-8 bytes that a token adds to a text; a character's bytes may come from several tokens."""
    text = token_text(tokenizer, token)
    piece = str(tokenizer.convert_ids_to_tokens(token))
    partial_character = "\ufffd" in str(tokenizer.decode([token], skip_special_tokens=False))
    encoded = _piece_bytes(piece) if partial_character else None
    return text.encode() if encoded is None else encoded


def _piece_bytes(piece: str) -> bytes | None:
    """The bytes of a vocabulary entry in byte notation (SentencePiece's or byte-level BPE's); None for others."""
    single = _BYTE.fullmatch(piece)
    if single is not None:
        return bytes([int(single[1], 16)])
    letters = {letter: value for value, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else None
