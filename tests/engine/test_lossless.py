"""The promise: whatever is drafted, the text is vanilla's. fp64, tiny random models."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from fakes import (
    VOCAB,
    FakeDrafter,
    Node,
    RandomTrees,
    always,
    chi_square_p,
    collect,
    decode,
    full_texts,
    never,
    random_head,
    sometimes,
    tiny_llama,
    tiny_target,
    vanilla,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from haast.core import RowVerdict, SamplingParams, StopParams, TokenChooser, Verdict
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine import step
from haast.engine.engine import Engine
from haast.engine.verify import Failures, verify
from haast.sampling import Sampler, keyed_uniform
from haast.stats import Stats
from haast.target.target import Target
from haast.tree import DraftTree

NEW = 16

Prompts = list[list[int]]
shapes = st.builds(
    DraftShape,
    kind=st.sampled_from(["dynamic", "static", "chain"]),
    depth=st.integers(1, 5),
    top_k=st.integers(1, 8),
    width=st.integers(1, 8),
    nodes=st.integers(2, 40),
)
batches = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=3)
draft_vocabs = st.sampled_from([None, tuple(range(0, VOCAB, 2)), tuple(range(5, VOCAB))])


@cache
def target() -> Target:
    return tiny_target()


@cache
def small_context() -> Target:
    return tiny_target(context=24)


def fake_drafters(texts: Sequence[Sequence[int]], seed: int) -> list[Drafter]:
    return [
        never(texts),
        always(texts),
        always(texts, depth=1),
        sometimes(texts, depth=4, seed=seed),
        RandomTrees(9, seed, texts, rate=0.7),
        RandomTrees(17, seed, texts, rate=0.8, dead=0.2),
        RandomTrees(17, seed, texts, rate=0.8, probes=0.3),
        RandomTrees(12, seed, texts, rate=0.6, dead=0.2, probes=0.2),
        RandomTrees(2, seed),
    ]


# ------------------------------------------------------------------ greedy


@settings(max_examples=30)
@given(shape=shapes, prompts=batches, vocab=draft_vocabs, seed=st.integers(0, 3))
def test_greedy_eagle_says_what_vanilla_says(
    shape: DraftShape, prompts: Prompts, vocab: tuple[int, ...] | None, seed: int
) -> None:
    drafter = EagleDrafter(target(), random_head(target(), vocab, seed), shape)
    assert decode(target(), drafter, prompts, NEW) == vanilla(target(), prompts, NEW)


@settings(max_examples=12)
@given(prompts=batches, seed=st.integers(0, 1000))
def test_greedy_fakes_say_what_vanilla_says(prompts: Prompts, seed: int) -> None:
    texts = full_texts(target(), prompts, NEW)
    expected = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    for drafter in fake_drafters(texts, seed):
        assert decode(target(), drafter, prompts, NEW) == expected


@settings(max_examples=12)
@given(prompts=batches, shape=shapes)
def test_a_row_does_not_depend_on_its_batch(prompts: Prompts, shape: DraftShape) -> None:
    drafter = EagleDrafter(target(), random_head(target()), shape)
    alone = [decode(target(), drafter, [prompt], NEW)[0] for prompt in prompts]
    assert decode(target(), drafter, prompts, NEW) == alone
    assert vanilla(target(), prompts, NEW) == alone


@settings(max_examples=6)
@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
def test_vanilla_says_what_stock_generate_says(prompt: list[int]) -> None:
    assert vanilla(target(), [prompt], NEW)[0] == stock_generate(prompt)


def test_the_texts_wander_and_drafts_are_accepted() -> None:
    # Guards the tests above: with constant text or nothing accepted they would show little.
    prompts = [[1, 2, 3], [7], [9, 9, 4, 1]]
    assert all(len(set(text)) >= 5 for text in vanilla(target(), prompts, 32))
    shape, stats = DraftShape("dynamic", depth=3, top_k=8, width=8, nodes=40), Stats()
    decode(target(), EagleDrafter(target(), random_head(target()), shape), prompts, 32, stats=stats)
    assert 1.1 < stats.tau < 3.9
    assert len(stats.accepted_by_depth) >= 2 and stats.accepted_by_depth[1] > 0


def stock_generate(prompt: list[int]) -> list[int]:
    model: Any = tiny_llama()
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    new: list[int] = output[0, len(prompt) :].tolist()
    return new


# ------------------------------------------------------------------ sampled, same seed


def history_processor(history: Tensor, scores: Tensor) -> Tensor:
    """Stateless: bans one token and lifts another, by what was said before."""
    scores = scores.clone()
    scores[:, int(history.sum()) % scores.shape[-1]] = -torch.inf
    scores[:, (3 * int(history[0, -1]) + history.shape[1]) % scores.shape[-1]] += 3.0
    return scores


class CountingProcessor:
    """Stateful: what it does depends on how often it was called, and it checks that histories only ever grow by one."""

    def __init__(self) -> None:
        self.calls = 0
        self.before: list[int] = []

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        now = history[0].tolist()
        assert not self.before or now[:-1] == self.before, "called with a history out of order"
        self.before = now
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % scores.shape[-1]] += 4.0
        return scores


sampled = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, VOCAB + 5]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 2**63 - 1),
    processors=st.sampled_from([(), (history_processor,)]),
)


@settings(max_examples=40)
@given(shape=shapes, prompts=batches, params=sampled, vocab=draft_vocabs)
def test_the_same_seed_gives_vanillas_text(
    shape: DraftShape, prompts: Prompts, params: SamplingParams, vocab: tuple[int, ...] | None
) -> None:
    drafter = EagleDrafter(target(), random_head(target(), vocab), shape)
    assert decode(target(), drafter, prompts, NEW, params) == vanilla(target(), prompts, NEW, params)


@settings(max_examples=12)
@given(prompts=batches, params=sampled, seed=st.integers(0, 1000))
def test_the_same_seed_gives_vanillas_text_with_fakes(prompts: Prompts, params: SamplingParams, seed: int) -> None:
    new = vanilla(target(), prompts, NEW, params)
    texts = [[*prompt, *row] for prompt, row in zip(prompts, new, strict=True)]
    for drafter in fake_drafters(texts, seed):
        assert decode(target(), drafter, prompts, NEW, params) == new


@settings(max_examples=15)
@given(shape=shapes, prompts=batches, temperature=st.sampled_from([0.0, 1.0]))
def test_a_stateful_processor_is_called_once_per_token_in_order(
    shape: DraftShape, prompts: Prompts, temperature: float
) -> None:
    mine, theirs = CountingProcessor(), CountingProcessor()
    eagle = EagleDrafter(target(), random_head(target()), shape)
    one = prompts[:1]
    ours = decode(target(), eagle, one, NEW, SamplingParams(temperature, seed=5, processors=(mine,)))
    assert ours == vanilla(target(), one, NEW, SamplingParams(temperature, seed=5, processors=(theirs,)))


# ------------------------------------------------------------------ draws belong to requests


def test_requests_of_one_seed_say_the_same_and_other_seeds_and_choices_differ() -> None:
    prompts = [[3, 1, 4]] * 3
    one = vanilla(target(), prompts, 24, SamplingParams(1.0, seed=1))
    assert one[0] == one[1] == one[2]
    assert one == vanilla(target(), prompts, 24, SamplingParams(1.0, seed=1))
    seeds = vanilla(target(), prompts, 24, [SamplingParams(1.0, seed=seed) for seed in (1, 2, 3)])
    choices = chosen([Sampler(SamplingParams(1.0, seed=1), choice) for choice in range(3)], prompts)
    for texts in (seeds, choices):
        assert texts[0] == one[0] and len(set(map(tuple, texts))) == 3


def chosen(choosers: Sequence[TokenChooser], prompts: Prompts, drafter: Drafter | None = None) -> list[list[int]]:
    """What requests say whose tokens are chosen so."""
    engine = Engine(target(), drafter or VanillaDrafter())
    return collect(engine.run(prompts, SamplingParams(), StopParams(24), choosers=choosers), len(prompts))


A, B = [4, 8, 15, 16, 23], [7, 7, 1]


def test_what_a_request_says_depends_on_nothing_but_itself() -> None:
    params = SamplingParams(0.8, seed=7)
    engine = Engine(target(), EagleDrafter(target(), random_head(target()), DraftShape("dynamic", 4, 6, 4, 20)))
    alone = engine.complete([B], params, StopParams(24))[0]
    assert engine.complete([A, B], params, StopParams(24))[1] == alone
    assert engine.complete([B, A, A, B], params, StopParams(24))[::3] == [alone] * 2
    assert engine.complete([A, B], [SamplingParams(2.0, seed=1), params], StopParams(24))[1] == alone
    assert vanilla(target(), [A, B], 24, params)[1] == alone


class SharedDraws(Sampler):
    """Takes the next draw of one stream that all requests share, as torch's global generator is."""

    def __init__(self, params: SamplingParams, taken: list[int]) -> None:
        super().__init__(params)
        self._taken = taken

    def draw(self, position: int) -> float:
        self._taken[0] += 1
        return keyed_uniform(self.params.seed, 0, self._taken[0])


