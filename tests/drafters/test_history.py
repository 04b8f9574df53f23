"""Drafters that need no head: prompt lookup, suffix automaton, Lookahead, and EAGLE with a suffix branch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import block_head, random_head, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from haast.core import Accepted, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.block import BlockDrafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter, LookaheadState, NgramPool
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.suffix_index import SuffixIndex
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.errors import HeadMismatchError
from haast.path_tree import PathTree, pack_rows
from haast.stats import Stats
from haast.target.kv_pool import KVPool
from haast.target.target import Target
from haast.tree import DraftTree

CPU = torch.device("cpu")


def begun(drafter: Drafter, tokens: Sequence[int], reused: int = 0) -> Any:
    """The state of a request whose text is `tokens`, the last one the root."""
    state = drafter.begin(tokens, KVPool(16).sequence(), reused)
    told(drafter, state, tokens[reused + 1 :])
    return state


def told(drafter: Drafter, state: Any, tokens: Sequence[int], choices: Sequence[int] | None = None) -> None:
    """The request's text goes on with `tokens`; `choices` are the target's at the last tree's nodes."""
    said, chosen = torch.tensor([list(tokens)]), None if choices is None else torch.tensor([list(choices)])
    accepted = Accepted(said, torch.zeros(1, len(tokens), 1), torch.tensor([len(tokens)]), chosen)
    drafter.observe([state], accepted)


def settle(drafter: Drafter, tokens: Sequence[int]) -> DraftTree:
    """The drafter's proposal after a text whose last token is the newest."""
    return drafter.propose([begun(drafter, tokens)])


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
    packed = pack_rows([tree, PathTree(8, 6)], CPU)
    assert chains(packed) == [[1, 2, 3], [1, 2, 4], [1, 5]]
    assert packed.live.tolist() == [[True] * 6, [True] + [False] * 5]
    assert packed.height == tree.height == int(packed.depths.max()) == 3
    more = PathTree(9, 8)
    assert [more.insert([1, 2, 3], 2), more.insert([1, 2, 3], 0), more.insert([1, 5], most=9)] == [2, 0, 1]
    assert chains(pack_rows([more], CPU)) == [[1, 2], [1, 5]]
    alone = pack_rows([PathTree(8, 6), PathTree(7, 6)], CPU)
    assert (alone.tokens.tolist(), alone.height) == ([[8], [7]], 0)


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
    automaton = SuffixIndex(1, 99)
    for length, token in enumerate(text, start=1):
        automaton.extend([token])
        known = text[:length]
        assert automaton.match()[0] == brute_longest(known)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_what_followed_the_match_is_counted(text: list[int]) -> None:
    """The children of the root, and their shares, by counting in the text."""
    index = SuffixIndex(1, 99)
    index.extend(text)
    length, likeliest = index.match()
    assert length == brute_longest(text)
    if not length:
        assert not index.candidates(9).tokens
        return
    ends = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
    counts = Counter(text[end] for end in ends)
    assert counts[likeliest] == max(counts.values())
    found = index.candidates(99)
    shares = {
        token: score - math.log(index.odds.chance(length))
        for token, parent, score in zip(found.tokens, found.parents, found.scores, strict=True)
        if parent < 0
    }
    for token, share in shares.items():
        assert math.isclose(math.exp(share), counts[token] / len(ends))
    assert found.scores == sorted(found.scores, reverse=True)
    assert all(parent < place for place, parent in enumerate(found.parents))


def test_suffix_branches() -> None:
    drafter = SuffixDrafter(nodes=7, least=1, branches=2)
    state = begun(drafter, [1, 2, 7, 7, 1, 2, 8, 8, 1, 2, 7, 7, 1, 2])
    assert isinstance(state, SuffixIndex) and state.match() == (6, 8)
    state = begun(drafter, [1, 2, 7, 0, 1, 2, 8, 3, 1, 2, 7, 4, 5, 1, 2])
    assert state.match() == (2, 7), "twice, and 8 once"
    assert [path[0] for path in chains(drafter.propose([state]))] == [7, 7, 8]
    assert chains(settle(SuffixDrafter(nodes=7, least=3), [1, 2, 3, 1, 2])) == []
    assert len(chains(settle(SuffixDrafter(nodes=7, branches=1), state.text))) == 1


