"""Models with recurrent layers: drafted text is vanilla's, and vanilla's is stock `generate`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import OracleChain, RandomTrees, collect, decode, random_head, sometimes, vanilla
from hybrids import (
    FAMILIES,
    FAST,
    INCONSISTENT,
    WINDOWED,
    families,
    fast,
    fresh_hybrid,
    hybrid_target,
    needs_cache,
    some_text,
    stock_text,
    tiny_hybrid,
)
from torch import Tensor
from zoo_sizes import VOCAB

import haast
from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats
from haast.errors import HeadMismatchError, UnsupportedArgumentError, UnsupportedModelError
from haast.target import recurrent
from haast.target.kv_pool import BLOCK
from haast.target.target import Target
from haast.tree import DraftTree

pytestmark = needs_cache
PROMPTS = [some_text(length, seed) for seed, length in enumerate((9, 23, 1))]
NEW = 14


def trees(texts: list[list[int]], rate: float = 0.6) -> RandomTrees:
    """Trees of which some nodes are right, with dead ones and placeholders."""
    return RandomTrees(10, 3, texts, rate=rate, dead=0.1, probes=0.1, vocab=VOCAB)


def chain(texts: list[list[int]], depth: int = 4) -> OracleChain:
    return OracleChain(texts, depth, sometimes([], depth)._right, VOCAB)


def texts_of(target: Target, sampling: Any = None) -> list[list[int]]:
    said = vanilla(target, PROMPTS, NEW, sampling)
    return [prompt + new for prompt, new in zip(PROMPTS, said, strict=True)]


def new_of(texts: list[list[int]]) -> list[list[int]]:
    return [text[len(prompt) :] for prompt, text in zip(PROMPTS, texts, strict=True)]


@families
def test_vanilla_says_what_stock_generate_says(kind: str) -> None:
    texts = texts_of(hybrid_target(kind))
    model = tiny_hybrid(kind)
    assert new_of(texts) == [stock_text(model, prompt, NEW) for prompt in PROMPTS]
    stats = Stats()
    alone = [decode(hybrid_target(kind), trees([text]), [text[:-NEW]], NEW, stats=stats)[0] for text in texts]
    assert alone == new_of(texts) and stats.tau > 1.5, "right nodes are accepted"


@families
def test_generate_takes_a_decoder(kind: str) -> None:
    model, text = tiny_hybrid(kind), texts_of(hybrid_target(kind))[1]
    for decoder in (haast.Decoder(drafter="suffix"), haast.Decoder(model, drafter=trees([text]))):
        assert stock_text(model, PROMPTS[1], NEW, custom_generate=decoder) == text[-NEW:]
    assert decoder.stats.tau > 1


@families
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_with_early_ends_say_what_each_says_alone(kind: str, temperature: float) -> None:
    sampling = [SamplingParams(temperature=temperature, seed=seed) for seed in range(len(PROMPTS))]
    texts = texts_of(hybrid_target(kind), sampling)
    end = texts[0][-NEW // 2]
    expected = [new[: new.index(end) + 1] if end in new else new for new in new_of(texts)]
    assert len(expected[0]) < NEW, "one ends early"
    drafters: list[Drafter] = [trees(texts), chain(texts)]
    if temperature:
        drafters = drafters[:1]
    for drafter in drafters:
        assert decode(hybrid_target(kind), drafter, PROMPTS, NEW, sampling, eos=(end,)) == expected


@families
def test_prompts_across_chunk_borders(kind: str) -> None:
    """Chunks of 5 positions, which batches of prompts share; the states in between are taken up."""
    texts = texts_of(hybrid_target(kind))
    engine = Engine(hybrid_target(kind), trees(texts), prefill_chunk=5)
    assert collect(engine.run(PROMPTS, SamplingParams(), StopParams(NEW)), len(PROMPTS)) == new_of(texts)


@families
def test_a_text_is_continued_and_edited(kind: str) -> None:
    """A continued text is taken up after its last step; an edited one at the last border of blocks that was kept."""
    target, prompt = hybrid_target(kind), some_text(101, 7)
    drafter = trees([])
    first = decode(target, drafter, [prompt], 8)[0]
    assert first == vanilla(hybrid_target(kind), [prompt], 8)[0]
    border = 96 // BLOCK * BLOCK
    for text, recalled in (
        ([*prompt, *first, 5, 6, 7], border if kind in INCONSISTENT else None),
        ([*prompt[:99], 5, 6], border),
        ([*prompt[:90], 5, 6], 0),
    ):
        stats = Stats()
        assert decode(target, drafter, [text], 8, stats=stats) == vanilla(hybrid_target(kind), [text], 8)
        if recalled is None:  # all but the last step
            assert len(prompt) <= stats.recalled_tokens < len(prompt) + len(first)
        else:
            assert stats.recalled_tokens == recalled


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST[:2] else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_preempted_requests_say_what_they_say_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six requests in a pool for three: some are preempted in the middle of their texts and computed again."""
    prompts, sampling = [some_text(20, seed) for seed in range(6)], SamplingParams(temperature=1.0, seed=3)
    expected = [vanilla(hybrid_target(kind), [prompt], 30, sampling)[0] for prompt in prompts]
    texts = [prompt + new for prompt, new in zip(prompts, expected, strict=True)]
    target = hybrid_target(kind)
    target.use_pool(200)
    engine, said = Engine(target, trees(texts)), list[int]()
    admission = engine.scheduler._admission
    preempt = admission.preempt

    def preempting(request: Request) -> None:
        said.append(len(request.new_tokens))
        preempt(request)

    monkeypatch.setattr(admission, "preempt", preempting)
    assert collect(engine.run(prompts, sampling, StopParams(30)), len(prompts)) == expected
    assert any(said), "one was in the middle of its text"


