"""What requests cost in memory, budgets that are kept to, and what is refused because it can't be."""

from __future__ import annotations

import ctypes
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
import torch
from fakes import random_head, tiny_llama, tiny_target, vanilla

from haast.api import Haast
from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.engine.scheduler import Scheduler
from haast.errors import CancelledError, KVPoolError, PromptError, QueueFullError
from haast.target import load as models
from haast.target.kv_pool import BLOCK
from haast.target.target import Target

DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "vanilla": lambda target: VanillaDrafter(),
    "eagle": lambda target: EagleDrafter(target, random_head(target), DraftShape(nodes=6)),
}
drafters = pytest.mark.parametrize("name", DRAFTERS)


def some_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(32), k=length) for _ in range(count)]


# ------------------------------------------------------------------ as text grows


@drafters
def test_a_long_limit_costs_nothing_until_text_is_there(name: str) -> None:
    target = tiny_target(context=200_000)
    drafter = DRAFTERS[name](target)
    pool, used = target.pool, [0]

    def ask(limit: int) -> int:
        pool.clear()
        used[:] = [0]
        said = Engine(target, drafter).run(
            [[3, 1, 4, 1, 5]],
            SamplingParams(),
            StopParams(limit, stop=lambda new: len(new) == 20),
            watch=lambda step: used.append(pool.blocks - pool.free_blocks),
        )
        assert sum(len(emission.tokens) for emission in said) == 20
        return max(used)

    assert ask(100_000) == ask(20) <= -(-(5 + 20 + max(drafter.nodes, drafter.room) + 2) // BLOCK)
    assert pool.available == pool.blocks


@pytest.mark.parametrize(("name", "new"), [pytest.param("vanilla", 150, marks=pytest.mark.slow), ("eagle", 50)])
def test_a_small_pool_serves_many_requests(name: str, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 requests of 300 tokens in a pool of 2,000: they wait, are preempted, and say what they say alone."""
    target, prompts = tiny_target(), some_prompts(50, 300 - new)
    target.use_pool(2000)
    haast = Haast(target, DRAFTERS[name](target))
    scheduler, running, preempted = haast.engine.scheduler, list[int](), list[Request]()
    decode, preempt = scheduler._decode, scheduler._admission.preempt

    def decoding(group: list[Request]) -> None:
        running.append(len(group))
        decode(group)

    def preempting(request: Request, keep: bool = True) -> None:
        preempted.append(request)
        preempt(request, keep)

    monkeypatch.setattr(scheduler, "_decode", decoding)
    monkeypatch.setattr(scheduler._admission, "preempt", preempting)
    said = haast.generate(prompts, max_new_tokens=new)
    assert [list(each.tokens) for each in said] == vanilla(tiny_target(), prompts, new)
    assert max(running) >= 2000 // 300 and target.pool.tokens == 2000
    assert preempted, "the pool was too small for all that ran"
    assert target.pool.available == target.pool.blocks


def held() -> int:
    """Bytes that the process holds; what malloc has free, of whatever ran in it before, is given back first."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


@drafters
def test_a_thousand_short_requests_leave_memory_where_it_was(name: str) -> None:
    target = tiny_target()
    haast = Haast(target, DRAFTERS[name](target))

    def ask(count: int, seed: int) -> None:
        for number in range(count // 50):
            haast.generate(some_prompts(50, 20, seed + number), max_new_tokens=3)

    ask(1000, 0)
    before = held()
    ask(1000, 100)
    assert held() - before < 20e6
    assert not haast.engine.scheduler.requests, "nothing of a request that is done is kept"


def test_who_drops_a_haast_gets_its_memory_back_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        for make in DRAFTERS.values():
            target = tiny_target()
            haast = Haast(target, make(target))
            haast.generate([1, 2, 3], max_new_tokens=5)
            gone: list[weakref.ref[Any]] = [weakref.ref(target), weakref.ref(target.model), weakref.ref(target.cache)]
            del haast, target
            assert [each() for each in gone] == [None] * 3
    finally:
        gc.enable()


def test_n_texts_share_their_prompt_and_may_be_more_than_the_pool_holds() -> None:
    target, (prompt,) = tiny_target(), some_prompts(1, 100)
    target.use_pool(320)  # the prompt, and new tokens of a few
    haast = Haast(target, VanillaDrafter())
    said = haast.generate(prompt, n=30, max_new_tokens=40, temperature=1.0, seed=3)
    assert len(said) == 30 and len({each.tokens for each in said}) == 30
    assert said[0].stats.recalled_tokens == 0
    assert all(each.stats.recalled_tokens >= 95 for each in said[1:])
    assert said[0].tokens == haast.generate(prompt, max_new_tokens=40, temperature=1.0, seed=3).tokens
    both = haast.generate([prompt, prompt[:50]], n=2, max_new_tokens=40, temperature=1.0, seed=3)
    assert [each.tokens for each in both[0]] == [each.tokens for each in said[:2]]
    assert both[1][0].tokens == haast.generate(prompt[:50], max_new_tokens=40, temperature=1.0, seed=3).tokens


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"kv_tokens": 0}, "tokens=0 is not allowed for a KV pool: give 1 or more"),
        ({"kv_tokens": -5}, "tokens=-5"),
        ({"kv_tokens": 1.5}, "tokens=1.5"),
        ({"kv_tokens": True}, "tokens=True"),
        ({"kv_bytes": 0}, "kv_bytes=0"),
        ({"kv_bytes": -1}, "kv_bytes=-1"),
        ({"kv_bytes": "1 GB"}, "kv_bytes='1 GB'"),
        (
            {"kv_tokens": 100, "kv_bytes": 100},
            "kv_tokens=100 and kv_bytes=100 both set the size of a KV pool: give one",
        ),
        ({"kv_dtype": "float8"}, "kv_dtype='float8' is unknown: choose auto, "),
        ({"max_batch": 0}, "max_batch=0 is not allowed: give 1"),
        ({"max_batch": 2.0}, "max_batch=2.0"),
        ({"max_waiting": -1}, "max_waiting=-1 is not allowed: give 0"),
    ],
)
def test_impossible_budgets_are_refused_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], why: str
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the budget was checked")

    monkeypatch.setattr(models, "load_target", loads)
    monkeypatch.setattr("haast.api.load_target", loads)
    monkeypatch.setattr("haast.api.Target", loads)
    for model in ("smollm2-135m-instruct", tiny_llama()):
        with pytest.raises(ValueError, match=why):
            Haast.from_pretrained(model, head=None, **given)


