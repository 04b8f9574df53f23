"""Tool calls in an answer: splits streamed text into words and calls, and describes tools in words.

Owns the splitting; how a model writes a call is `tool_formats`'. The calls are the same wherever the text is cut into
pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from haast.serving.tool_formats import TAGS, CallFormat, Schemas, ToolCall


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
            mark = form.close if self._inside else form.open
            before, here, after = self._buffer.partition(mark)
            if not here:
                break
            self._buffer = after
            if self._inside:
                calls = form.read(before.strip(), self._schemas)
                parts += calls or [f"{self._whitespace}{form.open}{before}{form.close}"]
                self.calls += len(calls or [])
            else:
                words = before.rstrip()
                self._whitespace = before[len(words) :]  # dropped, if a call follows
                parts += [words] if words else []
            self._inside = not self._inside
        if not self._inside:
            keep = _undecided(self._buffer, form.open)
            if not self._buffer[: len(self._buffer) - keep].strip():
                keep = len(self._buffer)
            words, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
            if words:
                parts.append(words)
        return parts

    def _emit(self, parts: Sequence[str | ToolCall]) -> list[str | ToolCall]:
        self._started = self._started or bool(parts)
        return list(parts)


def _undecided(text: str, mark: str) -> int:
    """Number of characters at a text's end that may be whitespace before a mark, or the start of a mark."""
    longest = min(len(mark) - 1, len(text))
    mark_start = next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
    whole = text[: len(text) - mark_start]
    return mark_start + len(whole) - len(whole.rstrip())