@pytest.mark.parametrize("make", [PromptLookupDrafter, SuffixDrafter, lambda: LookaheadDrafter(9, 2, 3, 2)])
def test_a_request_that_begins_with_a_known_prefix_drafts_as_if_it_had_seen_it(make: Any) -> None:
    drafter, text = make(), [1, 2, 3, 1, 2, 4, 1, 2]
    whole = drafter.propose([begun(drafter, text)])
    for reused in range(1, len(text) - 1):
        tree = drafter.propose([begun(drafter, text, reused)])
        assert torch.equal(tree.tokens, whole.tokens) and torch.equal(tree.parents, whole.parents)


@pytest.mark.parametrize("make", [PromptLookupDrafter, SuffixDrafter, lambda: LookaheadDrafter(9, 2, 3, 2)])
def test_a_tree_has_the_nodes_that_are_needed_and_at_most_the_budget(make: Any) -> None:
    drafter = make()
    repeating, fresh = begun(drafter, [1, 2, 3, 4, 5, 6, 1, 2]), begun(drafter, [1, 2, 3])
    for budget in (None, *range(1, 13)):
        tree, alone = drafter.propose([repeating, fresh], budget), drafter.propose([fresh], budget)
        assert tree.nodes <= min(budget or drafter.nodes, drafter.nodes)
        assert int(tree.depths.max()) <= tree.height < max(tree.nodes, 1)
        assert tree.live.any(0).all(), "no node is dead in every row"
        assert (tree.nodes > 1) == (budget is None or budget > 1)
        assert isinstance(drafter, LookaheadDrafter) or alone.nodes == 1, "where there is no draft, the root is alone"


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
    state = begun(drafter, [*text, roots[0]])
    tree = drafter.propose([state])
    levels = [list(row) for row in state._window]
    for root, following in zip(roots, [*roots[1:], 4], strict=True):
        levels[0][0] = root
        expected = figure_5(levels, known[root])
        assert seen_in(tree) == expected and len(expected) == drafter.nodes
        marks = [False] * tree.nodes if tree.placeholder is None else tree.placeholder[0].tolist()
        placeholders = {token for token, mark in zip(tree.tokens[0].tolist(), marks, strict=True) if mark}
        assert placeholders == {token for level in levels for token in level} - {root}
        said = [next(fresh) for _ in range(tree.nodes)]
        at = {token: node for node, token in enumerate(tree.tokens[0].tolist())}
        levels = [*levels[1:], [said[at[token]] for token in levels[-1]]]
        told(drafter, state, [following], said)
        tree = drafter.propose([state])


def test_another_mask_than_the_papers_is_seen() -> None:
    drafter = LookaheadDrafter(10**9, 3, 3, 1)
    state = begun(drafter, [1, 50, 51, 1])
    tree = drafter.propose([state])
    levels = [list(row) for row in state._window]
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
    state = drafter.begin([7], KVPool(16).sequence(), 0)
    drafter.propose([state])
    first, second = [list(each) for each in state._window]
    choices = list(range(100, 100 + drafter.nodes))
    said = [choices[number] for number in state._numbers[-1]]
    told(drafter, state, [11], choices)
    assert state._window == [second, said]
    assert state._pool.guesses(7)[0][1:] or state._pool.guesses(7)  # column 0 continues the root
    assert state._pool.guesses(7)[-1] == (second[0], said[0])
    assert state._pool.guesses(first[1])[-1] == (second[1], said[1])


