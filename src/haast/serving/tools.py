"""Tool calls: how a model writes them, read piece by piece, and the grammar that makes it write one.

Owns the two ways of writing that are read, and JSON calls out of text. Knows nothing of tokens or of drafting: a
text's pieces may be cut anywhere, and the calls are the same.

    marks    <tool_call>{"name": "f", "arguments": {...}}</tool_call>      Qwen, Hermes, and models without a way
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
        """Its id: the same for the same answer and place."""
        return f"call_{hashlib.sha256(f'{answer} {number}'.encode()).hexdigest()[:24]}"


def style_of(template: str) -> Style | None:
    """How a chat template tells its model to write calls; None where it can't tell it any that is read here."""
    if OPEN in template:
        return "marks"
    if "tools" in template and '"parameters"' in template and '"name"' in template:
        return "object"
    return None


def instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told whose template knows no tools."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    form = f'{OPEN}\n{{"name": <name>, "arguments": <object>}}\n{CLOSE}'
    return f"You can call these functions:\n{listed}\nTo call one, write its name and arguments as JSON:\n{form}"


def parsed(text: str) -> ToolCall | None:
    """The call that a text is; None where it is none."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        return None
    given = read.get("arguments", read.get("parameters", {}))
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    return ToolCall(read["name"], json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else None


def call_grammar(
    tools: Sequence[Mapping[str, Any]], style: Style, several: bool, spacing: Mapping[str, Any], free: bool = False
) -> str:
    """Lark for one call of these tools, or with `several` one or more; with `free` also for any words without one.

    Args:
        tools: OpenAI's, `{"type": "function", "function": {...}}`.
        style: how the model writes calls.
        spacing: llguidance's options for JSON.
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
    # Words without the mark, or words up to the mark and a call from there on.
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
    kept = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}  # what references point at
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, _ARGUMENTS[style]: arguments},
        "required": ["name", _ARGUMENTS[style]],
        "additionalProperties": False,
        "x-guidance": dict(spacing),
        **kept,
    }


class CallReader:
    """Divides a text that comes in pieces into words for the reader and calls.

    Args:
        style: how the model writes calls; None reads none, all is words.

    What is read is the same however the text is cut. Text that may be part of a call is held; blanks around calls
    belong to them. A call that is never closed, or is none, is text after all.
    """

    def __init__(self, style: Style | None) -> None:
        self._style, self._held, self._inside, self._blank = style, "", False, ""
        self._begun = False  # whether any words were given out
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """The next piece of text; returns what became certain."""
        if self._style is None:
            return [text] if text else []
        self._held += text
        return self._objects() if self._style == "object" else self._marked()

    def finish(self) -> list[str | ToolCall]:
        """The text ends here."""
        held, self._held = self._held, ""
        if self._style == "object" and not self._begun:
            call = parsed(held.strip())
            if call is not None:
                return self._given([call])
        rest = (self._blank + OPEN if self._inside else "") + held
        if self.calls and not self._inside:
            rest = rest if rest.strip() else ""
        return self._given([rest] if rest else [])

    def _objects(self) -> list[str | ToolCall]:
        """A text that begins as an object is held to its end."""
        if not self._begun and (not self._held.strip() or self._held.lstrip().startswith("{")):
            return []
        held, self._held = self._held, ""
        return self._given([held] if held else [])

    def _marked(self) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            before, here, after = self._held.partition(mark)
            if not here:
                break
            self._held = after
            if self._inside:
                call = parsed(before.strip())
                found.append(f"{self._blank}{OPEN}{before}{CLOSE}" if call is None else call)
            else:
                words = before.rstrip()
                self._blank = before[len(words) :]  # belongs to the call, if it is one
                found += [words] if words else []
            self._inside = not self._inside
            self.calls += sum(isinstance(each, ToolCall) for each in found[-1:])
        if not self._inside:
            keep = _held_back(self._held, OPEN)
            if self.calls or not self._held[: len(self._held) - keep].strip():
                keep = len(self._held) if not self._held[: len(self._held) - keep].strip() else keep
            words, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if words:
                found.append(words)
        return self._given(found)

    def _given(self, found: list[str | ToolCall]) -> list[str | ToolCall]:
        self._begun = self._begun or bool(found)
        if self._style == "object":
            self.calls += sum(isinstance(each, ToolCall) for each in found)
        return found


def _held_back(text: str, mark: str) -> int:
    """Characters at a text's end that may be blanks before a mark, or the beginning of one."""
    longest = min(len(mark) - 1, len(text))
    begun = next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
    whole = text[: len(text) - begun]
    return begun + len(whole) - len(whole.rstrip())