def test_draws_that_rows_share_or_that_are_keyed_by_rows_are_seen() -> None:
    """Controls of the test above: it is by keying draws by the request that both texts of B are one."""
    params = SamplingParams(0.8, seed=7)
    for drafter in (VanillaDrafter(), RandomTrees(9, 0)):
        taken = [0]
        together = chosen([SharedDraws(params, taken), SharedDraws(params, taken)], [A, B], drafter)
        assert together[1] != chosen([SharedDraws(params, [0])], [B], drafter)[0]
        by_row = chosen([Sampler(params, row) for row in range(2)], [A, B], drafter)
        assert by_row[1] != chosen([Sampler(params, 0)], [B], drafter)[0]


@settings(max_examples=15)
@given(
    prompts=batches,
    params=st.lists(sampled, min_size=3, max_size=3),
    choices=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    shape=shapes,
)
def test_requests_of_different_kinds_say_together_what_each_says_alone(
    prompts: Prompts, params: list[SamplingParams], choices: list[int], shape: DraftShape
) -> None:
    samplers = [Sampler(each, choice) for each, choice in zip(params, choices, strict=True)][: len(prompts)]
    alone = [chosen([own], [prompt])[0] for own, prompt in zip(samplers, prompts, strict=True)]
    texts = [[*prompt, *said] for prompt, said in zip(prompts, alone, strict=True)]
    eagle = EagleDrafter(target(), random_head(target()), shape)
    for drafter in (VanillaDrafter(), eagle, RandomTrees(9, 1, texts, rate=0.7, dead=0.2, probes=0.1)):
        assert chosen(samplers, prompts, drafter) == alone


