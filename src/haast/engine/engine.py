"""The engine: one target, one drafter and one acceptance rule; submits requests to the target's scheduler.

Owns how requests are submitted and read: one by one (`submit`, `read`), a list of prompts at once (`run`, `complete`),
and from asynchronous code (`aread`). Knows token ids only, no text. The scheduler runs the steps, for the requests of
all engines on a target together.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from numbers import Integral, Real

from haast.core import DraftHints, Emission, Request, SamplingParams, StopParams, TokenChooser
from haast.drafters.base import Drafter
from haast.engine.rules import AcceptanceRule
from haast.engine.scheduler import Scheduler
from haast.engine.step import Step
from haast.errors import CancelledError, KVPoolError, PromptError
from haast.sampling import Sampler
from haast.stats import Stats
from haast.target.target import PromptInputs, Target

__all__ = ["PREFILL_CHUNK", "Emission", "Engine", "Stats", "Step", "StopParams", "check_prompts"]
# Prompt positions per forward. Bounds the memory of activations, attention masks and, without fused attention, scores.
PREFILL_CHUNK = 512


class Engine:
    """One target and one drafter, for any number of requests, from any number of threads.

    Args:
        target: the model.
        drafter: drafts for the target.
        rule: acceptance rule; None is sample-and-match. Only sample-and-match guarantees the text of vanilla decoding
            for a seed; see `haast.engine.rules` for what each rule guarantees, and which is lossy.
        prefill_chunk: prompt positions per forward, 1 or more; the text does not depend on it.

    Raises:
        ValueError: a chunk below 1. KVPoolError: the drafter was made for another target.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: AcceptanceRule | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        check_chunk(prefill_chunk)
        if any(cache.pool is not target.pool for cache in drafter.caches):
            raise KVPoolError(
                f"this {drafter.name} drafter keeps its keys and values in the KV pool of another target: create one "
                f"for this target"
            )
        self.prefill_chunk = prefill_chunk
        self.target = target
        self.drafter = drafter
        self.rule = rule
        self.scheduler = Scheduler.of(target)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop: StopParams,
        *,
        choice: int = 0,
        chooser: TokenChooser | None = None,
        row: int = 0,
        stats: Stats | None = None,
        timeout: float | None = None,
        watch: Callable[[Step], None] | None = None,
        prefill_chunk: int | None = None,
        hints: DraftHints | None = None,
        inputs: PromptInputs | None = None,
        queued: bool = True,
    ) -> Request:
        """Queue a request; `read` returns its tokens.

        Args:
            prompt: token ids, one or more.
            sampling: sampling parameters; draws are keyed by (seed, choice, position).
            stop: when the request ends.
            choice: index of the continuation, if a prompt gets several.
            chooser: samples the tokens instead of `sampling`.
            row: index of the request in the caller's call; `Emission.row` repeats it.
            stats: filled as it runs.
            timeout: seconds from now after which the request ends.
            watch: called with every decoding step of the request before its tokens can be read.
            prefill_chunk: prompt positions per forward, instead of the engine's.
            hints: options for drafting; only with sample-and-match they leave the text unchanged.
            inputs: what the prompt has besides tokens.
            queued: False checks the request but does not queue it; see `start`.

        Raises:
            PromptError: an empty prompt, one that leaves no room for a new token in the context, or an id outside the
                vocabulary.
            KVPoolError: prompt and new tokens could never fit the KV pool. QueueFullError: too many requests wait.
            ValueError: a chunk below 1, or an invalid choice, watch or timeout; or the model is in training mode.
        """
        self._check(prompt, prefill_chunk, choice, watch, timeout)
        request = Request(
            prompt,
            sampling,
            stop,
            chooser or Sampler(sampling, int(choice)),
            self.drafter,
            row=row,
            stats=stats,
            prefill_chunk=prefill_chunk or self.prefill_chunk,
            deadline=None if timeout is None else time.monotonic() + timeout,
            watch=watch,
            hints=hints,
            inputs=inputs,
        )
        if queued:
            return self.start(request)
        self.scheduler.set_limit(request)
        return request

    def _check(
        self, prompt: Sequence[int], prefill_chunk: int | None, choice: int, watch: object, timeout: float | None
    ) -> None:
        """Raise ValueError or PromptError for arguments that `submit` can't use."""
        check_prompts([prompt], self.target.context_length, self.target.vocab_size)
        if prefill_chunk is not None:
            check_chunk(prefill_chunk)
        if not isinstance(choice, Integral) or not 0 <= choice < 2**63:
            raise ValueError(f"choice={choice!r} is not allowed: give the index of the continuation, 0 or more")
        if watch is not None and not callable(watch):
            raise ValueError(f"watch={watch!r} is not allowed: give a function, or None")
        if self.target.model.training:  # dropout would change keys and values that later requests reuse
            raise ValueError("the model is in training mode, where dropout changes its text: call model.eval() first")
        if timeout is not None and not (isinstance(timeout, Real) and 0 < timeout < math.inf):
            raise ValueError(f"timeout={timeout!r} is not allowed: give seconds above 0, or None for no limit")

    def start(self, request: Request) -> Request:
        """Queue a request that is not queued yet. Raises QueueFullError if too many requests wait."""
        return self.scheduler.submit(request, self.rule)

    def cancel(self, request: Request, wait: bool = True) -> None:
        """End a request; its KV blocks are freed within a step. See `Scheduler.cancel`."""
        self.scheduler.cancel(request, wait=wait)

    def read(self, request: Request) -> Generator[Emission, None, None]:
        """Yield a request's tokens as they are emitted. Closing the iterator cancels the request.

        Raises:
            CancelledError: the request was cancelled, or its deadline has passed.
            Exception: any exception that a processor or stop rule of the request raised.
        """
        try:
            while self.scheduler.pump(request):
                yield request.emissions.popleft()
            raise_error(request)
        finally:
            if not request.finished:
                self.scheduler.cancel(request)

    async def aread(self, request: Request) -> AsyncGenerator[Emission, None]:
        """Like `read`, for asynchronous code: steps run in a worker thread and do not block the event loop."""
        try:
            while request.emissions or not request.finished:
                if request.emissions:
                    yield request.emissions.popleft()
                else:
                    await asyncio.wrap_future(self.scheduler.advance_async(request))
            raise_error(request)
        finally:
            if not request.finished:
                self.scheduler.cancel(request, wait=False)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        stop: StopParams | Sequence[StopParams],
        stats: Stats | None = None,
        watch: Callable[[Step], None] | None = None,
        choosers: Sequence[TokenChooser] | None = None,
        inputs: PromptInputs | None = None,
    ) -> Generator[Emission, None, None]:
        """Decode all prompts together; yields each row's tokens as they are emitted. Closing it cancels the rest.

        Args:
            prompts: token ids per row, each non-empty.
            sampling: for all rows, or one per row.
            stop: when a row ends, for all rows, or one per row.
            stats: filled as the run goes on, all rows together.
            watch: called with every decoding step before its tokens are yielded; its own time is not counted.
            choosers: one per row, instead of `sampling`.
            inputs: what a prompt has besides tokens, if there is one row.

        Raises:
            PromptError, KVPoolError, QueueFullError: see `submit`.
        """
        check_prompts(prompts, self.target.context_length, self.target.vocab_size)
        rows = len(prompts)
        params = [sampling] * rows if isinstance(sampling, SamplingParams) else list(sampling)
        stops = [stop] * rows if isinstance(stop, StopParams) else list(stop)
        if not len(params) == len(stops) == rows:
            raise ValueError(
                f"{rows} prompts, {len(params)} sampling and {len(stops)} stop parameters: give one per prompt"
            )
        return self._run(prompts, params, stops, stats or Stats(), watch, choosers or [None] * rows, inputs)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        stops: Sequence[StopParams],
        stats: Stats,
        watch: Callable[[Step], None] | None,
        choosers: Sequence[TokenChooser | None],
        inputs: PromptInputs | None,
    ) -> Generator[Emission, None, None]:
        requests: list[Request] = []
        try:
            for row, (prompt, params, stop, chooser) in enumerate(zip(prompts, sampling, stops, choosers, strict=True)):
                submitted = self.submit(
                    prompt, params, stop, chooser=chooser, row=row, stats=stats, watch=watch, inputs=inputs
                )
                requests.append(submitted)
            unfinished = list(requests)
            while unfinished:
                self.scheduler.pump(unfinished[0])
                for request in unfinished:
                    while request.emissions:
                        yield request.emissions.popleft()
                    if request.finished:
                        raise_error(request)
                unfinished = [request for request in unfinished if not request.finished or request.emissions]
        finally:
            for request in requests:
                if not request.finished:
                    self.scheduler.cancel(request)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        stop: StopParams | Sequence[StopParams],
        stats: Stats | None = None,
    ) -> list[list[int]]:
        """Decode all prompts to the end; returns each row's new tokens."""
        texts: list[list[int]] = [[] for _ in prompts]
        for emission in self.run(prompts, sampling, stop, stats):
            texts[emission.row].extend(emission.tokens)
        return texts


