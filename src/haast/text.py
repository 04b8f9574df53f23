"""From tokens to text as they come: whole characters only, stop strings across token borders.

Owns incremental detokenisation, the search for stop strings, and one token made readable. Knows nothing of decoding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte that is no character by itself


def stop_strings(stops: Any, name: str = "stop") -> tuple[str, ...]:
    """Stop strings, given as `name`; one by itself is one string, not its letters. Raises ValueError."""
    if not isinstance(stops, Sequence) or isinstance(stops, bytes):
        raise ValueError(f"{name}={stops!r} is not allowed: give a string, or a list of strings")
    several = (stops,) if isinstance(stops, str) else tuple(stops)
    for stop in several:
        if not isinstance(stop, str) or not stop:
            why = "an empty stop string would end every text at once"
            raise ValueError(f"{name} holds {stop!r}: give strings of one character or more ({why})")
    return several


def checked_stops(tokenizer: PreTrainedTokenizerBase, stops: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings that a text of this tokenizer can hold.

    Raises ValueError for one that is no text, is empty, or has a character that none of the tokenizer's tokens write.
    """
    several = stop_strings(stops)
    for stop in several:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        written = str(tokenizer.decode(ids, skip_special_tokens=False)).lower()
        lost = [letter for letter in stop if not letter.isspace() and letter.lower() not in written]
        if lost:
            raise ValueError(
                f"stop string {stop!r} can't come up: the tokenizer has no tokens that write {lost[0]!r}; leave it out"
            )
    return several


class TextStream:
    """Turns a growing list of tokens into text that never has to be taken back.

    Text that may be the beginning of a stop string, or half a character, is held until it is settled.

    Args:
        stops: strings before which the text ends.
        after: tokens before which no stop string is looked for.
        keep_stop: the stop string that ends the text is the last of it.
        special: special tokens are text too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        *,
        after: int = 0,
        keep_stop: bool = False,
        special: bool = False,
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stop_strings(stops)
        self._after, self._keep_stop, self._special = after, keep_stop, special
        self._tokens: list[int] = []
        self._window = 0  # tokens before it are settled: their text no longer changes
        self._prefix = 0  # where the window's context begins; some tokenizers join words by looking back
        self._pending = ""  # decoded, but possibly the beginning of a stop string
        self.text = ""  # given out so far
        self.stopped = False

    @property
    def decoded(self) -> int:
        """Characters so far, those included that are held."""
        return len(self.text) + len(self._pending)

    def push(self, token: int) -> str:
        """Add one token; returns the text that became certain, cut before a stop string."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self._decode(self._prefix, self._window)
        now = self._decode(self._prefix, len(self._tokens))
        # Half a character, which the next token completes; or nothing new (a special token), which is no context for
        # what follows: the window stays where it is.
        if now.endswith("\ufffd") or now == before:
            return ""
        self._pending += now[len(before) :]
        self._prefix, self._window = self._window, len(self._tokens)
        return self._release(final=False)

    def finish(self, whole: bool = False) -> str:
        """No token follows: returns what was held back, with `whole` without a character that was not completed."""
        if self.stopped:
            return ""
        before = self._decode(self._prefix, self._window)
        rest = self._decode(self._prefix, len(self._tokens))[len(before) :]
        self._pending += rest.rstrip("\ufffd") if whole else rest
        self._prefix = self._window = len(self._tokens)
        return self._release(final=True)

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=not self._special))

    def _release(self, final: bool) -> str:
        watching = len(self._tokens) > self._after
        found = [(at, stop) for stop in self._stops if watching and (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, stop = min(found)
            return self._give(at + len(stop) if self._keep_stop else at)
        keep = 0
        if not final and watching:
            for stop in self._stops:
                longest = min(len(stop) - 1, len(self._pending))
                keep = max(keep, next((n for n in range(longest, 0, -1) if self._pending.endswith(stop[:n])), 0))
        return self._give(len(self._pending) - keep)

    def _give(self, count: int) -> str:
        out, self._pending = self._pending[:count], self._pending[count:]
        self.text += out
        return out


class StopWatch:
    """A stop rule for one request: does its text, given the new tokens so far, hold a stop string?"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, after: int = 0) -> None:
        self._fresh = partial(TextStream, tokenizer, tuple(stops), after=after)
        self._stream, self._seen = self._fresh(), 0

    def __call__(self, new: Sequence[int]) -> bool:
        if len(new) < self._seen:  # a step was interrupted, and its tokens are chosen again
            self._stream, self._seen = self._fresh(), 0
        for token in new[self._seen :]:
            self._stream.push(token)
        self._seen = len(new)
        return self._stream.stopped


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token by itself, as a reader can tell it: its text with a leading space where it has one.

    Special tokens show their names. A token that is a piece of a character shows its bytes, as in `\\xe2\\x96`.
    """
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if "\ufffd" in text and (written := _piece_bytes(piece)) is not None:
        return written.decode("utf-8", errors="backslashreplace")
    if piece.startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops the space of a text's first word
        return " " + text
    return text


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes that a token adds to a text; those of a character may be spread over several tokens."""
    text = token_text(tokenizer, token)
    piece = str(tokenizer.convert_ids_to_tokens(token))
    split = "\ufffd" in str(tokenizer.decode([token], skip_special_tokens=False))
    written = _piece_bytes(piece) if split else None
    return text.encode() if written is None else written


def _piece_bytes(piece: str) -> bytes | None:
    """The bytes that a piece of a vocabulary stands for, where it is written byte by byte."""
    written = _BYTE.fullmatch(piece)
    if written is not None:
        return bytes([int(written[1], 16)])
    letters = {letter: value for value, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else None
