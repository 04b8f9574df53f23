"""One answer as it is written: from the engine's emissions to what a client reads.

Owns, for one request, the text, its reasoning and tool calls, the logprobs that belong to it, and its trace. Nothing
depends on how tokens fall into emissions, so an answer is the same with and without drafting, streamed or whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from transformers import PreTrainedTokenizerBase

from haast.bench.trace import TraceRecorder
from haast.core import Emission, Request
from haast.engine.engine import Engine
from haast.errors import CancelledError
from haast.serving.logprobs import Logprob, RecordingSampler
from haast.serving.metrics import Metrics
from haast.serving.plan import Plan
from haast.serving.problems import ApiError
from haast.serving.reasoning import ReasoningReader
from haast.serving.tools import CallReader, ToolCall
from haast.text import TextStream


@dataclass
class Delta:
    """What became certain with some tokens."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[tuple[Logprob, int]] = field(default_factory=list)  # and the place of its text's first character
    tokens: list[dict[str, Any]] = field(default_factory=list)  # of a trace: text, drafted, step
    steps: list[dict[str, Any]] = field(default_factory=list)  # of a trace: documents

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Writing:
    """One request and its text.

    Args:
        engine, request: where it is written; not queued yet.
        plan: what was asked for.
        tokenizer: of the model.
        sampler: that writes logprobs down; None where none are asked for.
        trace: that follows the request's steps; None where nobody looks.
        metrics: told of what comes.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        plan: Plan,
        tokenizer: PreTrainedTokenizerBase,
        sampler: RecordingSampler | None,
        trace: TraceRecorder | None,
        metrics: Metrics,
    ) -> None:
        self.engine, self.request, self._sampler, self._trace = engine, request, sampler, trace
        self._text = TextStream(tokenizer, plan.stops, after=plan.min_tokens, keep_stop=plan.keep_stop)
        self._reasoning = ReasoningReader(plan.marks, plan.reasoning)
        self._calls = CallReader(plan.style)
        self._ends = set(plan.ends)
        self._held: list[tuple[int, int]] = []  # tokens whose text is not out: its first character, position
        self._metrics, self._begun, self._last = metrics, monotonic(), monotonic()
        self.reasoning_tokens = self.shown_steps = 0
        self._at = request.prompt_length  # position of the next token
        self.has_calls = self._closed = False

    @property
    def new_tokens(self) -> list[int]:
        """What was said so far."""
        return self.request.new_tokens

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words."""
        if self.has_calls and self.request.finish_reason == "stop":
            return "tool_calls"
        return self.request.finish_reason

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All that is said, as it becomes certain; closing it ends the request.

        Raises:
            ApiError: the request ran out of time or was ended. Exception: its own.
        """
        try:
            async with aclosing(self.engine.aread(self.request)) as emissions:
                async for emission in emissions:
                    self._timed(emission)
                    yield self._taken(emission)
            yield self._rest()
        except CancelledError:
            raise self._ended_early() from None
        finally:
            self.close()

    def _ended_early(self) -> ApiError:
        """Why there is no whole answer."""
        count = f"after {len(self.new_tokens)} tokens"
        if self.request.finish_reason == "deadline":
            return ApiError(503, f"the answer took too long and was ended {count}: ask for less", code="timeout")
        return ApiError(503, f"the server has ended this answer {count}: ask again", code="cancelled")

    def close(self) -> None:
        """End the request, if it has not ended; nobody reads on."""
        if not self._closed:
            self._closed = True
            if not self.request.finished:
                self.engine.cancel(self.request, wait=False)
            self._metrics.ended(self.request, monotonic() - self._begun)

    def _timed(self, emission: Emission) -> None:
        now = monotonic()
        if len(emission.tokens) == len(self.request.tokens) - self.request.prompt_length:
            self._metrics.first_token.observe(now - self._begun)
        elif emission.tokens:
            self._metrics.between(now - self._last, len(emission.tokens))
        self._last = now

    def _taken(self, emission: Emission) -> Delta:
        delta, text = Delta(), ""
        position = self._at
        for place, token in enumerate(emission.tokens):
            self._held.append((self._text.decoded, position + place))
            before = self._reasoning.inside
            piece = self._text.push(token)
            text += piece
            self._read(delta, piece)
            self.reasoning_tokens += before or self._reasoning.inside
            if self._trace is not None:
                drafted = place < emission.drafted
                delta.tokens.append({"text": piece, "drafted": drafted, "step": self._trace.step_of(position + place)})
        self._at += len(emission.tokens)
        self._release(delta)
        if self._trace is not None:
            delta.steps = self._trace.steps[self.shown_steps :]
            self.shown_steps += len(delta.steps)
        return delta

    def _read(self, delta: Delta, text: str) -> None:
        reasoning, answer = self._reasoning.push(text) if text else ("", "")
        delta.reasoning += reasoning
        self._said(delta, self._calls.push(answer) if answer else [])

    def _said(self, delta: Delta, parts: Sequence[str | ToolCall]) -> None:
        for part in parts:
            if isinstance(part, str):
                delta.content += part
            else:
                delta.calls.append(part)
                self.has_calls = True

    def _rest(self) -> Delta:
        """What was held back, now that nothing follows."""
        delta = Delta()
        rest = self._text.finish(whole=True)
        self._read(delta, rest)
        reasoning, answer = self._reasoning.finish()
        delta.reasoning += reasoning
        self._said(delta, [*(self._calls.push(answer) if answer else []), *self._calls.finish()])
        if self._trace is not None and rest:
            delta.tokens.append({"text": rest, "drafted": False, "step": None})
        self._release(delta, final=True)
        return delta

    def _release(self, delta: Delta, final: bool = False) -> None:
        """The logprobs of tokens whose text has begun to come out; at the end of all but what was cut off."""
        shown, whole = len(self._text.text), final and not self._text.stopped
        while self._held and (whole or self._held[0][0] < shown):
            start, position = self._held.pop(0)
            ended = whole and not self._held and self.request.tokens[position] in self._ends
            if self._sampler is not None and not ended:
                delta.logprobs.append((self._sampler.at(position), start))
