"""One request's fault is its own, Ctrl-C cuts no step in half, and what is cancelled leaves whoever holds the model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from fakes import always, packed_target, random_head, tiny_llama, tiny_target
from torch import Tensor

from haast import native
from haast.api import Haast
from haast.core import Request, RequestState, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.engine.scheduler import Scheduler
from haast.engine.step import Step
from haast.engine.verify import verify
from haast.errors import HeadMismatchError, PromptError
from haast.sampling import Sampler
from haast.target.target import Target
from haast.tree import DraftTree

PROMPT, OTHER, LONG = [1, 2, 3], [4, 5, 6, 7], 24
SHAPE = DraftShape(depth=3, top_k=3, width=3, nodes=10)


def engine_of(name: str) -> Engine:
    target = tiny_target()
    drafter = VanillaDrafter() if name == "vanilla" else EagleDrafter(target, random_head(target), SHAPE)
    return Engine(target, drafter)


def finish(engine: Engine, request: Request) -> list[int]:
    return [token for emission in engine.read(request) for token in emission.tokens]


class Wide:
    """A processor that returns scores of more tokens than there are, and prefers one of those."""

    def __call__(self, _history: Tensor, scores: Tensor) -> Tensor:
        return torch.nn.functional.pad(scores, (0, 3), value=1e9)


class Mad:
    """A chooser that chooses no token."""

    stateless = False

    def __init__(self, choice: object) -> None:
        self.choice = choice

    def choose(self, _history: Sequence[int], _logits: Tensor) -> Any:
        return self.choice


def failing(*_: object) -> Any:
    raise RuntimeError("on purpose")


CULPRITS: dict[str, dict[str, Any]] = {
    "scores of too many tokens": {"sampling": SamplingParams(processors=(Wide(),))},
    "no choice": {"chooser": Mad(None)},
    "a choice beyond the vocabulary": {"chooser": Mad(999)},
    "a watcher": {"watch": failing},
    "a warper": {"chooser": Sampler(SamplingParams(temperature=1.0), warpers=(failing,))},
}


@pytest.mark.parametrize("name", ["vanilla", "eagle"])
@pytest.mark.parametrize("culprit", CULPRITS)
def test_a_fault_ends_its_own_request_alone(name: str, culprit: str) -> None:
    engine = engine_of(name)
    (expected,) = engine.complete([PROMPT], SamplingParams(), StopParams(LONG))
    given = {"sampling": SamplingParams(), **CULPRITS[culprit]}
    good = engine.submit(PROMPT, SamplingParams(), StopParams(LONG))
    bad = engine.submit(OTHER, given.pop("sampling"), StopParams(LONG), **given)
    also = engine.submit(PROMPT, SamplingParams(temperature=0.8, seed=3), StopParams(LONG))
    assert finish(engine, good) == expected
    with pytest.raises((RuntimeError, ValueError), match=r"on purpose|was chosen as the next token"):
        finish(engine, bad)
    assert len(finish(engine, also)) == LONG
    assert engine.scheduler.running == engine.scheduler.waiting == 0


@pytest.mark.parametrize("wrap", [lambda eagle: eagle, HybridDrafter])
@pytest.mark.parametrize("when", ["prompt", "answer"])
@pytest.mark.skipif(
    not native.available(), reason="as sums of PyTorch, a drafted NaN reaches its neighbours by 0 * NaN"
)
def test_where_no_token_is_possible_that_request_ends_alone(wrap: Callable[[EagleDrafter], Drafter], when: str) -> None:
    """One token has no embedding; it is in a prompt, or the first token of an answer."""
    law, prompts = SamplingParams(0.8, seed=3), [[1, 2, 3], [7, 30, 4], [6, 2]]
    (first,) = Engine(packed_target(), VanillaDrafter()).complete([prompts[1]], law, StopParams(1))[0]

    def said(drafter_of: Callable[[Target], Drafter]) -> list[Any]:
        target = packed_target()
        weight: Any = target.embedding.weight
        weight.data[30 if when == "prompt" else first] = torch.nan
        engine = Engine(target, drafter_of(target))
        requests = [engine.submit(prompt, law, StopParams(12)) for prompt in prompts]
        while any(not request.finished for request in requests):
            engine.scheduler.advance()
        assert target.pool.available == target.pool.blocks
        return [(type(request.error), request.finish_reason, request.new_tokens) for request in requests]

    expected = said(lambda _: VanillaDrafter())
    assert expected[1][0] is PromptError and len(expected[1][2]) == (when == "answer")
    assert expected[0][0] is type(None) or when == "answer"
    assert said(lambda target: wrap(EagleDrafter(target, random_head(target), SHAPE))) == expected


@pytest.mark.skipif(not native.available(), reason="as above")
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("depth", [1, 4, 9])
def test_a_draft_beyond_the_end_changes_nothing(depth: int, ends: bool) -> None:
    """No token is possible after one of the text, which ends there, or does not."""
    law, prompt = SamplingParams(0.8, seed=3), [1, 2, 3]
    (text,) = Engine(packed_target(), VanillaDrafter()).complete([prompt], law, StopParams(20))
    last = next(token for place, token in enumerate(text) if place > 2 and token not in [*prompt, *text[:place]])

    def said(drafter: Drafter) -> tuple[Any, ...]:
        target = packed_target()
        weight: Any = target.embedding.weight
        weight.data[last] = torch.nan
        engine = Engine(target, drafter)
        request = engine.submit(prompt, law, StopParams(20, (last,) if ends else ()))
        while not request.finished:
            engine.scheduler.advance()
        return request.new_tokens, request.finish_reason, str(request.error)

    expected = said(VanillaDrafter())
    assert expected[0][-1] == last and expected[1] == ("stop" if ends else "error")
    assert said(always([[*prompt, *text]], depth)) == expected


def test_a_watcher_sees_one_emission_a_row() -> None:
    engine, seen = engine_of("eagle"), list[Step]()
    requests = [
        engine.submit(PROMPT, SamplingParams(), StopParams(LONG), row=0, watch=seen.append),
        engine.submit(OTHER, SamplingParams(), StopParams(LONG), row=1, chooser=Mad(999), watch=seen.append),
    ]
    finish(engine, requests[0])
    assert all(tuple(each.row for each in step.emissions) == step.rows for step in seen)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_who_waits_again_has_no_part_in_a_failing_step(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of one forward, of which the second has found no blocks when it fails."""
    engine = engine_of("eagle")
    expected = engine.complete([PROMPT, OTHER[1:]], SamplingParams(), StopParams(LONG))
    engine.target.pool.clear()
    first = engine.submit(PROMPT, SamplingParams(), StopParams(LONG))
    second = engine.submit(OTHER[1:], SamplingParams(), StopParams(LONG))
    scheduler, admission = engine.scheduler, engine.scheduler._admission
    reserved = admission.reserve_prompt

    def crowded(request: Request, count: int) -> bool:
        if request is second:
            admission.preempt(request)
        return request is not second and reserved(request, count)

    def broken(*_: Any, **__: Any) -> Any:
        raise error("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(admission, "reserve_prompt", crowded)
        patched.setattr(engine.target, "forward", broken)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                scheduler.step()
        else:
            scheduler.step()
    if error is KeyboardInterrupt:
        assert finish(engine, first) == expected[0]
    assert finish(engine, second) == expected[1]


def test_a_row_is_judged_alike_beside_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a native call judges is not judged by tensors because its neighbour is."""
    judged, real = list[int](), native.judge

    def counted(logits: Tensor, *fields: Any, **more: Any) -> Tensor:
        judged.append(len(logits))
        return real(logits, *fields, **more)

    monkeypatch.setattr(native, "judge", counted)
    tree, logits = DraftTree.roots(torch.tensor([3, 3, 3])), torch.randn(3, 1, 32)
    plain, cut = SamplingParams(temperature=0.7, seed=1), SamplingParams(temperature=0.7, top_k=4, seed=1)
    together = verify(tree, logits, [Sampler(plain), Sampler(cut), Sampler(plain)], [[3]] * 3)
    assert judged == [2]
    alone = verify(tree.select_rows(torch.tensor([0])), logits[:1], [Sampler(plain)], [[3]])
    assert together.rows[0] == alone.rows[0] and judged == [2, 1]


# ---------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("name", ["vanilla", "eagle"])
def test_ctrl_c_in_a_step_takes_effect_after_it(name: str) -> None:
    """Nothing that the step has settled is lost, and no block."""
    engine = engine_of(name)
    (expected,) = engine.complete([PROMPT], SamplingParams(), StopParams(LONG))
    engine.target.pool.clear()
    calls, said, interrupted = 0, list[int](), 0

    def pressing(_tokens: Sequence[int]) -> bool:
        nonlocal calls
        calls += 1
        if calls % 3 == 1:
            signal.raise_signal(signal.SIGINT)  # in the middle of the step, as a handler sees it
        return False

    request = engine.submit(PROMPT, SamplingParams(), StopParams(LONG, stop=pressing))
    while True:
        try:
            if not engine.scheduler.pump(request):
                break
        except KeyboardInterrupt:
            interrupted += 1
        while request.emissions:
            said += request.emissions.popleft().tokens
    assert said == expected and interrupted > 3 and request.state is RequestState.DONE
    assert engine.target.pool.available == engine.target.pool.blocks


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    engine = engine_of("vanilla")
    reached = []

    def pressing(_tokens: Sequence[int]) -> bool:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
        return False

    request = engine.submit(PROMPT, SamplingParams(), StopParams(4, stop=pressing))
    with pytest.raises(KeyboardInterrupt):
        engine.scheduler.pump(request)
    assert not reached
    engine.cancel(request)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_of_ctrl_c_is_called() -> None:
    engine, pressed = engine_of("vanilla"), []

    def pressing(_tokens: Sequence[int]) -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        assert len(engine.complete([PROMPT], SamplingParams(), StopParams(2, stop=pressing))[0]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed and set(pressed) == {signal.SIGINT}


# --------------------------------------------------------------------------------------------------------- cancelling


def test_what_is_cancelled_leaves_while_another_thread_holds_the_model() -> None:
    engine = engine_of("eagle")
    request = engine.submit(PROMPT, SamplingParams(), StopParams(LONG))
    Scheduler.of(engine.target).step()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with engine.target.lock:
            held.set()
            done.wait(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    engine.cancel(request)
    assert request.finished and engine.scheduler.running == 0
    done.set()
    holder.join()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_model_in_training_mode_is_refused() -> None:
    engine = engine_of("vanilla")
    engine.target.model.train()
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        engine.submit(PROMPT, SamplingParams(), StopParams(4))


def test_a_model_that_was_moved_under_its_head_is_named() -> None:
    model: Any = tiny_llama()
    target = Target(model)
    engine = Engine(target, EagleDrafter(target, random_head(target), SHAPE))
    model.float()
    with pytest.raises(HeadMismatchError, match=r"torch.float32 now; .* torch.float64: move the model first"):
        engine.complete([PROMPT], SamplingParams(), StopParams(4))


def test_numbers_of_other_libraries_are_taken() -> None:
    engine = engine_of("vanilla")
    odd = SamplingParams(temperature=Fraction(1, 2), top_k=np.int32(3), seed=np.int64(5))  # type: ignore[arg-type]
    plain = SamplingParams(temperature=0.5, top_k=3, seed=5)
    stop = StopParams(np.int64(8), (np.int64(31),))  # type: ignore[arg-type]
    assert engine.complete([PROMPT], odd, stop) == engine.complete([PROMPT], plain, StopParams(8, (31,)))


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: StopParams(eos_ids=5), "eos_ids=5"),  # type: ignore[arg-type]
        (lambda: StopParams(eos_ids=("a",)), "eos_ids="),  # type: ignore[arg-type]
        (lambda: StopParams(stop="abc"), "stop='abc'"),  # type: ignore[arg-type]
        (lambda: SamplingParams(top_k=True), "top_k=True"),
        (lambda: SamplingParams(processors=failing), "processors="),  # type: ignore[arg-type]
    ],
)
def test_parameters_that_are_none_are_refused(made: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        made()


@pytest.mark.parametrize("prompt", ["abc", [1.5, 2], ["1"], [None], [float("nan")]])
def test_prompts_that_are_none_are_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match="the ids of tokens"):
        engine_of("vanilla").submit(prompt, SamplingParams(), StopParams(4))


@pytest.mark.parametrize("given", [{"choice": -1}, {"choice": "a"}, {"watch": 5}])
def test_arguments_that_are_none_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        engine_of("vanilla").submit(PROMPT, SamplingParams(), StopParams(4), **given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_tokens": 3}, "'max_tokens': did you mean max_new_tokens"),
        ({"drafter": "suffix"}, "when the model is loaded, by from_pretrained"),
        ({"beams": 4}, "'beams': it takes max_new_tokens, temperature, "),
    ],
)
def test_an_unknown_setting_is_named_with_what_there_is(given: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        Haast(tiny_target(), VanillaDrafter()).generate(PROMPT, **given)