def test_budgets_reach_the_pool_and_the_scheduler() -> None:
    haast = Haast.from_pretrained(tiny_llama(), head=None, kv_tokens=100, max_batch=2, max_waiting=1)
    assert haast.target.pool.tokens == 7 * BLOCK
    assert (haast.engine.scheduler.max_batch, haast.engine.scheduler.max_waiting) == (2, 1)
    haast = Haast.from_pretrained(tiny_llama(), head=None, kv_bytes=1_000_000)
    haast.generate([1, 2, 3], max_new_tokens=2)
    assert haast.target.cache.bytes_per_token == haast.target.kv_bytes_per_token == 2 * 2 * 2 * 8 * 8
    assert 980_000 < haast.target.pool.tokens * haast.target.cache.bytes_per_token <= 1_000_000
    single: Any = tiny_llama()
    half = Haast.from_pretrained(single.float(), head=None, kv_bytes=1_000_000, kv_dtype="bfloat16")
    half.generate([1, 2, 3], max_new_tokens=2)
    assert 3.9 < half.target.pool.tokens / haast.target.pool.tokens < 4.1
    assert half.target.cache.bytes_per_token * half.target.pool.tokens <= 1_000_000
    with pytest.raises(KVPoolError, match=r"999 bytes is too small: the minimum of 32 token slots takes 16384 bytes"):
        Haast.from_pretrained(tiny_llama(), head=None, kv_bytes=999)
    with pytest.raises(KVPoolError, match="in use already"):
        haast.target.use_pool(50)


def test_what_could_never_fit_is_refused_with_both_sizes() -> None:
    target = tiny_target()
    target.use_pool(96)
    haast = Haast(target, VanillaDrafter())
    for prompt, new, size in ((some_prompts(1, 100)[0], 5, 108), ([1, 2], 200, 205)):
        words = f"{len(prompt)} tokens, {new} new ones .* need {size} token slots; the KV pool has 96: lower max_new"
        for ask in (haast.generate, haast.stream, haast.astream):
            with pytest.raises(KVPoolError, match=words):
                ask(prompt, max_new_tokens=new)
        with pytest.raises(KVPoolError, match=words):
            haast.generate([prompt[:2], prompt], max_new_tokens=new)
    assert haast.engine.scheduler.waiting == 0, "a list of which one can't be served begins nothing"
    assert len(haast.generate([1, 2], max_new_tokens=80).tokens) == 80


def test_a_full_queue_refuses() -> None:
    target = tiny_target()
    target.scheduler = Scheduler(target, max_batch=2, max_waiting=1)
    haast = Haast(target, VanillaDrafter())
    streams = [haast.stream([1, number], max_new_tokens=9) for number in range(3)]
    for stream in streams[:2]:
        next(stream)
    waiting = haast.engine.submit([1, 2], SamplingParams(), StopParams(9))
    with pytest.raises(QueueFullError, match=r"2 requests run and 1 wait: .*max_batch=2, max_waiting=1"):
        next(streams[2])
    with pytest.raises(QueueFullError, match="4 texts in one call, but only 3 may run and wait"):
        haast.generate([1, 2], n=4)
    with pytest.raises(QueueFullError, match="requests run"):
        haast.generate([1, 2], n=2)
    for stream in streams:
        stream.close()
    haast.engine.cancel(waiting)
    assert (haast.engine.scheduler.running, haast.engine.scheduler.waiting) == (0, 0)
    assert len(haast.generate([1, 2], n=3, max_new_tokens=4)) == 3


