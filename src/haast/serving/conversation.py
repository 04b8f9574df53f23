"""Turns chat messages into a prompt with the model's chat template, its tools and its reasoning.

Owns what a template supports, and the replacements for what it does not. Knows nothing of sampling or the engine.
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
from haast.serving.api_errors import TooLongError
from haast.serving.reasoning import ReasoningMarks, marks_of
from haast.serving.schema import ChatMessage, TextPart, Tool
from haast.serving.tool_formats import TAGS, CallFormat, format_of
from haast.serving.tools import instruction

LETTERS = 16  # characters per token; of a text with more per token that fits, only the start is tokenised at first
_MARGIN = 16  # tokens by which a cut text may be longer than the same text inside the whole


@dataclass(frozen=True)
class Conversation:
    """A prompt that was rendered from messages.

    Attributes:
        ids: its token ids.
        reasoning: whether it ends inside a reasoning.
    """

    ids: list[int]
    reasoning: bool


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: the model's.
        most: maximum tokens of a prompt; None for no limit.

    Attributes:
        marks: of reasoning; None if the template has none.
        calls: format of the model's tool calls.
        special_marks: ids of those of its marks that are special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> None:
        self._most = most
        self._tokenizer = tokenizer
        self._tokenizer_lock = threading.Lock()  # fast tokenizers keep settings of a call as state
        template = tokenizer.chat_template
        templates = list(template.values()) if isinstance(template, dict) else [template or ""]
        self._text = "\n".join(templates)
        self.marks: ReasoningMarks | None = marks_of(self._text)
        native = format_of(self._text)
        self._supports_tools = native is not None
        self.calls: CallFormat = native or TAGS
        special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_marks = {mark: special[mark] for mark in self.calls.marks if mark in special}

    def text_ids(self, text: str, special: bool = True, whole: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: to tokenise.
            special: add the tokenizer's special tokens, such as BOS.
            whole: tokenise a text of any length.

        Raises:
            PromptError: it can't be tokenised.
            TooLongError: it is far longer than a prompt may be. Not raised with `whole`, which may take seconds.
        """
        if not whole and self._most is not None and len(text) > LETTERS * self._most:
            least = len(self.text_ids(text[: LETTERS * self._most], special, whole=True)) - _MARGIN
            if least > self._most:
                raise TooLongError(self._most, f"more than {least} tokens", "messages")
        try:
            with self._tokenizer_lock:
                return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(f"the text can't be tokenised: {error}") from error

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        with self._tokenizer_lock:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), settings: Mapping[str, Any] | None = None
    ) -> Conversation:
        """The prompt for the assistant's next message.

        Args:
            messages: the conversation so far.
            tools: tools that the model may call.
            settings: further variables of the template.

        Raises:
            PromptError: the template rejects a message, or a message has a part that is not text.
        """
        if not self._text:
            raise PromptError("this model has no chat template: use /v1/completions")
        settings = dict(settings or {})
        for name in ("messages", "tools", "documents", "tokenize", "chat_template", "add_generation_prompt"):
            if name in settings:
                raise PromptError(f"chat_template_kwargs holds {name!r}, which the request sets itself: leave it out")
        converted = [self._message(message) for message in messages]
        tool_schemas: list[Any] = [tool.model_dump(exclude_none=True) for tool in tools]
        if tools and not self._supports_tools:
            converted, tool_schemas = _with_instruction(converted, tool_schemas), []
        try:
            with self._tokenizer_lock:
                text = self._tokenizer.apply_chat_template(
                    converted, tools=tool_schemas or None, add_generation_prompt=True, tokenize=False, **settings
                )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the model's chat template rejects these messages: {error}") from error
        assert isinstance(text, str), "one conversation"
        return Conversation(self.text_ids(text, False), self.marks is not None and self.marks.opened_by(text))

    def knows(self, setting: str) -> bool:
        """Whether the template uses a variable."""
        return setting in self._text

    def _message(self, message: ChatMessage) -> dict[str, Any]:
        role = message.role
        if role == "developer" and "developer" not in self._text:
            role = "system"
        converted: dict[str, Any] = {"role": role, "content": joined(message.content, role)}
        calls: list[dict[str, Any]] = [
            {"id": call.id or "", "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
            for call in message.tool_calls or ()
            for arguments in [_arguments(call.function.arguments)]
        ]
        if message.name is not None:
            converted["name"] = message.name
        if self._supports_tools:
            if calls:
                converted["tool_calls"] = calls
            if message.tool_call_id is not None:
                converted["tool_call_id"] = message.tool_call_id
        elif calls:
            functions = [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]
            blocks = [f"{TAGS.open}\n{json.dumps(call, ensure_ascii=False)}\n{TAGS.close}" for call in functions]
            converted["content"] = "\n".join(filter(None, [converted["content"], *blocks]))
        elif role == "tool":
            response = f"<tool_response>\n{converted['content']}\n</tool_response>"
            converted |= {"role": "user", "content": response}
        return converted


def joined(content: str | Sequence[TextPart] | None, where: str) -> str:
    """The text of a message, its parts joined by newlines. Raises PromptError for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise PromptError(f"the {where} message holds a part of type {part.type!r}: this model supports text only")
    return "\n".join(part.text or "" for part in content)


def _arguments(arguments: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PromptError(f"the arguments of a tool call are {arguments[:80]!r}: give a JSON object")
    return value


def _with_instruction(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe the tools in the system message, for templates without tool support."""
    words = instruction([tool["function"] for tool in tools])
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{words}".strip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]
