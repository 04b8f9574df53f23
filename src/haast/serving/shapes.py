"""Formats answers as OpenAI's JSON: chat completions and text completions, whole and in chunks.

Owns JSON only. A whole answer is built from the same deltas as a stream of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from haast.serving.generation import Delta, Generation
from haast.serving.logprobs import Logprob
from haast.serving.plan import Plan
from haast.serving.service import Service, prediction_counts
from haast.serving.tool_formats import ToolCall
from haast.text import token_bytes, token_text

Json = dict[str, Any]


class Shape:
    """Formats one answer, with all of its choices.

    Args:
        service: the model that answers.
        plan: the checked request.
        answer_id: the answer's id.
        created: Unix time in seconds at which the request came.
    """

    kind = chunk_kind = ""

    def __init__(self, service: Service, plan: Plan, answer_id: str, created: int) -> None:
        self.service, self.plan = service, plan
        self.id, self.created = answer_id, created
        self.tokenizer: PreTrainedTokenizerBase = service.tokenizer
        self._calls: dict[int, int] = {}  # choice -> number of tool calls that were sent

    def opening(self, index: int) -> Iterator[Json]:
        """Chunks at the start of a choice, before any delta."""
        yield from ()

    def delta_chunks(self, index: int, delta: Delta) -> Iterator[Json]:
        """The chunk of a delta; none if the delta has nothing to send."""
        raise NotImplementedError

    def closing(self, index: int, generation: Generation) -> Json:
        """The last chunk of a choice, with its finish_reason."""
        raise NotImplementedError

    def whole(self, deltas: Sequence[Delta], generations: Sequence[Generation]) -> Json:
        """The whole answer; `deltas` holds one joined delta per choice."""
        choices = [self.choice(index, *pair) for index, pair in enumerate(zip(deltas, generations, strict=True))]
        answer = self._frame(self.kind, choices) | {"usage": self.usage(generations)}
        if self.plan.trace:
            traces = [{"tokens": delta.tokens, "steps": delta.steps} for delta in deltas]
            answer["haast"] = {"choices": traces, "stats": self.stats(generations)}
        return answer

    def choice(self, index: int, delta: Delta, generation: Generation) -> Json:
        """One choice of a whole answer."""
        raise NotImplementedError

    def totals(self, generations: Sequence[Generation]) -> Json:
        """The last chunk of a stream: usage, without choices."""
        chunk = self._frame(self.chunk_kind, []) | {"usage": self.usage(generations)}
        return chunk | ({"haast": {"stats": self.stats(generations)}} if self.plan.trace else {})

    def usage(self, generations: Sequence[Generation]) -> Json:
        """OpenAI's usage: counts of emitted tokens, and what drafting did."""
        prompts = generations[:: self.plan.n]  # choices of one prompt share it
        prompt = sum(generation.request.prompt_length for generation in prompts)
        new = [generation.new_tokens for generation in generations]
        completion, stats = sum(map(len, new)), [generation.request.stats for generation in generations]
        details: Json = {"reasoning_tokens": sum(generation.reasoning_tokens for generation in generations)}
        if self.plan.prediction:
            counts = [prediction_counts(self.plan.prediction, tokens) for tokens in new]
            details["accepted_prediction_tokens"] = sum(accepted for accepted, _ in counts)
            details["rejected_prediction_tokens"] = sum(rejected for _, rejected in counts)
        forwards = sum(each.target_forwards for each in stats)
        decoded = sum(each.decoded_tokens for each in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(w.request.stats.recalled_tokens for w in prompts)},
            "completion_tokens_details": details,
            "haast": {
                "drafter": generations[0].engine.drafter.name,
                "target_forwards": forwards,
                "tau": round(decoded / forwards, 3) if forwards else None,
                "drafted_tokens": sum(max(each.nodes - each.target_forwards, 0) for each in stats),
                "accepted_tokens": sum(sum(each.accepted_by_depth) for each in stats),
            },
        }

    def stats(self, generations: Sequence[Generation]) -> Json:
        """Speed and times of a traced answer; of several choices the first."""
        stats = generations[0].request.stats
        names = ("tau", "tokens_per_s", "ms_prefill", "ms_draft", "ms_verify", "ms_overhead", "target_forwards")
        return {
            **{name: round(getattr(stats, name), 3) for name in names},
            "vanilla_tokens_per_s": self.service.vanilla_tokens_per_s,
            "decoder": generations[0].engine.drafter.name,
        }

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }

    def _chunk(self, choice: Json, delta: Delta | None = None) -> Json:
        chunk = self._frame(self.chunk_kind, [choice])
        if self.plan.usage_in_stream:
            chunk["usage"] = None
        if delta is not None and self.plan.trace:
            chunk["haast"] = {"tokens": delta.tokens, "steps": delta.steps}
        return chunk


