"""The model behind a server: builds requests from plans, starts them and cancels them.

Owns one engine per drafter that a request may choose; all share one target and its scheduler. Knows no HTTP.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect
from collections.abc import Callable, Sequence
from time import time
from typing import Any

from haast.api import Haast
from haast.bench.trace import TraceRecorder
from haast.core import DraftHints, Processor, SamplingParams, StopParams
from haast.drafters.factory import alternatives
from haast.engine.engine import Engine
from haast.errors import CancelledError
from haast.sampling import Sampler
from haast.serving.config import ServeConfig
from haast.serving.conversation import ChatTemplate
from haast.serving.generation import Generation
from haast.serving.logprobs import RecordingSampler
from haast.serving.metrics import Metrics
from haast.serving.plan import ModelLimits, Plan
from haast.serving.processors import MinimumLength, NewTokenPenalties, TokenBias
from haast.serving.structured import Gate, Grammars
from haast.stats import Stats
from haast.text import StopWatch

_LOG = logging.getLogger("haast.serving")
_SPARE = 64  # KV pool slots kept for a step's drafts, in addition to prompt and new tokens


class Service:
    """One loaded model with its drafters, tokenizer and metrics.

    Args:
        haast: the model and its drafter, with a tokenizer.
        name: the model's name for clients.
        config: of the server.

    Attributes:
        limits: the properties of the model that `plan` needs.
        metrics: of all requests.
        fingerprint: OpenAI's `system_fingerprint`: version and precision, which answers depend on.
    """

    def __init__(self, haast: Haast, name: str, config: ServeConfig) -> None:
        target, scheduler = haast.target, haast.engine.scheduler
        self.name, self.config, self.created = name, config, int(time())
        self._haast, self._target, self._scheduler = haast, target, scheduler
        self._engines = {"auto": haast.engine}
        for drafter_name, drafter in alternatives(target, haast.drafter).items():
            self._engines[drafter_name] = haast.engine if drafter is haast.drafter else Engine(target, drafter)
        tokenizer = self.tokenizer = haast.tokenizer
        self._rows, self._ending = itertools.count(), False
        room = target.pool.tokens - _SPARE - max(engine.drafter.nodes for engine in self._engines.values())
        self.limits = ModelLimits(
            ChatTemplate(tokenizer, min(room, target.context_length or room)),
            Grammars(tokenizer, target.vocab_size, target.end_ids),
            target.vocab_size,
            target.context_length,
            room,
            target.end_ids,
            tuple(self._engines),
            config.max_choices,
        )
        self.metrics = Metrics(name, lambda: scheduler.running, lambda: scheduler.waiting, self._cache_use)
        self.fingerprint = _fingerprint(haast)

    def engine(self, drafter: str | None) -> Engine:
        """The engine of a drafter; None is the default drafter."""
        return self._engines[drafter or "auto"]

    @property
    def drafter(self) -> str:
        """Name of the default drafter."""
        return self._haast.drafter.name

    @property
    def vanilla_tokens_per_s(self) -> float | None:
        """Tokens/s of one request without drafting, by the measured latencies; None if none were measured."""
        policy: Any = self._haast.drafter.policy
        latency = getattr(policy, "latency", None)
        return None if latency is None else 1e3 / float(latency.step(1, 1))

    def begin(self, plan: Plan) -> list[Generation]:
        """Start all answers of a plan, or none if one of them fails to start.

        Raises:
            QueueFullError: too many requests wait.
            CancelledError: the server is shutting down.
            KVPoolError, PromptError, ValueError: the request does not fit or is not valid.
        """
        generations = [self._build(plan, prompt, choice) for prompt in plan.prompts for choice in range(plan.n)]
        started = list[Generation]()
        try:
            for generation in generations:
                generation.engine.start(generation.request)
                started.append(generation)
            if self._ending:  # checked last: a request started after `end_all` would never be cancelled
                raise CancelledError("the server is shutting down")
        except BaseException:
            for generation in started:
                generation.engine.cancel(generation.request)
            raise
        return generations

    def end_all(self) -> None:
        """Cancel every running answer and start no more, for a shutdown."""
        self._ending = True
        for request in self._scheduler.requests:
            self._scheduler.cancel(request, wait=False)

    def _build(self, plan: Plan, prompt: list[int], choice: int) -> Generation:
        """Build one request; it is checked but not queued."""
        engine, row, tokenizer = self.engine(plan.drafter), next(self._rows), self.tokenizer
        guide = None
        if plan.grammar is not None:
            guide = self.limits.grammars.guide(plan.grammar, len(prompt), self._gate(plan))
        processors = self._processors(plan, len(prompt))
        processors += [] if guide is None else [guide]
        params = SamplingParams(**{**vars(plan.sampling), "processors": tuple(processors)})
        sampler = None
        if plan.logprobs is not None:
            sampler = RecordingSampler(params, choice, plan.logprobs, plan.processed)
        trace = None
        if plan.trace:  # processors keep state per text, so a trace with processors shows the unprocessed distribution
            trace = TraceRecorder(tokenizer, prompt, None if processors else Sampler(params, choice), row)
        watch = StopWatch(tokenizer, plan.stops, after=plan.min_tokens) if plan.stops else None
        request = engine.submit(
            prompt,
            params,
            StopParams(plan.max_tokens or self.limits.most - len(prompt), plan.ends, watch),
            choice=choice,
            chooser=sampler,
            row=row,
            stats=Stats(),
            timeout=self.config.timeout,
            watch=None if trace is None else trace.watch,
            hints=DraftHints(guide, plan.foreseen(prompt), plan.max_nodes),
            queued=False,
        )
        return Generation(engine, request, plan, tokenizer, sampler, trace, self.metrics)

    def _processors(self, plan: Plan, length: int) -> list[Processor]:
        """Logits processors of one request, without its grammar; `length` is the prompt's, in tokens."""
        processors: list[Processor] = []
        if plan.presence or plan.frequency:
            processors.append(NewTokenPenalties(length, plan.presence, plan.frequency))
        if plan.bias:
            processors.append(TokenBias(plan.bias))
        if plan.min_tokens and plan.ends:
            processors.append(MinimumLength(length, plan.min_tokens, plan.ends))
        return processors

    def _gate(self, plan: Plan) -> Gate | None:
        """Starts the grammar after the reasoning; None for models without reasoning."""
        if plan.marks is None:
            return None
        ids = self.limits.template.text_ids(plan.marks.open, False)
        return Gate(self.tokenizer, plan.marks.close, plan.reasoning, ids[0] if len(ids) == 1 else None)

    def _cache_use(self) -> float:
        pool = self._target.pool
        return 1 - pool.available / pool.blocks


