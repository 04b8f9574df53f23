"""Tool calls in an answer: splits streamed text into words and calls, and describes tools in words.

Owns the splitting; how a model writes a call is `tool_formats`'. The calls are the same wherever the text is cut into
pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from haast.serving.tool_formats import TAGS, CallFormat, Schemas, ToolCall

_QUOTES = re.compile(r'\\.|"', re.DOTALL)  # of a JSON text, with what a backslash escapes


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """System message with the tools, for models whose template does not support them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    form = f'{TAGS.open}\n{{"name": <name>, "arguments": <object>}}\n{TAGS.close}'
    return f"You can call these functions:\n{listed}\nTo call one, write its name and arguments as JSON:\n{form}"


class CallReader:
    """Splits a streamed text into plain text and tool calls.

    Args:
        form: format of the calls; None reads none, so all is plain text.
        schemas: of the tools' parameters, for formats whose values are text.

    The result does not depend on where the text is cut into pieces. Text that may be part of a call is held back, and
    whitespace around calls is dropped. Calls that are never closed, or can't be read, become plain text.
    """

    def __init__(self, form: CallFormat | None, schemas: Schemas | None = None) -> None:
        self._form, self._schemas = form, schemas or {}
        self._buffer, self._inside, self._whitespace = "", False, ""
        self._closings = list[int]()  # closing marks within a string of the call's JSON, which may be a part of it
        self._scanned, self._in_string = 0, False  # how far the call's quotes were counted, and what they say
        self._started = False  # whether any output was returned
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """Add a piece of text; returns the output that is final now."""
        if self._form is None:
            return [text] if text else []
        self._buffer += text
        return self._emit(self._read_marked(self._form) if self._form.open else self._read_object())

    def finish(self) -> list[str | ToolCall]:
        """End the text; returns the output that was held back."""
        held, self._buffer = self._buffer, ""
        if self._form is None or not held:
            return [self._whitespace + self._form.open] if self._form and self._inside else []
        if not self._form.open and not self._started:
            return self._emit(self._form.read(held.strip(), self._schemas) or [held])
        if self._inside and self._closings:  # a string that never ended
            self._buffer = held
            return self._emit(self._end_call(self._form, self._closings[0])) + self.push("") + self.finish()
        if self._inside:
            calls = None if self._form.close else self._form.read(held.strip(), self._schemas)
            return self._emit(calls or [self._whitespace + self._form.open + held])
        return self._emit([held] if held.strip() or not self.calls else [])

    def _read_object(self) -> list[str | ToolCall]:
        """Hold a text that starts with an object to its end."""
        if not self._started and (not self._buffer.strip() or self._buffer.lstrip().startswith("{")):
            return []
        held, self._buffer = self._buffer, ""
        return [held] if held else []

    def _read_marked(self, form: CallFormat) -> list[str | ToolCall]:
        parts: list[str | ToolCall] = []
        while not self._inside or form.close:
            if self._inside:
                if (end := self._closing(form)) is None:
                    break
                parts += self._end_call(form, end)
                continue
            before, here, after = self._buffer.partition(form.open)
            if not here:
                break
            words = before.rstrip()
            self._buffer, self._whitespace = after, before[len(words) :]  # dropped, if a call follows
            parts += [words] if words else []
            self._inside = True
        if not self._inside:
            keep = _undecided(self._buffer, form.open)
            if not self._buffer[: len(self._buffer) - keep].strip():
                keep = len(self._buffer)
            words, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
            if words:
                parts.append(words)
        return parts

    def _closing(self, form: CallFormat) -> int | None:
        """Where the call ends. A mark in a string of its JSON is a part of it, unless it can't be read so."""
        while (end := self._buffer.find(form.close, self._closings[-1] + 1 if self._closings else 0)) >= 0:
            if not self._string_at(end):
                whole = not self._closings or form.read(self._buffer[:end].strip(), self._schemas)
                return end if whole else self._closings[0]
            self._closings.append(end)
        return None

    def _string_at(self, end: int) -> bool:
        """Whether the buffer before `end` is a JSON object that stops within a string."""
        for quote in _QUOTES.finditer(self._buffer, self._scanned, end):
            self._in_string ^= quote[0] == '"'
        self._scanned = end
        return self._in_string and self._buffer.lstrip().startswith("{")

    def _end_call(self, form: CallFormat, end: int) -> list[str | ToolCall]:
        """The call that ends at `end`, or its text; what follows stays in the buffer."""
        before, self._buffer = self._buffer[:end], self._buffer[end + len(form.close) :]
        self._closings, self._scanned, self._in_string, self._inside = [], 0, False, False
        calls = form.read(before.strip(), self._schemas)
        self.calls += len(calls or [])
        return list(calls) if calls else [f"{self._whitespace}{form.open}{before}{form.close}"]

    def _emit(self, parts: Sequence[str | ToolCall]) -> list[str | ToolCall]:
        self._started = self._started or bool(parts)
        return list(parts)


def _undecided(text: str, mark: str) -> int:
    """Number of characters at a text's end that may be whitespace before a mark, or the start of a mark."""
    longest = min(len(mark) - 1, len(text))
    mark_start = next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
    whole = text[: len(text) - mark_start]
    return mark_start + len(whole) - len(whole.rstrip())