# ------------------------------------------------------------------ the sampled distribution

SMALL, ROWS, RUNS = 5, 250, 16
PARAMS = SamplingParams(temperature=0.9, top_p=0.97, repetition_penalty=1.1)
PROMPT = [1, 3]


@cache
def small_target() -> Target:
    return tiny_target(vocab=SMALL, layers=1, std=0.12, seed=3)


def exact_chances() -> dict[tuple[int, ...], float]:
    """P(string) of all strings of length 3, from the stock model's logits over every prefix."""
    model = tiny_llama(vocab=SMALL, layers=1, std=0.12, seed=3)
    sampler, chances = Sampler(PARAMS), {}

    @cache
    def probs(history: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([history])).logits[0, -1]
        return sampler.probs(history, logits)

    for string in product(range(SMALL), repeat=3):
        chance = 1.0
        for i, token in enumerate(string):
            chance *= float(probs((*PROMPT, *string[:i]))[token])
        chances[string] = chance
    return chances


def p_value(drafter: Drafter) -> float:
    """How well requests of as many seeds follow the exact distribution."""
    exact, seen = exact_chances(), Counter[tuple[int, ...]]()
    assert abs(sum(exact.values()) - 1) < 1e-9
    for run in range(RUNS):
        every = [replace(PARAMS, seed=run * ROWS + row) for row in range(ROWS)]
        texts = decode(small_target(), drafter, [PROMPT] * ROWS, 3, every)
        seen.update(tuple(text) for text in texts)
    strings = sorted(exact)
    return chi_square_p([seen[s] for s in strings], [exact[s] * ROWS * RUNS for s in strings])


def small_eagle() -> EagleDrafter:
    shape = DraftShape("dynamic", depth=2, top_k=2, width=2, nodes=5)
    return EagleDrafter(small_target(), random_head(small_target()), shape)


def biased(
    tree: DraftTree,
    logits: Tensor,
    choosers: Sequence[Sampler],
    histories: Sequence[Sequence[int]],
    failures: Failures | None = None,
) -> Verdict:
    """Accepts the root's preferred child with chance 0.3 more than is right; else it is the true rule."""
    honest = verify(tree, logits, choosers, histories, failures).rows
    rows: list[RowVerdict | None] = []
    for row, (verdict, sampler, history) in enumerate(zip(honest, choosers, histories, strict=True)):
        children = tree.children(row)[0]
        honestly = keyed_uniform(sampler.params.seed + 10**6, sampler.choice, len(history)) >= 0.3
        if not children or honestly:
            rows.append(verdict)
        else:
            child = children[0]
            token = int(tree.tokens[row, child])
            bonus = sampler.choose([*history, token], logits[row, child])
            rows.append(RowVerdict((0, child), (token, bonus), (True,)))
    return Verdict.of_rows(rows, logits.device)


def test_the_sampled_distribution_is_exact_over_all_strings_of_length_3() -> None:
    assert p_value(small_eagle()) > 1e-3


def test_a_biased_rule_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "verify", biased)
    assert p_value(small_eagle()) < 1e-9


# ------------------------------------------------------------------ stop rules


def drafters_for(prompt: list[int], at: Target) -> list[Drafter]:
    texts = [[*prompt, *vanilla(at, [prompt], 40)[0]]]
    shape = DraftShape("dynamic", depth=4, top_k=6, width=4, nodes=20)
    eagle = EagleDrafter(at, random_head(at), shape)
    return [VanillaDrafter(), eagle, never(texts), always(texts, 5), sometimes(texts), RandomTrees(9, 0, texts)]


