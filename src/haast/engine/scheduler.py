"""All requests on one target: who waits, who is prefilled, who decodes.

Owns the states of requests: generate, stream, sessions, transformers' generate, answers for training, benchmarks and
checks all submit requests here. What a step computes is `step`'s.

    retire    cancelled requests and those past their deadline give their blocks back
    admit     waiting requests, first come first served, as far as the KV pool has room
    prefill   a chunk of prompt positions, smaller where others decode, so that a long prompt stalls nobody
    decode    a step of each drafter's requests together

Whoever waits for a token takes steps (`pump`), or waits for the thread that is taking one; there is no thread of its
own. A step serves every running request, whosever it is: tokens wait in `Request.emissions` until they are taken. A
request that runs out of blocks is preempted, the newest first: it waits again and its positions are computed anew.
Nothing it says changes by that, since a choice depends on the request and the position alone.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from haast.core import Request, RequestState
from haast.engine.guiding import guided_nodes
from haast.engine.rules import AcceptanceRule
from haast.engine.step import decode, prefill
from haast.engine.tensor_parallel import agreement
from haast.errors import KVPoolError, QueueFullError
from haast.interrupt import uninterrupted
from haast.target.kv_pool import BLOCK, PoolFullError, common_length
from haast.target.target import Target

BESIDE_DECODING = 128  # prompt positions a step where other requests decode
_PADDED = 9 / 8  # positions of a forward over several prompts, over those that are computed for something
_MARGIN = 2  # slots after the nodes of a step: the bonus token, and a head's shift


class Scheduler:
    """The requests on one target. Any number of threads may submit, cancel and pump.

    Args:
        target: whose KV pool and lock it uses.
        max_batch: requests that run at once.
        max_waiting: requests that wait beside them; None is any number.
    """

    def __init__(self, target: Target, max_batch: int = 256, max_waiting: int | None = None) -> None:
        check_limits(max_batch, max_waiting)
        self._target = weakref.ref(target)  # a cycle would keep its memory until Python's garbage collector comes by
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._agreement = agreement(target.ranks)
        self._door = threading.Lock()  # held while a request joins the queue
        self._arrived: deque[Request] = deque()  # since the last step; joined without waiting for a step to end
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # prefilling or decoding, in the order of admission
        self._rules: dict[Request, AcceptanceRule | None] = {}
        self._turn = threading.Lock()  # held by the thread that takes a step for everybody
        self._served = threading.Condition()  # told after every step
        self._steps = 0
        self._stepper: int | None = None  # the thread inside a step
        self._unswept = False  # whether somebody may have been cancelled since the last look
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="haast")  # its thread starts at first use

    @classmethod
    def of(cls, target: Target) -> Scheduler:
        """The one scheduler of a target."""
        with target.lock:
            if target.scheduler is None:
                target.scheduler = cls(target)
            found: Scheduler = target.scheduler
            return found

    @property
    def target(self) -> Target:
        """The model, which whoever has requests holds."""
        target = self._target()
        if target is None:
            raise RuntimeError("this scheduler's target is gone: keep the Haast, Engine or Target of its requests")
        return target

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting) + len(self._arrived)

    @property
    def running(self) -> int:
        """Requests that are prefilled or decode."""
        return len(self._running)

    @property
    def requests(self) -> list[Request]:
        """All that are here, a copy: they may have ended when it is looked at."""
        return list(self._rules)

    @property
    def most(self) -> int | None:
        """Requests that may be there at once, waiting ones included; None is any number."""
        return None if self.max_waiting is None else self.max_batch + self.max_waiting

    def fit(self, request: Request) -> None:
        """Set how many new tokens a request may have. Raises KVPoolError where it could never fit the pool."""
        target = self.target
        context = target.context_length
        # A text whose context is full ends; verified nodes may stand beyond it but are never emitted.
        request.limit = request.stop.max_new_tokens
        if context is not None:
            request.limit = min(request.limit, context - request.prompt_length)
        most = request.prompt_length + request.limit + self._ahead(request)
        if most > target.pool.tokens:
            raise KVPoolError(
                f"a prompt of {request.prompt_length} tokens, {request.limit} new ones and the drafts' room are {most} "
                f"token slots; the KV pool has {target.pool.tokens}: lower max_new_tokens, or give the pool more "
                f"(kv_tokens or kv_bytes)"
            )

    def submit(self, request: Request, rule: AcceptanceRule | None = None) -> Request:
        """Queue a request, without waiting for a step that is on its way.

        Raises:
            KVPoolError: it could never fit the pool. QueueFullError: too many wait already.
        """
        self.fit(request)
        self._agreement.check(request.tokens, request.limit, request.prefill_chunk)
        if request.deadline is not None and self.target.ranks is not None:
            raise ValueError(
                "a timeout is by each process's own clock, and the processes of one model must agree: leave it out"
            )
        with self._door:
            if self.most is not None and self.running + self.waiting >= self.most:
                raise QueueFullError(
                    f"{self.running} requests run and {self.waiting} wait: try again later, or allow more "
                    f"(max_batch={self.max_batch}, max_waiting={self.max_waiting})"
                )
            self._rules[request] = rule
            self._arrived.append(request)
        return request

    def cancel(self, request: Request, reason: str = "cancelled", wait: bool = True) -> None:
        """End a request. What it holds is free when this returns, or with the end of a step that is on its way.

        Without `wait`, as an event loop needs it, this never waits for who holds the model: what the request holds is
        free soon after they let it go.
        """
        request.finish_reason = request.finish_reason or reason
        self._unswept = True
        if wait:
            self._sweep()
        elif self.target.lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self.target.lock.release()
        else:  # a step sweeps when it ends, but a session, a measurement or another target's step does not
            self._worker.submit(self._sweep)

    def _sweep(self) -> None:
        """Retire who was cancelled; while a step is on its way, this is done after it."""
        while self._unswept and self._stepper is None:
            with self.target.lock:  # others hold it too: steps of another Target of the model, sessions, measurements
                if self._stepper is None:
                    self._unswept = False
                    self._retire()

    def pump(self, request: Request) -> bool:
        """Take steps until the request has something to read; False where nothing will come any more."""
        while not request.emissions and not request.finished:
            self._check_queued(request)
            self.advance()
        return bool(request.emissions)

    def advance(self) -> None:
        """One step for everybody: taken by this thread, or waited for where another one is at it."""
        before = self._steps
        if self._turn.acquire(blocking=False):
            try:
                self.step()
            finally:
                self._turn.release()
                with self._served:
                    self._served.notify_all()
            return
        self._refuse_own_step()
        with self._served:
            self._served.wait_for(lambda: self._steps != before or not self._turn.locked())

    def served(self, request: Request) -> Future[None]:
        """For who must not wait in a thread of its own: done as soon as there may be something to read.

        The scheduler's own thread takes a step, unless one that it took for another reader has served the request too.
        Cancelling it ends the wait, not the request.
        """
        self._check_queued(request)
        return self._worker.submit(self._serve, request)

    def _serve(self, request: Request) -> None:
        if not request.emissions and not request.finished:
            self.advance()

    def _check_queued(self, request: Request) -> None:
        if request not in self._rules and not request.finished:
            raise ValueError("this request was never queued, so nothing comes of it: submit it (`Engine.start`) first")

    def _refuse_own_step(self) -> None:
        if self._stepper == threading.get_ident():
            raise RuntimeError(
                "a logits processor, stop rule or watcher asked for tokens of the model that it is called by: "
                "generate with that model elsewhere, or load it a second time"
            )

    def step(self) -> bool:
        """Serve everybody once; whether anybody is left."""
        self._refuse_own_step()
        with uninterrupted():
            with self.target.lock:
                self._stepper = threading.get_ident()
                try:
                    left = self._serve_all()
                finally:
                    self._stepper = None
                    self._steps += 1
            self._sweep()
        return left

    def _serve_all(self) -> bool:
        self._retire()
        if self._waiting or self._running:
            self._tell_load()
            with torch.inference_mode(), self.target.step_threads():
                groups = self._groups()  # a request's first token can be read before it decodes
                self._prefill()
                for group in groups:
                    self._decode(group)
        self._retire()
        return bool(self._waiting or self._running)

    def _tell_load(self) -> None:
        """Tell drafters how many requests are going to run. Processes of one model would have to agree on that."""
        if self.target.ranks is None:
            requests = [*self._running, *self._waiting]
            for drafter in {id(request.drafter): request.drafter for request in requests}.values():
                drafter.loaded(min(len(requests), self.max_batch))

    # ------------------------------------------------------------------------------------------ joining and leaving

    def _retire(self) -> None:
        """Let those join that arrived, and those leave that were cancelled or are too late."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        now = time.monotonic()
        for request in [*self._running, *self._waiting]:
            if request.deadline is not None and now >= request.deadline and not request.finish_reason:
                request.finish_reason = "deadline"
        self._let_go([*self._running, *self._waiting])

    def _let_go(self, requests: Sequence[Request]) -> None:
        """Those that have ended leave, with all that they hold."""
        for request in requests:
            if not request.finish_reason or request.finished:
                continue
            if request in self._running:
                self._running.remove(request)
                self._release(request, keep=request.error is None)
            elif request in self._waiting:
                self._waiting.remove(request)
            said_all = request.finish_reason in ("stop", "length")
            request.state = RequestState.DONE if said_all else RequestState.CANCELLED
            self._rules.pop(request, None)

    def _release(self, request: Request, keep: bool = True) -> None:
        drafter, kv, state = request.drafter, request.kv, request.draft_state
        # A stop rule may have cut off tokens whose positions are there.
        known = min(kv.length, len(request.tokens))
        filled, complete_from = self._cached(request) if keep else (0, 0)
        kv.release(request.tokens, min(filled, known), drafter.prefix_key, complete_from)
        if state is not None:
            drafter.end(state)
        request.kv = request.draft_state = None

    def _cached(self, request: Request) -> tuple[int, int]:
        """How many slots of a request others may use, and from which one on its drafter has all that it needs there."""
        drafter, state, length = request.drafter, request.draft_state, request.kv.length
        own = self._agreement.numbers(lambda: (drafter.filled(state, length), drafter.complete_from(state)))
        return own[0], own[1]

    def _preempt(self, request: Request, keep: bool = True) -> None:
        """Take a running request's blocks; it waits again, before all others."""
        self._release(request, keep)
        self._running.remove(request)
        request.state = RequestState.WAITING
        self._waiting.appendleft(request)

    def _ahead(self, *requests: Request) -> int:
        """Slots after a text's committed ones that a step of these requests, of one drafter, may write."""
        drafter = requests[0].drafter
        ahead: int = max(drafter.nodes + guided_nodes(requests), drafter.room) + _MARGIN
        return ahead

    def _admit(self, fits: Callable[[Request], bool]) -> Request | None:
        """The next request that there is room for and that `fits`, which runs from here on."""
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            pool = self.target.pool
            if not self._running:
                self.target.refresh()
            fresh = len(request.tokens) == request.prompt_length
            request.prefill_end = request.prompt_length if fresh else len(request.tokens) - 1
            needed = -(-(len(request.tokens) + self._ahead(request)) // BLOCK)
            shared = self._computed(request) // BLOCK
            # Every running request may need a block in this step; one more each keeps preemptions rare.
            if self._running and pool.available < max(needed - shared, 1) + 2 * len(self._running):
                return None
            if not fits(request):
                return None
            request.kv = pool.sequence()
            try:
                self._waiting.popleft()
                self._enter(request)
                return request
            except Exception as error:  # its own drafter's
                self._release(request, keep=False)
                request.fail(error)
                self._let_go([request])
            except BaseException:
                self._release(request, keep=False)
                self._waiting.appendleft(request)
                raise
        return None

    def _enter(self, request: Request) -> None:
        drafter, cache, kv = request.drafter, self.target.cache, request.kv
        text = request.tokens[: request.prefill_end]
        reused, source, copy = kv.reuse(text, drafter.prefix_key, drafter.reach, drafter.resting)
        if source:
            for each in (cache, *drafter.caches):
                each.stores.copy_block(source, copy)
        request.state = RequestState.PREFILLING
        if self._agreement.leads:
            request.draft_state = drafter.begin(request.tokens, kv, reused)
            drafter.drawn_by(request.draft_state, request.chooser)
            if request.hints.foreseen:
                drafter.foresee(request.draft_state, (*request.hints.foreseen, *request.tokens[: reused + 1]))
        if len(request.tokens) == request.prompt_length:
            request.stats.prompt_tokens += len(text)
            request.stats.recalled_tokens += reused
        self._running.append(request)

    def _make_room(self, group: list[Request]) -> None:
        """Reserve what the group's next step may write; where there is no room, the newest request waits again."""
        for request in list(group):
            while request.state is RequestState.RUNNING or request.state is RequestState.PREFILLING:
                try:
                    left = [each for each in group if each.state is not RequestState.WAITING]
                    request.kv.reserve(request.kv.length + self._ahead(*left))
                    break
                except PoolFullError:
                    newest = next(each for each in reversed(self._running))
                    self._preempt(newest)
        group[:] = [request for request in group if request.state is not RequestState.WAITING]

    # ------------------------------------------------------------------------------------------------------- prefill

    def _prefill(self) -> None:
        decoding = any(request.state is RequestState.RUNNING for request in self._running)
        left = None
        while left is None or left > 0:
            batch = self._prompts(left, decoding)
            if not batch:
                return
            chunk = batch[0][0].prefill_chunk
            left = (min(chunk, BESIDE_DECODING) if decoding else chunk) if left is None else left
            left -= len(batch) * max(count for _, count in batch)
            with self._guarded([request for request, _ in batch]):
                self._prefill_batch(batch)

    def _prompts(self, left: int | None, decoding: bool) -> list[tuple[Request, int]]:
        """The requests whose prompts the next forward goes over, and how many positions of each.

        A request that would compute the same block as another one waits for the next forward, and shares it then.
        """
        batch: list[tuple[Request, int]] = []
        begun = [r for r in self._running if r.state is RequestState.PREFILLING and not r.finish_reason]

        def count_of(request: Request) -> int:
            chunk = request.prefill_chunk
            most = (min(chunk, BESIDE_DECODING) if decoding else chunk) if left is None else min(left, chunk)
            done = max(self._computed(request) - (request.kv is None), 0)  # the last shared position is run again
            return max(min(most, request.prefill_end - done), 1)

        def fits(request: Request) -> bool:
            if not batch:
                return True
            first = batch[0][0]
            counts = [count_of(request), *(count for _, count in batch)]
            room = first.prefill_chunk if left is None else left
            alike = request.drafter is first.drafter and request.prefill_chunk == first.prefill_chunk
            padded, most = len(counts) * max(counts), min(room, BESIDE_DECODING) if decoding else room
            if not alike or padded > most or padded > _PADDED * sum(counts):
                return False
            # Tokens in common from which on one of both could use a block of the other's.
            shared = self._computed(request) // BLOCK * BLOCK + BLOCK
            return all(common_length(request.tokens, other.tokens) < shared for other, _ in batch)

        for request in begun:
            if fits(request):
                batch.append((request, count_of(request)))
        while (entered := self._admit(fits)) is not None:
            batch.append((entered, count_of(entered)))
        return batch

    def _computed(self, request: Request) -> int:
        """Positions of a prompt that are there: the request's own, or before it has any those that others left."""
        if request.kv is not None:
            return int(request.kv.length)
        drafter, text = request.drafter, request.tokens[: request.prefill_end]
        return self.target.pool.usable(text, drafter.prefix_key, drafter.reach, drafter.resting)

    def _prefill_batch(self, batch: list[tuple[Request, int]]) -> None:
        padded = max(count for _, count in batch)  # the forward writes so many slots of every row
        batch = [(request, count) for request, count in batch if self._reserved(request, padded)]
        if not batch:
            return
        prefill(self.target, batch, self._agreement)
        for request, _ in batch:
            if request.kv.length == request.prefill_end:
                filled, complete_from = self._cached(request)
                shared = min(filled, request.kv.length)  # others may share the prompt's blocks
                request.kv.publish(request.tokens, shared, request.drafter.prefix_key, complete_from)
                request.state = RequestState.RUNNING

    def _reserved(self, request: Request, count: int) -> bool:
        """Take the blocks for the next positions of a prompt; where there are none, it waits again."""
        try:
            request.kv.reserve(request.kv.length + count + self._ahead(request))
        except PoolFullError:
            if len(self._running) == 1:
                raise
            self._preempt(request)
            return False
        return True

    # -------------------------------------------------------------------------------------------------------- decode

    def _groups(self) -> list[list[Request]]:
        """Decoding requests that step together: those of one drafter and acceptance rule."""
        groups: dict[tuple[int, int], list[Request]] = {}
        for request in self._running:
            if request.state is RequestState.RUNNING and not request.finish_reason:
                groups.setdefault((id(request.drafter), id(self._rules[request])), []).append(request)
        return list(groups.values())

    def _decode(self, group: list[Request]) -> None:
        """One step of requests that share a drafter."""
        self._make_room(group)
        if group:
            with self._guarded(group):
                decode(self.target, group, self._rules[group[0]], self._agreement)

    @contextmanager
    def _guarded(self, group: Sequence[Request]) -> Iterator[None]:
        """What goes wrong in a step ends its requests; an interrupt ends none: they begin their step again later.

        Those that had to wait meanwhile have no part in it. What has ended leaves.
        """
        try:
            yield
        except Exception as error:
            for request in group:
                if request in self._running and not request.finish_reason:
                    request.fail(error)
        except BaseException:
            for request in reversed(group):
                if request in self._running:
                    self._preempt(request, keep=False)
            raise
        self._let_go(group)


def check_limits(max_batch: int, max_waiting: int | None) -> None:
    """Raises ValueError where a scheduler can't keep to these limits."""
    for name, value, least in (("max_batch", max_batch, 1), ("max_waiting", max_waiting, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}={value!r} is not allowed: give {least} requests or more")
