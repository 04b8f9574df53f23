"""Drafters that need no head: prompt lookup, suffix automaton, Lookahead, and EAGLE with a suffix branch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import random_head, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from haast.drafters.base import Accepted, Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter, NgramPool
from haast.drafters.lookup import PromptLookupDrafter, SuffixAutomaton, SuffixDrafter
from haast.drafters.paths import PathTree, pack_rows
from haast.drafters.shape import DraftShape
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine import Engine, Stats, StopConfig
from haast.errors import HeadMismatchError
from haast.sampling import SamplingConfig
from haast.target import Target
from haast.tree import DraftTree

CPU = torch.device("cpu")


def settle(drafter: Drafter, tokens: Sequence[int]) -> DraftTree:
    """The drafter's proposal behind a text whose last token is the newest."""
    drafter.start([tokens[:1]])
    following = torch.tensor([list(tokens[1:])])
    drafter.observe(Accepted(following, torch.zeros(1, following.shape[1], 1), (following.shape[1],)))
    return drafter.propose()


def chains(tree: DraftTree) -> list[list[int]]:
    """Every live path from below the root to a leaf."""
    children = tree.children(0)
    found: list[list[int]] = []

    def walk(node: int, path: list[int]) -> None:
        if not children[node] and path:
            found.append(path)
        for child in children[node]:
            walk(child, [*path, int(tree.tokens[0, child])])

    walk(0, [])
    return found


def test_paths_share_their_beginnings_and_are_cut_where_the_tree_is_full() -> None:
    tree = PathTree(9, 6)
    assert [tree.insert([1, 2, 3]), tree.insert([1, 2, 4]), tree.insert([1, 5, 6])] == [3, 1, 1]
    assert tree.insert([1, 2, 3]) == 0 and tree.insert([7]) == 0
    packed = pack_rows([tree, PathTree(8, 6)], 6, CPU)
    assert chains(packed) == [[1, 2, 3], [1, 2, 4], [1, 5]]
    assert packed.live.tolist() == [[True] * 6, [True] + [False] * 5]
    again = PathTree.of_tree(packed, 0, 8)
    assert again.insert([1, 5, 6, 7], most=1) == 1
    assert chains(pack_rows([again], 8, CPU)) == [[1, 2, 3], [1, 2, 4], [1, 5, 6]]


def test_prompt_lookup_continues_the_latest_match_of_the_longest_ngram() -> None:
    drafter = PromptLookupDrafter(nodes=4, ngram=2)
    assert chains(settle(drafter, [1, 2, 3, 4, 5, 9, 1, 2])) == [[3, 4, 5]]
    assert chains(settle(drafter, [1, 2, 3, 7, 2, 8, 9, 1, 2])) == [[3, 7, 2]]  # (1, 2), not the later 2
    assert chains(settle(drafter, [5, 2, 3, 7, 2, 8, 9, 1, 2])) == [[8, 9, 1]]  # only 2 is known: its latest place
    assert chains(settle(drafter, [1, 2, 3])) == []
    assert chains(settle(drafter, [4, 4])) == [[4]]


