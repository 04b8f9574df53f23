"""Threads and tasks on one Haast: own texts, memory back at once, nobody stalled, usable after Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chats import SMOLLM2, bytes_tokenizer
from fakes import random_head, tiny_target
from torch import Tensor

from haast.api import Haast
from haast.core import SamplingParams, StopParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import CancelledError
from haast.generation import Piece
from haast.session import Session
from haast.target.target import Target

NEW = 12


@pytest.fixture(scope="module")
def model() -> Haast:
    tokenizer = bytes_tokenizer(SMOLLM2, "<|im_end|>", ["<|im_start|>"])
    target = Target(tiny_target(vocab=len(tokenizer), context=4096).model, tokenizer)
    return Haast(target, EagleDrafter(target, random_head(target), DraftShape(nodes=6)))


@pytest.fixture(scope="module")
def alone(model: Haast) -> Callable[..., str]:
    """What vanilla says to one prompt by itself."""
    plain = Haast(Target(model.target.model, model.target.tokenizer), VanillaDrafter())
    return lambda prompt, **settings: plain.generate(prompt, **settings).text


def idle(model: Haast) -> bool:
    """Whether nothing runs, waits or holds a block."""
    scheduler = model.engine.scheduler
    return model.target.pool.available == model.target.pool.blocks and not scheduler.running + scheduler.waiting


def settings(number: int) -> dict[str, Any]:
    return {"max_new_tokens": NEW + number % 5, "temperature": 0.9 * (number % 3 > 0), "seed": number}


# ------------------------------------------------------------------ own texts


def test_eight_threads_get_their_own_texts(model: Haast, alone: Callable[..., str]) -> None:
    def ask(number: int) -> list[str]:
        said, prompt = [], f"{number} is a number."
        said.append(model.generate(prompt, **settings(number)).text)
        said.append("".join(piece.text for piece in model.stream(prompt, **settings(number + 1))))
        said.append(model.generate([prompt, "x"], **settings(number + 2))[0].text)
        said.append(Session(model).say(prompt, **settings(number + 3)).text)
        return said

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    for number, said in enumerate(texts):
        prompt = f"{number} is a number."
        assert said == [alone(prompt, **settings(number + turn)) for turn in range(4)]
    assert len({text for said in texts for text in said}) > 20
    assert idle(model)


def test_64_tasks_get_their_own_texts_and_the_loop_goes_on(model: Haast, alone: Callable[..., str]) -> None:
    ticks, done = 0, False

    async def ask(number: int) -> str:
        return "".join([piece.text async for piece in model.astream(f"Task {number}.", **settings(number))])

    async def tick() -> None:
        nonlocal ticks
        while not done:
            ticks += 1
            await asyncio.sleep(0.001)

    async def main() -> list[str]:
        nonlocal done
        ticking = asyncio.create_task(tick())
        texts = await asyncio.gather(*map(ask, range(64)))
        done = True
        await ticking
        return texts

    texts = asyncio.run(main())
    assert texts == [alone(f"Task {number}.", **settings(number)) for number in range(64)]
    assert ticks > NEW, "the loop was free while the model worked"
    assert idle(model)


def test_threads_and_tasks_together(model: Haast, alone: Callable[..., str]) -> None:
    async def main() -> list[str]:
        def ask(number: int) -> str:
            return str(model.generate(f"{number}?", **settings(number)).text)

        async def listen(number: int) -> str:
            return "".join([piece.text async for piece in model.astream(f"{number}!", **settings(number))])

        return await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(3)), *map(listen, range(3)))

    wanted = [alone(f"{number}{mark}", **settings(number)) for mark in "?!" for number in range(3)]
    assert asyncio.run(main()) == wanted


# ------------------------------------------------------------------ leaving


def test_closing_a_stream_gives_its_memory_back_at_once(model: Haast) -> None:
    pieces = model.stream("Tell me all.", max_new_tokens=2000)
    assert idle(model), "nothing begins before the first piece is asked for"
    next(pieces)
    assert not idle(model)
    pieces.close()
    assert idle(model)
    pieces = model.stream("Tell me all.", max_new_tokens=2000)
    next(pieces)
    del pieces
    assert idle(model)


def test_a_cancelled_task_gives_its_memory_back_within_a_step(model: Haast) -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def listen() -> None:
            async for _ in model.astream("Tell me all.", max_new_tokens=2000):
                begun.set()

        task = asyncio.create_task(listen())
        await begun.wait()
        steps = model.engine.scheduler._steps
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not idle(model) and model.engine.scheduler._steps <= steps + 2:
            await asyncio.sleep(0.001)
        assert idle(model)
        pieces = model.astream("Tell me all.", max_new_tokens=2000)
        await anext(pieces)
        await pieces.aclose()
        while not idle(model) and model.engine.scheduler._steps <= steps + 5:
            await asyncio.sleep(0.001)
        assert idle(model)

    asyncio.run(main())


def test_a_request_is_cancelled_from_another_thread(model: Haast) -> None:
    request = model.engine.submit([1, 2, 3], SamplingParams(), StopParams(3000))
    heard: list[int] = []

    def listen() -> None:
        for emission in model.engine.read(request):
            heard.extend(emission.tokens)

    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        while len(heard) < 5:
            time.sleep(0.001)
        model.engine.cancel(request)
        with pytest.raises(CancelledError, match="it was cancelled after"):
            listening.result(timeout=60)
    assert heard == request.new_tokens and idle(model)
    with pytest.raises(CancelledError, match="submit it again"):
        list(model.engine.read(request))


def test_a_text_ends_at_its_deadline(model: Haast) -> None:
    def slow(history: Tensor, scores: Tensor) -> Tensor:
        time.sleep(0.02)
        return scores

    said = model.generate("Tell me all.", max_new_tokens=2000, processors=[slow], timeout=0.3)
    assert said.finish_reason == "deadline" and 0 < len(said.tokens) <= 15
    pieces, heard = model.stream("Tell me all.", max_new_tokens=2000, processors=[slow], timeout=0.3), list[Piece]()
    with pytest.raises(CancelledError, match="deadline has passed"):
        for piece in pieces:
            heard.append(piece)  # as far as it comes
    assert heard[-1].finish_reason == "deadline" and "".join(piece.text for piece in heard)
    for piece in model.stream("Tell me all.", max_new_tokens=6, timeout=1000):
        reason = piece.finish_reason
    assert reason == "length" and idle(model)


# ------------------------------------------------------------------ slow consumers


def test_who_does_not_read_stalls_nobody(model: Haast, alone: Callable[..., str]) -> None:
    slow = model.stream("Slow.", max_new_tokens=60)
    said = next(slow).text
    assert model.generate("Quick.", max_new_tokens=NEW).text == alone("Quick.", max_new_tokens=NEW)

    async def main() -> list[str]:
        lazy = model.astream("Lazy.", max_new_tokens=60)
        heard = [(await anext(lazy)).text]
        quick = [piece.text async for piece in model.astream("Quick.", max_new_tokens=NEW)]
        assert "".join(quick) == alone("Quick.", max_new_tokens=NEW)
        return [*heard, *[piece.text async for piece in lazy]]

    assert "".join(asyncio.run(main())) == alone("Lazy.", max_new_tokens=60)
    assert said + "".join(piece.text for piece in slow) == alone("Slow.", max_new_tokens=60)
    assert idle(model)


# ------------------------------------------------------------------ interrupts and failures


def interrupting(after: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = iter(range(after))

    def process(history: Tensor, scores: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return scores

    return process


@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_interrupt_inside_a_step_ends_one_call_alone(model: Haast, alone: Callable[..., str], after: int) -> None:
    other = model.stream("Other.", max_new_tokens=40, temperature=0.9, seed=3)
    said = next(other).text
    with pytest.raises(KeyboardInterrupt):
        model.generate("Mine.", max_new_tokens=40, processors=[interrupting(after)])
    assert model.generate("Mine.", max_new_tokens=NEW).text == alone("Mine.", max_new_tokens=NEW)
    said += "".join(piece.text for piece in other)
    assert said == alone("Other.", max_new_tokens=40, temperature=0.9, seed=3)
    assert idle(model)


def test_ctrl_c_at_any_time_leaves_it_usable(model: Haast, alone: Callable[..., str]) -> None:
    wanted = alone("Mine.", max_new_tokens=NEW)
    for number in range(12):
        waiting = threading.Timer(0.01 + 0.011 * number, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            waiting.start()
            model.generate([f"Mine {number}.", "x" * 600], max_new_tokens=3000, stop=["never said, I hope"])
        assert model.generate("Mine.", max_new_tokens=NEW).text == wanted
        assert idle(model)


def test_a_processor_cannot_ask_the_model_that_calls_it(model: Haast, alone: Callable[..., str]) -> None:
    def asking(history: Tensor, scores: Tensor) -> Tensor:
        model.generate("And you?", max_new_tokens=2)
        return scores

    other = model.stream("Other.", max_new_tokens=30)
    said = next(other).text
    with pytest.raises(RuntimeError, match="asked for tokens of the model that it is called by"):
        model.generate("Mine.", max_new_tokens=5, processors=[asking])
    assert said + "".join(piece.text for piece in other) == alone("Other.", max_new_tokens=30)
    assert idle(model)


def test_a_failing_processor_ends_its_own_request_alone(model: Haast, alone: Callable[..., str]) -> None:
    def failing(history: Tensor, scores: Tensor) -> Tensor:
        if history.shape[1] > 70:
            raise LookupError("planted")
        return scores

    def ask(number: int) -> str:
        broken = [failing] if number % 2 else []
        try:
            return model.generate(f"{number}.", max_new_tokens=40, processors=broken).text
        except LookupError as error:
            return repr(error)

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(ask, range(6)))
    for number, text in enumerate(texts):
        assert text == ("LookupError('planted')" if number % 2 else alone(f"{number}.", max_new_tokens=40))
    assert idle(model)
