"""The closed loop: drafts that do not pay cost the noticing and no more, those that do are used, and runs repeat."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from fakes import OracleChain, collect, decode, full_texts, never, tiny_target, vanilla
from hypothesis import given, settings
from hypothesis import strategies as st

from haast.core import Request, RowVerdict, SamplingParams, StopParams
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.engine.engine import Engine, Step
from haast.sampling import Sampler, keyed_uniform
from haast.tuning.latency import Latency
from haast.tuning.online import DraftSize, MatchOdds, OnlinePolicy, best_chain, chances_of

FLAT = Latency({1: 10.0, 2: 10.2, 8: 12.0, 64: 30.0}, 1.2, {1: 0.3})  # a small GPU, say
PACKED = Latency({1: 10.2, 2: 10.7, 4: 11.9, 8: 16.8, 16: 29.7, 32: 52.0}, 1.24, {1: 0.32, 8: 0.86})  # two cores
DEAR = Latency({1: 65.0, 2: 123.0, 8: 125.0, 16: 140.0, 64: 350.0}, 6.0, {1: 2.0})  # plain fp32 on two cores
COSTS = {"flat": FLAT, "packed": PACKED, "dear": DEAR}


def sizes(nodes: int = 5, depth: int = 3, gain: float = 1.27) -> tuple[DraftSize, ...]:
    """A small size and the full one, as the factory makes them."""
    small = max(2, nodes // 4)
    levels = min(depth, small - 1)
    return DraftSize(small, small, levels, 1, levels, 0.0), DraftSize(None, nodes, depth, 1, depth, gain)


Accepts = Callable[[int, int, DraftSize], int]  # row, tokens so far, what is drafted -> drafts that are kept


class Run:
    """Requests that decode together, drafted for as the policy says, with an acceptance of the test's making."""

    def __init__(self, latency: Latency, choice: Sequence[DraftSize], accepts: Accepts, rows: int, tokens: int) -> None:
        policy = OnlinePolicy(latency, lambda rows: choice)
        stop, sampling = StopParams(tokens), SamplingParams()
        requests = [Request([1], sampling, stop, Sampler(sampling), None) for _ in range(rows)]
        done, self.spent, self.nodes = [0] * rows, 0.0, list[int]()
        self.alone = 0.0  # ms of the same tokens by steps without drafts, of as many rows
        while live := [row for row in range(rows) if done[row] < tokens]:
            budget = policy.budget([requests[row] for row in live])
            size = None if budget == 1 else next(each for each in choice if each.budget == budget)
            nodes, levels = (1, 0) if size is None else (int(size.nodes), size.levels)
            self.spent += latency.step(len(live), nodes, levels)
            self.nodes.append(nodes)
            for row in live:
                drafts = 0 if size is None else min(accepts(row, done[row], size), size.depth)
                kept = tuple(range(drafts + 1))
                policy.observed(requests[row], RowVerdict(kept, kept, ()), nodes)
                done[row] += drafts + 1
                self.alone += (drafts + 1) * latency.forward(len(live)) / len(live)
        self.cost = self.spent / self.alone  # below 1: faster than without


def by_chance(chance: Callable[[int, int], float], seed: int = 0) -> Accepts:
    """Every further draft is right with a chance by row and place."""
    rng = random.Random(seed)

    def accepts(row: int, place: int, size: DraftSize) -> int:
        drafts = 0
        while drafts < size.depth and rng.random() < chance(row, place):
            drafts += 1
        return drafts

    return accepts


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(COSTS)),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([(5, 3, 1.27), (16, 5, 1.9), (2, 1, 0.55)]),
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_never_slower_than_without_drafts_by_more_than_the_noticing(
    costs: str, rows: int, tree: tuple[int, int, float], chances: list[float], seed: int
) -> None:
    """Every row has an acceptance of its own, which changes every 64 tokens."""

    def chance(row: int, place: int) -> float:
        return chances[(row + place // 64) % len(chances)]

    assert Run(COSTS[costs], sizes(*tree), by_chance(chance, seed), rows, 256).cost < 1.06


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(COSTS)), st.lists(st.integers(0, 3), min_size=4, max_size=40))
def test_whatever_is_accepted_the_loss_is_bounded(costs: str, kept: list[int]) -> None:
    """An adversary that knows the policy: it may lose the stake, the last step above it, and a share of every pause."""
    latency, steps = COSTS[costs], iter(kept * 400)
    run = Run(latency, sizes(), lambda row, place, size: next(steps), 1, 400)
    dearest = latency.step(1, 5, 3) / latency.forward(1)
    assert run.spent <= run.alone * (1 + 1 / 16) + (2 + 2 * dearest) * latency.forward(1)


