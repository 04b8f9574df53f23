"""What of a server's reply becomes an answer: text, tokens, and whether it ended.

Owns the mistrust: replies are checked for shape, for the target's own prompt, and for tokens that the target knows.
Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from haast.training.chat import end_of_turn
from haast.training.generation_queue import Question

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion


class NoAnswerError(Exception):
    """One prompt got no answer; others may. `refused`: the server said that this prompt never will."""

    def __init__(self, words: str, refused: bool = False) -> None:
        super().__init__(words)
        self.refused = refused


@dataclass(frozen=True)
class Reply:
    """What of a completion is kept."""

    text: str
    tokens: list[int]
    finished: bool  # by itself, not by the limit
    retokenised: bool  # made of the text, since the server told no token ids


def why_unusable(completion: ChatCompletion | None) -> str:
    """Why a reply is no answer; empty where it is one. The `openai` package does not check what servers send."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return "the reply is no chat completion"
    if not isinstance(choices[0].message.content, str | None):
        return "the reply's content is no text"
    if choices[0].finish_reason not in ("stop", "length"):
        return f"the answer ended by {choices[0].finish_reason!r}"
    return ""


class ReplyReader:
    """Reads replies to a target's prompts.

    Args:
        tokenizer: the target's, with a chat template.
        end_ids: tokens that end the target's answers.
        name: the target's, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        end = end_of_turn(tokenizer)
        self._end = end if end is not None else next(iter(end_ids), None)
        self._ends = {*end_ids, self._end}

    def read(self, completion: ChatCompletion, question: Question, prompt: list[int]) -> Reply:
        """The answer in a usable completion; the end-of-turn token is put after what ended by itself.

        Raises:
            NoAnswerError: there is nothing in it.
            ValueError: the server runs another model or template, or keeps the reasoning apart.
        """
        choice = completion.choices[0]
        text, finished = choice.message.content or "", choice.finish_reason == "stop"
        told: list[int] | None = (choice.model_extra or {}).get("token_ids")
        if told:
            theirs = (completion.model_extra or {}).get("prompt_token_ids")
            if theirs is not None and list(theirs) != prompt:
                raise ValueError(
                    f"the endpoint makes {len(theirs)} tokens of prompt {question.id!r}, {self._name} makes other "
                    f"{len(prompt)} of it: serve the target itself, with its own chat template"
                )
            tokens = [int(i) for i in told]
            if max(tokens) >= len(self._tokenizer):
                raise ValueError(
                    f"the endpoint answers with token {max(tokens)}, the tokenizer of {self._name} knows "
                    f"{len(self._tokenizer)}: serve the target itself"
                )
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        else:
            said = choice.message.model_extra or {}
            if said.get("reasoning_content") or said.get("reasoning"):
                raise ValueError(
                    "the endpoint parts the reasoning from the answer, so the target's own text is lost: serve it "
                    "without a reasoning parser, or ask with --no-thinking"
                )
            tokens = [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]
        if finished and self._end is not None and (not tokens or tokens[-1] not in self._ends):
            tokens.append(self._end)
        if not tokens:
            raise NoAnswerError("the answer is empty")
        return Reply(text, tokens, finished, retokenised=not told)