def test_a_window_begins_alike_in_every_row_and_rests_where_a_budget_has_no_room_for_it() -> None:
    drafter = LookaheadDrafter(50, window=3, ngram=3, guesses=4)
    first, second = (begun(drafter, [*text, 1]) for text in ([1, 2, 3], [4, 5]))
    assert isinstance(first, LookaheadState) and first._window == second._window
    tree = drafter.propose([first, second], 5)  # the window takes 6
    assert chains(tree) == [[2, 3]] and tree.placeholder is None
    before = [list(row) for row in first._window]
    told(drafter, first, [2], [9] * tree.nodes)
    assert first._window == before
    assert drafter.propose([first], 6).nodes == 6 and chains(drafter.propose([first], 6)) == []


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
        HybridDrafter(eagle),
        HybridDrafter(BlockDrafter(at, block_head(at), DraftShape(depth=4, top_k=3, width=3, nodes=7))),
        SmallModelDrafter(at, small_model(), 3),
        SmallModelDrafter(at, at, 2),
    ]


def say(drafter: Drafter, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], Stats]:
    stats = Stats()
    return Engine(target(), drafter).complete(prompts, params, StopParams(30), stats), stats


@settings(max_examples=6)
@given(
    prompts=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_they_say_what_vanilla_says(prompts: list[list[int]], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=4)
    expected, _ = say(VanillaDrafter(), prompts, params)
    for drafter in all_drafters():
        assert say(drafter, prompts, params)[0] == expected, drafter.name


def test_they_accept_drafts_where_the_text_repeats() -> None:
    prompt = [[5, 6, 7, 8] * 6]
    for drafter in all_drafters():
        if isinstance(drafter, SmallModelDrafter):
            continue  # a random small model is right by chance only
        _, stats = say(drafter, prompt, SamplingParams(temperature=0.01))
        assert stats.tau > 1.0, drafter.name


def test_a_small_model_that_is_the_target_is_always_right() -> None:
    _, stats = say(SmallModelDrafter(target(), target(), 4), [[1, 2, 3]], SamplingParams())
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


def test_a_suffix_branch_and_its_eagle_serve_requests_side_by_side() -> None:
    at = target()
    eagle = EagleDrafter(at, random_head(at), DraftShape(depth=3, top_k=3, width=3, nodes=7))
    hybrid, prompts = HybridDrafter(eagle), [[1, 2, 3], [4, 5]]
    expected = [say(VanillaDrafter(), [prompt], SamplingParams())[0][0] for prompt in prompts]
    running = Engine(at, hybrid).run(prompts[:1], SamplingParams(), StopParams(30))
    first = list(next(running).tokens)
    assert Engine(at, eagle).complete(prompts[1:], SamplingParams(), StopParams(30)) == expected[1:]
    assert first + [token for emission in running for token in emission.tokens] == expected[0]


def test_a_suffix_branch_is_the_eagles_in_everything_that_the_pool_asks() -> None:
    at = target()
    hybrid = HybridDrafter(eagle := EagleDrafter(at, random_head(at), DraftShape(depth=3, top_k=3, width=3, nodes=7)))
    for name in ("prefix_key", "reach", "caches", "room", "target_layers"):
        assert getattr(hybrid, name) == getattr(eagle, name), name


@pytest.mark.parametrize("budget", [1, 2, 4, 99, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6, 9))])
def test_every_drafter_keeps_to_a_budget(budget: int) -> None:
    class Told:
        def budget(self, requests: object) -> int:
            return budget

        def drafting_off(self, rows: int) -> bool:
            return budget == 1

        def observed(self, request: object, kept: object, nodes: int) -> None:
            sizes.append(nodes)

    expected, _ = say(VanillaDrafter(), [[5, 6] * 5, [3]], SamplingParams())
    for drafter in all_drafters():
        sizes: list[int] = []
        drafter.policy = Told()
        assert say(drafter, [[5, 6] * 5, [3]], SamplingParams())[0] == expected, drafter.name
        assert max(sizes) <= min(budget, drafter.nodes), drafter.name