def _fingerprint(haast: Haast) -> str:
    from importlib.metadata import version

    target = haast.target
    return f"haast-{version('haast')}-{target.precision}".replace(" ", "-")


def loader(
    load: Callable[[], Haast], name: str, config: ServeConfig, loaded: Callable[[Service], None] | None = None
) -> Callable[[], Service]:
    """A function that loads the service, for the server's background thread; calls `loaded` with it at the end."""

    def load_service() -> Service:
        service = Service(load(), name, config)
        if loaded is not None:
            loaded(service)
        _LOG.info("%s is ready: drafts by %s", name, service.drafter)
        return service

    return load_service


def prediction_counts(prediction: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """(accepted, rejected): tokens of a prediction that an answer contains in order, and those that it does not.

    The answer is matched against the prediction token by token. After a mismatch, matching resumes after the next
    occurrence of the answer's last three tokens.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for end in range(3, len(prediction) + 1):
        places.setdefault(tuple(prediction[end - 3 : end]), []).append(end)
    at, accepted = 0, 0
    for count, token in enumerate(answer, start=1):
        if at < len(prediction) and prediction[at] == token:
            at += 1
            accepted += 1
        elif count >= 3:
            ends = places.get(tuple(answer[count - 3 : count]), [])
            later = bisect(ends, at)  # repetitive texts have many
            at = ends[later] if later < len(ends) else at
    return accepted, len(prediction) - accepted
