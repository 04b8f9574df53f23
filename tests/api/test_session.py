"""Conversations: what a turn takes from the cache, and that the text is the same as from scratch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import SMOLLM2, bytes_tokenizer
from fakes import block_head, packed_target, random_head, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from test_medusa import medusa

from haast import native
from haast.api import Haast
from haast.bench.tables import markdown
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.block import BlockDrafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape, shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.errors import CancelledError, PromptError, QueueFullError
from haast.generation import Generation, Message
from haast.heads.checkpoint import Head
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.session import Session, Sessions
from haast.target.kv_pool import BLOCK, common_length
from haast.target.packing import PackedLinear
from haast.target.target import Target


def eagle3(target: Target) -> Head:
    torch.manual_seed(2)
    return Head(Eagle3Head(Eagle3Config.for_target(target.config, layer_ids=(0, 1, 2))).to(target.dtype), None, {})


DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "vanilla": lambda target: VanillaDrafter(),
    "eagle": lambda target: EagleDrafter(target, random_head(target), DraftShape(nodes=8)),
    "eagle, chain": lambda target: EagleDrafter(target, random_head(target), DraftShape("chain", depth=3)),
    "eagle3": lambda target: EagleDrafter(target, eagle3(target), DraftShape(nodes=8)),
    "eagle, batches' ways": lambda target: EagleDrafter(target, random_head(target), shape_for(6)),
    "block": lambda target: BlockDrafter(target, block_head(target), DraftShape(nodes=8)),
    "block, chain": lambda target: BlockDrafter(target, block_head(target), DraftShape("chain", depth=4)),
    "medusa": lambda target: MedusaDrafter(target, medusa(target), 8),
    "lookup": lambda target: PromptLookupDrafter(5),
    "suffix": lambda target: SuffixDrafter(5),
    "lookahead": lambda target: LookaheadDrafter(target.vocab_size, 3, 3, 2),
    "small-model": lambda target: SmallModelDrafter(target, tiny_target(target.vocab_size, 1, seed=5), 3),
    "hybrid": lambda target: HybridDrafter(EagleDrafter(target, random_head(target), DraftShape(nodes=6))),
    "hybrid, chain": lambda target: HybridDrafter(EagleDrafter(target, random_head(target), DraftShape("chain", 3))),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def other() -> Target:
    """The same model, for what it says by itself."""
    return tiny_target()


def turn(target: Target, drafter: Drafter, prompt: list[int], **sampling: Any) -> tuple[list[int], Stats]:
    stats = Stats()
    said = Engine(target, drafter).complete([prompt], SamplingParams(**sampling), StopParams(7), stats)
    return said[0], stats


def cold(target: Target, prompt: list[int], **sampling: Any) -> list[int]:
    """What vanilla says with nothing kept; the pool is empty afterwards too."""
    target.pool.clear()
    said, stats = turn(target, VanillaDrafter(), prompt, **sampling)
    assert stats.recalled_tokens == 0
    target.pool.clear()
    return said


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.one_of_each
def test_ten_turns_reuse_the_cache_and_say_the_same(name: str, temperature: float) -> None:
    target, other = tiny_target(), tiny_target()
    drafter, text = DRAFTERS[name](target), [3, 4, 5]
    for number in range(10):
        held = target.pool.common(text, drafter.prefix_key)
        said, stats = turn(target, drafter, text, temperature=temperature, seed=number)
        assert said == cold(other, text, temperature=temperature, seed=number)
        assert stats.recalled_tokens == max(held - 1, 0) and stats.prompt_tokens == len(text)
        # Two new tokens, the answer's last, which no cache holds, and one known position again, for its features. A
        # head has not seen the last step of an answer.
        unseen = drafter.nodes - 1 if drafter.caches else 0
        assert stats.prompt_tokens - stats.recalled_tokens <= (4 + unseen if number else 3)
        text = [*text, *said]
        assert target.pool.common(text, drafter.prefix_key) >= len(text) - 1 - unseen  # all but the root
        text += [6 + number, 7]


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["eagle", "lookahead", "suffix", "small-model"])
def test_an_edited_text_is_used_as_far_as_it_is_the_same(
    target: Target, other: Target, name: str, examples: int
) -> None:
    @settings(max_examples=examples)
    @given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 31), min_size=1, max_size=5)), max_size=5))
    def holds(edits: list[tuple[int, list[int]]]) -> None:
        drafter, text = DRAFTERS[name](target), [3, 4, 5, 6, 7, 8]
        for keep, more in [(6, [9]), *edits]:
            text = [*text[:keep], *more]
            held = target.pool.common(text, drafter.prefix_key)
            said, stats = turn(target, drafter, text)
            assert said == cold(other, text)
            assert stats.recalled_tokens == max(held - 1, 0) < len(text)
            text = [*text, *said]

    holds()


def test_a_packed_target_recalls_the_same_bits() -> None:
    target, other = packed_target(), packed_target()
    drafter, text = EagleDrafter(target, random_head(target), DraftShape(nodes=6)), [3, 4, 5]
    for _ in range(4):
        said, stats = turn(target, drafter, text)
        assert said == cold(other, text)
        text = [*text, *said, 9]
    assert stats.recalled_tokens > 20


def test_a_head_uses_what_it_has_computed_itself() -> None:
    target, text = tiny_target(), [3, 4, 5, 6]
    first, second = DRAFTERS["eagle"](target), DRAFTERS["eagle"](target)
    for drafter, recalled in ((first, 0), (second, 0), (first, 3), (second, 3)):
        assert turn(target, drafter, text)[1].recalled_tokens == recalled
    # Drafters without keys and values of their own share the target's.
    for drafter, recalled in ((VanillaDrafter(), 0), (VanillaDrafter(), 3), (SuffixDrafter(5), 3)):
        assert turn(target, drafter, text)[1].recalled_tokens == recalled


def test_what_an_interrupted_step_computed_is_not_used() -> None:
    target, text = tiny_target(), [3, 4, 5, 6]

    class Broken(VanillaDrafter):
        def propose(self, states: Any, budget: int | None = None) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turn(target, Broken(), text)
    assert target.pool.cached_blocks == 0 and target.pool.available == target.pool.blocks
    said, stats = turn(target, VanillaDrafter(), text)
    assert stats.recalled_tokens == 0 and said == cold(tiny_target(), text)


def test_what_other_weights_computed_is_not_used() -> None:
    target, text, drafter = tiny_target(), [3, 4, 5, 6], VanillaDrafter()
    turn(target, drafter, text)
    assert turn(target, drafter, text)[1].recalled_tokens == 3
    first = next(target.model.model.layers[0].parameters())
    with torch.no_grad():
        first.mul_(-1.5)
    said, stats = turn(target, drafter, text)
    assert stats.recalled_tokens == 0
    assert said == cold(target, text)
    turn(target, drafter, text)
    first.data = first.data.clone()  # as moving a model does
    assert turn(target, drafter, text)[1].recalled_tokens == 0
    assert turn(target, drafter, text)[1].recalled_tokens == 3


def test_what_was_computed_before_a_hook_is_not_used() -> None:
    target, text, drafter = tiny_target(), [3, 4, 5, 6], VanillaDrafter()
    turn(target, drafter, text)
    hook = target.model.model.layers[0].register_forward_hook(lambda module, given, output: output * -1.5)
    said, stats = turn(target, drafter, text)
    assert stats.recalled_tokens == 0
    assert said == cold(target, text)
    turn(target, drafter, text)
    hook.remove()
    assert turn(target, drafter, text)[1].recalled_tokens == 0


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_what_other_packed_weights_computed_is_not_used() -> None:
    packed, text, drafter = packed_target(), [3, 4, 5, 6], VanillaDrafter()
    assert packed.one_call
    turn(packed, drafter, text)
    assert turn(packed, drafter, text)[1].recalled_tokens == 3
    linear = next(module for module in packed.model.modules() if isinstance(module, PackedLinear))
    linear.packed.copy_(linear.packed.flip(0))
    said, stats = turn(packed, drafter, text)
    assert stats.recalled_tokens == 0
    assert said == cold(packed, text)


def test_an_abandoned_run_leaves_what_it_has() -> None:
    target, drafter = tiny_target(), VanillaDrafter()
    run: Iterator[Any] = Engine(target, drafter).run([[3, 4, 5]], SamplingParams(), StopParams(9))
    said = [next(run).tokens[0] for _ in range(4)]
    del run
    assert target.pool.available == target.pool.blocks
    text = [3, 4, 5, *said, 9]
    assert target.pool.common(text) == 6
    again, stats = turn(target, drafter, text)
    assert stats.recalled_tokens == 5
    assert again == cold(target, text)


@pytest.fixture(scope="module")
def model() -> Haast:
    tokenizer = bytes_tokenizer(SMOLLM2, "<|im_end|>", ["<|im_start|>"])
    target = Target(tiny_target(vocab=len(tokenizer), context=4096).model, tokenizer)
    return Haast(target, EagleDrafter(target, random_head(target), DraftShape(nodes=6)))


@pytest.fixture(scope="module")
def plain(model: Haast) -> Haast:
    """The same model with a pool of its own, without drafts."""
    return Haast(Target(model.target.model, model.target.tokenizer), VanillaDrafter())


def scratch(plain: Haast, dialogue: list[Message], **settings: Any) -> str:
    """What vanilla answers to a dialogue that it computes from its beginning."""
    plain.target.pool.clear()
    said = plain.generate(dialogue, **settings)
    assert said.stats.recalled_tokens == 0
    text: str = said.text
    return text


def test_a_conversation_of_ten_turns(model: Haast, plain: Haast) -> None:
    model.target.pool.clear()
    session, recalled = Session(model, [{"role": "system", "content": "Be brief."}]), []
    for number in range(10):
        asked = [*session.messages, {"role": "user", "content": f"And {number}?"}]
        said = session.say(f"And {number}?", max_new_tokens=6)
        assert said.text == scratch(plain, asked, max_new_tokens=6) and said.finish_reason == "length"
        assert session.messages == [*asked, {"role": "assistant", "content": said.text}]
        recalled.append(said.stats.recalled_tokens)
        prefilled = said.stats.prompt_tokens - said.stats.recalled_tokens
        assert number == 0 or prefilled < 60  # the new turn, not the dialogue
    assert recalled[0] == 0 and recalled == sorted(recalled) and recalled[-1] > 300


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_sampled_dialogue_with_an_edit_and_a_branch_says_what_it_says_from_scratch(
    model: Haast, plain: Haast, name: str
) -> None:
    """Every turn, over every drafter: an earlier turn edited, and both branches gone on with."""
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    model.target.pool.clear()
    session = Session(Haast(model.target, DRAFTERS[name](model.target)))

    def check(said: Generation, spoken: Session) -> None:
        fresh = scratch(plain, spoken.messages[:-1], max_new_tokens=5, sampling=sampling)
        assert said.text == fresh == spoken.messages[-1]["content"]

    for number in range(3):
        check(session.say(f"And {number}?", max_new_tokens=5, sampling=sampling), session)
    branch = session.branch()
    edited = session.edit(2, "Or else?", max_new_tokens=5, sampling=sampling)
    check(edited, session)
    assert len(session.messages) == 4 and edited.stats.recalled_tokens > 20
    held = kept(branch)
    on = branch.say("Go on.", max_new_tokens=5, sampling=sampling)
    check(on, branch)
    # Half characters of a random model's answer are encoded otherwise than it said them: an answer may be read again.
    assert len(branch.messages) == 8 and held - 6 <= on.stats.recalled_tokens < held
    check(session.say("More.", max_new_tokens=5, sampling=sampling), session)


def kept(session: Session) -> int:
    """Tokens of a dialogue whose keys and values are there."""
    return session.haast.target.pool.common(session._texts[-1], session.haast.drafter.prefix_key)


def test_the_benchmark_counts_what_turns_compute(model: Haast, plain: Haast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    conversation = import_module("conversation")
    turns = [conversation.turn(number, [conversation.converse(model, plain, 4, 3, 0)]) for number in range(3)]
    assert [each["prefilled"]["scratch"] for each in turns] == [each["prompt_tokens"] for each in turns]
    assert turns[0]["prefilled"]["session"] == turns[0]["prompt_tokens"]
    assert all(each["prefilled"]["session"] < each["prompt_tokens"] - 50 for each in turns[1:])
    table = markdown("results.md", "conversation", {"conversation": turns})
    assert table.startswith("| turn | 1 | 2 | 3 |") and str(turns[2]["prompt_tokens"]) in table
    different = model.stream([{"role": "user", "content": "x"}], max_new_tokens=4)
    monkeypatch.setattr(conversation, "from_scratch", lambda *_: conversation.collect(different, Stats(), 0.0))
    with pytest.raises(RuntimeError, match="turn 1 differs"):
        conversation.converse(model, plain, 4, 1, 0)


def test_edit_and_branch(model: Haast, plain: Haast) -> None:
    pool = model.target.pool
    pool.clear()
    session = Session(model)
    assert session.nbytes == 0
    session.say("one", max_new_tokens=4)
    session.say("two", max_new_tokens=4)
    assert len(session.blocks) == -(-kept(session) // BLOCK)
    assert session.nbytes == len(session.blocks) * BLOCK * kv_bytes(model)
    before = pool.available, pool.cached_blocks
    branch = session.branch()
    assert (pool.available, pool.cached_blocks) == before, "nothing is copied"
    assert branch.blocks == session.blocks and branch.nbytes > 0
    assert branch.messages == session.messages and branch.messages is not session.messages
    here, there = session.say("left", max_new_tokens=4), branch.say("right", max_new_tokens=4)
    assert here.stats.recalled_tokens > 20 and there.stats.recalled_tokens > 20
    assert there.text == scratch(plain, branch.messages[:-1], max_new_tokens=4)
    edited = session.edit(-4, "three", max_new_tokens=4)  # "two" was said there
    assert [message["content"] for message in session.messages[2:]] == ["three", edited.text]
    assert edited.stats.recalled_tokens > 20
    assert edited.text == scratch(plain, session.messages[:-1], max_new_tokens=4)
    for number, words in ((7, "no message 7"), (1, "message 1 is the assistant's")):
        with pytest.raises(ValueError, match=words):
            session.edit(number, "x")
    dialogue = list(session.messages)
    with pytest.raises(PromptError, match="context holds"):
        session.edit(0, "x" * 5000)
    assert session.messages == dialogue
    refused: list[dict[str, Any]] = [{"max_new_tokens": 0}, {"eos": "x"}, {"prefill_chunk": 0}, {"prefill_chunk": 1.5}]
    for asked in refused:
        with pytest.raises(ValueError, match=next(iter(asked))):
            session.edit(0, "x", **asked)
        assert session.messages == dialogue
    held = kept(branch)
    session.release()
    assert session.nbytes == 0 and kept(branch) == held, "what the branch goes on from stays"
    branch.release()
    assert pool.cached_blocks == 0, "also of turns that were edited away"
    assert session.say("four", max_new_tokens=4).stats.recalled_tokens == 0


def kv_bytes(model: Haast) -> int:
    """Keys and values of a token: 2 layers of the target and the head's, each 2 heads of 8 numbers of 8 bytes."""
    return (model.target.layers + 1) * 2 * 2 * 8 * 8