def test_a_pool_without_the_prompt_still_learns_what_is_said() -> None:
    drafter = LookaheadDrafter(50, window=2, ngram=3, guesses=4, from_prompt=False)
    state = begun(drafter, [1, 2, 3])
    pool = state._pool
    assert pool.guesses(1) == [] and pool.guesses(2) == []
    tree = drafter.propose([state])
    told(drafter, state, [4, 5], [0] * tree.nodes)
    assert (3, 4) in pool.guesses(2) and (4, 5) in pool.guesses(3) and (4, 5) not in pool.guesses(1)


# ------------------------------------------------------------------ the small model's own keys and values


def small_run(
    drafter: SmallModelDrafter, prompts: list[list[int]], new: int = 24, params: SamplingParams | None = None
) -> list[list[int]]:
    return Engine(target(), drafter).complete(prompts, params or SamplingParams(), StopParams(new))


def forwards(monkeypatch: pytest.MonkeyPatch, small: Target) -> list[int]:
    """Filled with the positions of every forward of the small model."""
    seen, honest = list[int](), small.forward

    def counting(tree: DraftTree, *args: Any, **options: Any) -> Any:
        seen.append(tree.nodes)
        return honest(tree, *args, **options)

    monkeypatch.setattr(small, "forward", counting)
    return seen


def wide_small_model() -> Target:
    """As long a context as the target's."""
    return tiny_target(layers=1, seed=5)


def test_accepted_drafts_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = SmallModelDrafter(target(), tiny_target(), 4)  # the target's twin: every draft is right
    seen = forwards(monkeypatch, drafter._small)
    small_run(drafter, [[1, 2, 3]], 26)
    # After the first step 4 drafts are accepted, 3 of which were run: the fourth and the bonus are new.
    assert seen[:4] == [4, 1, 1, 1] and seen[4:] == [2, 1, 1, 1] * 4


def test_a_dialogue_is_not_run_anew_by_the_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = SmallModelDrafter(target(), wide_small_model(), 3)
    prompt = [each % 30 for each in range(70)]
    said = small_run(drafter, [prompt])[0]
    seen = forwards(monkeypatch, drafter._small)
    again = [*prompt, *said, 4, 2]
    assert small_run(drafter, [again], 8) == [say_alone(again, 8)]
    assert max(seen) < 16 < len(again)


def say_alone(prompt: list[int], new: int) -> list[int]:
    return Engine(target(), VanillaDrafter()).complete([prompt], SamplingParams(), StopParams(new))[0]


def test_the_small_models_blocks_come_back() -> None:
    drafter = SmallModelDrafter(target(), wide_small_model(), 3)
    pool = drafter._small.pool
    assert pool.available == pool.blocks
    running = Engine(target(), drafter).run([[1, 2, 3], [4] * 40], SamplingParams(), StopParams(30))
    next(running)
    assert pool.available < pool.blocks and len(drafter._drafting) == 2
    running.close()
    assert pool.available == pool.blocks and not drafter._drafting


def test_a_small_model_without_room_drafts_no_more_and_the_text_goes_on() -> None:
    small = wide_small_model()
    small.use_pool(tokens=80)
    drafter = SmallModelDrafter(target(), small, 3)
    prompts = [[each + row for each in range(9)] for row in range(6)]
    assert small_run(drafter, prompts, 40) == [say_alone(prompt, 40) for prompt in prompts]
    assert small.pool.available == small.pool.blocks


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_drafted_does_not_depend_on_who_is_drafted_for_beside_it(temperature: float) -> None:
    """Chains alone and together, with texts that wait for different numbers of positions."""
    params = SamplingParams(temperature, seed=3)
    drafter = SmallModelDrafter(target(), wide_small_model(), 3, params)
    texts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10] * 30]
    states = [begun(drafter, text) for text in texts]
    together = drafter.propose(states)
    for row, text in enumerate(texts):
        alone = drafter.propose([begun(drafter, text)])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.draft_probs is not None and together.draft_probs is not None
        torch.testing.assert_close(alone.draft_probs[0], together.draft_probs[row], rtol=0, atol=1e-12)
    again = drafter.propose(states)  # proposing leaves no trace
    assert torch.equal(again.tokens, together.tokens)
