"""The model behind a server: loads it, plans requests, starts them, ends them.

Owns the engines, one for each drafter that a request may choose, on one target and its one scheduler. Knows no HTTP.
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
from haast.serving.logprobs import RecordingSampler
from haast.serving.metrics import Metrics
from haast.serving.plan import ModelFacts, Plan
from haast.serving.processors import LeastLength, NewTokenPenalties, TokenBias
from haast.serving.structured import Gate, Grammars
from haast.serving.writing import Writing
from haast.stats import Stats
from haast.text import StopWatch

_LOG = logging.getLogger("haast.serving")
_SPARE = 64  # slots of the KV pool beside prompt and new tokens, for a step's drafts


class Service:
    """One loaded model, and all that writes with it.

    Args:
        haast: the model and its drafter, with a tokenizer.
        name: what clients call it.
        config: of the server.

    Attributes:
        facts: what planning looks at.
        metrics: of all requests.
        fingerprint: changes where answers may: another model, precision, or version.
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
        self.facts = ModelFacts(
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
        """Where requests go that chose this drafter, or none."""
        return self._engines[drafter or "auto"]

    @property
    def drafter(self) -> str:
        """Who drafts where a request does not say."""
        return self._haast.drafter.name

    @property
    def vanilla_tokens_per_s(self) -> float | None:
        """What decoding without drafts makes for one request, by measured costs; None where nothing was measured."""
        policy: Any = self._haast.drafter.policy
        latency = getattr(policy, "latency", None)
        return None if latency is None else 1e3 / float(latency.step(1, 1))

    def begin(self, plan: Plan) -> list[Writing]:
        """Start all answers of a plan; none where one can't be.

        Raises:
            QueueFullError: too many wait. CancelledError: the server ends. KVPoolError, PromptError, ValueError: it
                can't be answered.
        """
        made = [self._writing(plan, prompt, choice) for prompt in plan.prompts for choice in range(plan.n)]
        started = list[Writing]()
        try:
            for writing in made:
                writing.engine.start(writing.request)
                started.append(writing)
            if self._ending:  # looked at last: who begins after `end_all` would be ended by nobody
                raise CancelledError("the server is shutting down")
        except BaseException:
            for writing in started:
                writing.engine.cancel(writing.request)
            raise
        return made

    def end_all(self) -> None:
        """End every answer that is still being written, as at a shutdown, and begin none."""
        self._ending = True
        for request in self._scheduler.requests:
            self._scheduler.cancel(request, wait=False)

    def _writing(self, plan: Plan, prompt: list[int], choice: int) -> Writing:
        """One request, checked and not queued."""
        engine, row, tokenizer = self.engine(plan.drafter), next(self._rows), self.tokenizer
        guide = None
        if plan.grammar is not None:
            guide = self.facts.grammars.guide(plan.grammar, len(prompt), self._gate(plan))
        processors = self._processors(plan, len(prompt))
        processors += [] if guide is None else [guide]
        params = SamplingParams(**{**vars(plan.sampling), "processors": tuple(processors)})
        sampler = None
        if plan.logprobs is not None:
            sampler = RecordingSampler(params, choice, plan.logprobs, plan.processed)
        trace = None
        if plan.trace:  # processors remember their text: what is shown then is the model's own distribution
            trace = TraceRecorder(tokenizer, prompt, None if processors else Sampler(params, choice), row)
        watch = StopWatch(tokenizer, plan.stops, after=plan.min_tokens) if plan.stops else None
        request = engine.submit(
            prompt,
            params,
            StopParams(plan.max_tokens or self.facts.most - len(prompt), plan.ends, watch),
            choice=choice,
            chooser=sampler,
            row=row,
            stats=Stats(),
            timeout=self.config.timeout,
            watch=None if trace is None else trace.watch,
            hints=DraftHints(guide, plan.foreseen(prompt), plan.max_nodes),
            queued=False,
        )
        return Writing(engine, request, plan, tokenizer, sampler, trace, self.metrics)

    def _processors(self, plan: Plan, length: int) -> list[Processor]:
        """What changes the scores of one text beside its grammar; `length` is its prompt's."""
        made: list[Processor] = []
        if plan.presence or plan.frequency:
            made.append(NewTokenPenalties(length, plan.presence, plan.frequency))
        if plan.bias:
            made.append(TokenBias(plan.bias))
        if plan.min_tokens and plan.ends:
            made.append(LeastLength(length, plan.min_tokens, plan.ends))
        return made

    def _gate(self, plan: Plan) -> Gate | None:
        """Where the grammar of an answer begins, for models that reason first."""
        if plan.marks is None:
            return None
        ids = self.facts.template.text_ids(plan.marks.open, False)
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
    """What a server runs in the background while it says that it is loading; `loaded` is called at its end."""

    def made() -> Service:
        service = Service(load(), name, config)
        if loaded is not None:
            loaded(service)
        _LOG.info("%s is ready: drafts by %s", name, service.drafter)
        return service

    return made


def prediction_counts(prediction: Sequence[int], said: Sequence[int]) -> tuple[int, int]:
    """How many tokens of a prediction an answer has, in order, and how many it has not.

    The answer is followed along the prediction; where they part, it goes on after the next place of its last three
    tokens.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for end in range(3, len(prediction) + 1):
        places.setdefault(tuple(prediction[end - 3 : end]), []).append(end)
    at, accepted = 0, 0
    for count, token in enumerate(said, start=1):
        if at < len(prediction) and prediction[at] == token:
            at += 1
            accepted += 1
        elif count >= 3:
            found = places.get(tuple(said[count - 3 : count]), [])
            later = bisect(found, at)  # in a text that repeats itself there are many
            at = found[later] if later < len(found) else at
    return accepted, len(prediction) - accepted
