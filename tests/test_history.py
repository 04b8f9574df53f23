"""Drafters that need no head: prompt lookup, suffix automaton, Lookahead, and EAGLE with a suffix branch."""

from __future__ import annotations

import itertools
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


Seen = dict[int, tuple[int, frozenset[int]]]  # token -> its position behind the root, and all tokens it sees


def figure_5(levels: list[list[int]], guesses: list[list[int]]) -> Seen:
    """Lookahead's mask as the paper draws it (arXiv 2402.02057, figure 5), cell by cell over a flat sequence.

    The lookahead branch lies level after level, each as wide as the window; level 0 stands at positions 0 (the input
    token), 1, 2, ... and each further level one position later. The verification branch lies behind it, guess after
    guess, at positions 1, 2, ... A cell is dark where the column's token is the row's own, comes before it in the
    row's guess, or is what the row's trajectory holds at an earlier position: of all levels up to the row's, one token
    a position, from as deep a level as leads to the row's. Branches and guesses never see each other, but all see the
    input token.
    """
    flat = [("window", level, level + column) for level, row in enumerate(levels) for column in range(len(row))]
    flat += [("guess", number, 1 + place) for number, guess in enumerate(guesses) for place in range(len(guess))]
    tokens = [token for row in [*levels, *guesses] for token in row]
    assert len(set(tokens)) == len(tokens), "tokens name the nodes here, so they must differ"

    def dark(row: tuple[str, int, int], column: tuple[str, int, int]) -> bool:
        (branch, group, position), (other, of, at) = row, column
        if at > position:
            return False
        if (other, of, at) == ("window", 0, 0):
            return True
        if branch != other:
            return False
        if branch == "guess":
            return group == of
        return of == max(0, group - (position - at))

    return {
        token: (row[2], frozenset(seen for seen, column in zip(tokens, flat, strict=True) if dark(row, column)))
        for token, row in zip(tokens, flat, strict=True)
    }


def seen_in(tree: DraftTree) -> Seen:
    """What a tree's live nodes see, by their tokens."""
    tokens = tree.tokens[0].tolist()
    return {
        tokens[node]: (
            int(tree.depths[0, node]),
            frozenset(tokens[other] for other in range(tree.nodes) if tree.ancestors[0, node, other]),
        )
        for node in range(tree.nodes)
        if tree.live[0, node]
    }


def test_figure_5_of_the_paper_as_drawn() -> None:
    """4-grams, a window of 5, two guesses: rows of the figure, read off by eye."""
    orange, green, red = [0, 1, 2, 3, 4], [11, 12, 13, 14, 15], [22, 23, 24, 25, 26]
    mask = figure_5([orange, green, red], [[31, 32, 33], [41, 42, 43]])
    rows = {3: (0, 1, 2, 3), 11: (0, 11), 15: (0, 1, 2, 3, 4, 15), 22: (0, 11, 22), 26: (0, 1, 2, 3, 4, 15, 26)}
    rows |= {33: (0, 31, 32, 33), 42: (0, 41, 42)}
    assert {token: mask[token] for token in rows} == {t: (len(seen) - 1, frozenset(seen)) for t, seen in rows.items()}


@pytest.mark.parametrize(
    ("window", "ngram", "guesses"), list(itertools.product((1, 2, 3, 5, 7), (2, 3, 4, 5), (1, 2, 4)))
)
def test_lookaheads_tree_is_the_papers_mask_and_positions(window: int, ngram: int, guesses: int) -> None:
    """Every node of three steps in a row: the first window is random, the next hold what the target said."""
    fresh = itertools.count(1000)
    roots = [1, 2, 3]
    known = {root: [[next(fresh) for _ in range(ngram - 1)] for _ in range(guesses)] for root in roots}
    text = [token for root in roots for guess in known[root] for token in (root, *guess)]
    drafter = LookaheadDrafter(10**9, window, ngram, guesses)  # so many tokens that random ones differ
    tree = settle(drafter, [*text, roots[0]])
    levels = [list(row) for row in drafter._rows[0]._window]
    for root, following in zip(roots, [*roots[1:], 4], strict=True):
        levels[0][0] = root
        expected = figure_5(levels, known[root])
        assert seen_in(tree) == expected and len(expected) == drafter.nodes
        marks = [False] * tree.nodes if tree.probe is None else tree.probe[0].tolist()
        probes = {token for token, mark in zip(tree.tokens[0].tolist(), marks, strict=True) if mark}
        assert probes == {token for level in levels for token in level} - {root}
        said = [next(fresh) for _ in range(tree.nodes)]
        at = {token: node for node, token in enumerate(tree.tokens[0].tolist())}
        levels = [*levels[1:], [said[at[token]] for token in levels[-1]]]
        drafter.observe(Accepted(torch.tensor([[following]]), torch.zeros(1, 1, 1), (1,), torch.tensor([said])))
        tree = drafter.propose()


def test_another_mask_than_the_papers_is_seen() -> None:
    drafter = LookaheadDrafter(10**9, 3, 3, 1)
    tree = settle(drafter, [1, 50, 51, 1])
    levels = [list(row) for row in drafter._rows[0]._window]
    levels[0][0] = 1
    expected = figure_5(levels, [[50, 51]])
    assert seen_in(tree) == expected
    for node in range(2, tree.nodes):
        parents = tree.parents.clone()
        parents[0, node] -= 1 if parents[0, node] > 0 else -1
        assert seen_in(DraftTree.from_parents(tree.tokens, parents, tree.live)) != expected


def test_the_pool_is_warmed_up_from_the_prompt_if_asked() -> None:
    prompt = [1, 50, 51, 2, 1, 60, 61, 3, 1]
    warm, cold = (LookaheadDrafter(100, 3, 3, 2, from_prompt=asked) for asked in (True, False))
    assert sorted(chains(settle(warm, prompt))) == [[50, 51], [60, 61]]
    assert chains(settle(cold, prompt)) == []


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