class Recorder:
    """Chooses greedily, and keeps the logits."""

    stateless = False

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        self.logits.append(logits.clone())
        return int(logits.argmax())


def heard(target: Target, prompt: list[int], new: int, chunk: int = 512) -> tuple[list[int], Tensor]:
    """New tokens and the logits (tokens, vocab) of each."""
    engine, recorder = Engine(target, VanillaDrafter(), prefill_chunk=chunk), Recorder()
    request = engine.submit(prompt, SamplingParams(), StopParams(new), chooser=recorder)
    return [token for emission in engine.read(request) for token in emission.tokens], torch.stack(recorder.logits)


inconsistent = pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in INCONSISTENT]
)


@inconsistent
def test_no_token_of_a_prompt_is_computed_as_if_decoded(kind: str) -> None:
    """Wherever chunks end, where a prefix is taken up, and after a preemption: several tokens of a prompt at once."""
    for length, chunk in ((17, 16), (17, 1), (18, 1), (33, 32), (2, 1)):
        for seed in range(3):
            prompt = some_text(length, seed)
            alone = heard(hybrid_target(kind), prompt, 2)
            torch.testing.assert_close(heard(hybrid_target(kind), prompt, 2, chunk), alone, rtol=0, atol=2e-5)
    target, prompt = hybrid_target(kind), some_text(65, 3)
    heard(target, some_text(65, 3)[:64] + some_text(36, 5), 1, chunk=32)  # leaves states after 32 and 64 tokens
    torch.testing.assert_close(heard(target, prompt, 2), heard(hybrid_target(kind), prompt, 2), rtol=0, atol=2e-5)


@inconsistent
def test_prompts_reuse_nothing_that_was_decoded(kind: str) -> None:
    """A prompt that repeats an answer leaves states, which must not meet keys and values from when it was decoded."""
    for seed in range(3):
        target, prompt = hybrid_target(kind), some_text(17, seed)
        repeated = [*prompt, *heard(target, prompt, 70)[0][:60]]
        for text in (repeated, [*repeated, 5], [*repeated, *some_text(20, seed)]):
            said = heard(target, text, 4, chunk=16)
            torch.testing.assert_close(said, heard(hybrid_target(kind), text, 4), rtol=0, atol=2e-5)


