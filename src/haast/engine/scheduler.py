"""All requests on one target: who waits, who is prefilled, who decodes, and the step that serves them together.

Owns the states of requests and every step of the house: generate, stream, sessions, transformers' generate, answers for
training, benchmarks and checks all submit requests here. Knows drafters and targets by their contracts only.

    step    retire    cancelled requests and those past their deadline give their blocks back
            admit     waiting requests, first come first served, as far as the KV pool has room
            prefill   a chunk of prompt positions, smaller where others decode, so that a long prompt stalls nobody
            decode    propose -> forward -> verify -> keep -> observe -> emit, for each drafter's requests together

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
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from haast.core import Accepted, Emission, Request, RequestState, Verdict
from haast.device import to_device
from haast.drafters.base import Drafter
from haast.engine.background import Background
from haast.engine.rules import AcceptanceRule
from haast.engine.tensor_parallel import agreement
from haast.engine.verify import Failures, check_possible, verify
from haast.errors import KVPoolError, QueueFullError
from haast.stats import Stats
from haast.target.kv_pool import BLOCK, PoolFullError, common_length
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.target import Target, TargetOutput
from haast.tree import DraftTree

BESIDE_DECODING = 128  # prompt positions a step where other requests decode
_PADDED = 9 / 8  # positions of a forward over several prompts, over those that are computed for something
_MARGIN = 2  # slots after the nodes of a step: the bonus token, and a head's shift


@dataclass(frozen=True)
class Step:
    """One decoding step as a watcher sees it. The tensors are the step's own: read them at once, keep none."""

    tree: DraftTree
    logits: Tensor  # (rows, nodes, vocab): the target's raw logits at every node
    verdict: Verdict
    emissions: tuple[Emission, ...]  # what the stop rules left of the verdict, one per row
    rows: tuple[int, ...]  # the place of each row's request in its call
    ms_draft: float
    ms_verify: float
    ms_overhead: float


