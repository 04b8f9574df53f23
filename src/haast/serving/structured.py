"""Constrained decoding: JSON schemas, regular expressions, Lark and GBNF grammars, choices.

Owns how a grammar becomes token masks (`GrammarGuide`) and forced drafts. llguidance does the parsing. Knows neither
models nor the server's protocol.

A guide is a logits processor: it is called once per chosen token with that token's own history, so the grammar also
holds inside an accepted block of drafted tokens. It is a `haast.core.Guide` as well: it removes drafts that the grammar
forbids, and adds tokens that the grammar forces, which need no drafter.
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

# Fixed spacing of JSON, as models write it, so that a text can't continue with whitespace for ever.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Limits on time and memory of a client's grammar: a tenth of the library's defaults.
_LIMITS = LLParserLimits(
    max_grammar_size=50_000, initial_lexer_fuel=200_000, max_lexer_states=25_000, verbose_errors=False
)
_LONGEST = 200_000  # characters of a grammar at most


class GrammarError(PromptError):
    """A grammar can't be used, or a text has no valid continuation; the message has the reason."""


@dataclass(frozen=True)
class Grammar:
    """A checked grammar in llguidance's format. `field` is the request field that it comes from."""

    text: str
    field: str


class Grammars:
    """Checks grammars and makes guides for one target's tokenizer.

    Args:
        tokenizer: the target's; must be a fast one.
        vocab_size: size of the target's logits, which may be larger than the tokenizer's vocabulary.
        ends: ids of tokens that end a text, one or more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, list(ends)
        self._llg_tokenizer: Any = None
        self._lock = threading.Lock()

    def guide(self, grammar: Grammar, prompt_length: int, gate: Gate | None = None) -> GrammarGuide:
        """A guide for one request."""
        matcher = LLMatcher(self._tokens(grammar.field), grammar.text, log_level=0, limits=_LIMITS)
        return GrammarGuide(matcher, grammar.field, self._ends, prompt_length, gate)

    def checked(self, text: str, field: str) -> Grammar:
        """Check a grammar in llguidance's format. Raises GrammarError."""
        _check_length(text, field)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(text, self._tokens(field), limits=_LIMITS)
        if wrong:
            raise GrammarError(f"{field} can't be used: {_first_line(messages[0])}")
        return Grammar(text, field)

    def json_schema(self, schema: Mapping[str, Any], field: str) -> Grammar:
        """A grammar for JSON that follows a schema. Raises GrammarError for invalid or unsupported schemas."""
        text = json.dumps(schema)
        _check_length(text, field)
        return self.checked(LLMatcher.grammar_from_json_schema(text, overrides=SPACING), field)

    def regex(self, pattern: str, field: str) -> Grammar:
        """A grammar for texts that match a regular expression completely. Raises GrammarError."""
        _check_length(pattern, field)
        return self.checked(LLMatcher.grammar_from_regex(pattern), field)

    def choice(self, options: Sequence[str], field: str) -> Grammar:
        """A grammar for one of the given texts. Raises GrammarError."""
        return self.lark("start: " + " | ".join(json.dumps(option) for option in options), field)

    def lark(self, text: str, field: str) -> Grammar:
        """A grammar in llguidance's Lark or llama.cpp's GBNF. Raises GrammarError."""
        _check_length(text, field)
        try:
            grammar = llguidance.grammar_from("grammar", text)
        except ValueError as error:
            raise GrammarError(f"{field} can't be used: {_first_line(str(error))}") from error
        return self.checked(grammar, field)

    def prepare(self) -> None:
        """Build the tokenizer that all grammars need, so that no request waits for it. Raises GrammarError."""
        self._tokens("grammar")

    def _tokens(self, field: str) -> Any:
        """llguidance's tokenizer; built once, in a third of a second in which no other thread runs."""
        if not self._ends:
            raise GrammarError(f"{field}: this model has no end token, so a grammar could not end a text")
        with self._lock:
            if self._llg_tokenizer is None:
                try:
                    self._llg_tokenizer = llguidance.hf.from_tokenizer(
                        cast(Any, self._tokenizer), self._vocab_size, self._ends
                    )
                except ValueError as error:
                    raise GrammarError(
                        f"{field} needs a fast tokenizer, which this model does not have: {error}"
                    ) from error
            return self._llg_tokenizer


