"""Under load nothing is drafted, and a head need not follow the texts: what it does when it drafts again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from fakes import collect, random_head, states_of, tiny_target
from test_stack import KINDS, made

from haast import native
from haast.core import Accepted, Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.pending_features import EagleState
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.engine.step import Step
from haast.sampling import Sampler
from haast.stats import Stats
from haast.target.kv_pool import BLOCK, KVPool
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.latency import Latency
from haast.tuning.online import DraftSize, OnlinePolicy

LAWS = [SamplingParams(), SamplingParams(1.1, top_p=0.9, seed=3)]


class Crowded:
    """Drafts for at most so many rows."""

    def __init__(self, most: int) -> None:
        self.most = most

    def budget(self, requests: Sequence[object]) -> int | None:
        return 1 if self.drafting_off(len(requests)) else None

    def drafting_off(self, rows: int) -> bool:
        return rows > self.most

    def observed(self, *told: object) -> None:
        """It goes by the rows alone."""


@cache
def target() -> Target:
    return tiny_target()


def drafter_of(
    at: Target, make: Callable[[EagleDrafter], Drafter] = lambda eagle: eagle, most: int = 1, window: int | None = None
) -> Drafter:
    drafter = make(EagleDrafter(at, random_head(at), shape_for(8), window))
    drafter.policy = Crowded(most)
    return drafter


def texts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(32) for _ in range(length + draw.randrange(40))] for _ in range(count)]


def say(
    at: Target, drafter: Drafter, prompts: list[list[int]], ends: Sequence[int], law: SamplingParams, **settings: object
) -> list[list[int]]:
    stops = [StopParams(end) for end in ends]
    return collect(Engine(at, drafter, prefill_chunk=48).run(prompts, law, stops, **settings), len(prompts))  # type: ignore[arg-type]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [lambda eagle: eagle, HybridDrafter])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.one_of_each
def test_a_head_that_goes_on_in_the_middle_changes_no_text(
    make: Callable[[EagleDrafter], Drafter], law: SamplingParams, window: int | None
) -> None:
    """Prompts and answers longer than what waits for a head, computed in chunks; the last of three rows drafts."""
    drafter = drafter_of(target(), make, window=window)
    states = states_of(drafter.eagle if isinstance(drafter, HybridDrafter) else drafter)
    seen, prompts, ends = list[Step](), texts(3, 70), (30, 230, 150)
    target().pool.clear()
    expected = say(target(), VanillaDrafter(), prompts, ends, law)
    assert say(target(), drafter, prompts, ends, law, watch=seen.append) == expected
    assert {len(step.rows) for step in seen} == {1, 2, 3}
    if make is not HybridDrafter:
        assert all((step.tree.nodes > 1) == (len(step.rows) == 1) for step in seen)
    assert sum(state.begin > 0 for state in states) >= 2, "no head began in the middle of a text"
    assert states[1].observed > 200 and states[1].past < 200


def test_what_waits_for_a_head_is_bounded() -> None:
    drafter, most = drafter_of(target(), most=0), [0]
    states = states_of(drafter)

    def watch(step: Step) -> None:
        most.append(max(state.pending_count for state in states))

    say(target(), drafter, texts(2, 200), (300, 200), SamplingParams(), watch=watch)
    assert 64 <= max(most) <= 128 + 48, "a chunk of a prompt, and 128 positions"
    assert drafter.caches and all(state.extrapolated is None for state in states), "the head ran for nobody"


def observed(eagle: EagleDrafter, tokens: list[int], begin: int) -> EagleState:
    """A head that has seen the text from slot `begin` on, told all of it."""
    at = eagle._target
    kv = at.pool.sequence()
    kv.reserve(len(tokens) + 64)
    text = torch.tensor([tokens])
    output = at.forward(DraftTree.chain(text), at.cache.bind([kv]))
    at.cache.advance([len(tokens)])
    state, said = eagle.begin(tokens, kv, 0), [*tokens[1:], 7]
    if begin:
        state.begin_after(begin)
    following = torch.tensor([said])
    eagle.observe([state], Accepted(following, output.features, torch.tensor([len(said)]), tokens_on_host=[said]))
    return state


def kinds() -> dict[str, Target]:
    return {"fp64": target(), **({"packed": made(KINDS["llama"])} if native.available() else {})}


@pytest.mark.parametrize("kind", kinds())
def test_a_head_drafts_as_if_its_text_began_where_it_begins(kind: str) -> None:
    """Control: with one block more or less to look at, it drafts something else."""
    at = kinds()[kind]
    if kind == "packed":
        assert at.use_one_call()
    eagle = EagleDrafter(at, random_head(at), shape_for(12))
    tokens = texts(1, 90)[0]
    with torch.inference_mode():
        states = [observed(eagle, tokens, begin) for begin in (2 * BLOCK - 5, 2 * BLOCK, BLOCK, 3 * BLOCK)]
        trees = [eagle.propose([state]) for state in states]
        assert states[0].past == states[1].past == len(tokens) - 2 * BLOCK
        # The same, laid at the beginning of a text: the features of the whole text, without its first two blocks.
        kv = at.pool.sequence()
        kv.reserve(len(tokens) + 64)
        output = at.forward(DraftTree.chain(torch.tensor([tokens])), at.cache.bind([kv]))
        short, said = at.pool.sequence(), [*tokens[2 * BLOCK + 1 :], 7]
        short.reserve(len(tokens) + 64)
        state = eagle.begin(tokens[2 * BLOCK :], short, 0)
        features = output.features[:, 2 * BLOCK :]
        eagle.observe(
            [state], Accepted(torch.tensor([said]), features, torch.tensor([len(said)]), tokens_on_host=[said])
        )
        expected = eagle.propose([state])
        both = eagle.propose([states[1], states[2]])
    for tree in trees[:2]:
        assert torch.equal(tree.tokens, expected.tokens) and torch.equal(tree.parents, expected.parents)
    assert not all(torch.equal(tree.tokens, expected.tokens) for tree in trees[2:])
    assert both.tokens[0, : trees[1].nodes].tolist() == trees[1].tokens[0].tolist()
    assert both.tokens[1, : trees[2].nodes].tolist() == trees[2].tokens[0].tolist()


@pytest.mark.parametrize("law", LAWS)
def test_prefixes_of_a_crowd_are_shared_and_made_whole_again(law: SamplingParams) -> None:
    """What a crowd has computed serves a crowd; who drafts computes it anew, with the head, for all that draft."""
    at, prompt = tiny_target(), texts(1, 100)[0]
    drafter = drafter_of(at)

    def told(crowd: bool) -> int:
        drafter.policy = Crowded(0 if crowd else 1)
        stats = Stats()
        said = Engine(at, drafter).complete([prompt], law, StopParams(9), stats)
        assert said == expected
        return stats.recalled_tokens

    expected = Engine(at, VanillaDrafter()).complete([prompt], law, StopParams(9), Stats())
    at.pool.clear()
    assert [told(crowd=True) for _ in range(3)] == [0, len(prompt) - 1, len(prompt) - 1]
    assert told(crowd=False) == 0, "the head has not seen it"
    assert told(crowd=False) == len(prompt) - 1
    assert told(crowd=True) == len(prompt) - 1
    assert at.pool.available == at.pool.blocks


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("length", range(2 * BLOCK - 1, 3 * BLOCK, 3))
@pytest.mark.one_of_each
def test_a_text_taken_up_within_a_block_drafts_from_the_next_one_on(length: int, law: SamplingParams) -> None:
    """Where a crowd has computed a prompt, two rows go on from its last token; the one that is left then drafts."""
    at, (other, prompt) = tiny_target(), texts(2, 60)
    drafter, seen, prompt = drafter_of(at), list[Step](), prompt[:length]
    expected = say(at, VanillaDrafter(), [other, prompt], (3, 40), law)
    at.pool.clear()
    for _ in range(2):
        seen.clear()
        assert say(at, drafter, [other, prompt], (3, 40), law, watch=seen.append) == expected
    alone = [step.tree.nodes > 1 for step in seen if len(step.rows) == 1]
    known = length + 2  # the text without its last token, when it is left alone
    missing = max(0, -(-(length - 1) // BLOCK) * BLOCK + 1 - known)
    assert alone[: missing + 2] == [False] * missing + [True] * 2, "drafts begin with the block after the reused text"


@pytest.mark.parametrize("law", LAWS)
def test_texts_taken_up_at_different_places_of_a_block_draft_together(law: SamplingParams) -> None:
    """One row's head can begin at once, the other's block is still to come: both wait for it, and say what they say."""
    at, (other, long) = tiny_target(), texts(2, 60)
    drafter, seen = drafter_of(at, most=2), list[Step]()
    prompts, ends = [other, long[: 2 * BLOCK - 1], long[: 2 * BLOCK + 2]], (3, 40, 40)
    expected = say(at, VanillaDrafter(), prompts, ends, law)
    at.pool.clear()
    for _ in range(2):
        seen.clear()
        assert say(at, drafter, prompts, ends, law, watch=seen.append) == expected
    drafted = [step.tree.nodes > 1 for step in seen if len(step.rows) == 2]
    assert True in drafted and False in drafted and drafted == sorted(drafted)


def test_a_sequence_says_whether_its_prefix_lacks_the_head() -> None:
    pool, text = KVPool(40 * BLOCK), list(range(100))
    kv = pool.sequence()
    kv.reserve(100)
    kv.length = 100
    kv.publish(text, 48, "head")
    kv.release(text, 100, "head", head_kv_from=100)
    drafting, crowd, near = (pool.sequence() for _ in range(3))
    assert drafting.reuse(text, "head")[0] == 47 and not drafting.headless
    reused, source, copy = crowd.reuse(text, "head", headless=True)
    assert reused == 99 and crowd.headless and source != copy and copy == crowd.table[6]
    assert near.reuse(text[:40], "head", headless=True)[0] == 39 and not near.headless, "the head has seen so much"
    assert pool.usable(text, "head", None, False) == 48 and pool.usable(text, "head", None, True) == 100
    for each in (drafting, crowd, near):
        each.release()
    assert pool.available == pool.blocks


def test_who_would_have_to_catch_up_first_is_tried_later() -> None:
    costs = Latency({1: 10.2, 2: 10.7, 4: 11.9, 8: 16.8, 16: 29.7, 32: 52.0}, 1.24, {1: 0.32, 8: 0.86})
    full = DraftSize(None, 5, 3, 1, 3, 0.1)
    pays = replace(full, gain=2.0)

    def off(rows: int, *sizes: DraftSize) -> bool:
        return OnlinePolicy(costs, lambda rows: sizes).drafting_off(rows)

    assert off(1, full) and not off(1, pays) and off(16, pays) and off(1)

    def first_trial(behind: int) -> int:
        small = DraftSize(2, 2, 1, 1, 1, 0.0)
        policy = OnlinePolicy(costs, lambda rows: (small, full), pending=lambda requests: behind)
        request = Request([1], SamplingParams(), StopParams(4), Sampler(SamplingParams()), None)
        return next(step for step in range(10_000) if policy.budget([request]) != 1)

    trials = [first_trial(behind) for behind in (0, 20, 60)]
    assert trials == sorted(trials) and trials[0] < trials[1] < trials[2] < 2_000
