"""Rows decoded together: each says what it says alone, leaves when it is done, and is drafted for as pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from fakes import collect, commit, random_head, states_of, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import assert_holds
from test_session import DRAFTERS
from test_stack import KINDS, made

from haast import native
from haast.core import Accepted, SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.batch_policy import DraftConfig, DraftConfigs, config_for, default_configs
from haast.drafters.candidates import Candidates
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter, HybridState
from haast.drafters.pending_features import EagleState, join_pending
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape, shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Step, StopParams
from haast.engine.rules import RejectionRule
from haast.target.kv_pool import KVPool
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel

LENGTHS = (3, 1, 9, 4, 6, 2, 12, 5)  # of the prompts
ENDS = (5, 21, 1, 13, 13, 30, 8, 2)  # of the answers: rows leave from the middle, the front and the back, two at once
PACE = CostModel((8.0, 8.5, 9.0, 9.5, 10.0, 10.5), 0.3, 0.2, follow=0.9)


@cache
def target() -> Target:
    return tiny_target()


def prompts(vocab: int = 32) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(vocab) for _ in range(length)] for length in LENGTHS]


def ending(ends: Sequence[int]) -> list[StopParams]:
    return [StopParams(max(ends), stop=lambda new, end=end: len(new) >= end) for end in ends]  # type: ignore[misc]


def together(at: Target, drafter: Drafter, law: SamplingParams, seen: list[Step] | None = None) -> list[list[int]]:
    watch = None if seen is None else seen.append
    vocab = at.vocab_size
    run = Engine(at, drafter).run(prompts(vocab), law, ending(ENDS), watch=watch)
    return collect(run, len(ENDS))


def alone(at: Target, drafter: Drafter) -> list[list[int]]:
    each = zip(prompts(at.vocab_size), ENDS, strict=True)
    return [collect(Engine(at, drafter).run([p], SamplingParams(), ending([end])), 1)[0] for p, end in each]


LAWS = [SamplingParams(), SamplingParams(1.2, top_p=0.95, repetition_penalty=1.2, seed=11)]


@pytest.mark.parametrize("name", DRAFTERS)
def test_eight_ragged_rows_say_what_each_says_alone(name: str) -> None:
    drafter = DRAFTERS[name](target())
    assert together(target(), drafter, LAWS[0]) == alone(target(), drafter)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.one_of_each
def test_every_drafter_says_what_vanilla_says_while_rows_leave(name: str, law: SamplingParams) -> None:
    assert together(target(), DRAFTERS[name](target()), law) == together(target(), VanillaDrafter(), law)


def test_forwards_go_over_the_rows_that_run() -> None:
    seen: list[Step] = []
    texts = together(target(), VanillaDrafter(), SamplingParams(), seen)
    assert [len(text) for text in texts] == list(ENDS)
    for number, step in enumerate(seen, start=2):  # a row's first token comes with its prompt
        assert sorted(step.rows) == [row for row, end in enumerate(ENDS) if end >= number]
        assert step.tree.rows == len(step.logits) == len(step.verdict.rows) == len(step.rows)
        assert [emission.row for emission in step.emissions] == sorted(step.rows)


def test_a_sampled_tree_is_judged_by_its_rows_own_draws() -> None:
    law, small = SamplingParams(0.8, seed=4), tiny_target(layers=1, seed=5)

    def run(rows: Sequence[int]) -> list[list[int]]:
        """The rows that are not asked for end at once, so they leave at the first step."""
        drafter, stop = SmallModelDrafter(target(), small, 3, law), ending([20 if r in rows else 1 for r in range(8)])
        texts = collect(Engine(target(), drafter, RejectionRule()).run(prompts(), law, stop), 8)
        return [texts[row] for row in rows]

    assert run([2]) + run([6, 7]) == run([2, 6, 7])


# ------------------------------------------------------------------ by rows


def alternating(nodes: int = 6, pace: CostModel | None = None) -> DraftConfigs:
    """Drafts and does not, in turn, as rows leave."""
    small = DraftShape("dynamic", depth=2, top_k=3, width=2, nodes=3)
    return {
        2: DraftConfig(None, pace),
        4: DraftConfig(small, pace),
        6: DraftConfig(None, pace),
        7: DraftConfig(shape_for(nodes), pace),
        8: DraftConfig(None),
    }


@pytest.mark.parametrize("pace", [None, PACE])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [lambda eagle: eagle, HybridDrafter])
def test_falling_back_and_resuming_changes_no_text(
    make: Callable[[EagleDrafter], Drafter], law: SamplingParams, pace: CostModel | None
) -> None:
    eagle = EagleDrafter(target(), random_head(target()))
    eagle.reshape(shape_for(8), pace, alternating(pace=pace))
    seen: list[Step] = []
    assert together(target(), make(eagle), law, seen) == together(target(), VanillaDrafter(), law)
    drafted = {len(step.rows): set[bool]() for step in seen}
    for step in seen:
        drafted[len(step.rows)].add(step.tree.nodes > 1)
    if make is not HybridDrafter and pace is None:
        pays = {rows: {rows not in (6, 5, 2)} for rows in range(1, 8)}
        assert {6, 2, 1} < set(drafted)  # it fell back, resumed, fell back and resumed
        assert drafted == {rows: pays[rows] for rows in drafted}


def test_what_is_drafted_after_a_pause_is_what_a_head_without_one_drafts() -> None:
    shape = DraftShape("dynamic", depth=3, top_k=4, width=3, nodes=9)
    seen: list[list[DraftTree]] = []
    for configs in (None, {4: DraftConfig(shape), 8: DraftConfig(None)}):
        eagle, trees = EagleDrafter(target(), random_head(target())), list[Step]()
        eagle.reshape(shape, configs=configs)
        together(target(), eagle, SamplingParams(), trees)
        seen.append([step.tree for step in trees if len(step.rows) == 1])
    last = seen[1]
    assert 0 < len(last) <= len(seen[0])
    # Steps do not fall on the same tokens, so trees are compared by what they draft behind a root at its end.
    assert torch.equal(last[-1].tokens, seen[0][-1].tokens) and torch.equal(last[-1].parents, seen[0][-1].parents)


def test_text_is_searched_only_where_the_head_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, copies = list[int](), HybridDrafter._copies

    def counted(self: HybridDrafter, state: HybridState, most: int) -> Candidates:
        searched.append(most)
        return copies(self, state, most)

    monkeypatch.setattr(HybridDrafter, "_copies", counted)
    eagle = EagleDrafter(target(), random_head(target()))
    eagle.reshape(shape_for(6), configs={2: DraftConfig(None)})
    for prompts, expected in (([[1, 2, 1]], True), ([[1, 2, 1], [3, 4, 3]], False)):
        searched.clear()
        Engine(target(), HybridDrafter(eagle)).complete(prompts, SamplingParams(), StopParams(12))
        assert bool(searched) is expected


def test_a_long_pause_is_observed_in_parts() -> None:
    eagle = EagleDrafter(target(), random_head(target()))
    eagle.reshape(shape_for(6), configs={2: DraftConfig(None)})
    states, most = states_of(eagle), [0]

    def watch(step: Step) -> None:
        most.append(max(state.pending_count for state in states))

    run = Engine(target(), eagle).run([[1, 2], [3]], SamplingParams(), StopParams(150), watch=watch)
    assert collect(run, 2) == collect(
        Engine(target(), VanillaDrafter()).run([[1, 2], [3]], SamplingParams(), StopParams(150)), 2
    )
    assert len(states) == 2 and all(state.pending_count < 128 <= state.observed for state in states)
    assert 64 < max(most) <= 128


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize("law", LAWS)
def test_packed_rows_have_the_bits_of_single_ones(law: SamplingParams) -> None:
    packed = made(KINDS["llama"])
    assert packed.use_one_call()
    eagle = EagleDrafter(packed, random_head(packed))
    eagle.reshape(shape_for(8), PACE, alternating(pace=PACE))
    assert together(packed, eagle, law) == together(packed, VanillaDrafter(), law)
    assert together(packed, eagle, SamplingParams()) == alone(packed, VanillaDrafter())
    assert eagle._shapes and all(each.one_call is not None for each in eagle._shapes.values())


def test_a_config_is_of_the_next_row_count_that_is_known() -> None:
    configs = {1: DraftConfig(shape_for(8)), 2: DraftConfig(shape_for(4)), 8: DraftConfig(None)}
    assert [config_for(configs, rows) for rows in (1, 2, 3, 8, 9)] == [
        configs[1],
        configs[2],
        configs[8],
        configs[8],
        configs[8],
    ]


def test_usual_ways_draft_less_the_more_rows_there_are() -> None:
    cpu, device = (default_configs(shape_for(n), kind) for n, kind in ((6, "cpu"), (60, "cuda")))
    sizes = {rows: None if config.shape is None else config.shape.nodes for rows, config in cpu.items()}
    assert sizes == {1: 6, 2: 6, 4: 3, 8: None, 16: None, 32: None, 64: None}
    sizes = {rows: None if config.shape is None else config.shape.nodes for rows, config in device.items()}
    assert sizes == {1: 60, 2: 60, 4: 60, 8: 32, 16: 16, 32: 8, 64: 4}


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5), st.data())
def test_what_waited_is_observed_in_order(counts: list[list[int]], data: st.DataObject) -> None:
    """Steps of changing batches: a row's number in a step is not its number in the next."""
    rng, expected = random.Random(0), [list[int]() for _ in range(3)]
    states = [EagleState(KVPool(16).sequence(), 0, 0, torch.tensor(0)) for _ in range(3)]
    for step in counts:
        rows = data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))]
        own = [step[row] for row in rows]
        said = [[rng.randrange(1, 99) for _ in range(max(own))] for _ in rows]
        tokens = torch.tensor(said, dtype=torch.long).view(len(rows), max(own))
        accepted = Accepted(tokens, tokens.unsqueeze(2).float(), torch.tensor(own))
        for number, row in enumerate(rows):
            states[row].pending.append((accepted, number))
            expected[row] += tokens[number, : own[number]].tolist()
    waits = [row for row in range(3) if states[row].pending]
    tokens, features, taken = join_pending([states[row] for row in waits])
    for number, row in enumerate(waits):
        assert tokens[number, : taken[number]].tolist() == expected[row]
        assert features[number, : taken[number], 0].tolist() == expected[row]


# ------------------------------------------------------------------ the cache


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_a_cache_holds_its_rows_through_leaving_joining_and_going_on(seed: int) -> None:
    rng = random.Random(seed)
    cache = target().new_cache(5, 48)
    rows = [(each, list[int]()) for each in cache.sequences]
    for _ in range(6):
        fed = [[rng.randrange(32) for _ in range(rng.randint(1, 4))] for _ in rows]
        width = max(map(len, fed))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in fed])
        live = torch.tensor([[i < len(row) for i in range(width)] for row in fed])
        cache.bind([sequence for sequence, _ in rows])
        target().forward(DraftTree.chain(tokens, live), cache)
        commit(cache, [range(len(row)) for row in fed])
        for (_, text), own in zip(rows, fed, strict=True):
            text += own
        if len(rows) > 1 and rng.random() < 0.6:
            gone, _ = rows.pop(rng.randrange(len(rows)))
            gone.release()
        if len(rows) < 5 and rng.random() < 0.5:
            rows.append((cache.pool.sequence(), []))
        rng.shuffle(rows)
    cache.bind([sequence for sequence, _ in rows]).begin(1)
    for row, (_, text) in enumerate(rows):
        if text:
            assert_holds(cache, row, text)
