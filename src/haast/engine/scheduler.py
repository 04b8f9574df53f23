"""Continuous-batching scheduler: the loop over steps that serves all requests on one target.

The Python API, the server, transformers' generate, training data, benchmarks and checks all submit requests here.
`admission` owns which of them run and the blocks that they hold, `step` what a step computes.

    retire    free the blocks of cancelled requests and of those past their deadline
    admit     waiting requests in order of arrival, as far as the KV pool has room
    prefill   a chunk of prompt positions; smaller while other requests decode, so that a long prompt can't stall them
    decode    one step per drafter and acceptance rule, of all their requests together

There is no scheduler thread: a caller that waits for a token runs steps itself (`pump`), or waits for the thread that
runs one. A step serves all running requests, of all callers; tokens wait in `Request.emissions` until they are read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from haast.core import Request, RequestState
from haast.engine.admission import Admission
from haast.engine.rules import AcceptanceRule
from haast.engine.step import decode, prefill
from haast.engine.tensor_parallel import agreement
from haast.errors import QueueFullError
from haast.interrupt import uninterrupted
from haast.target.kv_pool import BLOCK, common_length
from haast.target.target import Target

PREFILL_WHILE_DECODING = 128  # prompt positions per step while other requests decode
_MAX_PADDING = 9 / 8  # padded positions of a forward over several prompts, per real position


class Scheduler:
    """The requests on one target. Any number of threads may submit, cancel and pump.

    Args:
        target: its KV pool and lock are used.
        max_batch: maximum number of running requests.
        max_waiting: maximum number of waiting requests; None is no limit.
    """

    def __init__(self, target: Target, max_batch: int = 256, max_waiting: int | None = None) -> None:
        check_limits(max_batch, max_waiting)
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._agreement = agreement(target.ranks)
        self._admission = Admission(target, self._agreement)
        self._queue_lock = threading.Lock()  # held while a request is queued
        self._step_lock = threading.Lock()  # held by the thread that runs a step
        self._step_done = threading.Condition()  # notified after every step
        self._steps = 0
        self._stepper: int | None = None  # id of the thread inside a step
        self._cancellations = False  # whether requests may have been cancelled since the last `retire`
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="haast")  # its thread starts at first use

    @classmethod
    def of(cls, target: Target) -> Scheduler:
        """The scheduler of a target, created at first use."""
        with target.lock:
            if target.scheduler is None:
                target.scheduler = cls(target)
            scheduler: Scheduler = target.scheduler
            return scheduler

    @property
    def target(self) -> Target:
        """The model. Raises RuntimeError if it was deleted: the scheduler holds a weak reference only."""
        return self._admission.target

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._admission.waiting) + len(self._admission.arrived)

    @property
    def running(self) -> int:
        """Number of requests that prefill or decode."""
        return len(self._admission.running)

    @property
    def requests(self) -> list[Request]:
        """A copy of the list of waiting and running requests."""
        return list(self._admission.rules)

    @property
    def max_requests(self) -> int | None:
        """Maximum number of requests, running and waiting; None is no limit."""
        return None if self.max_waiting is None else self.max_batch + self.max_waiting

    def set_limit(self, request: Request) -> None:
        """Set the maximum number of new tokens of a request. Raises KVPoolError if it could never fit the pool."""
        self._admission.set_limit(request)

    def submit(self, request: Request, rule: AcceptanceRule | None = None) -> Request:
        """Queue a request. Does not wait for a running step.

        Raises:
            KVPoolError: it could never fit the pool. QueueFullError: too many requests wait.
        """
        self.set_limit(request)
        self._agreement.check(request.tokens, request.limit, request.prefill_chunk)
        if request.deadline is not None and self.target.ranks is not None:
            raise ValueError(
                "timeout is not supported for a model sharded over processes, whose clocks differ: leave it out"
            )
        with self._queue_lock:
            if self.max_requests is not None and self.running + self.waiting >= self.max_requests:
                raise QueueFullError(
                    f"{self.running} requests run and {self.waiting} wait: try again later, or allow more "
                    f"(max_batch={self.max_batch}, max_waiting={self.max_waiting})"
                )
            self._admission.add(request, rule)
        return request

    def cancel(self, request: Request, reason: str = "cancelled", wait: bool = True) -> None:
        """End a request. Its blocks are free when this returns, or after the running step.

        Without `wait`, for event loops, this never blocks on the target's lock: the blocks are freed soon after the
        lock is released.
        """
        request.finish_reason = request.finish_reason or reason
        self._cancellations = True
        if wait:
            self._retire_cancelled()
        elif self.target.lock.acquire(blocking=False):
            try:
                self._retire_cancelled()
            finally:
                self.target.lock.release()
        else:  # a step retires them at its end; a session, a measurement or another Target's step does not
            self._worker.submit(self._retire_cancelled)

    def _retire_cancelled(self) -> None:
        """Free the blocks of cancelled requests; during a step, the thread that runs it does so afterwards."""
        while self._cancellations and self._stepper is None:
            with self.target.lock:  # other Targets of the model, sessions and measurements hold it too
                if self._stepper is None:
                    self._cancellations = False
                    self._admission.retire()

    def pump(self, request: Request) -> bool:
        """Run steps until the request has emissions to read; False if it has ended and all are read."""
        while not request.emissions and not request.finished:
            self._check_queued(request)
            self.advance()
        return bool(request.emissions)

    def advance(self) -> None:
        """Run one step, or wait for the end of the step that another thread is running."""
        before = self._steps
        if self._step_lock.acquire(blocking=False):
            try:
                self.step()
            finally:
                self._step_lock.release()
                with self._step_done:
                    self._step_done.notify_all()
            return
        self._check_not_in_step()
        with self._step_done:
            self._step_done.wait_for(lambda: self._steps != before or not self._step_lock.locked())

    def advance_async(self, request: Request) -> Future[None]:
        """`advance` for asynchronous callers: a future that is done when the request may have emissions to read.

        A worker thread runs the step, unless an earlier step has served the request meanwhile. Cancelling the future
        ends the wait, not the request.
        """
        self._check_queued(request)
        return self._worker.submit(self._advance_for, request)

    def _advance_for(self, request: Request) -> None:
        if not request.emissions and not request.finished:
            self.advance()

    def _check_queued(self, request: Request) -> None:
        if request not in self._admission.rules and not request.finished:
            raise ValueError("this request was never queued, so it has no tokens: submit it (`Engine.start`) first")

    def _check_not_in_step(self) -> None:
        if self._stepper == threading.get_ident():
            raise RuntimeError(
                "a logits processor, stop rule or watcher asked for tokens of the model that it is called by: "
                "generate outside of the callback, or load the model a second time"
            )

    def step(self) -> bool:
        """Run one step of all requests; returns whether any request is left."""
        self._check_not_in_step()
        with uninterrupted():
            with self.target.lock:
                self._stepper = threading.get_ident()
                try:
                    remaining = self._step_all()
                finally:
                    self._stepper = None
                    self._steps += 1
            self._retire_cancelled()
        return remaining

    def _step_all(self) -> bool:
        self._admission.retire()
        if self._admission.waiting or self._admission.running:
            self._report_load()
            with torch.inference_mode(), self.target.step_threads():
                groups = self._groups()  # before prefill: a request's first token can be read before it decodes
                self._prefill()
                for group in groups:
                    self._decode(group)
        self._admission.retire()
        return bool(self._admission.waiting or self._admission.running)

    def _report_load(self) -> None:
        """Report the number of requests to drafters; not with several processes, which would have to agree on it."""
        if self.target.ranks is None:
            requests = [*self._admission.running, *self._admission.waiting]
            for drafter in {id(request.drafter): request.drafter for request in requests}.values():
                drafter.set_load(min(len(requests), self.max_batch))

    # ------------------------------------------------------------------------------------------------------- prefill

    def _prefill(self) -> None:
        decoding = any(request.state is RequestState.RUNNING for request in self._admission.running)
        budget = None  # prompt positions left in this step; set by the first batch
        while budget is None or budget > 0:
            batch = self._prefill_group(budget, decoding)
            if not batch:
                return
            chunk = batch[0][0].prefill_chunk
            budget = (min(chunk, PREFILL_WHILE_DECODING) if decoding else chunk) if budget is None else budget
            budget -= len(batch) * max(count for _, count in batch)
            with self._handle_errors([request for request, _ in batch]):
                self._prefill_batch(batch)

    def _prefill_group(self, budget: int | None, decoding: bool) -> list[tuple[Request, int]]:
        """The requests of the next prefill forward, and the number of prompt positions of each.

        A request that would compute the same block as another one waits for the next forward and shares it then.
        """
        batch: list[tuple[Request, int]] = []
        prefilling = [r for r in self._admission.running if r.state is RequestState.PREFILLING and not r.finish_reason]

        def count_of(request: Request) -> int:
            if request.whole_prompt:
                return request.prompt_length
            chunk = request.prefill_chunk
            most = (min(chunk, PREFILL_WHILE_DECODING) if decoding else chunk) if budget is None else min(budget, chunk)
            # Before admission: of the positions that it would share, the last one is computed again.
            done = max(self._admission.computed(request) - (request.kv is None), 0)
            return self._admission.chunk(request, done, max(min(most, request.prefill_end - done), 1))

        def fits(request: Request) -> bool:
            if not batch:
                return True
            first = batch[0][0]
            if request.whole_prompt or first.whole_prompt:
                return False
            counts = [count_of(request), *(count for _, count in batch)]
            room = first.prefill_chunk if budget is None else budget
            compatible = request.drafter is first.drafter and request.prefill_chunk == first.prefill_chunk
            padded, most = len(counts) * max(counts), min(room, PREFILL_WHILE_DECODING) if decoding else room
            if not compatible or padded > most or padded > _MAX_PADDING * sum(counts):
                return False
            # With this many tokens in common, one request could reuse a block of the other.
            shared = self._admission.computed(request) // BLOCK * BLOCK + BLOCK
            return all(common_length(request.tokens, other.tokens) < shared for other, _ in batch)

        for request in prefilling:
            if fits(request):
                batch.append((request, count_of(request)))
        while len(self._admission.running) < self.max_batch and (admitted := self._admission.admit(fits)) is not None:
            batch.append((admitted, count_of(admitted)))
        return batch

    def _prefill_batch(self, batch: list[tuple[Request, int]]) -> None:
        padded = max(count for _, count in batch)  # the forward writes this many slots in every row
        batch = [(request, count) for request, count in batch if self._admission.reserve_prompt(request, padded)]
        if not batch:
            return
        prefill(self.target, batch, self._agreement)
        for request, _ in batch:
            if request.kv.length == request.prefill_end:
                self._admission.publish(request)
                request.state = RequestState.RUNNING

    # -------------------------------------------------------------------------------------------------------- decode

    def _groups(self) -> list[list[Request]]:
        """Decoding requests grouped by drafter and acceptance rule; each group decodes in one step."""
        groups: dict[tuple[int, int], list[Request]] = {}
        for request in self._admission.running:
            if request.state is RequestState.RUNNING and not request.finish_reason:
                groups.setdefault((id(request.drafter), id(self._admission.rules[request])), []).append(request)
        return list(groups.values())

    def _decode(self, group: list[Request]) -> None:
        """One decoding step of requests that share a drafter and an acceptance rule."""
        self._admission.reserve_step(group)
        if group:
            with self._handle_errors(group):
                decode(self.target, group, self._admission.rules[group[0]], self._agreement)

    @contextmanager
    def _handle_errors(self, group: Sequence[Request]) -> Iterator[None]:
        """Fail the group's running requests if their step raises an error; preempt them if it is interrupted.

        Requests that were preempted during the step are not affected. Finished requests are removed afterwards.
        """
        try:
            yield
        except Exception as error:
            for request in group:
                if request in self._admission.running and not request.finish_reason:
                    request.fail(error)
        except BaseException:
            for request in reversed(group):
                if request in self._admission.running:
                    self._admission.preempt(request, keep=False)
            raise
        self._admission.remove_finished(group)


def check_limits(max_batch: int, max_waiting: int | None) -> None:
    """Raise ValueError for invalid limits."""
    for name, value, least in (("max_batch", max_batch, 1), ("max_waiting", max_waiting, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}={value!r} is not allowed: give {least} requests or more")
