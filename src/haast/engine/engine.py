"""The engine: one target, one drafter, one acceptance rule, and requests that go through the target's scheduler.

Owns how requests are made and read: one by one (`submit`, `read`), a list of prompts at once (`run`, `complete`), and
from asynchronous code (`aread`). Knows token ids only, no text. The steps themselves are `scheduler`'s, which serves
all requests on a target together, whoever made them.
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
from haast.target.target import Target

__all__ = ["PREFILL_CHUNK", "Emission", "Engine", "Stats", "Step", "StopParams", "check_prompts"]
# Prompt positions a forward. They bound the activations, and what grows with them times the positions before: masks
# and, where modules answer, attention scores.
PREFILL_CHUNK = 512


class Engine:
    """One target and one drafter, for any number of requests, from any number of threads.

    Args:
        target: the model.
        drafter: what drafts for it.
        rule: another acceptance rule than sample-and-match. Only sample-and-match promises vanilla's own text for a
            seed; see `haast.engine.rules` for what each rule keeps, and which is lossy.
        prefill_chunk: prompt positions a forward, 1 or more; the text does not depend on it.

    Raises:
        ValueError: a chunk below 1. KVPoolError: the drafter is another target's.
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
                f"this {drafter.name} drafter keeps its keys and values in the KV pool of another target: make one for "
                f"this target"
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
        queued: bool = True,
    ) -> Request:
        """Queue a request; `read` gives what it says.

        Args:
            prompt: token ids, one or more.
            sampling: distribution of the next token; draws are keyed by (seed, choice, position).
            stop: when it ends.
            choice: number of the continuation, where several are made of one prompt.
            chooser: chooses the tokens instead of `sampling`.
            row: the request's number in its call, for the caller.
            stats: filled as it runs.
            timeout: seconds from now after which it is ended.
            watch: called with every decoding step of the request before its tokens can be read.
            prefill_chunk: prompt positions a forward, instead of the engine's.
            hints: about its drafts; sample-and-match alone keeps to the text with them.
            queued: False only checks it and leaves it for `start`.

        Raises:
            PromptError: an empty prompt, one that does not fit the context with one new token, or ids of no token.
            KVPoolError: prompt and new tokens could never fit the KV pool. QueueFullError: too many wait already.
            ValueError: a chunk below 1, or a timeout that is no time.
        """
        check_prompts([prompt], self.target.context_length, self.target.vocab_size)
        if prefill_chunk is not None:
            check_chunk(prefill_chunk)
        if not isinstance(choice, Integral) or not 0 <= choice < 2**63:
            raise ValueError(f"choice={choice!r} is not allowed: give the number of the continuation, from 0 on")
        if watch is not None and not callable(watch):
            raise ValueError(f"watch={watch!r} is not allowed: give a function, or None")
        if self.target.model.training:  # dropout would get into keys and values that other requests use again
            raise ValueError("the model is in training mode, where its text is not its own: call model.eval() first")
        if timeout is not None and not (isinstance(timeout, Real) and 0 < timeout < math.inf):
            raise ValueError(f"timeout={timeout!r} is not allowed: give seconds above 0, or None to wait for any time")
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
        )
        if queued:
            return self.start(request)
        self.scheduler.fit(request)
        return request

    def start(self, request: Request) -> Request:
        """Queue a request that is not queued yet. Raises QueueFullError where too many wait already."""
        return self.scheduler.submit(request, self.rule)

    def cancel(self, request: Request, wait: bool = True) -> None:
        """End a request; what it holds is free within a step. See `Scheduler.cancel`."""
        self.scheduler.cancel(request, wait=wait)

    def read(self, request: Request) -> Generator[Emission, None, None]:
        """What a request says, as it comes. Leaving the iterator ends the request.

        Raises:
            CancelledError: the request was cancelled, or its deadline has passed.
            Exception: whatever a processor or stop rule of the request raised.
        """
        try:
            while self.scheduler.pump(request):
                yield request.emissions.popleft()
            raise_error(request)
        finally:
            if not request.finished:
                self.scheduler.cancel(request)

    async def aread(self, request: Request) -> AsyncGenerator[Emission, None]:
        """As `read`, for asynchronous code: steps are taken in a worker thread, the event loop goes on."""
        try:
            while request.emissions or not request.finished:
                if request.emissions:
                    yield request.emissions.popleft()
                else:
                    await asyncio.wrap_future(self.scheduler.served(request))
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
    ) -> Generator[Emission, None, None]:
        """Decode every prompt; yields each one's tokens as they are settled. Safe to abandon at any point.

        Args:
            prompts: token ids per row, each non-empty.
            sampling: for all rows, or one a row.
            stop: when a row ends, for all rows, or one a row.
            stats: filled as the run goes on, all rows together.
            watch: called with every decoding step before its tokens are yielded; its own time is not counted.
            choosers: one a row, instead of `sampling`.

        Raises:
            PromptError, KVPoolError, QueueFullError: see `submit`.
        """
        check_prompts(prompts, self.target.context_length, self.target.vocab_size)
        rows = len(prompts)
        every = [sampling] * rows if isinstance(sampling, SamplingParams) else list(sampling)
        stops = [stop] * rows if isinstance(stop, StopParams) else list(stop)
        if not len(every) == len(stops) == rows:
            raise ValueError(f"{rows} prompts, {len(every)} sampling and {len(stops)} stop parameters: give one a row")
        return self._run(prompts, every, stops, stats or Stats(), watch, choosers or [None] * rows)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        stops: Sequence[StopParams],
        stats: Stats,
        watch: Callable[[Step], None] | None,
        choosers: Sequence[TokenChooser | None],
    ) -> Generator[Emission, None, None]:
        requests: list[Request] = []
        try:
            for row, (prompt, params, stop, chooser) in enumerate(zip(prompts, sampling, stops, choosers, strict=True)):
                made = self.submit(prompt, params, stop, chooser=chooser, row=row, stats=stats, watch=watch)
                requests.append(made)
            left = list(requests)
            while left:
                self.scheduler.pump(left[0])
                for request in left:
                    while request.emissions:
                        yield request.emissions.popleft()
                    if request.finished:
                        raise_error(request)
                left = [request for request in left if not request.finished or request.emissions]
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
        """`run` to the end: each row's new tokens."""
        texts: list[list[int]] = [[] for _ in prompts]
        for emission in self.run(prompts, sampling, stop, stats):
            texts[emission.row].extend(emission.tokens)
        return texts