@pytest.mark.parametrize("limit", range(1, 14))
def test_max_new_tokens_is_exact(limit: int) -> None:
    prompt = [4, 8, 15]
    whole = vanilla(target(), [prompt], 40)[0]
    for drafter in drafters_for(prompt, target()):
        assert decode(target(), drafter, [prompt], limit) == [whole[:limit]]


def test_every_end_token_in_the_middle_of_an_accepted_path_ends_the_text() -> None:
    prompt = [4, 8, 15]
    whole = vanilla(target(), [prompt], 40)[0]
    for end in sorted(set(whole))[::3]:
        cut = whole[: whole.index(end) + 1]
        for drafter in drafters_for(prompt, target()):
            stats = Stats()
            assert decode(target(), drafter, [prompt], 40, eos=(end, VOCAB + 7), stats=stats) == [cut]
            assert stats.tokens == len(cut) and stats.decoded_tokens == len(cut) - 1


def test_one_row_ends_while_others_go_on() -> None:
    prompts = [[4, 8, 15], [16, 23], [1]]
    texts = full_texts(target(), prompts, 20)
    whole = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    end = whole[1][6]
    cut = [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert len({len(row) for row in cut}) > 1, "the rows must end at different places"
    for drafter in [VanillaDrafter(), *fake_drafters(texts, 1)]:
        assert decode(target(), drafter, prompts, 20, eos=(end,)) == cut


def test_the_stop_callback_sees_every_token_once_and_ends_the_text() -> None:
    prompt = [4, 8, 15]
    whole = vanilla(target(), [prompt], 40)[0]
    for drafter in drafters_for(prompt, target()):
        seen: list[list[int]] = []

        def stop(new: Sequence[int], seen: list[list[int]] = seen) -> bool:
            seen.append(list(new))
            return len(new) == 7

        assert decode(target(), drafter, [prompt], 40, stop=stop) == [whole[:7]]
        assert seen == [whole[:n] for n in range(1, 8)]


@pytest.mark.parametrize("length", [1, 18, 22, 23])
def test_the_text_ends_where_the_context_ends(length: int) -> None:
    prompt = random.Random(length).choices(range(VOCAB), k=length)
    whole = vanilla(small_context(), [prompt], 100)[0]
    assert len(prompt) + len(whole) == 24
    for drafter in drafters_for(prompt, small_context()):
        assert decode(small_context(), drafter, [prompt], 100) == [whole]


def test_drafts_beyond_learned_positions_are_harmless() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=20, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    gpt2 = Target(GPT2LMHeadModel(config).double())
    prompt = list(range(13))
    whole = vanilla(gpt2, [prompt], 100)[0]
    assert len(whole) == 7
    for drafter in drafters_for(prompt, gpt2):
        assert decode(gpt2, drafter, [prompt], 100) == [whole]


# ------------------------------------------------------------------ abandoning


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_engine_can_be_used_again_after_abandoning_a_run(steps: int) -> None:
    prompts, others = [[4, 8, 15], [16, 23]], [[7, 7, 7, 1, 2]]
    texts = full_texts(target(), others, 12)
    expected = [text[len(prompt) :] for text, prompt in zip(texts, others, strict=True)]
    shape = DraftShape("static", depth=3, top_k=4, nodes=12)
    for drafter in (EagleDrafter(target(), random_head(target()), shape), RandomTrees(8, 0), VanillaDrafter()):
        engine = Engine(target(), drafter)
        run = engine.run(prompts, SamplingParams(), StopParams(20))
        kept = [next(run) for _ in range(steps)]
        del run
        assert kept[0].tokens
        again = collect(engine.run(others, SamplingParams(), StopParams(12)), 1)
        assert again == expected


def test_a_closed_run_yields_no_more() -> None:
    run = Engine(target(), RandomTrees(8, 0)).run([[1, 2]], SamplingParams(), StopParams(9))
    next(run)
    run.close()
    assert list(run) == []


def test_what_was_yielded_before_an_interrupt_is_vanillas_prefix() -> None:
    prompt = [4, 8, 15]
    whole = vanilla(target(), [prompt], 40)[0]

    class Interrupted(FakeDrafter):
        name = "interrupted"
        steps = 0

        def draft(self, row: int, history: list[int]) -> list[Node]:
            self.steps += 1
            if self.steps == 4:
                raise KeyboardInterrupt
            return []

    said: list[int] = []
    engine = Engine(target(), Interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        for emission in engine.run([prompt], SamplingParams(), StopParams(40)):
            said.extend(emission.tokens)
    assert said == whole[:4]
    assert engine.complete([prompt], SamplingParams(), StopParams(40)) == [whole], "the engine can be used again"
    assert target().pool.free_blocks + target().pool.cached_blocks == target().pool.blocks, "and no block is lost"
