"""Requests that arrive, are cancelled and end at any time: each says exactly what vanilla says for it alone.

fp64, tiny models of four families, every drafter, pools so small that requests are preempted, prefixes reused; and
packed fp32, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from fakes import random_head, tiny_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_families import stock
from test_session import DRAFTERS
from torch import Tensor

from haast import native
from haast.core import Processor, Request, RequestState, SamplingParams, StopParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Step, raise_error
from haast.sampling import Sampler, keyed_uniform
from haast.target.fusing import fuse_small_modules
from haast.target.packing import pack_linears
from haast.target.target import Target

FAMILIES = ("llama", "gpt2", "qwen3", "mistral-sliding")
VOCAB = 48
POOL = 176  # tokens: room for two or three at a time


# ------------------------------------------------------------------ what is asked


class Counting:
    """A processor with a memory: what it does depends on how often it was called; histories must grow by one."""

    def __init__(self) -> None:
        self.calls, self.before = 0, list[int]()

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        now = history[0].tolist()
        assert not self.before or now[:-1] == self.before, "called with a history out of order"
        self.before, self.calls = now, self.calls + 1
        scores = scores.clone()
        scores[:, self.calls % VOCAB] += 4.0
        return scores


def banning(history: Tensor, scores: Tensor) -> Tensor:
    """A processor without one: bans one token and lifts another, by what was said before."""
    scores = scores.clone()
    scores[:, int(history.sum()) % VOCAB] = -torch.inf
    scores[:, (3 * int(history[0, -1]) + history.shape[1]) % VOCAB] += 3.0
    return scores


PROCESSORS: dict[str, Callable[[], tuple[Processor, ...]]] = {
    "none": lambda: (),
    "banning": lambda: (banning,),
    "counting": lambda: (Counting(),),
}


@dataclass(frozen=True)
class Asked:
    """One request: what it says, when it arrives, and when nobody wants it any more."""

    stem: int  # its prompt begins as those of the same stem
    prompt: int  # tokens of it
    new: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    processors: str = "none"
    eos: int = VOCAB  # none
    stop: int = 99  # a stop rule ends it after so many tokens
    arrives: int = 0  # step
    leaves: int = 99  # cancelled once it has said so many tokens

    @property
    def tokens(self) -> list[int]:
        shared = 2 * self.prompt // 3
        parts = (keyed_uniform(self.stem, 7, i, *([self.seed] if i >= shared else [])) for i in range(self.prompt))
        return [int(VOCAB * part) for part in parts]

    def parameters(self) -> tuple[SamplingParams, StopParams]:
        """Fresh ones: processors may remember."""
        sampling = SamplingParams(
            self.temperature, top_p=self.top_p, seed=self.seed, processors=PROCESSORS[self.processors]()
        )
        return sampling, StopParams(self.new, (self.eos,), lambda new: len(new) >= self.stop)


asked = st.builds(
    Asked,
    stem=st.integers(0, 1),
    prompt=st.integers(1, 40),
    new=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 4),
    processors=st.sampled_from(["none", "none", *PROCESSORS]),
    eos=st.integers(0, 2 * VOCAB),
    stop=st.sampled_from([5, 99]),
    arrives=st.integers(0, 12),
    leaves=st.sampled_from([0, 1, 6, 99, 99, 99]),
)
crowd = [Asked(number % 2, 10, 40, temperature=0.8 * (number > 2), seed=number) for number in range(5)]


@dataclass
class Seen:
    """What happened besides, over all examples."""

    preempted: int = 0
    recalled: int = 0
    cancelled: int = 0
    together: int = 0


@cache
def model(family: str) -> Any:
    return stock(family)


@cache
def alone(family: str, one: Asked) -> tuple[int, ...]:
    """What vanilla says for a request by itself, with nothing kept from others."""
    target = Target(model(family))
    return tuple(Engine(target, VanillaDrafter()).complete([one.tokens], *one.parameters())[0])


@cache
def small(family: str, name: str) -> Engine:
    """A drafter on a target with a small pool."""
    target = Target(model(family))
    target.use_pool(POOL)
    return Engine(target, DRAFTERS[name](target), prefill_chunk=9)


def serve(engine: Engine, several: Sequence[Asked], seen: Seen, watch: Any = None) -> list[Request]:
    """Step by hand until all are done; every request's tokens are what was emitted."""
    scheduler, requests = engine.scheduler, dict[int, Request]()
    heard: list[list[int]] = [[] for _ in several]
    admission = scheduler._admission
    preempt = admission.preempt

    def counted(request: Request, keep: bool = True) -> None:
        seen.preempted += 1
        preempt(request, keep)

    admission.preempt = counted  # type: ignore[method-assign]
    try:
        for step in range(10_000):
            for row, one in enumerate(several):
                if one.arrives == step:
                    requests[row] = engine.submit(one.tokens, *one.parameters(), row=row, watch=watch)
            left = scheduler.step()
            seen.together = max(seen.together, scheduler.running)
            for row, request in requests.items():
                while request.emissions:
                    heard[row].extend(request.emissions.popleft().tokens)
                if len(heard[row]) >= several[row].leaves and not request.finished:
                    engine.cancel(request)
                    assert request.finished and request.kv is None
                    seen.cancelled += 1
            if not left and len(requests) == len(several):
                break
    finally:
        del admission.preempt
    assert [request.new_tokens for _, request in sorted(requests.items())] == heard
    pool = engine.target.pool
    assert pool.available == pool.blocks and scheduler.running == scheduler.waiting == 0
    return [request for _, request in sorted(requests.items())]