def raise_error(request: Request) -> None:
    """Raise what ended a request, if something did.

    Raises:
        CancelledError: it was cancelled, or its deadline has passed. Exception: its own.
    """
    if request.error is not None:
        raise request.error
    if request.finish_reason in ("cancelled", "deadline"):
        why = "its deadline has passed" if request.finish_reason == "deadline" else "it was cancelled"
        raise CancelledError(
            f"the request has no more to say: {why} after {len(request.tokens) - request.prompt_length} tokens; "
            f"submit it again for another answer"
        )


def check_chunk(prefill_chunk: int) -> None:
    """Raises ValueError where prompts can't be run in chunks of this size."""
    if not isinstance(prefill_chunk, Integral) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk!r} is not allowed: give 1 or more prompt positions a forward")


def check_prompts(prompts: Sequence[Sequence[int]], context: int | None, vocab_size: int) -> None:
    """Refuse prompts that can't be answered, before any work.

    Raises:
        PromptError: no prompt, an empty one, one that fills the context, or an id outside the vocabulary.
    """
    if not prompts:
        raise PromptError("no prompt was given")
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str | bytes) or not all(issubclass(kind, Integral) for kind in set(map(type, prompt))):
            raise PromptError(f"prompt {row} is {prompt!r}: the engine takes whole numbers, the ids of tokens")
        if not len(prompt):
            raise PromptError(f"prompt {row} has no tokens; give at least one (a BOS token, say)")
        if context is not None and len(prompt) >= context:
            raise PromptError(
                f"prompt {row} has {len(prompt)} tokens, the target's context holds {context} and needs room for at "
                f"least one more; shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise PromptError(f"prompt {row} holds token ids outside 0..{vocab_size - 1}: wrong tokenizer?")