@inconsistent
def test_a_preempted_answer_takes_up_no_prompt(kind: str) -> None:
    """Another prompt that repeats the answer so far is computed before the preempted request goes on."""
    for seed in range(3):
        prompt = some_text(17, seed)
        expected = heard(hybrid_target(kind), prompt, 60)
        target = hybrid_target(kind)
        engine, recorder = Engine(target, VanillaDrafter(), prefill_chunk=16), Recorder()
        request = engine.submit(prompt, SamplingParams(), StopParams(60), chooser=recorder)
        while len(request.new_tokens) < 55:
            engine.scheduler.step()
        engine.scheduler._admission.preempt(request)
        engine.scheduler._admission.waiting.clear()
        heard(target, [*request.tokens, 5], 1, chunk=16)
        engine.scheduler._admission.waiting.append(request)
        said = [token for emission in engine.read(request) for token in emission.tokens]
        torch.testing.assert_close((said, torch.stack(recorder.logits)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_shorter_than_a_draft(kind: str) -> None:
    model = fresh_hybrid(kind, sliding_window=3)
    text = [*PROMPTS[1], *stock_text(model, PROMPTS[1], NEW)]
    for drafter in (OracleChain([text], 8, lambda row, position: True, VOCAB), trees([text], rate=0.8)):
        stats = Stats()
        assert decode(Target(model), drafter, [PROMPTS[1]], NEW, stats=stats)[0] == text[-NEW:]
        assert stats.tau > 3 or drafter.name == "random"


@fast
def test_a_head_drafts_and_is_reused(kind: str) -> None:
    target = hybrid_target(kind)
    drafter = EagleDrafter(target, random_head(target), DraftShape(nodes=6))
    prompt = some_text(101, 7)
    said = decode(target, drafter, [prompt], 8)[0]
    more, stats = [*prompt, *said, 5, 6], Stats()
    assert said == vanilla(hybrid_target(kind), [prompt], 8)[0]
    assert decode(target, drafter, [more], 8, stats=stats) == vanilla(hybrid_target(kind), [more], 8)
    assert stats.recalled_tokens >= 96


# ------------------------------------------------------------------ controls


@fast
def test_a_wrong_state_is_heard(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the state before the last accepted node is committed instead of the one after it."""
    texts = texts_of(hybrid_target(kind))
    state = recurrent.Run.state

    def before(self: recurrent.Run, row: int, node: int, length: int) -> recurrent.TextState:
        return state(self, row, max(node - 1, 0) if (row, node - 1) in self._plan.where else node, length)

    monkeypatch.setattr(recurrent.Run, "state", before)
    wrong = [decode(hybrid_target(kind), chain(texts), [text[:-NEW]], NEW)[0] for text in texts]
    assert wrong != new_of(texts)


@fast
def test_a_parents_state_is_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the nodes of a depth start from the state of that depth's first parent, whoever theirs is."""
    texts = texts_of(hybrid_target(kind))
    before = recurrent.Run._before

    def first(self: recurrent.Run, span: recurrent._Span, number: int) -> Any:
        return {name: state[:1].expand_as(state) for name, state in before(self, span, number).items()}

    monkeypatch.setattr(recurrent.Run, "_before", first)
    assert decode(hybrid_target(kind), trees(texts, rate=0.8), PROMPTS, NEW) != new_of(texts)


def test_a_state_of_another_length_is_refused() -> None:
    cache = hybrid_target(FAST[0]).new_cache()
    cache.bind(cache.sequences, [3])
    with pytest.raises(RuntimeError, match="recurrent state of a text of 3 tokens"):
        hybrid_target(FAST[0]).forward(DraftTree.chain(torch.tensor([[1]])), cache)
    cache = hybrid_target(FAST[0]).new_cache()
    with pytest.raises(RuntimeError, match="needs a forward"):
        cache.advance([1])


# ------------------------------------------------------------------ wrong input


def test_caches_from_outside_and_no_cache_are_refused() -> None:
    model, ids = tiny_hybrid(FAST[0]), torch.tensor([PROMPTS[0]])
    output = model(ids, use_cache=True)
    assert not output.past_key_values.is_croppable
    for wrong in ({"past_key_values": output.past_key_values}, {"use_cache": False}):
        with pytest.raises(UnsupportedArgumentError, match="|".join(wrong)):
            model.generate(ids, max_new_tokens=3, custom_generate=haast.Decoder(drafter="suffix"), **wrong)


def test_a_state_of_another_dtype_is_refused() -> None:
    target = hybrid_target(FAST[0])
    cache = target.new_cache()
    tree = DraftTree.chain(torch.tensor([[1, 2, 3]]))
    target.forward(tree, cache, last_only=True)
    cache.advance([3])
    state = cache.sequences[0].state
    assert isinstance(state, recurrent.TextState)
    halved = [{name: each.half() for name, each in states.items()} for states in state.states]
    cache.sequences[0].state = recurrent.TextState(3, tuple(halved))
    with pytest.raises(UnsupportedModelError, match=r"state of .* in torch.float16, and has one of .*torch.float"):
        target.forward(tree, cache)


def test_what_recurrent_layers_do_not_allow() -> None:
    target = hybrid_target(FAST[0])
    with pytest.raises(HeadMismatchError, match="has recurrent layers"):
        SmallModelDrafter(target, target)
    with pytest.raises(ValueError, match="can't be compiled"):
        target.use_compiled_layers()


# ------------------------------------------------------------------ memory


def test_snapshots_stay_within_their_limit() -> None:
    target = hybrid_target(FAST[0])
    target.use_pool(1024)
    snapshots, layout = target.pool.snapshots, target.probed.layout
    assert snapshots is not None and layout is not None
    each = layout.nbytes
    assert snapshots.limit == max(1024 * target.kv_bytes_per_token // 4, 4 * each)
    engine = Engine(target, VanillaDrafter(), prefill_chunk=2 * BLOCK)
    for seed in range(16):
        engine.complete([some_text(100, seed)], SamplingParams(), StopParams(2))
        assert len(snapshots) * each == snapshots.nbytes <= snapshots.limit
    assert snapshots.nbytes > snapshots.limit - each
    target.pool.clear()
    assert not len(snapshots) and not snapshots.nbytes


def test_nothing_stays_on_the_model() -> None:
    model = fresh_hybrid(FAST[0])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    target = Target(model)
    vanilla(target, PROMPTS, 2)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