def test_a_drafter_that_never_rests_does_lose() -> None:
    """The control: what the two tests above look at is there to be seen."""
    size = DraftSize(None, 5, 3, 1, 3, 100.0)  # so hopeful that no count changes its mind
    policy = OnlinePolicy(DEAR, lambda rows: (size,))
    assert policy.ratio(1, size, 5) > 1.9
    run = Run(DEAR, sizes(), lambda row, place, size: 0, 1, 256)
    assert 1.0 < run.cost < 1.06 and sum(nodes > 1 for nodes in run.nodes) < 12


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("costs", "most"), [("flat", (0.5, 0.8)), ("packed", (0.55, 1.03)), ("dear", (1.0, 0.8))])
def test_good_drafts_are_used(costs: str, most: tuple[float, float], rows: int) -> None:
    run = Run(COSTS[costs], sizes(), by_chance(lambda row, place: 0.8), rows, 256)
    assert run.cost < most[rows > 1]


@pytest.mark.parametrize("costs", ["flat", "packed"])
def test_acceptance_that_changes_is_noticed(costs: str) -> None:
    turns = Run(COSTS[costs], sizes(), by_chance(lambda row, place: 0.0 if place < 150 else 0.95), 1, 600)
    assert turns.cost < 0.7 and set(turns.nodes[-20:]) == {5}
    fails = Run(COSTS[costs], sizes(), by_chance(lambda row, place: 0.95 if place < 300 else 0.0), 1, 600)
    assert fails.cost < 0.75 and turns.nodes[10:100].count(1) > 80
    last = fails.nodes[-200:]
    assert last.count(1) > 190 and last.count(5) < 4


def test_trials_grow_rare() -> None:
    run = Run(PACKED, sizes(), lambda row, place, size: 0, 1, 1000)
    tried = [step for step, nodes in enumerate(run.nodes) if nodes > 1]
    pauses = [later - step for step, later in pairwise(tried) if later - step > 4]
    assert pauses == sorted(pauses) and 4 < len(pauses) < 9 and pauses[-1] >= 4 * pauses[0] >= 32


def test_dear_nodes_are_drafted_for_only_by_those_who_bring_enough() -> None:
    """Where a second node costs as much as the first, a chance of 0.6 brings nothing, one of 0.95 does."""
    poor = Run(DEAR, sizes(), by_chance(lambda row, place: 0.5), 1, 256)
    good = Run(DEAR, sizes(), by_chance(lambda row, place: 0.97), 1, 600)
    assert poor.cost < 1.05 and sum(nodes > 1 for nodes in poor.nodes) < 25
    assert good.cost < 0.7


def test_a_row_that_rests_rides_along_and_costs_the_others_nothing() -> None:
    together = Run(FLAT, sizes(), by_chance(lambda row, place: 0.0 if row == 3 else 0.9), 4, 256)
    assert together.cost < 0.9
    assert together.nodes[:50].count(1) < 10  # three rows outvote the fourth


def test_where_nothing_is_to_choose_from_nothing_is_drafted() -> None:
    policy = OnlinePolicy(FLAT, lambda rows: ())
    request = Request([1], SamplingParams(), StopParams(4), Sampler(SamplingParams()), None)
    assert policy.budget([request]) == 1
    policy.observed(request, RowVerdict((0,), (1,), ()), 1)
    assert request.draft_policy is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sampled_from([1, 3]))
def test_the_same_counts_lead_to_the_same_choices(kept: list[int], rows: int) -> None:
    def again() -> list[int]:
        steps = iter(kept * 400)
        return Run(PACKED, sizes(), lambda row, place, size: next(steps), rows, 100).nodes

    assert again() == again()


def test_no_choice_looks_at_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> float:
        raise AssertionError("decisions rest on counts")

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, name, clock)
    assert Run(PACKED, sizes(), by_chance(lambda row, place: 0.5), 2, 100).nodes


def test_first_chances_sum_up_to_the_gain() -> None:
    assert sum(chances_of(1.27, 3)) == pytest.approx(1.27) and chances_of(1.27, 3) == sorted(
        chances_of(1.27, 3), reverse=True
    )
    assert sum(chances_of(9.0, 3)) == pytest.approx(3.0) and sum(chances_of(0.0, 3)) == pytest.approx(0.0)
    assert chances_of(1.0, 0) == []


# ------------------------------------------------------------------ in the engine

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


