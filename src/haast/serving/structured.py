"""Text by a grammar: JSON schemas, regular expressions, Lark and GBNF grammars, choices.

Owns how a grammar becomes masks for the tokens that may come, along the path of the text (`GrammarGuide`), and drafts
that have to come. llguidance does the parsing. Knows neither models nor the server's protocol.

A guide is a logits processor: it is called once for every token that is chosen, with that token's own history, so a
text follows its grammar at any place of a drafted block as it does without drafts. It is a `haast.core.Guide` too:
drafts that the grammar forbids are not run, and tokens that it leaves no choice about are drafted for free.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import llguidance
import llguidance.hf
import torch
from llguidance import LLMatcher, LLParserLimits
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haast.errors import PromptError

# How JSON is spaced: as models write it by themselves, and nothing else, so that a text can't run on in blanks.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A grammar of a stranger must not take the server's time or memory: a tenth of what the library allows.
_LIMITS = LLParserLimits(
    max_grammar_size=50_000, initial_lexer_fuel=200_000, max_lexer_states=25_000, verbose_errors=False
)
_LONGEST = 200_000  # characters of a grammar


class GrammarError(PromptError):
    """A grammar that can't be used, or that a text ran into; the message says why."""


@dataclass(frozen=True)
class Grammar:
    """A checked grammar, as llguidance reads it. `field` is what asked for it."""

    text: str
    field: str


class Grammars:
    """Makes guides for one target's tokenizer.

    Args:
        tokenizer: the target's, a fast one.
        vocab_size: scores of the target, which may be more than the tokenizer has tokens.
        ends: tokens that end a text, one or more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, list(ends)
        self._known: Any = None
        self._making = threading.Lock()

    def guide(self, grammar: Grammar, prompt_length: int, gate: Gate | None = None) -> GrammarGuide:
        """A guide for one text."""
        matcher = LLMatcher(self._tokens(grammar.field), grammar.text, log_level=0, limits=_LIMITS)
        return GrammarGuide(matcher, grammar.field, self._ends, prompt_length, gate)

    def checked(self, text: str, field: str) -> Grammar:
        """A grammar that can be used. Raises GrammarError."""
        _check_length(text, field)
        wrong, said = LLMatcher.validate_grammar_with_warnings(text, self._tokens(field), limits=_LIMITS)
        if wrong:
            raise GrammarError(f"{field} can't be used: {_first_line(said[0])}")
        return Grammar(text, field)

    def json_schema(self, schema: Mapping[str, Any], field: str) -> Grammar:
        """JSON of a schema. Raises GrammarError for one that is wrong, or uses what is not supported."""
        text = json.dumps(schema)
        _check_length(text, field)
        return self.checked(LLMatcher.grammar_from_json_schema(text, overrides=SPACING), field)

    def regex(self, pattern: str, field: str) -> Grammar:
        """What matches a regular expression as a whole. Raises GrammarError."""
        _check_length(pattern, field)
        return self.checked(LLMatcher.grammar_from_regex(pattern), field)

    def choice(self, options: Sequence[str], field: str) -> Grammar:
        """One of some texts. Raises GrammarError."""
        return self.lark("start: " + " | ".join(json.dumps(option) for option in options), field)

    def lark(self, text: str, field: str) -> Grammar:
        """What a grammar derives, in llguidance's Lark or llama.cpp's GBNF. Raises GrammarError."""
        _check_length(text, field)
        try:
            found = llguidance.grammar_from("grammar", text)
        except ValueError as error:
            raise GrammarError(f"{field} can't be used: {_first_line(str(error))}") from error
        return self.checked(found, field)

    def prepare(self) -> None:
        """Make what all grammars need, so that none of them has to wait for it. Raises GrammarError."""
        self._tokens("grammar")

    def _tokens(self, field: str) -> Any:
        """The tokenizer as llguidance knows it; made once, in a third of a second in which no other thread runs."""
        if not self._ends:
            raise GrammarError(f"{field}: this model names no token that ends a text, so a grammar could not end it")
        with self._making:
            if self._known is None:
                try:
                    self._known = llguidance.hf.from_tokenizer(cast(Any, self._tokenizer), self._vocab_size, self._ends)
                except ValueError as error:
                    raise GrammarError(f"{field} needs a fast tokenizer, and this model's is none: {error}") from error
            return self._known


class Gate:
    """Where in a text its grammar begins: at its start, or after the reasoning.

    Args:
        tokenizer: of the text.
        close: the mark that ends the reasoning.
        opened: the prompt has opened it; else the text may do so with its first token, `open_token`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, close: str, opened: bool, open_token: int | None = None
    ) -> None:
        self._tokenizer, self._close, self._opened, self.open_token = tokenizer, close, opened, open_token
        self._window = 2 * len(tokenizer.encode(close, add_special_tokens=False)) + 2

    def begin(self, new: Sequence[int]) -> int | None:
        """How many of a text's new tokens stand before the grammar; None while that is open."""
        if not self._opened and (not new or new[0] != self.open_token):
            return 0
        for end in range(1, len(new) + 1):
            tail = list(new[max(0, end - self._window) : end])
            if self._close in str(self._tokenizer.decode(tail, skip_special_tokens=False)):
                return end
        return None