@dataclass(frozen=True)
class Computed:
    """What the target computed at kept positions of some requests. The tensors are the step's own: copy what stays.

    A request that had to wait again computes positions anew that it has told of. Stop rules may cut off the last
    positions later: the text has no token for them.
    """

    requests: tuple[Request, ...]
    begins: tuple[int, ...]  # each one's first position
    counts: tuple[int, ...]  # and how many
    features: Tensor  # (positions, hidden): the LM head's input, request after request
    logits: Tensor  # (n, vocab), raw: at the last n of these positions, after which tokens were chosen


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
        self._background = Background()

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
    def most(self) -> int | None:
        """Requests that may be there at once, waiting ones included; None is any number."""
        return None if self.max_waiting is None else self.max_batch + self.max_waiting

    def fit(self, request: Request) -> None:
        """Set how many new tokens a request may have. Raises KVPoolError where it could never fit the pool."""
        target, drafter = self.target, request.drafter
        context = target.context_length
        # A text whose context is full ends; verified nodes may stand beyond it but are never emitted.
        request.limit = request.stop.max_new_tokens
        if context is not None:
            request.limit = min(request.limit, context - request.prompt_length)
        most = request.prompt_length + request.limit + self._ahead(drafter)
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

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """End a request. What it holds is free when this returns, or with the end of a step that is on its way."""
        request.finish_reason = request.finish_reason or reason
        self._unswept = True
        self._sweep()

    def _sweep(self) -> None:
        """Retire who was cancelled; while a step is on its way, this is done after it."""
        while self._unswept and self.target.lock.acquire(blocking=False):
            try:
                if self._stepper is not None:
                    return
                self._unswept = False
                self._retire()
            finally:
                self.target.lock.release()

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
        """Done when the request has something to read or has ended; a thread takes steps until then."""
        self._check_queued(request)
        return self._background.served(request, self.advance)

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
        left = self._step()
        self._sweep()
        return left

    def _step(self) -> bool:
        with self._stepping():
            self._retire()
            if self._waiting or self._running:
                with torch.inference_mode(), self.target.step_threads():
                    groups = self._groups()  # a request's first token can be read before it decodes
                    self._prefill()
                    for group in groups:
                        self._decode(group)
            self._retire()
            return bool(self._waiting or self._running)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        self._refuse_own_step()
        with self.target.lock:
            self._stepper = threading.get_ident()
            try:
                yield
            finally:
                self._stepper = None
                self._steps += 1

    # ------------------------------------------------------------------------------------------ joining and leaving

    def _retire(self) -> None:
        """Give back what requests hold that were cancelled or are too late."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        now = time.monotonic()
        for request in [*self._running, *self._waiting]:
            if request.deadline is not None and now >= request.deadline and not request.finish_reason:
                request.finish_reason = "deadline"
            if request.finish_reason and not request.finished:
                self._leave(request, RequestState.CANCELLED)

    def _leave(self, request: Request, state: RequestState) -> None:
        if request in self._running:
            self._running.remove(request)
            self._release(request, keep=request.error is None)
        elif request in self._waiting:
            self._waiting.remove(request)
        request.state = state
        self._rules.pop(request, None)

    def _release(self, request: Request, keep: bool = True) -> None:
        drafter, kv, state = request.drafter, request.kv, request.draft_state
        # A stop rule may have cut off tokens whose positions are there.
        known = min(kv.length, len(request.tokens))
        filled, complete_from = self._cached(request) if keep else (0, 0)
        kv.release(request.tokens, min(filled, known), drafter.prefix_key, complete_from)
        if self._agreement.leads:
            drafter.end(state)
        request.kv = request.draft_state = None

    def _publish(self, request: Request) -> None:
        """Let other requests share the prompt's blocks."""
        filled, complete_from = self._cached(request)
        request.kv.publish(request.tokens, min(filled, request.kv.length), request.drafter.prefix_key, complete_from)

    def _cached(self, request: Request) -> tuple[int, int]:
        """How many slots of a request others may use, and from which one on its drafter has all that it needs there."""
        drafter, state, length = request.drafter, request.draft_state, request.kv.length
        own = self._agreement.numbers(lambda: (drafter.filled(state, length), drafter.complete_from(state)))
        return own[0], own[1]

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with this step: it is retired afterwards, since the step goes on for the others."""
        request.finish_reason, request.error = "error", error

    def _preempt(self, request: Request, keep: bool = True) -> None:
        """Take a running request's blocks; it waits again, before all others."""
        self._release(request, keep)
        self._running.remove(request)
        request.state = RequestState.WAITING
        self._waiting.appendleft(request)

    def _ahead(self, drafter: Drafter) -> int:
        """Slots after a text's committed ones that a step may write."""
        return max(drafter.nodes, drafter.room) + _MARGIN

    def _admit(self, fits: Callable[[Request], bool]) -> Request | None:
        """The next request that there is room for and that `fits`, which runs from here on."""
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            pool = self.target.pool
            if not self._running:
                self.target.refresh()
            fresh = len(request.tokens) == request.prompt_length
            request.prefill_end = request.prompt_length if fresh else len(request.tokens) - 1
            needed = -(-(len(request.tokens) + self._ahead(request.drafter)) // BLOCK)
            shared = pool.common(request.tokens[: request.prefill_end], request.drafter.prefix_key) // BLOCK
            # Every running request may need a block in this step; one more each keeps preemptions rare.
            if self._running and pool.available < max(needed - shared, 1) + 2 * len(self._running):
                return None
            if not fits(request):
                return None
            kv = pool.sequence()
            try:
                self._waiting.popleft()
                self._enter(request, kv)
                return request
            except Exception as error:  # its own drafter's
                self._undo(request, kv)
                self._fail(request, error)
                self._leave(request, RequestState.CANCELLED)
            except BaseException:
                self._undo(request, kv)
                self._waiting.appendleft(request)
                raise
        return None

    def _undo(self, request: Request, kv: KVSequence) -> None:
        """Take back what a request was given that could not enter."""
        if request.draft_state is not None:
            request.drafter.end(request.draft_state)
        kv.release()
        request.kv = request.draft_state = None

    def _enter(self, request: Request, kv: KVSequence) -> None:
        drafter, cache = request.drafter, self.target.cache
        text = request.tokens[: request.prefill_end]
        reused, source, copy = 0, 0, 0
        if request.recorder is None:  # no cache holds features
            reused, source, copy = kv.reuse(text, drafter.prefix_key, drafter.reach)
        if source:
            for each in (cache, *drafter.caches):
                each.copy_block(source, copy)
        request.kv, request.state = kv, RequestState.PREFILLING
        if self._agreement.leads:
            request.draft_state = drafter.begin(request.tokens, kv, reused)
            drafter.drawn_by(request.draft_state, request.chooser)
        if len(request.tokens) == request.prompt_length:
            request.stats.prompt_tokens += len(text)
            request.stats.recalled_tokens += reused
        self._running.append(request)

    def _make_room(self, group: list[Request]) -> None:
        """Reserve what the group's next step may write; where there is no room, the newest request waits again."""
        for request in list(group):
            while request.state is RequestState.RUNNING or request.state is RequestState.PREFILLING:
                try:
                    request.kv.reserve(request.kv.length + self._ahead(request.drafter))
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
            done = 0 if request.kv is None else request.kv.length
            if request.kv is None:
                text = request.tokens[: request.prefill_end]
                done = max(self.target.pool.common(text, request.drafter.prefix_key) - 1, 0)
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
            shared = self._shared_from(request)
            return all(common_length(request.tokens, other.tokens) < shared for other, _ in batch)

        for request in begun:
            if fits(request):
                batch.append((request, count_of(request)))
        while (entered := self._admit(fits)) is not None:
            batch.append((entered, count_of(entered)))
        return batch

    def _shared_from(self, request: Request) -> int:
        """Tokens in common with another request from which on one of both could use a block of the other's."""
        text = request.tokens[: request.prefill_end]
        have = (
            request.kv.length if request.kv is not None else self.target.pool.common(text, request.drafter.prefix_key)
        )
        return int(have) // BLOCK * BLOCK + BLOCK

    def _prefill_batch(self, batch: list[tuple[Request, int]]) -> None:
        """Compute the next positions of several prompts; with its last ones comes a request's first token."""
        begun = perf_counter()
        target, drafter = self.target, batch[0][0].drafter
        padded = max(count for _, count in batch)  # the forward writes so many slots of every row
        batch = [(request, count) for request, count in batch if self._reserved(request, padded)]
        if not batch:
            return
        requests, counts = [request for request, _ in batch], [count for _, count in batch]
        begins = [request.kv.length for request in requests]
        ends = [begin + count for begin, count in zip(begins, counts, strict=True)]
        rows, longest = len(batch), max(counts)
        tokens = torch.zeros(2, rows, longest, dtype=torch.long)  # at the positions, and those that follow
        known = []
        for row, (request, begin, end) in enumerate(zip(requests, begins, ends, strict=True)):
            tokens[0, row, : end - begin] = torch.tensor(request.tokens[begin:end])
            known.append(request.tokens[begin + 1 : end + 1])
            tokens[1, row, : len(known[-1])] = torch.tensor(known[-1], dtype=torch.long)
        text, following = to_device(tokens, target.device)
        held = to_device(torch.tensor(counts), target.device)
        live = torch.arange(longest, device=target.device) < held.unsqueeze(1) if min(counts) < longest else None
        cache = target.cache.bind([request.kv for request in requests])
        tree = DraftTree.chain(text, live)
        output = target.forward(tree, cache, last_only=True, hidden_layers=drafter.target_layers)
        cache.advance(counts)
        first = [row for row, request in enumerate(requests) if ends[row] == len(request.tokens)]
        verdict = None
        if first:
            roots = DraftTree.roots(text[first, [counts[row] - 1 for row in first]])
            verdict = self._judge([requests[row] for row in first], roots, output.logits[first], None)
            following[first, [counts[row] - 1 for row in first]] = verdict.tokens[:, 0]
            for row, kept in zip(first, verdict.rows, strict=True):
                known[row] += [] if kept is None else kept.tokens
        if self._agreement.leads:
            states = [request.draft_state for request in requests]
            drafter.observe(states, Accepted(following, self._features(drafter, output), held, known=known))
        for row, request in enumerate(requests):
            if request.recorder is not None:
                logits = output.logits[row] if row in first else output.logits[row, :0]
                features = output.features[row, : counts[row]]
                request.recorder(Computed((request,), (begins[row],), (counts[row],), features, logits))
            if ends[row] == request.prefill_end:
                self._publish(request)
                request.state = RequestState.RUNNING
        for stats in {id(request.stats): request.stats for request in requests}.values():
            stats.ms_prefill += 1e3 * (perf_counter() - begun)
        if verdict is not None:
            self._emit([requests[row] for row in first], verdict, None)

    def _reserved(self, request: Request, count: int) -> bool:
        """Take the blocks for the next positions of a prompt; where there are none, it waits again."""
        try:
            request.kv.reserve(request.kv.length + count + self._ahead(request.drafter))
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
        if not group:
            return
        with self._guarded(group):
            start = perf_counter()
            target, drafter = self.target, group[0].drafter
            states = [request.draft_state for request in group]
            tree = self._propose(group, states)
            drafted = perf_counter()
            cache = target.cache.bind([request.kv for request in group])
            output = target.forward(tree, cache, hidden_layers=drafter.target_layers)
            forwarded = perf_counter()
            verdict = self._judge(group, tree, output.logits, self._rules[group[0]])
            if tree.height:
                cache.keep(verdict.path, verdict.counts)
            settled = perf_counter()
            self._observe(drafter, states, verdict, output)
            observed = perf_counter()
            self._record(group, verdict, output)
            cache.advance([0 if row is None else len(row.path) for row in verdict.rows])
            emissions = self._emit(group, verdict, tree)
            done = perf_counter()
            ms = (drafted - start + observed - settled, forwarded - drafted, settled - forwarded + done - observed)
            self._account(group, tree, output.logits, verdict, emissions, tuple(1e3 * seconds for seconds in ms))

    def _propose(self, group: list[Request], states: list[object]) -> DraftTree:
        drafter = group[0].drafter
        budget = None if drafter.policy is None else drafter.policy.budget(group)
        return self._agreement.proposed(lambda: drafter.propose(states, budget), self.target.device)

    def _judge(self, group: list[Request], tree: DraftTree, logits: Tensor, rule: AcceptanceRule | None) -> Verdict:
        """What is kept of every row. A request whose own processors raise ends alone."""
        failures: Failures = {}
        choosers, histories = [request.chooser for request in group], [request.tokens for request in group]

        def judge() -> Verdict:
            if rule is not None:
                return rule.verify(tree, logits, choosers, histories, failures)
            return verify(tree, logits, choosers, histories, failures)

        verdict = self._agreement.judged(judge, self.target.device)
        for row, error in failures.items():
            self._fail(group[row], error)
        return verdict

    def _observe(self, drafter: Drafter, states: list[object], verdict: Verdict, output: TargetOutput) -> None:
        """Hand the drafter each row's kept positions: features there, and the tokens that follow."""
        if not self._agreement.leads:
            return
        path, tokens = verdict.path, verdict.tokens
        if path.device.type == "cpu":  # values are at hand here, and padding would be computed
            longest = max((len(row.path) for row in verdict.rows if row is not None), default=1)
            path, tokens = path[:, :longest], tokens[:, :longest]
        features = self._features(drafter, output)
        features = features.gather(1, path.unsqueeze(2).expand(-1, -1, features.shape[2]))
        choices = output.logits.argmax(-1) if drafter.wants_choices else None
        drafter.observe(states, Accepted(tokens, features, verdict.counts, choices, verdict))

    def _record(self, group: list[Request], verdict: Verdict, output: TargetOutput) -> None:
        """Tell recorders of the kept nodes."""
        recorders: dict[Callable[[Computed], None], list[int]] = {}
        for place, request in enumerate(group):
            if request.recorder is not None and verdict.rows[place] is not None:
                recorders.setdefault(request.recorder, []).append(place)
        for recorder, places in recorders.items():
            paths = [row.path for row in map(verdict.rows.__getitem__, places) if row is not None]
            counts = tuple(map(len, paths))
            row = torch.tensor([place for place, path in zip(places, paths, strict=True) for _ in path])
            node = torch.tensor([each for path in paths for each in path])
            requests = tuple(group[place] for place in places)
            begins = tuple(len(request.tokens) - 1 for request in requests)
            recorder(Computed(requests, begins, counts, output.features[row, node], output.logits[row, node]))

    def _features(self, drafter: Drafter, output: TargetOutput) -> Tensor:
        layers = drafter.target_layers
        return torch.cat([output.hidden[i] for i in layers], dim=-1) if layers else output.features

    def _emit(self, group: list[Request], verdict: Verdict, tree: DraftTree | None) -> list[Emission]:
        """Apply stop rules in the order in which vanilla would meet them, and publish what is left."""
        ends = self._agreement.settled(lambda: [self._end(r, row) for r, row in zip(group, verdict.rows, strict=True)])
        emissions = []
        for request, row, (kept, reason) in zip(group, verdict.rows, ends, strict=True):
            if reason == "error" and request.error is None:
                self._fail(request, RuntimeError("this request failed in the first process, whose error says why"))
            if row is None or not kept:
                continue
            position = len(request.tokens) - 1  # the root's
            request.tokens.extend(row.tokens[:kept])
            drafted = 0 if tree is None else min(len(row.tokens) - 1, kept)
            emission = Emission(request.row, row.tokens[:kept], drafted, bool(reason))
            request.stats.tokens += kept
            if tree is not None:
                request.stats.nodes += tree.nodes
                request.stats.count(len(row.path), row.first_choice, position, kept)
                if request.drafter.policy is not None:
                    request.drafter.policy.observed(request, row, tree.nodes)
            request.emissions.append(emission)  # before it is done: another thread may be waiting for either
            emissions.append(emission)
            if reason:
                request.finish_reason = reason
                self._leave(request, RequestState.DONE)
        return emissions

    def _end(self, request: Request, row: object) -> tuple[int, str]:
        """How many of a row's new tokens stay, and why it ends there; 0 where its stop rule raised."""
        if request.error is not None:
            return 0, "error"
        tokens: tuple[int, ...] = () if row is None else row.tokens  # type: ignore[attr-defined]
        new = request.new_tokens if request.stop.stop is not None else []
        count = len(request.tokens) - request.prompt_length
        try:
            if row is not None:
                check_possible(row, len(request.tokens))  # type: ignore[arg-type]
            for kept, token in enumerate(tokens, start=1):
                new.append(token)
                reason = "stop" if token in request.stop.eos_ids else ""
                if request.stop.stop is not None and request.stop.stop(new):
                    reason = "stop"
                if count + kept >= request.limit:
                    reason = reason or "length"
                if reason:
                    return kept, reason
        except Exception as error:
            self._fail(request, error)
            return 0, "error"
        return len(tokens), ""

    # ---------------------------------------------------------------------------------------------- errors and times

    @contextmanager
    def _guarded(self, group: Sequence[Request]) -> Iterator[None]:
        """What goes wrong in a step ends its requests; an interrupt ends none: they begin their step again later."""
        try:
            yield
        except Exception as error:
            for request in group:
                if not request.finish_reason:
                    self._fail(request, error)
        except BaseException:
            for request in reversed(group):
                if not request.finished:
                    self._preempt(request, keep=False)
            raise

    def _account(
        self,
        group: Sequence[Request],
        tree: DraftTree,
        logits: Tensor,
        verdict: Verdict,
        emissions: Sequence[Emission],
        ms: tuple[float, ...],
    ) -> None:
        every: dict[int, Stats] = {id(request.stats): request.stats for request in group}
        for stats in every.values():
            stats.ms_draft += ms[0]
            stats.ms_verify += ms[1]
            stats.ms_overhead += ms[2]
        watchers: dict[int, Callable[[Step], None]] = {id(r.watch): r.watch for r in group if r.watch is not None}
        if watchers:
            rows = tuple(request.row for request in group)
            step = Step(tree, logits, verdict, tuple(emissions), rows, ms[0], ms[1], ms[2])
            for watch in watchers.values():
                try:
                    watch(step)
                except Exception as error:
                    for request in group:
                        if request.watch is watch:
                            self._fail(request, error)


def check_limits(max_batch: int, max_waiting: int | None) -> None:
    """Raises ValueError where a scheduler can't keep to these limits."""
    for name, value, least in (("max_batch", max_batch, 1), ("max_waiting", max_waiting, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}={value!r} is not allowed: give {least} requests or more")