@pytest.mark.parametrize("law", [SamplingParams(), SamplingParams(1.0, top_p=0.95, seed=3)])
@pytest.mark.parametrize("latency", COSTS.values(), ids=list(COSTS))
def test_the_text_is_vanillas_whatever_the_policy_does(latency: Latency, law: SamplingParams) -> None:
    target = tiny_target()
    expected = vanilla(target, PROMPTS, 60, law)
    texts = [[*prompt, *new] for prompt, new in zip(PROMPTS, expected, strict=True)]

    def right(row: int, place: int) -> bool:
        return (place // 20) % 2 == 1 and keyed_uniform(7, row, place) < 0.9

    drafter = OracleChain(texts, 4, right)
    drafter.policy = OnlinePolicy(latency, lambda rows: sizes())
    seen: list[Step] = []
    run = Engine(target, drafter).run(PROMPTS, law, StopParams(60), watch=seen.append)
    assert collect(run, 2) == expected
    assert len({step.tree.nodes for step in seen}) > 1  # it drafted, and it did not


def test_hopeless_drafts_end_in_the_engine_too() -> None:
    target = tiny_target()
    texts = full_texts(target, PROMPTS[:1], 200)
    drafter = never(texts, 4)
    drafter.policy = OnlinePolicy(PACKED, lambda rows: sizes())
    seen: list[Step] = []
    assert collect(Engine(target, drafter).run(PROMPTS[:1], SamplingParams(), StopParams(200), watch=seen.append), 1)
    assert sum(step.tree.nodes > 1 for step in seen) < 20


# ------------------------------------------------------------------ matches in the text


def test_odds_follow_what_the_text_does() -> None:
    odds = MatchOdds()
    before = odds.chances(2, 3)
    assert before == sorted(before, reverse=True) and 0.2 < before[0] < 0.6
    for _ in range(40):
        odds.count(2, True)
    assert odds.chances(2, 1)[0] > 0.8 and odds.chances(3, 1) == MatchOdds().chances(3, 1)
    for _ in range(40):
        odds.count(2, False)
    assert odds.chances(2, 1)[0] < 0.3
    assert MatchOdds().chances(200, 2)[1] > 0.9 and MatchOdds().chances(0, 2) == []  # too small to look at


def test_the_best_chain_by_hand() -> None:
    likely, unlikely = [0.9, 0.8, 0.7, 0.6], [0.2, 0.05, 0.01, 0.0]
    drafts, tokens = best_chain([likely], DEAR)
    assert drafts == 4 and tokens == pytest.approx(4.0)  # for 1.9 steps
    assert best_chain([unlikely], DEAR) == (0, 1.0) and best_chain([unlikely], FLAT)[0] > 0
    assert best_chain([[]], FLAT) == (0, 1.0) and best_chain([], FLAT) == (0, 1.0)
    assert best_chain([likely, []], PACKED)[1] == pytest.approx(
        1 + sum(likely[: best_chain([likely, []], PACKED)[0]]) / 2
    )
    crowd = [likely, *[[]] * 7]
    assert best_chain(crowd, PACKED) == (0, 1.0)  # one of eight rows does not pay for the others' dead nodes


def cost(latency: Latency, seen: Sequence[Step], tokens: int) -> float:
    """What steps have cost, in steps without drafts for as many tokens."""
    return sum(latency.forward(step.tree.nodes) for step in seen) / ((tokens - 1) * latency.forward(1))


@pytest.mark.parametrize("make", [SuffixDrafter, PromptLookupDrafter])
def test_text_that_repeats_is_drafted_for_and_other_text_is_not(make: Callable[..., SuffixDrafter]) -> None:
    wander, loop = tiny_target(std=0.4), tiny_target(std=0.02)  # the second says one thing over and over
    for target, least, most in ((wander, 0.0, 1.05), (loop, 0.0, 0.5)):
        prompt = [[5, 3, 8, 1]]
        expected, seen = vanilla(target, prompt, 200), list[Step]()
        drafter = make(17, latency=lambda: DEAR)
        run = Engine(target, drafter).run(prompt, SamplingParams(), StopParams(200), watch=seen.append)
        assert collect(run, 1) == expected
        assert least <= cost(DEAR, seen, 200) < most
    always, seen = SuffixDrafter(11), []  # the control: without costs, every match is verified
    list(Engine(wander, always).run([[5, 3, 8, 1]], SamplingParams(), StopParams(200), watch=seen.append))
    assert cost(DEAR, seen, 200) > 1.2


def test_costs_are_asked_for_at_the_first_match() -> None:
    asked: list[int] = []

    def latency() -> Latency:
        asked.append(1)
        return FLAT

    target = tiny_target()
    drafter = SuffixDrafter(9, latency=latency)
    assert decode(target, drafter, [[1, 2, 3]], 2) == vanilla(target, [[1, 2, 3]], 2)
    assert not asked
    assert decode(target, drafter, [[1, 2, 1, 2, 1]], 12) == vanilla(target, [[1, 2, 1, 2, 1]], 12)
    assert asked
