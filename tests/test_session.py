"""Conversations: what a turn takes from the cache, and that the text is the same as from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import SMOLLM2, bytes_tokenizer
from fakes import decode, random_head, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from test_medusa import medusa

from haast import native
from haast.api import Generation, Haast
from haast.bench import tables
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.lookup import PromptLookupDrafter, SuffixDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.shape import DraftShape, shape_for
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine import Engine, Stats, StopConfig
from haast.errors import PromptError
from haast.heads.checkpoint import Head
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.past import Past
from haast.sampling import SamplingConfig
from haast.session import Session, Sessions
from haast.speed.fusing import fuse_small_modules
from haast.speed.packing import PackedLinear, pack_linears
from haast.target import Target


def eagle3(target: Target) -> Head:
    torch.manual_seed(2)
    return Head(Eagle3Head(Eagle3Config.for_target(target.config, layer_ids=(0, 1, 2))).to(target.dtype), None, {})


DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "vanilla": lambda target: VanillaDrafter(),
    "eagle": lambda target: EagleDrafter(target, random_head(target), DraftShape(nodes=8)),
    "eagle, chain": lambda target: EagleDrafter(target, random_head(target), DraftShape("chain", depth=3)),
    "eagle3": lambda target: EagleDrafter(target, eagle3(target), DraftShape(nodes=8)),
    "eagle, batches' ways": lambda target: EagleDrafter(target, random_head(target), shape_for(6)),
    "medusa": lambda target: MedusaDrafter(target, medusa(target), 8),
    "lookup": lambda target: PromptLookupDrafter(5),
    "suffix": lambda target: SuffixDrafter(5),
    "lookahead": lambda target: LookaheadDrafter(target.vocab_size, 3, 3, 2),
    "small-model": lambda target: SmallModelDrafter(target, tiny_target(target.vocab_size, 1, seed=5), 3),
    "hybrid": lambda target: HybridDrafter(EagleDrafter(target, random_head(target), DraftShape(nodes=6))),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def turn(target: Target, drafter: Drafter, prompt: list[int], past: Past, **law: Any) -> tuple[list[int], Stats]:
    stats = Stats()
    emitted = Engine(target, drafter).run([prompt], SamplingConfig(**law), StopConfig(7), stats, past)
    return [token for emission in emitted for token in emission.tokens], stats


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ten_turns_reuse_the_cache_and_say_the_same(target: Target, name: str, temperature: float) -> None:
    drafter, past, text = DRAFTERS[name](target), Past(), [3, 4, 5]
    for number in range(10):
        held = len(past.tokens)
        said, stats = turn(target, drafter, text, past, temperature=temperature, seed=number)
        fresh = decode(target, DRAFTERS[name](target), [text], 7, SamplingConfig(temperature, seed=number))
        assert [said] == fresh
        assert stats.recalled_tokens == max(held - 1, 0) and stats.prompt_tokens == len(text)
        # Two new tokens, the answer's last, which no cache holds, and one known position again, for its features.
        assert stats.prompt_tokens - stats.recalled_tokens <= (4 if number else 3)
        assert past.tokens == [*text, *said][: len(past.tokens)]
        assert len(past.tokens) >= len(text) + len(said) - 1  # all but the root, so next time only what is new runs
        text = [*text, *said, 6 + number, 7]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 31), min_size=1, max_size=5)), max_size=5))
@pytest.mark.parametrize("name", ["eagle", "lookahead", "suffix", "small-model"])
def test_an_edited_text_is_used_as_far_as_it_is_the_same(
    target: Target, name: str, edits: list[tuple[int, list[int]]]
) -> None:
    drafter, past, text = DRAFTERS[name](target), Past(), [3, 4, 5, 6, 7, 8]
    for keep, more in [(6, [9]), *edits]:
        text = [*text[:keep], *more]
        said, stats = turn(target, drafter, text, past)
        assert [said] == decode(target, VanillaDrafter(), [text], 7)
        assert stats.recalled_tokens < len(text)
        text = [*text, *said]


def packed_target() -> Target:
    model: Any = tiny_target().model
    target = Target(model.float())
    pack_linears(target.model)
    fuse_small_modules(target.model)
    target.use_one_call()
    return target


def test_a_packed_target_recalls_the_same_bits() -> None:
    target = packed_target()
    drafter, past, text = EagleDrafter(target, random_head(target), DraftShape(nodes=6)), Past(), [3, 4, 5]
    for _ in range(4):
        said, stats = turn(target, drafter, text, past)
        assert [said] == decode(target, VanillaDrafter(), [text], 7)
        text = [*text, *said, 9]
    assert stats.recalled_tokens > 20


def test_a_past_of_another_drafter_or_an_interrupted_run_is_not_used(target: Target) -> None:
    past, first, second = Past(), VanillaDrafter(), VanillaDrafter()
    turn(target, first, [3, 4, 5, 6], past)
    assert past.nbytes > 0
    assert turn(target, second, [3, 4, 5, 6], past)[1].recalled_tokens == 0
    assert turn(target, second, [3, 4, 5, 6], past)[1].recalled_tokens == 3

    class Broken(VanillaDrafter):
        def propose(self) -> Any:
            raise KeyboardInterrupt

    broken = Broken()
    with pytest.raises(KeyboardInterrupt):
        turn(target, broken, [3, 4, 5, 6], past)
    assert past.tokens == [] and past.nbytes == 0
    with pytest.raises(ValueError, match="belongs to one text, not to 2"):
        Engine(target, first).run([[1], [2]], SamplingConfig(), StopConfig(2), past=Past())


def test_a_past_of_changed_weights_is_not_used() -> None:
    target, past, text = tiny_target(), Past(), [3, 4, 5, 6]
    drafter = VanillaDrafter()
    turn(target, drafter, text, past)
    assert turn(target, drafter, text, past)[1].recalled_tokens == 3
    first = next(target.model.model.layers[0].parameters())
    with torch.no_grad():
        first.mul_(-1.5)
    said, stats = turn(target, drafter, text, past)
    assert stats.recalled_tokens == 0
    assert [said] == decode(target, VanillaDrafter(), [text], 7)
    first.data = first.data.clone()  # as moving a model does
    assert turn(target, drafter, text, past)[1].recalled_tokens == 0
    assert turn(target, drafter, text, past.copy())[1].recalled_tokens == 3


def test_a_past_from_before_a_hook_is_not_used() -> None:
    target, past, text, drafter = tiny_target(), Past(), [3, 4, 5, 6], VanillaDrafter()
    turn(target, drafter, text, past)
    hook = target.model.model.layers[0].register_forward_hook(lambda module, given, output: output * -1.5)
    said, stats = turn(target, drafter, text, past)
    assert stats.recalled_tokens == 0
    assert [said] == decode(target, VanillaDrafter(), [text], 7)
    hook.remove()
    assert turn(target, drafter, text, past)[1].recalled_tokens == 0


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_a_past_of_changed_packed_weights_is_not_used() -> None:
    packed, past, text, drafter = packed_target(), Past(), [3, 4, 5, 6], VanillaDrafter()
    assert packed.one_call
    turn(packed, drafter, text, past)
    assert turn(packed, drafter, text, past)[1].recalled_tokens == 3
    linear = next(module for module in packed.model.modules() if isinstance(module, PackedLinear))
    linear.packed.copy_(linear.packed.flip(0))
    said, stats = turn(packed, drafter, text, past)
    assert stats.recalled_tokens == 0
    assert [said] == decode(packed, VanillaDrafter(), [text], 7)


def test_an_abandoned_run_leaves_what_it_has(target: Target) -> None:
    past, drafter = Past(), VanillaDrafter()
    run: Iterator[Any] = Engine(target, drafter).run([[3, 4, 5]], SamplingConfig(), StopConfig(9), past=past)
    said = [next(run).tokens[0] for _ in range(4)]
    assert past.tokens == [3, 4, 5, *said[:3]]
    again, stats = turn(target, drafter, [3, 4, 5, *said, 9], past)
    assert stats.recalled_tokens == 5
    assert [again] == decode(target, VanillaDrafter(), [[3, 4, 5, *said, 9]], 7)


@pytest.fixture(scope="module")
def model() -> Haast:
    tokenizer = bytes_tokenizer(SMOLLM2, "<|im_end|>", ["<|im_start|>"])
    target = tiny_target(vocab=len(tokenizer), context=4096)
    return Haast(Target(target.model, tokenizer), EagleDrafter(target, random_head(target), DraftShape(nodes=6)))


def rebuilt(model: Haast) -> Haast:
    return Haast(model.target, VanillaDrafter())


def test_a_conversation_of_ten_turns(model: Haast) -> None:
    session, recalled = Session(model, [{"role": "system", "content": "Be brief."}]), []
    for number in range(10):
        asked = [*session.messages, {"role": "user", "content": f"And {number}?"}]
        said = session.say(f"And {number}?", max_new_tokens=6)
        assert said.text == rebuilt(model).generate(asked, max_new_tokens=6).text
        assert session.messages == [*asked, {"role": "assistant", "content": said.text}]
        recalled.append(said.stats.recalled_tokens)
        prefilled = said.stats.prompt_tokens - said.stats.recalled_tokens
        assert number == 0 or prefilled < 60  # the new turn, not the dialogue
    assert recalled[0] == 0 and recalled == sorted(recalled) and recalled[-1] > 300


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_sampled_dialogue_with_an_edit_and_a_branch_says_what_it_says_from_scratch(model: Haast, name: str) -> None:
    """Every turn, over every drafter: an earlier turn edited, and both branches gone on with."""
    law = SamplingConfig(temperature=1.0, top_p=0.9, seed=5)
    session = Session(Haast(model.target, DRAFTERS[name](model.target)))

    def check(said: Generation, spoken: Session) -> None:
        fresh = rebuilt(model).stream(spoken.messages[:-1], max_new_tokens=5, sampling=law)
        assert said.text == "".join(piece.text for piece in fresh) == spoken.messages[-1]["content"]

    for number in range(3):
        check(session.say(f"And {number}?", max_new_tokens=5, sampling=law), session)
    other = session.branch()
    edited = session.edit(2, "Or else?", max_new_tokens=5, sampling=law)
    check(edited, session)
    assert len(session.messages) == 4 and edited.stats.recalled_tokens > 20
    held = len(other._past.tokens)
    on = other.say("Go on.", max_new_tokens=5, sampling=law)
    check(on, other)
    # Half characters of a random model's answer are encoded otherwise than it said them: an answer may be read anew.
    assert len(other.messages) == 8 and held - 6 <= on.stats.recalled_tokens < held
    check(session.say("More.", max_new_tokens=5, sampling=law), session)


def test_the_benchmark_counts_what_turns_compute(model: Haast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    conversation = import_module("conversation")
    turns = [conversation.turn(number, [conversation.converse(model, 4, 3, 0)]) for number in range(3)]
    assert [each["prefilled"]["scratch"] for each in turns] == [each["prompt_tokens"] for each in turns]
    assert turns[0]["prefilled"]["session"] == turns[0]["prompt_tokens"]
    assert all(each["prefilled"]["session"] < each["prompt_tokens"] - 50 for each in turns[1:])
    table = tables.conversation({"conversation": turns})
    assert table.startswith("| turn | 1 | 2 | 3 |") and str(turns[2]["prompt_tokens"]) in table
    different = model.stream([{"role": "user", "content": "x"}], max_new_tokens=4)
    monkeypatch.setattr(conversation, "anew", lambda *_: conversation.listen(different, Stats(), 0.0))
    with pytest.raises(RuntimeError, match="turn 1 differs"):
        conversation.converse(model, 4, 1, 0)


def test_edit_and_branch(model: Haast) -> None:
    session = Session(model)
    session.say("one", max_new_tokens=4)
    session.say("two", max_new_tokens=4)
    other = session.branch()
    assert other.nbytes > 0 and other.messages == session.messages and other.messages is not session.messages
    here, there = session.say("left", max_new_tokens=4), other.say("right", max_new_tokens=4)
    assert here.stats.recalled_tokens > 20 and there.stats.recalled_tokens > 20
    assert there.text == rebuilt(model).generate(other.messages[:-1], max_new_tokens=4).text
    edited = session.edit(-4, "three", max_new_tokens=4)  # "two" was said there
    assert [message["content"] for message in session.messages[2:]] == ["three", edited.text]
    assert edited.stats.recalled_tokens > 20
    assert edited.text == rebuilt(model).generate(session.messages[:-1], max_new_tokens=4).text
    for number, words in ((7, "no message 7"), (1, "message 1 is the assistant's")):
        with pytest.raises(ValueError, match=words):
            session.edit(number, "x")
    kept = list(session.messages)
    with pytest.raises(PromptError, match="context holds"):
        session.edit(0, "x" * 5000)
    assert session.messages == kept
    refused: list[dict[str, Any]] = [{"max_new_tokens": 0}, {"eos": "x"}, {"prefill_chunk": 0}, {"prefill_chunk": 1.5}]
    for asked in refused:
        with pytest.raises(ValueError, match=next(iter(asked))):
            session.edit(0, "x", **asked)
        assert session.messages == kept
    session.release()
    assert session.nbytes == 0
    assert session.say("four", max_new_tokens=4).stats.recalled_tokens == 0


def test_whole_caches_are_freed_and_no_dialogue_is_lost(model: Haast) -> None:
    one = Session(model)
    one.say("hello", max_new_tokens=4)
    held = Sessions(model, max_bytes=2 * one.nbytes)
    for name in "abc":
        held.say(name, "hello", max_new_tokens=4)
    assert len(held) == 3 and held.nbytes <= held.max_bytes
    assert [held[name].nbytes > 0 for name in "abc"] == [False, True, True]
    held.say("b", "more", max_new_tokens=4)
    again = held.say("a", "more", max_new_tokens=4)
    assert again.stats.recalled_tokens == 0 and len(held["a"].messages) == 4
    assert [held[name].nbytes > 0 for name in "abc"] == [True, True, False]  # c was silent longest
    held.close("c")
    assert len(held) == 2
    with pytest.raises(ValueError, match="max_bytes=0"):
        Sessions(model, max_bytes=0)


def test_a_dialogue_that_does_not_fit_stays_as_it_was(model: Haast) -> None:
    session = Session(model)
    session.say("hello", max_new_tokens=4)
    before = list(session.messages)
    with pytest.raises(PromptError, match="context holds"):
        session.say("x" * 5000)
    assert session.messages == before
    pieces = session.stream("again", max_new_tokens=30)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert session.messages[-1]["role"] == "assistant"
    assert torch.get_default_dtype() is torch.float32
    with pytest.raises(PromptError, match="no chat template"):
        Session(Haast(Target(model.target.model, bytes_tokenizer(None, "<|im_end|>", [])), VanillaDrafter()))