def test_a_turn_that_is_refused_by_a_full_queue_never_began(model: Haast, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model)
    session.say("hello", max_new_tokens=4)
    dialogue = list(session.messages)
    monkeypatch.setattr(model.engine.scheduler, "max_waiting", 0)
    monkeypatch.setattr(model.engine.scheduler, "max_batch", 0)
    with pytest.raises(QueueFullError):
        session.say("more")
    with pytest.raises(QueueFullError):
        session.edit(0, "more")
    assert session.messages == dialogue


def test_whole_dialogues_are_freed_and_none_is_lost(model: Haast) -> None:
    model.target.pool.clear()
    words = {name: f"{name} has a lot to tell." + 3 * " And this is how they all go on." for name in "abc"}
    one = Session(model)
    one.say(words["a"], max_new_tokens=4)
    held = Sessions(model, max_bytes=9 * one.nbytes // 4)
    for name in "abc":
        held.say(name, words[name], max_new_tokens=4)
    assert len(held) == 3 and held.nbytes <= held.max_bytes
    assert [held[name].nbytes > 0 for name in "abc"] == [False, True, True]
    assert held.nbytes < held["b"].nbytes + held["c"].nbytes, "what both begin with counts once"
    held.say("b", "more", max_new_tokens=4)
    again = held.say("a", "more", max_new_tokens=4)
    alike = common_length(*(model.encode(words[name]) for name in "ab"))
    assert again.stats.recalled_tokens < alike and len(held["a"].messages) == 4
    assert [held[name].nbytes > 0 for name in "abc"] == [True, True, False]  # c was silent longest
    assert held.nbytes <= held.max_bytes
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
    first = next(pieces)
    pieces.close()
    assert session.messages[-1]["role"] == "assistant" and session.messages[-1]["content"].startswith(first.text)
    assert torch.get_default_dtype() is torch.float32
    with pytest.raises(PromptError, match="no chat template"):
        Session(Haast(Target(model.target.model, bytes_tokenizer(None, "<|im_end|>", [])), VanillaDrafter()))


def test_a_turn_that_takes_too_long_is_what_was_said_by_then(model: Haast) -> None:
    session = Session(model)

    def slow(history: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return scores

    said = session.say("hello", max_new_tokens=500, processors=[slow], timeout=0.3)
    assert said.finish_reason == "deadline" and 0 < len(said.tokens) < 20
    assert session.messages[-1] == {"role": "assistant", "content": said.text}
    pieces = session.stream("again", max_new_tokens=500, processors=[slow], timeout=0.2)
    with pytest.raises(CancelledError, match="deadline has passed"):
        list(pieces)
    assert len(session.messages) == 4
