"""Which requests run, and the KV blocks that they hold: admission, preemption, and what is kept when they end.

A request waits until the pool has room for it, holds blocks while it prefills and decodes, and gives them back when it
ends. Its whole blocks stay in the pool's prefix tree, where later requests find them. When blocks run out, the newest
request is preempted: it waits again and its positions are computed again. That does not change its text, since a
sampled token depends on the request and the position only. `scheduler` decides when each of this happens.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from haast.core import Request, RequestState
from haast.engine.guiding import guided_nodes
from haast.engine.rules import AcceptanceRule
from haast.engine.tensor_parallel import Alone
from haast.errors import KVPoolError
from haast.target.kv_pool import BLOCK, PoolFullError
from haast.target.target import Target

_LARGE_CHUNK = 6 * BLOCK  # positions of a chunk that is worth another forward for the last few positions
_MARGIN = 2  # slots after the nodes of a step: the bonus token, and a head's shift


class Admission:
    """The waiting and running requests of one target. Called with the target's lock held, except for `add`.

    Attributes:
        arrived: requests queued since the last `retire`, without waiting for the end of a step.
        waiting: requests without blocks, the next one first.
        running: requests that prefill or decode, in the order of admission.
        rules: the acceptance rule of each request, in all three of them.
    """

    def __init__(self, target: Target, agreement: Alone) -> None:
        self._target = weakref.ref(target)  # a reference cycle would delay freeing the target's memory
        self._agreement = agreement
        self.arrived: deque[Request] = deque()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.rules: dict[Request, AcceptanceRule | None] = {}

    @property
    def target(self) -> Target:
        """The model. Raises RuntimeError if it was deleted: this holds a weak reference only."""
        target = self._target()
        if target is None:
            raise RuntimeError(
                "this scheduler's target was deleted: keep a reference to the Haast, Engine or Target of its requests"
            )
        return target

    # ------------------------------------------------------------------------------------------ joining and leaving

    def set_limit(self, request: Request) -> None:
        """Set the maximum number of new tokens of a request. Raises KVPoolError if it could never fit the pool."""
        target = self.target
        context = target.context_length
        # A text ends when its context is full; drafts may reach past the end but are never emitted.
        request.limit = request.stop.max_new_tokens
        if context is not None:
            request.limit = min(request.limit, context - request.prompt_length)
        slots = request.prompt_length + request.limit + _draft_slots(request)
        if slots > target.pool.tokens:
            raise KVPoolError(
                f"a prompt of {request.prompt_length} tokens, {request.limit} new ones and the drafts need {slots} "
                f"token slots; the KV pool has {target.pool.tokens}: lower max_new_tokens, or make the pool larger "
                f"(kv_tokens or kv_bytes)"
            )

    def add(self, request: Request, rule: AcceptanceRule | None) -> None:
        """Queue a request."""
        self.rules[request] = rule
        self.arrived.append(request)

    def retire(self) -> None:
        """Move arrived requests to the queue; remove cancelled requests and those past their deadline."""
        while self.arrived:
            self.waiting.append(self.arrived.popleft())
        now = time.monotonic()
        for request in [*self.running, *self.waiting]:
            if request.deadline is not None and now >= request.deadline and not request.finish_reason:
                request.finish_reason = "deadline"
        self.remove_finished([*self.running, *self.waiting])

    def remove_finished(self, requests: Sequence[Request]) -> None:
        """Remove requests that have a finish reason, and free their blocks."""
        for request in requests:
            if not request.finish_reason or request.finished:
                continue
            if request in self.running:
                self.running.remove(request)
                self._release(request, keep=request.error is None)
            elif request in self.waiting:
                self.waiting.remove(request)
            complete = request.finish_reason in ("stop", "length")
            request.state = RequestState.DONE if complete else RequestState.CANCELLED
            self.rules.pop(request, None)

    def admit(self, fits: Callable[[Request], bool]) -> Request | None:
        """Move the first waiting request to the running ones, if the pool has room and it `fits`; else None."""
        while self.waiting:
            request = self.waiting[0]
            pool = self.target.pool
            if not self.running:
                self.target.refresh()
            fresh = len(request.tokens) == request.prompt_length
            request.prefill_end = request.prompt_length if fresh else len(request.tokens) - 1
            needed = -(-(len(request.tokens) + _draft_slots(request)) // BLOCK)
            shared = self.computed(request) // BLOCK
            # Each running request may need a block in this step; a second one each keeps preemptions rare.
            if self.running and pool.available < max(needed - shared, 1) + 2 * len(self.running):
                return None
            if not fits(request):
                return None
            request.kv = pool.sequence()
            try:
                self.waiting.popleft()
                self._begin(request)
                return request
            except Exception as error:  # raised by its drafter
                self._release(request, keep=False)
                request.fail(error)
                self.remove_finished([request])
            except BaseException:
                self._release(request, keep=False)
                self.waiting.appendleft(request)
                raise
        return None

    def _begin(self, request: Request) -> None:
        drafter, cache, kv = request.drafter, self.target.cache, request.kv
        reused, source, copy = 0, 0, 0
        if request.inputs is None:
            text = self._recallable(request)
            reused, source, copy = kv.reuse(text, drafter.prefix_key, drafter.reach, drafter.drafting_off)
        else:
            kv.position_shift = request.inputs.shift
        if source:
            for each in (cache, *drafter.caches):
                each.stores.copy_block(source, copy)
        kv.decoded_from = request.prompt_length
        request.state = RequestState.PREFILLING
        if self._agreement.leads:
            request.draft_state = drafter.begin(request.tokens, kv, reused)
            drafter.set_chooser(request.draft_state, request.chooser)
            if request.hints.prediction:
                drafter.add_prediction(request.draft_state, (*request.hints.prediction, *request.tokens[: reused + 1]))
        if len(request.tokens) == request.prompt_length:
            request.stats.prompt_tokens += request.prompt_length
            request.stats.recalled_tokens += reused
        self.running.append(request)

    # ------------------------------------------------------------------------------------------------------- blocks

    def preempt(self, request: Request, keep: bool = True) -> None:
        """Free a running request's blocks and put it at the front of the queue."""
        self._release(request, keep)
        self.running.remove(request)
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)

    def computed(self, request: Request) -> int:
        """Prompt positions that are computed: the request's own, or before admission those in the prefix cache."""
        if request.kv is not None:
            return int(request.kv.length)
        if request.inputs is not None:
            return 0
        drafter, text = request.drafter, self._recallable(request)
        return self.target.pool.usable(text, drafter.prefix_key, drafter.reach, drafter.drafting_off)

    def chunk(self, request: Request, done: int, count: int) -> int:
        """Size of a prefill chunk of about `count` positions after `done`.

        Recurrent states can be kept where a chunk ends on a border of blocks, so a large one ends there. If the model
        computes several tokens otherwise than one, no chunk has a single token of a prompt that has more.
        """
        snapshots, prompt = self.target.pool.snapshots, request.prompt_length
        border = (done + count) // BLOCK * BLOCK - done
        if snapshots is not None and snapshots.limit and border >= _LARGE_CHUNK:
            count = border
        if self._prompt_apart and done < prompt:
            count = max(count, min(2, prompt - done))
            count += done + count == prompt - 1
        return count

    @property
    def _prompt_apart(self) -> bool:
        """Whether the model computes several tokens of a prompt otherwise than the same ones as they are decoded."""
        snapshots = self.target.pool.snapshots
        return snapshots is not None and not snapshots.of_decoded

    def _recallable(self, request: Request) -> list[int]:
        """The tokens to prefill that may be found in the prefix cache.

        What is cached is of prompts only if the model computes them otherwise; at least two tokens of one are left.
        """
        return request.tokens[: request.prompt_length - 1 if self._prompt_apart else request.prefill_end]

    def reserve_prompt(self, request: Request, count: int) -> bool:
        """Reserve blocks for the next positions of a prompt; if there are none, preempt it and return False."""
        try:
            request.kv.reserve(request.kv.length + count + _draft_slots(request))
        except PoolFullError:
            if len(self.running) == 1:
                raise
            self.preempt(request)
            return False
        return True

    def reserve_step(self, group: list[Request]) -> None:
        """Reserve slots for the group's next step; preempt the newest requests while there is no room.

        Those of the group that were preempted leave it. All of the group share a drafter.
        """
        for request in list(group):
            while request.state is RequestState.RUNNING or request.state is RequestState.PREFILLING:
                try:
                    active = [each for each in group if each.state is not RequestState.WAITING]
                    request.kv.reserve(request.kv.length + _draft_slots(*active))
                    break
                except PoolFullError:
                    newest = next(each for each in reversed(self.running))
                    self.preempt(newest)
        group[:] = [request for request in group if request.state is not RequestState.WAITING]

    def publish(self, request: Request) -> None:
        """Let other requests reuse the blocks of a prompt that is computed."""
        if request.inputs is not None:
            return
        filled, head_kv_from = self._reusable(request)
        shared = min(filled, request.kv.length)
        request.kv.publish(request.tokens, shared, request.drafter.prefix_key, head_kv_from)

    def _release(self, request: Request, keep: bool = True) -> None:
        drafter, kv, state = request.drafter, request.kv, request.draft_state
        # A stop rule may have cut off tokens whose positions are committed.
        committed = min(kv.length, len(request.tokens))
        filled, head_kv_from = self._reusable(request) if keep and request.inputs is None else (0, 0)
        kv.release(request.tokens, min(filled, committed), drafter.prefix_key, head_kv_from)
        if state is not None:
            drafter.end(state)
        request.kv = request.draft_state = None

    def _reusable(self, request: Request) -> tuple[int, int]:
        """Slots that other requests may reuse: their number, and the first one that is complete for the drafter."""
        drafter, state, length = request.drafter, request.draft_state, request.kv.length
        slots = self._agreement.numbers(lambda: (drafter.filled(state, length), drafter.head_kv_from(state)))
        return min(slots[0], request.prompt_length) if self._prompt_apart else slots[0], slots[1]


def _draft_slots(*requests: Request) -> int:
    """Slots after the committed ones that a step of these requests may write. They share a drafter."""
    drafter = requests[0].drafter
    slots: int = max(drafter.nodes + guided_nodes(requests), drafter.room) + _MARGIN
    return slots
