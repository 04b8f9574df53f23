"""Checks of characters that span several tokens: none is broken in a stream, or cut at the end."""

from __future__ import annotations

from collections.abc import Iterator

from haast.serving.conform.answers import streamed_answer
from haast.serving.conform.base import Check, Theme, demand, not_visible, short
from haast.serving.conform.client import Streamed
from haast.serving.conform.subject import CHAT, TEXT, Subject, same_text

_BROKEN = "\ufffd"
# Patterns that any model continues, in characters of three and four bytes.
_PATTERNS = (
    "\U0001f642\U0001f680\U0001f642\U0001f680\U0001f642\U0001f680\U0001f642\U0001f680",
    "\u65e5\u672c\u8a9e\u3001\u65e5\u672c\u8a9e\u3001\u65e5\u672c\u8a9e\u3001",
    "\U0001f98a = fox, \U0001f431 = cat, \U0001f98a = fox, \U0001f431 = cat, ",
)


def _prompts(subject: Subject) -> Iterator[tuple[str, str]]:
    for pattern in _PATTERNS:
        if subject.offers_text():
            yield TEXT, pattern
        yield CHAT, f"Repeat this three times: {pattern}"


def utf8_stream(subject: Subject) -> str:
    """Every delta of texts with many multi-byte characters."""
    wide = 0
    for path, prompt in _prompts(subject):
        whole = subject.ask(prompt, path, max_tokens=24).text
        streamed = subject.stream(prompt, path, max_tokens=24)
        demand(not streamed.torn, f"{short(prompt, 30)}: an event is not valid UTF-8")
        if _BROKEN not in whole.rstrip(_BROKEN):
            _no_broken_delta(streamed, whole, prompt)
        same_text(whole, streamed_answer(streamed).text, f"{path} of {short(prompt, 30)}")
        wide += sum(ord(character) > 0x7FF for character in whole)
    if not wide:
        not_visible("the model generates no character of three bytes or more")
    return f"{wide} characters of three bytes or more, each whole"


def _no_broken_delta(streamed: Streamed, whole: str, prompt: str) -> None:
    """U+FFFD is allowed only at the end of the whole text, when a limit cut its last character."""
    pieces = [piece for chunk in streamed.chunks for piece in _pieces(chunk)]
    broken = [piece for piece in pieces if _BROKEN in piece]
    cut = whole.endswith(_BROKEN) and broken == pieces[-1:]
    demand(not broken or cut, f"{short(prompt, 30)}: a delta has U+FFFD, {short(broken[:1])}")


def _pieces(chunk: dict[str, object]) -> Iterator[str]:
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        piece = (choice.get("delta") or {}).get("content") or choice.get("text")
        if piece:
            yield piece


def utf8_cut(subject: Subject) -> str:
    """Token limits that fall inside a character."""
    for path, prompt in _prompts(subject):
        whole = subject.ask(prompt, path, max_tokens=24).text
        if any(ord(character) > 0x7FF for character in whole.rstrip(_BROKEN)[:4]):
            return _cut_anywhere(subject, path, prompt, whole.rstrip(_BROKEN))
    return not_visible("no text starts with a character of three bytes or more")


def _cut_anywhere(subject: Subject, path: str, prompt: str, whole: str) -> str:
    for most in range(1, 9):
        text = subject.ask(prompt, path, max_tokens=most).text
        demand(_BROKEN not in text, f"max_tokens={most} leaves a broken character: {short(text)}")
        demand(whole.startswith(text), f"max_tokens={most}: {short(text)} is not a prefix of the longer text")
    return "cut after 1 to 8 tokens: never a broken character"


THEME = Theme(
    "unicode",
    (
        Check(
            "utf8-stream", ("A20",), "no delta holds a broken character, and all deltas add up to the text", utf8_stream
        ),
        Check("utf8-cut", ("A20",), "a limit inside a character leaves no U+FFFD", utf8_cut),
    ),
)