def brute_longest(text: Sequence[int]) -> int:
    for length in range(len(text) - 1, 0, -1):
        if any(list(text[i : i + length]) == list(text[-length:]) for i in range(len(text) - length)):
            return length
    return 0


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_automaton_knows_the_longest_earlier_suffix(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for length, token in enumerate(text, start=1):
        automaton.append(token)
        known = text[:length]
        assert automaton.longest == brute_longest(known)
        lengths = []
        for end in automaton.earlier(1, 99):
            assert 0 < end < length
            shared = 0
            while shared < end and known[end - 1 - shared] == known[-1 - shared]:
                shared += 1
            lengths.append(shared)
        assert not lengths or lengths[0] >= automaton.longest
        assert all(shared >= 1 for shared in lengths)


def test_suffix_branches() -> None:
    drafter = SuffixDrafter(nodes=7, least=1, branches=2)
    tree = settle(drafter, [5, 1, 2, 7, 7, 2, 8, 8, 1, 2])
    assert drafter.longest(0) == 2
    assert chains(tree)[0][:2] == [7, 7]
    assert chains(settle(SuffixDrafter(nodes=7, least=3), [1, 2, 3, 1, 2])) == []


def test_the_pool_keeps_the_newest_of_a_token() -> None:
    pool = NgramPool(2)
    for gram in ([1, 2, 3], [1, 4, 5], [1, 2, 3], [1, 6, 7], [2, 1, 1]):
        pool.add(gram)
    assert pool.guesses(1) == [(6, 7), (2, 3)] and pool.guesses(2) == [(1, 1)] and pool.guesses(3) == []


@pytest.mark.parametrize(
    ("window", "ngram", "guesses"), list(itertools.product((1, 2, 3, 5, 7), (2, 3, 4, 5), (1, 2, 4)))
)
def test_lookaheads_tree_is_the_papers_mask_and_positions(window: int, ngram: int, guesses: int) -> None:
    """Built by brute force from figure 5: who sees whom, and at which distance from the root."""
    drafter = LookaheadDrafter(50, window, ngram, guesses, from_prompt=False)
    rng = random.Random(window * 100 + ngram * 10 + guesses)
    drafter.start([[1]])
    row = drafter._rows[0]
    for _ in range(guesses):  # guesses that share no beginning, so that each is a chain of its own
        row._pool.add([3, *rng.sample(range(4, 50), ngram - 1)])
    row._last = 3
    tree = drafter.propose()
    firsts = {guess[0] for guess in row._pool.guesses(3)}
    drafted = int((tree.live[0] & ~(tree.probe[0] if tree.probe is not None else torch.zeros(1).bool())).sum()) - 1
    if len(firsts) == guesses:
        assert drafted == guesses * (ngram - 1)
    numbers = row._numbers
    assert [len(each) for each in numbers] == [window] * (ngram - 1)
    place = {number: (level, column) for level, each in enumerate(numbers) for column, number in enumerate(each)}
    for number, (level, column) in place.items():
        sees = {numbers[0][i] for i in range(column + 1)} | {numbers[above][column] for above in range(1, level + 1)}
        assert {i for i in range(tree.nodes) if tree.ancestors[0, number, i]} == sees
        assert int(tree.depths[0, number]) == column + level
        assert number == 0 or (tree.probe is not None and bool(tree.probe[0, number]))
    for number in range(1, 1 + drafted):  # a guess sees the root, its own beginning, itself, and nothing of the window
        seen = {i for i in range(tree.nodes) if tree.ancestors[0, number, i]}
        assert seen & set(place) == {0} and int(tree.depths[0, number]) == len(seen) - 1


def test_the_window_moves_and_fills_the_pool() -> None:
    drafter = LookaheadDrafter(50, window=3, ngram=3, guesses=4, from_prompt=False)
    drafter.start([[7]])
    row = drafter._rows[0]
    row._last = 7
    drafter.propose()
    first, second = [list(each) for each in row._window]
    choices = list(range(100, 100 + drafter.nodes))
    said = [choices[number] for number in row._numbers[-1]]
    drafter.observe(Accepted(torch.tensor([[11]]), torch.zeros(1, 1, 1), (1,), torch.tensor([choices])))
    assert row._window == [second, said]
    assert row._pool.guesses(7)[0][1:] or row._pool.guesses(7)  # column 0 continues the root
    assert row._pool.guesses(7)[-1] == (second[0], said[0])
    assert row._pool.guesses(first[1])[-1] == (second[1], said[1])


TARGETS: list[Target] = []


def target() -> Target:
    if not TARGETS:
        TARGETS.append(tiny_target())
    return TARGETS[0]


def small_model() -> Target:
    torch.manual_seed(11)
    at = target().config
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=at.vocab_size, num_key_value_heads=1, max_position_embeddings=24, **sizes)
    return Target(LlamaForCausalLM(config).double())