def raise_error(request: Request) -> None:
    """Raise the error that ended a request, if any.

    Raises:
        CancelledError: it was cancelled, or its deadline has passed. Exception: the request's own error.
    """
    if request.error is not None:
        raise request.error
    if request.finish_reason in ("cancelled", "deadline"):
        why = "its deadline has passed" if request.finish_reason == "deadline" else "it was cancelled"
        raise CancelledError(
            f"the request has ended: {why} after {len(request.tokens) - request.prompt_length} tokens; submit it again "
            f"for another answer"
        )


def check_chunk(prefill_chunk: int) -> None:
    """Raise ValueError for an invalid prefill chunk size."""
    if not isinstance(prefill_chunk, Integral) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk!r} is not allowed: give 1 or more prompt positions per forward")


def check_prompts(prompts: Sequence[Sequence[int]], context: int | None, vocab_size: int) -> None:
    """Check prompts before any work.

    Raises:
        PromptError: no prompt, an empty one, one that fills the context, or an id outside the vocabulary.
    """
    if not prompts:
        raise PromptError("no prompt was given")
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str | bytes) or not all(issubclass(kind, Integral) for kind in set(map(type, prompt))):
            raise PromptError(f"prompt {row} is {prompt!r}: the engine takes integers, the ids of tokens")
        if not len(prompt):
            raise PromptError(f"prompt {row} has no tokens; give at least one (a BOS token, for example)")
        if context is not None and len(prompt) >= context:
            raise PromptError(
                f"prompt {row} has {len(prompt)} tokens, the target's context holds {context} and needs room for one "
                f"new token: shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise PromptError(f"prompt {row} holds token ids outside 0..{vocab_size - 1}: wrong tokenizer?")
