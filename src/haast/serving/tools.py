"""Tool calls: parses them from streamed text, and builds the grammar that makes a model write one.

Owns the two supported formats. Knows nothing of tokens or drafting: the calls are the same wherever the text is cut
into pieces.

    marks    <tool_call>{"name": "f", "arguments": {...}}</tool_call>      Qwen, Hermes, templates without a format
    object   {"name": "f", "parameters": {...}} as the whole answer        Llama 3
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Style = Literal["marks", "object"]
_ARGUMENTS = {"marks": "arguments", "object": "parameters"}


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it; `arguments` is a JSON object as text."""

    name: str
    arguments: str

    def id_of(self, answer: str, number: int) -> str:
        """The call's id: a hash of the answer's id and the call's number."""
        return f"call_{hashlib.sha256(f'{answer} {number}'.encode()).hexdigest()[:24]}"


def style_of(template: str) -> Style | None:
    """The format of tool calls that a chat template teaches; None if it teaches none that is supported."""
    if OPEN in template:
        return "marks"
    if "tools" in template and '"parameters"' in template and '"name"' in template:
        return "object"
    return None


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """System message with the tools, for models whose template does not support them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    form = f'{OPEN}\n{{"name": <name>, "arguments": <object>}}\n{CLOSE}'
    return f"You can call these functions:\n{listed}\nTo call one, write its name and arguments as JSON:\n{form}"


def parsed(text: str) -> ToolCall | None:
    """Parse a text as one tool call; None if it is not one."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        return None
    arguments = read.get("arguments", read.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(read["name"], json.dumps(arguments, ensure_ascii=False))


def call_grammar(
    tools: Sequence[Mapping[str, Any]], style: Style, several: bool, spacing: Mapping[str, Any], free: bool = False
) -> str:
    """A Lark grammar for calls of these tools.

    Args:
        tools: in OpenAI's format, `{"type": "function", "function": {...}}`.
        style: format of the calls.
        several: allow several calls instead of exactly one.
        spacing: llguidance's options for JSON.
        free: also allow any text without a call.
    """
    rules = [f"call_{n}: %json {json.dumps(_call_schema(tool, style, spacing))}" for n, tool in enumerate(tools)]
    one = " | ".join(f"call_{n}" for n in range(len(tools)))
    if style == "object":
        words = [f"start: {one} | words", r"words: /[^{](.|\n)*/"] if free else [f"start: {one}"]
        return "\n".join([*words, *rules])
    more = r' ("\n" marked)*' if several else ""
    marked = rf'marked: "{OPEN}\n" ({one}) "\n{CLOSE}"'
    if not free:
        return "\n".join([f"start: marked{more}", marked, *rules])
    # Text without the mark, or text up to the mark and then a call.
    words = [
        f"start: WORDS | lead rest{more}",
        rf"lead[lazy]: /(.|\n)*{OPEN}/",
        rf'rest: "\n" ({one}) "\n{CLOSE}"',
        rf"WORDS: /(.|\n)*/ & ~/(.|\n)*{OPEN}(.|\n)*/",
    ]
    return "\n".join([*words, *([marked] if several else []), *rules])


def _call_schema(tool: Mapping[str, Any], style: Style, spacing: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    arguments = function.get("parameters") or {"type": "object"}
    kept = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}  # targets of $ref
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, _ARGUMENTS[style]: arguments},
        "required": ["name", _ARGUMENTS[style]],
        "additionalProperties": False,
        "x-guidance": dict(spacing),
        **kept,
    }


class CallReader:
    """Splits a streamed text into plain text and tool calls.

    Args:
        style: format of the calls; None parses none, so all is plain text.

    The result does not depend on where the text is cut into pieces. Text that may be part of a call is held back, and
    whitespace around calls is dropped. A call that is never closed, or can't be parsed, becomes plain text.
    """

    def __init__(self, style: Style | None) -> None:
        self._style, self._buffer, self._inside, self._whitespace = style, "", False, ""
        self._started = False  # whether any output was returned
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """Add a piece of text; returns the output that is final now."""
        if self._style is None:
            return [text] if text else []
        self._buffer += text
        return self._read_object() if self._style == "object" else self._read_marked()

    def finish(self) -> list[str | ToolCall]:
        """End the text; returns the output that was held back."""
        held, self._buffer = self._buffer, ""
        if self._style == "object" and not self._started:
            call = parsed(held.strip())
            if call is not None:
                return self._emit([call])
        rest = (self._whitespace + OPEN if self._inside else "") + held
        if self.calls and not self._inside:
            rest = rest if rest.strip() else ""
        return self._emit([rest] if rest else [])

    def _read_object(self) -> list[str | ToolCall]:
        """Hold a text that starts with an object to its end."""
        if not self._started and (not self._buffer.strip() or self._buffer.lstrip().startswith("{")):
            return []
        held, self._buffer = self._buffer, ""
        return self._emit([held] if held else [])

    def _read_marked(self) -> list[str | ToolCall]:
        parts: list[str | ToolCall] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            before, here, after = self._buffer.partition(mark)
            if not here:
                break
            self._buffer = after
            if self._inside:
                call = parsed(before.strip())
                parts.append(f"{self._whitespace}{OPEN}{before}{CLOSE}" if call is None else call)
            else:
                words = before.rstrip()
                self._whitespace = before[len(words) :]  # dropped, if a call follows
                parts += [words] if words else []
            self._inside = not self._inside
            self.calls += sum(isinstance(each, ToolCall) for each in parts[-1:])
        if not self._inside:
            keep = _undecided(self._buffer, OPEN)
            if self.calls or not self._buffer[: len(self._buffer) - keep].strip():
                keep = len(self._buffer) if not self._buffer[: len(self._buffer) - keep].strip() else keep
            words, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
            if words:
                parts.append(words)
        return self._emit(parts)

    def _emit(self, parts: list[str | ToolCall]) -> list[str | ToolCall]:
        self._started = self._started or bool(parts)
        if self._style == "object":
            self.calls += sum(isinstance(each, ToolCall) for each in parts)
        return parts


def _undecided(text: str, mark: str) -> int:
    """Number of characters at a text's end that may be whitespace before a mark, or the start of a mark."""
    longest = min(len(mark) - 1, len(text))
    mark_start = next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
    whole = text[: len(text) - mark_start]
    return mark_start + len(whole) - len(whole.rstrip())
