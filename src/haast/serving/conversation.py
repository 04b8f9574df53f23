"""From messages to a prompt: the model's chat template, its tools and its reasoning.

Owns what a template is able to say. Knows no sampling and no engine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from haast.errors import PromptError
from haast.serving.problems import TooLongError
from haast.serving.reasoning import ReasoningMarks, marks_of
from haast.serving.schema import ChatMessage, TextPart, Tool
from haast.serving.tools import CLOSE, OPEN, Style, instruction, style_of

LETTERS = 16  # a token; of a text with more for every token that fits, the beginning is looked at first
_SEAM = 16  # tokens by which a text's beginning may have more than it has within the text


@dataclass(frozen=True)
class Conversation:
    """A prompt made of messages.

    Attributes:
        ids: its tokens.
        reasoning: it ends inside a reasoning.
    """

    ids: list[int]
    reasoning: bool


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: the model's.
        most: tokens that a prompt may have; None where it may have any number.

    Attributes:
        marks: of reasoning; None where it knows none.
        style: how the model writes tool calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> None:
        self._most = most
        self._tokenizer, self._tokenizing = tokenizer, threading.Lock()  # fast tokenizers keep a call's settings
        found = tokenizer.chat_template
        templates = list(found.values()) if isinstance(found, dict) else [found or ""]
        self._text = "\n".join(templates)
        self.marks: ReasoningMarks | None = marks_of(self._text)
        native = style_of(self._text)
        self._native = native is not None
        self.style: Style = native or "marks"

    def text_ids(self, text: str, special: bool = True, whole: bool = False) -> list[int]:
        """Tokens of a text.

        Raises:
            PromptError: it is no text. TooLongError: it is far longer than a prompt may be, which is told without the
                seconds that all of it would take; `whole` takes them.
        """
        if not whole and self._most is not None and len(text) > LETTERS * self._most:
            least = len(self.text_ids(text[: LETTERS * self._most], special, whole=True)) - _SEAM
            if least > self._most:
                raise TooLongError(self._most, f"more than {least} tokens", "messages")
        try:
            with self._tokenizing:
                return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the text can't be tokenised: {error}") from error

    def text_of(self, ids: Sequence[int]) -> str:
        """What tokens say."""
        with self._tokenizing:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), settings: Mapping[str, Any] | None = None
    ) -> Conversation:
        """The prompt for the assistant's next message.

        Args:
            messages: of the conversation so far.
            tools: that the model may call.
            settings: further variables of the template.

        Raises:
            PromptError: a message that the template does not take, or a part that is no text.
        """
        if not self._text:
            raise PromptError("this model has no chat template: use /v1/completions")
        settings = dict(settings or {})
        for name in ("messages", "tools", "documents", "tokenize", "chat_template", "add_generation_prompt"):
            if name in settings:
                raise PromptError(f"chat_template_kwargs holds {name!r}, which the request itself says")
        told = [self._message(message) for message in messages]
        described: list[Any] = [tool.model_dump(exclude_none=True) for tool in tools]
        if tools and not self._native:
            told, described = _instructed(told, described), []
        try:
            with self._tokenizing:
                text = self._tokenizer.apply_chat_template(
                    told, tools=described or None, add_generation_prompt=True, tokenize=False, **settings
                )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the model's chat template does not take these messages: {error}") from error
        assert isinstance(text, str), "one conversation"
        return Conversation(self.text_ids(text, False), self.marks is not None and self.marks.opened_by(text))

    def knows(self, setting: str) -> bool:
        """Whether the template looks at a variable."""
        return setting in self._text

    def _message(self, message: ChatMessage) -> dict[str, Any]:
        role = message.role
        if role == "developer" and "developer" not in self._text:
            role = "system"
        told: dict[str, Any] = {"role": role, "content": joined(message.content, role)}
        calls: list[dict[str, Any]] = [
            {"id": call.id or "", "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
            for call in message.tool_calls or ()
            for arguments in [_arguments(call.function.arguments)]
        ]
        if message.name is not None:
            told["name"] = message.name
        if self._native:
            if calls:
                told["tool_calls"] = calls
            if message.tool_call_id is not None:
                told["tool_call_id"] = message.tool_call_id
        elif calls:
            made = [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]
            written = [f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}" for call in made]
            told["content"] = "\n".join(filter(None, [told["content"], *written]))
        elif role == "tool":
            told |= {"role": "user", "content": f"<tool_response>\n{told['content']}\n</tool_response>"}
        return told


def joined(content: str | Sequence[TextPart] | None, where: str) -> str:
    """The text of a message. Raises PromptError for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise PromptError(f"the {where} message holds a part of type {part.type!r}: this model reads text alone")
    return "\n".join(part.text or "" for part in content)


def _arguments(given: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        read = json.loads(given or "{}")
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise PromptError(f"the arguments of a tool call are {given[:80]!r}: give a JSON object")
    return read


def _instructed(told: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the tools in words, for templates that know none."""
    words = instruction([tool["function"] for tool in tools])
    if told and told[0]["role"] == "system":
        first = {**told[0], "content": f"{told[0]['content']}\n\n{words}".strip()}
        return [first, *told[1:]]
    return [{"role": "system", "content": words}, *told]