# ------------------------------------------------------------------ wrong requests


@pytest.fixture(scope="module")
def haast() -> Iterator[Haast]:
    yield Haast(tiny_target(), VanillaDrafter())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"n": 0}, "n=0 is not allowed: give 1 text or more"),
        ({"n": -3}, "n=-3"),
        ({"n": 1.5}, "n=1.5"),
        ({"n": True}, "n=True"),
        ({"seed": -1}, "seed=-1 is not allowed: give a value between 0 and 2"),
        ({"seed": 2**63}, f"seed={2**63} is not allowed"),
        ({"timeout": 0}, "timeout=0 is not allowed: give seconds above 0"),
        ({"timeout": -1.0}, "timeout=-1.0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "1s"}, "timeout='1s'"),
        ({"sampling": SamplingParams(), "temperature": 0.5}, "sampling was given with temperature"),
    ],
)
def test_wrong_requests_are_refused(haast: Haast, given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        haast.generate([1, 2], **given)
    assert haast.engine.scheduler.waiting == 0
    if "n" not in given:
        for ask in (haast.stream, haast.astream):
            with pytest.raises(ValueError, match=why):
                ask([1, 2], **given)


def test_an_unknown_setting_is_refused_by_name(haast: Haast) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        haast.generate([1, 2], max_tokens=3)  # type: ignore[call-overload]


def test_a_request_that_is_over_is_told_from_one_that_was_never_queued(haast: Haast) -> None:
    engine = haast.engine
    request = engine.submit([1, 2], SamplingParams(), StopParams(5))
    assert sum(len(emission.tokens) for emission in engine.read(request)) == 5
    assert list(engine.read(request)) == [], "it is done, and all of it has been read"
    engine.cancel(request)
    assert request.finish_reason == "length" and list(engine.read(request)) == []
    request = engine.submit([1, 2], SamplingParams(), StopParams(5))
    engine.cancel(request)
    with pytest.raises(CancelledError, match="it was cancelled after 0 tokens; submit it again"):
        list(engine.read(request))
    request = engine.submit([1, 2], SamplingParams(), StopParams(5), queued=False)
    with pytest.raises(ValueError, match="never queued"):
        list(engine.read(request))


def test_a_drafter_of_another_targets_pool_is_refused() -> None:
    mine, other = tiny_target(), tiny_target(seed=1)
    with pytest.raises(KVPoolError, match="in the KV pool of another target"):
        Haast(mine, EagleDrafter(other, random_head(other), DraftShape(nodes=6)))


@pytest.mark.parametrize(
    ("given", "several"),
    [
        ([1, 2, 3], False),
        ((1, 2, 3), False),
        (torch.tensor([1, 2, 3]), False),
        (torch.tensor([1, 2, 3], dtype=torch.int32).numpy(), False),
        (list(torch.tensor([1, 2, 3])), False),
        ([[1, 2, 3]], True),
        (torch.tensor([[1, 2, 3]]), True),
        ([torch.tensor([1, 2, 3]), [4, 5]], True),
        (torch.tensor([[1, 2, 3], [3, 2, 1]]).numpy(), True),
    ],
)
def test_token_ids_come_in_many_forms(haast: Haast, given: Any, several: bool) -> None:
    wanted = haast.generate([1, 2, 3], max_new_tokens=4).tokens
    said = haast.generate(given, max_new_tokens=4)
    assert isinstance(said, list) == several
    assert (said[0] if several else said).tokens == wanted
    if not several or len(given) == 1:
        assert haast.encode(given) == [1, 2, 3]
        assert [token for piece in haast.stream(given, max_new_tokens=4) for token in piece.tokens] == list(wanted)
    else:
        with pytest.raises(PromptError, match="2 prompts where one is expected"):
            haast.stream(given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([1, "a"], "holds a int .number 0.: give text, .*not a mixture"),
        (["a", 1], "holds a int .number 1."),
        ([{"role": "user", "content": "a"}, "b"], "holds a dict .number 0."),
        ([[1, 2], 3], "holds a int .number 1."),
        ([[1, "a"]], "holds a list .number 0."),
        ([[[1]]], "holds a list"),
        ([1, 2.5], "holds a int"),
        ([True, False], "holds a bool"),
        ({"input_ids": [1]}, "a dict: give its input_ids, or a list of messages"),
        (torch.tensor([1.0]), r"a Tensor of torch.float32, shape \(1,\): give token ids as integers"),
        (torch.tensor([True]), "torch.bool"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.tensor([[[1]]]), r"shape \(1, 1, 1\)"),
        (torch.tensor([1.0]).numpy(), "a ndarray of float32"),
        (b"ab", "a bytes: give text"),
        (7, "a int: give text"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1], [99]], r"prompt 1 holds token ids outside 0\.\.31"),
    ],
)
def test_what_is_no_prompt_is_told(haast: Haast, given: Any, why: str) -> None:
    with pytest.raises(PromptError, match=why):
        haast.generate(given)