class GrammarGuide:
    """One text's grammar: masks for the token that follows a history, and drafts that must come."""

    def __init__(
        self, matcher: LLMatcher, field: str, ends: Sequence[int], prompt_length: int, gate: Gate | None
    ) -> None:
        self._matcher, self._field, self._ends = matcher, field, list(ends)
        self._prompt_length, self._gate = prompt_length, gate
        self._consumed: list[int] = []
        self._begin: int | None = 0 if gate is None else None

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        """Scores without the tokens that the grammar forbids. Raises GrammarError where the text has left it."""
        new = history[0, self._prompt_length :].tolist()
        if not self._sync(new):
            return scores
        allowed = torch.frombuffer(bytearray(self._ask(self._matcher.compute_logit_bias)), dtype=torch.uint8) > 0
        if not new and self._gate is not None and self._gate.open_token is not None:
            allowed[self._gate.open_token] = True
        if not bool(allowed.any()):
            raise GrammarError(f"{self._field}: no token of the model goes on with the grammar here")
        return scores.masked_fill(~allowed[: scores.shape[1]].to(scores.device), -torch.inf)

    def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """See `haast.core.Guide`."""
        if not self._sync(list(history[self._prompt_length :])):
            return [list(path) for path in drafted]
        found = []
        for path in drafted:
            may = list(path[: self._matcher.validate_tokens(list(path))])
            if may:
                found.append(may + self._forced(may)[:most])
        return found or [self._forced([])[:most]]

    def _forced(self, path: list[int]) -> list[int]:
        """What has to follow after a path that may come."""
        if path and any(token in self._ends for token in path):
            return []
        self._ask(lambda: self._matcher.try_consume_tokens(path))
        forced = list(self._matcher.compute_ff_tokens())
        if not forced and self._matcher.is_stopped():
            forced = self._ends[:1]
        if path and not self._matcher.rollback(len(path)):
            raise GrammarError(f"{self._field}: {_first_line(self._matcher.get_error())}")
        return forced

    def _sync(self, new: list[int]) -> bool:
        """Bring the matcher to a text's new tokens; False while the grammar has not begun there."""
        if self._gate is not None and (self._begin is None or len(new) < self._begin or self._begin == 0):
            self._begin = self._gate.begin(new)
        if self._begin is None:
            return False
        said = new[self._begin :]
        end = next((place for place, token in enumerate(said) if token in self._ends), len(said))
        said = said[:end]  # what a block holds after the end is cut off by the stop rules
        if said[: len(self._consumed)] != self._consumed:  # tokens were chosen that did not stay
            pairs = enumerate(zip(said, self._consumed, strict=False))
            same = next((place for place, pair in pairs if pair[0] != pair[1]), min(len(said), len(self._consumed)))
            self._ask(lambda: self._matcher.rollback(len(self._consumed) - same))
            del self._consumed[same:]
        fresh = said[len(self._consumed) :]
        if fresh and not self._ask(lambda: self._matcher.consume_tokens(fresh)):
            raise GrammarError(f"{self._field}: the text has left the grammar")
        self._consumed += fresh
        return True

    def _ask(self, question: Callable[[], Any]) -> Any:
        """What the matcher answers. Raises GrammarError where it has given up."""
        answer = question()
        if self._matcher.is_error():
            raise GrammarError(f"{self._field}: {_first_line(self._matcher.get_error())}")
        return answer


def _check_length(text: str, field: str) -> None:
    """Raises GrammarError for a text that is too long for a grammar, before it is translated into one."""
    if len(text) > _LONGEST:
        raise GrammarError(f"{field} is {len(text)} characters long: give a grammar of at most {_LONGEST}")


def _first_line(words: str) -> str:
    return words.strip().splitlines()[0] if words.strip() else "it was not understood"
