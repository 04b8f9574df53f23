"""One generation: turns the engine's emissions into text, reasoning, tool calls and logprobs for a client.

Owns, for one request, its text, reasoning, tool calls, logprobs and trace. The result does not depend on how tokens are
grouped into emissions, so an answer is the same with and without drafting, streamed or whole.
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
from haast.serving.api_errors import ApiError
from haast.serving.logprobs import Logprob, RecordingSampler
from haast.serving.metrics import Metrics
from haast.serving.plan import Plan
from haast.serving.reasoning import ReasoningReader
from haast.serving.tool_formats import ToolCall
from haast.serving.tools import CallReader
from haast.text import TextStream


@dataclass
class Delta:
    """New output that is final: no later token can change it."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[tuple[Logprob, int]] = field(default_factory=list)  # with the offset of its text's first character
    tokens: list[dict[str, Any]] = field(default_factory=list)  # of a trace: text, drafted, step number
    steps: list[dict[str, Any]] = field(default_factory=list)  # of a trace: step documents

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Generation:
    """One request and the text it generates.

    Args:
        engine, request: the engine and its request, which is not queued yet.
        plan: the checked request body.
        tokenizer: of the model.
        sampler: records logprobs; None if none were requested.
        trace: records the request's steps; None without `haast.trace`.
        metrics: receives latencies and counts.
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
        shown = plan.special_marks.values()
        self._text = TextStream(tokenizer, plan.stops, after=plan.min_tokens, keep_stop=plan.keep_stop, shown=shown)
        self._reasoning = ReasoningReader(plan.marks, plan.reasoning)
        self._calls = CallReader(plan.calls, plan.schemas)
        self._ends = set(plan.ends)
        self._unsent: list[tuple[int, int]] = []  # tokens whose text is not sent yet: (offset, position)
        self._metrics, self._started, self._last_emission = metrics, monotonic(), monotonic()
        self.reasoning_tokens = self.shown_steps = 0
        self._position = request.prompt_length  # position of the next token
        self.has_calls = self._closed = False

    @property
    def new_tokens(self) -> list[int]:
        """Token ids generated so far."""
        return self.request.new_tokens

    @property
    def finish_reason(self) -> str:
        """OpenAI's `finish_reason`."""
        if self.has_calls and self.request.finish_reason == "stop":
            return "tool_calls"
        return self.request.finish_reason

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield output as soon as it is final. Closing the generator cancels the request.

        Raises:
            ApiError: the request timed out or was cancelled.
            Exception: the request failed with this error.
        """
        try:
            async with aclosing(self.engine.aread(self.request)) as emissions:
                async for emission in emissions:
                    self._observe_latency(emission)
                    yield self._delta_of(emission)
            yield self._final_delta()
        except CancelledError:
            raise self._early_end_error() from None
        finally:
            self.close()

    def _early_end_error(self) -> ApiError:
        """The error for an answer that was cut short by the server."""
        count = f"after {len(self.new_tokens)} tokens"
        if self.request.finish_reason == "deadline":
            return ApiError(503, f"the answer reached the time limit {count}: request fewer tokens", code="timeout")
        return ApiError(503, f"the server cancelled this answer {count}: send the request again", code="cancelled")

    def close(self) -> None:
        """Cancel the request if it still runs, and count it in the metrics."""
        if not self._closed:
            self._closed = True
            if not self.request.finished:
                self.engine.cancel(self.request, wait=False)
            self._metrics.ended(self.request, monotonic() - self._started)

    def _observe_latency(self, emission: Emission) -> None:
        now = monotonic()
        if len(emission.tokens) == len(self.request.tokens) - self.request.prompt_length:
            self._metrics.first_token.observe(now - self._started)
        elif emission.tokens:
            self._metrics.between(now - self._last_emission, len(emission.tokens))
        self._last_emission = now

    def _delta_of(self, emission: Emission) -> Delta:
        delta, text = Delta(), ""
        position = self._position
        for place, token in enumerate(emission.tokens):
            self._unsent.append((self._text.decoded, position + place))
            before = self._reasoning.inside
            piece = self._text.push(token)
            text += piece
            self._add_text(delta, piece)
            self.reasoning_tokens += before or self._reasoning.inside
            if self._trace is not None:
                drafted = place < emission.drafted
                delta.tokens.append({"text": piece, "drafted": drafted, "step": self._trace.step_of(position + place)})
        self._position += len(emission.tokens)
        self._release_logprobs(delta)
        if self._trace is not None:
            delta.steps = self._trace.steps[self.shown_steps :]
            self.shown_steps += len(delta.steps)
        return delta

    def _add_text(self, delta: Delta, text: str) -> None:
        reasoning, answer = self._reasoning.push(text) if text else ("", "")
        delta.reasoning += reasoning
        self._add_parts(delta, self._calls.push(answer) if answer else [])

    def _add_parts(self, delta: Delta, parts: Sequence[str | ToolCall]) -> None:
        for part in parts:
            if isinstance(part, str):
                delta.content += part
            else:
                delta.calls.append(part)
                self.has_calls = True

    def _final_delta(self) -> Delta:
        """Output that was held back until the end of the text."""
        delta = Delta()
        rest = self._text.finish(whole=True)
        self._add_text(delta, rest)
        reasoning, answer = self._reasoning.finish()
        delta.reasoning += reasoning
        self._add_parts(delta, [*(self._calls.push(answer) if answer else []), *self._calls.finish()])
        if self._trace is not None and rest:
            delta.tokens.append({"text": rest, "drafted": False, "step": None})
        self._release_logprobs(delta, final=True)
        return delta

    def _release_logprobs(self, delta: Delta, final: bool = False) -> None:
        """Add the logprobs of tokens whose text is sent; with `final` of all others too, unless a stop cut the text."""
        shown, whole = len(self._text.text), final and not self._text.stopped
        while self._unsent and (whole or self._unsent[0][0] < shown):
            start, position = self._unsent.pop(0)
            ended = whole and not self._unsent and self.request.tokens[position] in self._ends
            if self._sampler is not None and not ended:
                delta.logprobs.append((self._sampler.at(position), start))