class ChatShape(Shape):
    """Chat completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Iterator[Json]:
        yield self._part(index, {"role": "assistant", "content": ""}, None)

    def delta_chunks(self, index: int, delta: Delta) -> Iterator[Json]:
        fields: Json = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.content:
            fields["content"] = delta.content
        if delta.calls:
            first = self._calls.get(index, 0)
            self._calls[index] = first + len(delta.calls)
            calls = enumerate(delta.calls, start=first)
            fields["tool_calls"] = [{"index": n, **self._call(index, n, call)} for n, call in calls]
        shown = self.plan.trace and (delta.tokens or delta.steps)
        if fields or delta.logprobs or shown:
            yield self._part(index, fields, self._logprobs(delta), delta)

    def closing(self, index: int, generation: Generation) -> Json:
        return self._part(index, {}, None, reason=generation.finish_reason)

    def choice(self, index: int, delta: Delta, generation: Generation) -> Json:
        message: Json = {"role": "assistant", "content": delta.content or (None if delta.calls else "")}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.calls:
            message["tool_calls"] = [self._call(index, number, call) for number, call in enumerate(delta.calls)]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(delta, always=True),
            "finish_reason": generation.finish_reason,
        }

    def _part(
        self, index: int, fields: Json, logprobs: Json | None, delta: Delta | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": fields, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk(choice, delta)

    def _call(self, index: int, number: int, call: ToolCall) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": call.id_of(f"{self.id} {index}", number), "type": "function", "function": function}

    def _logprobs(self, delta: Delta, always: bool = False) -> Json | None:
        if self.plan.logprobs is None or not (delta.logprobs or always):
            return None
        return {"content": [self._logprob(entry) for entry, _ in delta.logprobs]}

    def _logprob(self, entry: Logprob) -> Json:
        top = [self._token_entry(token, value) for token, value in entry.top]
        return {**self._token_entry(entry.token, entry.logprob), "top_logprobs": top}

    def _token_entry(self, token: int, logprob: float) -> Json:
        text, raw = token_text(self.tokenizer, token), token_bytes(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


class CompletionShape(Shape):
    """Text completions."""

    kind = chunk_kind = "text_completion"

    def opening(self, index: int) -> Iterator[Json]:
        if self.plan.echo:
            yield self._part(index, self.plan.echo[index // self.plan.n], None)

    def delta_chunks(self, index: int, delta: Delta) -> Iterator[Json]:
        if delta.content or delta.logprobs or (self.plan.trace and (delta.tokens or delta.steps)):
            yield self._part(index, delta.content, self._logprobs(delta), delta)

    def closing(self, index: int, generation: Generation) -> Json:
        return self._part(index, "", None, reason=generation.finish_reason)

    def choice(self, index: int, delta: Delta, generation: Generation) -> Json:
        echo = self.plan.echo[index // self.plan.n] if self.plan.echo else ""
        return {
            "index": index,
            "text": echo + delta.content,
            "logprobs": self._logprobs(delta, always=True),
            "finish_reason": generation.finish_reason,
        }

    def _part(
        self, index: int, text: str, logprobs: Json | None, delta: Delta | None = None, reason: str | None = None
    ) -> Json:
        return self._chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}, delta)

    def _logprobs(self, delta: Delta, always: bool = False) -> Json | None:
        if self.plan.logprobs is None or not (delta.logprobs or always):
            return None
        entries = [each for each, _ in delta.logprobs]
        return {
            "tokens": [token_text(self.tokenizer, each.token) for each in entries],
            "token_logprobs": [each.logprob for each in entries],
            "top_logprobs": [
                {token_text(self.tokenizer, token): value for token, value in each.top} for each in entries
            ],
            "text_offset": [start for _, start in delta.logprobs],
        }