def all_drafters() -> list[Drafter]:
    at = target()
    eagle = EagleDrafter(at, random_head(at), DraftShape(depth=3, top_k=3, width=3, nodes=7))
    return [
        PromptLookupDrafter(6),
        PromptLookupDrafter(3, ngram=1),
        SuffixDrafter(8),
        SuffixDrafter(5, least=2, branches=1),
        LookaheadDrafter(at.vocab_size, 3, 3, 2),
        LookaheadDrafter(at.vocab_size, 4, 4, 3, from_prompt=False),
        HybridDrafter(eagle, extra=3, least=1),
        SmallModelDrafter(at, small_model(), 3),
        SmallModelDrafter(at, at, 2),
    ]


def say(drafter: Drafter, prompts: list[list[int]], law: SamplingConfig) -> tuple[list[list[int]], Stats]:
    texts: list[list[int]] = [[] for _ in prompts]
    stats = Stats()
    for emission in Engine(target(), drafter).run(prompts, law, StopConfig(30), stats):
        texts[emission.row].extend(emission.tokens)
    return texts, stats


@settings(max_examples=10)
@given(
    prompts=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_they_say_what_vanilla_says(prompts: list[list[int]], temperature: float) -> None:
    law = SamplingConfig(temperature=temperature, seed=4)
    expected, _ = say(VanillaDrafter(), prompts, law)
    for drafter in all_drafters():
        assert say(drafter, prompts, law)[0] == expected, drafter.name


def test_they_accept_drafts_where_the_text_repeats() -> None:
    prompt = [[5, 6, 7, 8] * 6]
    for drafter in all_drafters():
        if isinstance(drafter, SmallModelDrafter):
            continue  # a random small model is right by chance only
        _, stats = say(drafter, prompt, SamplingConfig(temperature=0.01))
        assert stats.tau > 1.0, drafter.name


def test_a_small_model_that_is_the_target_is_always_right() -> None:
    _, stats = say(SmallModelDrafter(target(), target(), 4), [[1, 2, 3]], SamplingConfig())
    assert stats.accepted_by_depth == stats.reached_by_depth and stats.tau > 4


def test_a_small_model_of_another_vocabulary_is_refused() -> None:
    other = tiny_target()
    other.vocab_size += 1
    with pytest.raises(HeadMismatchError, match="vocabulary"):
        SmallModelDrafter(target(), other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookupDrafter(1), "nodes=1"),
        (lambda: PromptLookupDrafter(4, ngram=0), "ngram=0"),
        (lambda: SuffixDrafter(4, least=0), "least=0"),
        (lambda: SuffixDrafter(4, branches=0), "branches=0"),
        (lambda: SmallModelDrafter(target(), target(), 0), "depth=0"),
        (lambda: LookaheadDrafter(9, window=0), "window=0"),
        (lambda: LookaheadDrafter(9, ngram=1), "ngram=1"),
        (lambda: LookaheadDrafter(9, guesses=0), "guesses=0"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_a_suffix_branch_and_its_eagle_follow_one_run_at_a_time() -> None:
    at = target()
    eagle = EagleDrafter(at, random_head(at), DraftShape(depth=3, top_k=3, width=3, nodes=7))
    hybrid = HybridDrafter(eagle)
    assert hybrid.lock is eagle.lock
    running = Engine(at, hybrid).run([[1, 2, 3]], SamplingConfig(), StopConfig(30))
    next(running)
    Engine(at, eagle).complete([[4, 5]], SamplingConfig(), StopConfig(5))
    with pytest.raises(RuntimeError, match="another generation was started"):
        list(running)


def test_a_pool_without_the_prompt_still_learns_what_is_said() -> None:
    drafter = LookaheadDrafter(50, window=2, ngram=3, guesses=4, from_prompt=False)
    drafter.start([[1]])
    drafter.observe(Accepted(torch.tensor([[2, 3]]), torch.zeros(1, 2, 1), (2,)))
    pool = drafter._rows[0]._pool
    assert pool.guesses(1) == [] and pool.guesses(2) == []
    tree = drafter.propose()
    choices = torch.zeros(1, tree.nodes, dtype=torch.long)
    drafter.observe(Accepted(torch.tensor([[4, 5]]), torch.zeros(1, 2, 1), (2,), choices))
    assert (3, 4) in pool.guesses(2) and (4, 5) in pool.guesses(3) and (4, 5) not in pool.guesses(1)