def check(family: str, engine: Engine, several: Sequence[Asked], seen: Seen) -> None:
    for one, request in zip(several, serve(engine, several, seen), strict=True):
        wanted = list(alone(family, one))
        seen.recalled += request.stats.recalled_tokens
        if request.state is RequestState.CANCELLED:
            assert request.finish_reason == "cancelled" and request.new_tokens == wanted[: len(request.new_tokens)]
        else:
            assert request.new_tokens == wanted
            assert request.finish_reason == ("length" if len(wanted) == one.new and not ended(one, wanted) else "stop")


def ended(one: Asked, said: list[int]) -> bool:
    return said[-1] == one.eos or len(said) == one.stop


# ------------------------------------------------------------------ the property


def examine(name: str, examples: int) -> None:
    seen = Seen()

    @settings(max_examples=examples)
    @given(family=st.sampled_from(FAMILIES), several=st.lists(asked, min_size=2, max_size=7))
    @example(family="llama", several=crowd)
    def holds(family: str, several: list[Asked]) -> None:
        check(family, small(family, name), several, seen)

    holds()
    assert seen.preempted and seen.recalled and seen.cancelled and seen.together > 1, seen


@pytest.mark.parametrize("name", DRAFTERS)
def test_each_request_says_what_vanilla_says_for_it_alone(name: str) -> None:
    examine(name, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_each_request_says_what_vanilla_says_for_it_alone_many_times(name: str) -> None:
    examine(name, 150)


@pytest.mark.parametrize("shared", ["rows", "order"])
def test_draws_shared_between_requests_would_be_seen(monkeypatch: pytest.MonkeyPatch, shared: str) -> None:
    several = [Asked(0, 10, 20, temperature=1.0, seed=number) for number in range(3)]
    check("llama", small("llama", "eagle"), several, Seen())
    draws = iter(range(10**6))
    draw: dict[str, Callable[[Sampler, int], float]] = {
        "rows": lambda sampler, position: keyed_uniform(0, 0, position),
        "order": lambda sampler, position: keyed_uniform(next(draws), sampler.params.seed, position),
    }
    monkeypatch.setattr(Sampler, "draw", draw[shared])
    with pytest.raises(AssertionError):
        check("llama", small("llama", "eagle"), several, Seen())


def test_choices_of_one_prompt_differ_and_the_first_is_the_prompts_own() -> None:
    engine = small("llama", "eagle")
    one = Asked(0, 20, 20, temperature=1.0, seed=3)
    requests = [engine.submit(one.tokens, *one.parameters(), choice=choice) for choice in (0, 1, 2, 1)]
    said = [[token for emission in engine.read(request) for token in emission.tokens] for request in requests]
    assert said[0] == list(alone("llama", one)) and said[1] == said[3]
    assert len({tuple(text) for text in said}) == 3
    assert all(request.stats.recalled_tokens >= 15 for request in requests[1:])


# ------------------------------------------------------------------ one that goes wrong


@pytest.mark.parametrize("name", ["vanilla", "eagle", "hybrid", "small-model"])
@pytest.mark.parametrize("where", ["processor", "stop rule", "watcher"])
@pytest.mark.one_of_each
def test_what_goes_wrong_in_a_request_ends_it_alone(name: str, where: str) -> None:
    engine, others = small("llama", name), crowd[1:4]

    def broken(new: Any, scores: Any = None) -> Any:
        count = new.shape[1] - crowd[0].prompt if isinstance(new, Tensor) else len(new)
        if count >= 6:
            raise LookupError("planted")
        return scores if isinstance(new, Tensor) else False

    calls = iter(range(6))

    def watch(step: Step) -> None:
        if next(calls, None) is None:
            raise LookupError("planted")

    sampling, stop = crowd[0].parameters()
    if where == "processor":
        sampling = SamplingParams(processors=(broken,))
    failing = engine.submit(
        crowd[0].tokens,
        sampling,
        StopParams(40, stop=broken) if where == "stop rule" else stop,
        watch=watch if where == "watcher" else None,
    )
    check("llama", engine, others, Seen())
    assert failing.finish_reason == "error" and failing.state is RequestState.CANCELLED
    said = [token for emission in failing.emissions for token in emission.tokens]
    assert said == list(alone("llama", crowd[0]))[: len(said)] and len(said) >= (where == "watcher")
    failing.emissions.clear()
    with pytest.raises(LookupError, match="planted"):
        raise_error(failing)


def test_a_drafter_that_fails_at_the_beginning_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small("llama", "suffix")
    begin = engine.drafter.begin

    def broken(prompt: Sequence[int], kv: Any, reused: int) -> Any:
        if len(prompt) == 3:
            raise LookupError("planted")
        return begin(prompt, kv, reused)

    monkeypatch.setattr(engine.drafter, "begin", broken)
    failing = engine.submit([1, 2, 3], SamplingParams(), StopParams(5))
    check("llama", engine, crowd[:2], Seen())
    with pytest.raises(LookupError, match="planted"):
        list(engine.read(failing))


# ------------------------------------------------------------------ packed fp32, bit for bit


@cache
def packed() -> Any:
    target = Target(_float(tiny_llama(VOCAB, layers=2, context=128)))
    pack_linears(target.model)
    fuse_small_modules(target.model)
    return target.model


def _float(tiny: Any) -> Any:
    return tiny.float()


def packed_engine(pool: int | None, drafted: bool) -> Engine:
    target = Target(packed())
    assert target.use_one_call()
    target.use_pool(pool)
    shape = DraftShape(nodes=7)
    return Engine(target, EagleDrafter(target, random_head(target), shape) if drafted else VanillaDrafter(), None, 9)


def watching(several: Sequence[Asked], found: dict[tuple[int, int], Tensor]) -> Callable[[Step], None]:
    """Keeps the logits at every position that a step has settled, by (request, position)."""
    said = [one.prompt + 1 for one in several]  # the first new token is the prompt's

    def watch(step: Step) -> None:
        for place, (row, emission) in enumerate(zip(step.rows, step.emissions, strict=True)):
            verdict = step.verdict.rows[place]
            assert verdict is not None
            for depth, node in enumerate(verdict.path):
                found[row, said[row] - 1 + depth] = step.logits[place, node].clone()
            said[row] += len(emission.tokens)

    return watch


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_packed_requests_have_the_bits_that_each_has_alone() -> None:
    drafting = packed_engine(POOL, drafted=True)
    seen = Seen()

    @settings(max_examples=6)
    @given(several=st.lists(asked, min_size=2, max_size=6))
    @example(several=crowd)
    def holds(several: list[Asked]) -> None:
        found: dict[tuple[int, int], Tensor] = {}
        requests = serve(drafting, several, seen, watching(several, found))
        for row, (one, request) in enumerate(zip(several, requests, strict=True)):
            wanted: dict[tuple[int, int], Tensor] = {}
            plain = packed_engine(None, drafted=False)
            single = serve(plain, [replace(one, arrives=0, leaves=99)], Seen(), watching([one], wanted))
            said = single[0].new_tokens
            cut = len(request.new_tokens)
            assert request.new_tokens == said[:cut] and (cut == len(said) or request.finish_reason == "cancelled")
            for (_, position), logits in wanted.items():
                if (row, position) in found:
                    assert torch.equal(found[row, position], logits), f"request {row}, position {position}"

    holds()
    assert seen.preempted and seen.cancelled and seen.together > 1, seen