class Gate:
    """Finds where the grammar starts in a text: at its start, or after the reasoning.

    Args:
        tokenizer: of the model.
        close: the mark that ends the reasoning.
        opened: the prompt has opened the reasoning.
        open_token: the token that opens the reasoning, if the text starts with it; None if no token does.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, close: str, opened: bool, open_token: int | None = None
    ) -> None:
        self._tokenizer, self._close, self._opened, self.open_token = tokenizer, close, opened, open_token
        self._window = 2 * len(tokenizer.encode(close, add_special_tokens=False)) + 2

    def begin(self, new: Sequence[int]) -> int | None:
        """Number of new tokens before the grammar starts; None while the reasoning has not ended."""
        if not self._opened and (not new or new[0] != self.open_token):
            return 0
        for end in range(1, len(new) + 1):
            tail = list(new[max(0, end - self._window) : end])
            if self._close in str(self._tokenizer.decode(tail, skip_special_tokens=False)):
                return end
        return None


class GrammarGuide:
    """The grammar of one request: masks the scores of the next token, filters drafts and adds forced ones."""

    def __init__(
        self, matcher: LLMatcher, field: str, ends: Sequence[int], prompt_length: int, gate: Gate | None
    ) -> None:
        self._matcher, self._field, self._ends = matcher, field, list(ends)
        self._prompt_length, self._gate = prompt_length, gate
        self._consumed: list[int] = []
        self._start: int | None = 0 if gate is None else None

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of forbidden tokens to -inf. Raises GrammarError if the text does not follow the grammar."""
        new = history[0, self._prompt_length :].tolist()
        if not self._sync(new):
            return scores
        allowed = torch.frombuffer(bytearray(self._call(self._matcher.compute_logit_bias)), dtype=torch.uint8) > 0
        if not new and self._gate is not None and self._gate.open_token is not None:
            allowed[self._gate.open_token] = True
        if not bool(allowed.any()):
            raise GrammarError(f"{self._field}: no token of the model continues the grammar here")
        return scores.masked_fill(~allowed[: scores.shape[1]].to(scores.device), -torch.inf)

    def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """See `haast.core.Guide`."""
        if not self._sync(list(history[self._prompt_length :])):
            return [list(path) for path in drafted]
        paths = []
        for path in drafted:
            valid = list(path[: self._matcher.validate_tokens(list(path))])
            if valid:
                paths.append(valid + self._forced(valid)[:most])
        return paths or [self._forced([])[:most]]

    def _forced(self, path: list[int]) -> list[int]:
        """Tokens that the grammar forces after a valid path."""
        if path and any(token in self._ends for token in path):
            return []
        self._call(lambda: self._matcher.try_consume_tokens(path))
        forced = list(self._matcher.compute_ff_tokens())
        if not forced and self._matcher.is_stopped():
            forced = self._ends[:1]
        if path and not self._matcher.rollback(len(path)):
            raise GrammarError(f"{self._field}: {_first_line(self._matcher.get_error())}")
        return forced

    def _sync(self, new: list[int]) -> bool:
        """Move the matcher to the end of the new tokens; False while the grammar has not started."""
        if self._gate is not None and (self._start is None or len(new) < self._start or self._start == 0):
            self._start = self._gate.begin(new)
        if self._start is None:
            return False
        tokens = new[self._start :]
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        tokens = tokens[:end]  # the stop rules cut tokens after the end
        if tokens[: len(self._consumed)] != self._consumed:  # a choice was rolled back
            pairs = enumerate(zip(tokens, self._consumed, strict=False))
            same = next((place for place, pair in pairs if pair[0] != pair[1]), min(len(tokens), len(self._consumed)))
            self._call(lambda: self._matcher.rollback(len(self._consumed) - same))
            del self._consumed[same:]
        fresh = tokens[len(self._consumed) :]
        if fresh and not self._call(lambda: self._matcher.consume_tokens(fresh)):
            raise GrammarError(f"{self._field}: the text does not follow the grammar")
        self._consumed += fresh
        return True

    def _call(self, call: Callable[[], Any]) -> Any:
        """Call the matcher. Raises GrammarError if it reports an error."""
        result = call()
        if self._matcher.is_error():
            raise GrammarError(f"{self._field}: {_first_line(self._matcher.get_error())}")
        return result


def _check_length(text: str, field: str) -> None:
    """Raises GrammarError for a text that is too long for a grammar."""
    if len(text) > _LONGEST:
        raise GrammarError(f"{field} is {len(text)} characters long: give a grammar of at most {_LONGEST}")


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "it can't be parsed"
