"""The engine's counts with drafters whose success is known beforehand; prefill in chunks; prompts that are refused."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from fakes import (
    VOCAB,
    FakeDrafter,
    FakeState,
    Node,
    OracleChain,
    RandomTrees,
    always,
    collect,
    decode,
    full_texts,
    never,
    random_head,
    tiny_target,
    vanilla,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haast.core import Accepted, Emission, RowVerdict, SamplingParams, StopParams, Verdict
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.errors import PromptError
from haast.heads.checkpoint import Head
from haast.stats import Stats
from haast.target.kv_cache import KVCache
from haast.target.target import Target
from haast.tree import DraftTree

PROMPT = [4, 8, 15]


@cache
def target() -> Target:
    return tiny_target()


def run(drafter: FakeDrafter | VanillaDrafter, max_new: int, prompts: Sequence[Sequence[int]] = (PROMPT,)) -> Stats:
    stats = Stats()
    decode(target(), drafter, prompts, max_new, stats=stats)
    return stats


def test_a_finished_run_gives_its_blocks_back_and_makes_no_cache_of_its_own() -> None:
    """Without the garbage collector, which counts objects and not the megabytes behind them."""
    at = tiny_target()
    drafter = EagleDrafter(at, random_head(at), DraftShape(nodes=5))
    decode(at, drafter, [PROMPT], 6)
    gc.collect()
    before = sum(type(each) is KVCache for each in gc.get_objects())
    gc.disable()
    try:
        for number in range(6):
            decode(at, drafter, [[number, *PROMPT]], 6)
            assert at.pool.free_blocks + at.pool.cached_blocks == at.pool.blocks, "what is not free is a prefix"
        assert sum(type(each) is KVCache for each in gc.get_objects()) == before  # the target's, and the head's
    finally:
        gc.enable()
    at.pool.clear()
    assert at.pool.free_blocks == at.pool.blocks


# ------------------------------------------------------------------ exact counts


def test_vanilla_counts_one_token_a_forward() -> None:
    stats = run(VanillaDrafter(), 13)
    assert (stats.prompt_tokens, stats.tokens, stats.decoded_tokens, stats.target_forwards) == (3, 13, 12, 12)
    assert stats.tau == 1.0 and stats.acceptance_by_depth == [] and stats.alpha_by_depth == []


def test_never_accepting_counts_as_vanilla() -> None:
    stats = run(never(full_texts(target(), [PROMPT], 30)), 13)
    assert (stats.decoded_tokens, stats.target_forwards, stats.tau) == (12, 12, 1.0)
    assert stats.reached_by_depth == [12] and stats.acceptance_by_depth == [0.0] and stats.alpha_by_depth == [0.0]


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_always_accepting_gives_depth_plus_one(depth: int) -> None:
    steps = 4
    stats = run(always(full_texts(target(), [PROMPT], 60), depth), 1 + steps * (depth + 1))
    assert (stats.decoded_tokens, stats.target_forwards, stats.tau) == (steps * (depth + 1), steps, depth + 1)
    assert stats.accepted_by_depth == stats.reached_by_depth == stats.first_choice_by_depth == [steps] * depth
    assert stats.acceptance_by_depth == stats.alpha_by_depth == [1.0] * depth


def test_sometimes_accepting_counts_by_depth() -> None:
    # Prompt at 0..2, prefill emits position 3. Drafts of depth 3 are wrong at every position divisible by 5.
    #   root at  3   drafts 4 5!        -> emits 4 5          depth 1 right, depth 2 wrong
    #   root at  5   drafts 6 7 8       -> emits 6 7 8 9      all right
    #   root at  9   drafts 10!         -> emits 10           depth 1 wrong
    #   root at 10   drafts 11 12 13    -> emits 11 12 13 14  all right
    #   root at 14   drafts 15!         -> emits 15           depth 1 wrong
    texts = full_texts(target(), [PROMPT], 40)
    stats = run(OracleChain(texts, 3, lambda row, position: position % 5 != 0), 13)
    assert (stats.target_forwards, stats.decoded_tokens, stats.tau) == (5, 12, 12 / 5)
    assert stats.reached_by_depth == [5, 3, 2]
    assert stats.accepted_by_depth == stats.first_choice_by_depth == [3, 2, 2]
    assert stats.acceptance_by_depth == [3 / 5, 2 / 3, 1.0]


def test_alpha_counts_only_the_preferred_child() -> None:
    text = full_texts(target(), [PROMPT], 40)[0]

    class SecondIsRight(FakeDrafter):
        name = "second"

        def draft(self, row: int, history: list[int]) -> list[Node]:
            right = text[len(history)]
            return [Node((right + 1) % VOCAB, 0), Node(right, 0)]

    stats = run(SecondIsRight(3), 9)
    assert stats.tau == 2.0 and stats.acceptance_by_depth == [1.0] and stats.alpha_by_depth == [0.0]


def test_tokens_cut_off_by_a_limit_are_not_counted() -> None:
    stats = run(always(full_texts(target(), [PROMPT], 60), 5), 1 + 6 + 2)
    assert (stats.tokens, stats.decoded_tokens, stats.target_forwards, stats.tau) == (9, 8, 2, 4.0)


def test_rows_are_counted_while_they_run() -> None:
    prompts = [[4, 8, 15], [16, 23]]
    texts = full_texts(target(), prompts, 40)
    drafter = OracleChain(texts, 3, lambda row, position: row == 0)  # row 0 takes 3 forwards, row 1 takes 12
    stats = run(drafter, 13, prompts)
    assert (stats.prompt_tokens, stats.tokens) == (5, 26)
    assert (stats.target_forwards, stats.decoded_tokens) == (3 + 12, 24)


def test_one_token_needs_no_decoding_step() -> None:
    stats = run(VanillaDrafter(), 1)
    assert (stats.tokens, stats.target_forwards, stats.tau, stats.tokens_per_s) == (1, 0, 0.0, 0.0)


def test_stats_count_a_verdict() -> None:
    stats = Stats(ms_draft=1.0, ms_verify=2.0, ms_overhead=3.0)
    stats.count(3, (False, True, False), 40, 3)
    stats.count(1, (False,), 255, 1)
    stats.count(1, (), 512, 2)
    assert stats.target_forwards == 3 and stats.tau == 2.0
    assert stats.by_length == [
        {"begin": 0, "end": 256, "target_forwards": 2, "drafted": 2, "tau": 2.0, "acceptance": 0.5},
        {"begin": 512, "end": 1024, "target_forwards": 1, "drafted": 0, "tau": 2.0, "acceptance": 0.0},
    ]
    assert stats.reached_by_depth == [2, 1, 1]
    assert stats.accepted_by_depth == [1, 1, 0] and stats.first_choice_by_depth == [0, 1, 0]
    assert stats.acceptance_by_depth == [0.5, 1.0, 0.0] and stats.alpha_by_depth == [0.0, 1.0, 0.0]
    assert stats.ms_decode == 6.0 and stats.tokens_per_s == 1000.0


def test_time_is_counted_apart() -> None:
    stats = run(never(full_texts(target(), [PROMPT], 30)), 5)
    assert min(stats.ms_prefill, stats.ms_draft, stats.ms_verify, stats.ms_overhead) > 0


# ------------------------------------------------------------------ emissions


def emissions(drafter: FakeDrafter, rules: StopParams) -> list[Emission]:
    return list(Engine(target(), drafter).run([PROMPT], SamplingParams(), rules))


def test_emissions_say_what_was_drafted() -> None:
    text = full_texts(target(), [PROMPT], 60)[0]
    assert emissions(always([text], 3), StopParams(1 + 4 + 2)) == [
        Emission(0, tuple(text[3:4]), 0, False),
        Emission(0, tuple(text[4:8]), 3, False),
        Emission(0, tuple(text[8:10]), 2, True),
    ]
    assert emissions(never([text]), StopParams(2)) == [
        Emission(0, tuple(text[3:4]), 0, False),
        Emission(0, tuple(text[4:5]), 0, True),
    ]


def test_drafters_are_told_features_and_the_tokens_that_follow_them() -> None:
    heard: list[list[int]] = []
    at = tiny_target()  # of its own: no prompt was there before

    class Listening(RandomTrees):
        def observe(self, states: Sequence[FakeState], accepted: Accepted) -> None:
            super().observe(states, accepted)
            heard.append(accepted.counts.tolist())
            for row, (state, count) in enumerate(zip(states, heard[-1], strict=True)):
                history = state.history
                whole = at.forward(DraftTree.chain(torch.tensor([history])), at.new_cache()).features[0]
                kept = slice(len(history) - 1 - count, len(history) - 1)
                assert torch.allclose(accepted.features[row, :count], whole[kept], rtol=0, atol=1e-5)

    prompts = [[4, 8, 15], [16, 23], [1]]
    texts = full_texts(target(), prompts, 12)
    new = decode(at, Listening(9, 0, texts, rate=0.8), prompts, 12)
    assert [[*prompt, *row] for prompt, row in zip(prompts, new, strict=True)] == texts
    assert heard[:3] == [[3], [2], [1]] and max(max(counts) for counts in heard[3:]) > 1
    assert any(len(counts) == 3 for counts in heard[3:]), "rows are told together"


# ------------------------------------------------------------------ prefill


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_prefill_in_chunks_changes_nothing(chunk: int) -> None:
    prompts = [list(range(1, 15)), [5, 6, 7], list(range(20, 27)), [9]]
    params = SamplingParams(0.8, seed=3)
    shape = DraftShape("dynamic", depth=3, top_k=6, width=4, nodes=20)
    at = tiny_target()
    eagle = EagleDrafter(at, random_head(at), shape)
    stats, chunked = Stats(), Stats()
    whole = decode(at, eagle, prompts, 12, params, stats=stats)
    at.pool.clear()  # or the prompts would be there already
    assert Engine(at, eagle, prefill_chunk=chunk).complete(prompts, params, StopParams(12), chunked) == whole
    assert vanilla(target(), prompts, 12, params) == whole
    assert chunked.accepted_by_depth == stats.accepted_by_depth, "the drafter must have observed the same"
    assert chunked.prompt_tokens == stats.prompt_tokens == 25 and chunked.recalled_tokens == 0


def test_a_prompt_that_was_there_before_changes_nothing_but_the_work() -> None:
    prompt, params = list(range(1, 25)), SamplingParams(0.8, seed=3)
    at = tiny_target()
    eagle = EagleDrafter(at, random_head(at), DraftShape("dynamic", depth=3, top_k=6, width=4, nodes=20))
    first, second = Stats(), Stats()
    texts = [decode(at, eagle, [prompt], 12, params, stats=stats) for stats in (first, second)]
    assert texts[0] == texts[1] == vanilla(target(), [prompt], 12, params)
    assert (first.recalled_tokens, second.recalled_tokens) == (0, 23)
    assert first.accepted_by_depth == second.accepted_by_depth, "the head must know what it knew"


# ------------------------------------------------------------------ EAGLE's drafts, by brute force


class Naive:
    """EAGLE as the papers state it, without caches or masks: every path is run through the head from the beginning.

    `tokens` are those of positions 0..p (the root is the last), `features` those of positions 0..p - 1.
    """

    def __init__(self, head: Head, tokens: list[int], features: Tensor, top_k: int) -> None:
        self._head, self._tokens, self._features, self._top_k = head, tokens, features, top_k

    def best(self, path: tuple[int, ...]) -> list[tuple[int, float]]:
        """The likeliest tokens after root and path, best first, with their log-probabilities."""
        logits = target().head_logits(self._extrapolated(path))
        vocab = torch.arange(VOCAB) if self._head.draft_vocab is None else self._head.draft_vocab
        chances, ids = logits[vocab].float().log_softmax(-1).topk(min(self._top_k, len(vocab)))
        return list(zip(vocab[ids].tolist(), chances.tolist(), strict=True))

    def dynamic(self, shape: DraftShape) -> set[tuple[int, ...]]:
        """EAGLE-2: expand the best `width` of each level by cumulative probability, keep the best of all."""
        level: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        candidates: list[tuple[tuple[int, ...], float]] = []
        for _ in range(shape.depth):
            children = [((*path, t), score + chance) for path, score in level for t, chance in self.best(path)]
            candidates += children
            level = sorted(children, key=lambda child: -child[1])[: shape.width]
        return {path for path, _ in sorted(candidates, key=lambda child: -child[1])[: shape.nodes - 1]}

    def _extrapolated(self, path: tuple[int, ...]) -> Tensor:
        features, followers = self._features, list(self._tokens[1:])
        last = self._run(features, followers)
        for token in path:
            features = torch.cat([features, last.unsqueeze(0)])
            followers.append(token)
            last = self._run(features, followers)
        return last

    @torch.inference_mode()
    def _run(self, features: Tensor, followers: list[int]) -> Tensor:
        embeddings = target().embed(torch.tensor([followers]))
        places = torch.arange(len(followers)).unsqueeze(0)
        output: Tensor = self._head.module(embeddings, features.unsqueeze(0), places)
        return output[0, -1]


def paths_of(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    """The tokens under the root on the way to every node but the root."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.nodes):
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]


@settings(max_examples=20)
@given(
    shape=st.builds(
        DraftShape,
        kind=st.sampled_from(["dynamic", "static", "chain"]),
        depth=st.integers(1, 4),
        top_k=st.integers(1, 5),
        width=st.integers(1, 5),
        nodes=st.integers(2, 24),
    ),
    texts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=9), min_size=1, max_size=2),
    vocab=st.sampled_from([None, tuple(range(1, VOCAB, 3))]),
    data=st.data(),
)
def test_eagle_drafts_what_the_papers_say(
    shape: DraftShape, texts: list[list[int]], vocab: tuple[int, ...] | None, data: st.DataObject
) -> None:
    head = random_head(target(), vocab)
    drafter = EagleDrafter(target(), head, shape)
    features = [
        target().forward(DraftTree.chain(torch.tensor([text])), target().new_cache()).features[0, :-1] for text in texts
    ]
    states = [drafter.begin(text, target().pool.sequence(), 0) for text in texts]
    told = [0] * len(texts)  # pairs that the drafter has observed, per row; ragged steps of 0 to 3, at least 1 at first
    while any(done < len(text) - 1 for done, text in zip(told, texts, strict=True)):
        counts = [
            min(len(text) - 1 - done, data.draw(st.integers(int(done == 0), 3)))
            for done, text in zip(told, texts, strict=True)
        ]
        rows = [row for row, count in enumerate(counts) if count]
        if not rows:
            continue
        said: list[RowVerdict | None] = []
        kept = torch.zeros(len(rows), max(counts), 32, dtype=torch.float64)
        for place, row in enumerate(rows):
            done, count = told[row], counts[row]
            said.append(RowVerdict(tuple(range(count)), tuple(texts[row][done + 1 : done + 1 + count]), ()))
            kept[place, :count] = features[row][done : done + count]
            told[row] += count
        verdict = Verdict.of_rows(said, kept.device)
        step = verdict if data.draw(st.booleans()) else None  # of a step, or of a prompt
        drafter.observe([states[row] for row in rows], Accepted(verdict.tokens, kept, verdict.counts, verdict=step))
        drafter.propose(states)  # must leave no trace
    tree = drafter.propose(states)
    for state in states:
        state.kv.release()
    assert tree.nodes == drafter.nodes
    if vocab is not None:  # the texts' own tokens follow
        rare = sorted({token for text in texts for token in text} - set(vocab))
        head = Head(head.module, torch.tensor([*vocab, *rare]), {})
    for row, text in enumerate(texts):
        naive = Naive(head, text, features[row], 1 if shape.kind == "chain" else shape.top_k)
        paths = paths_of(tree, row)
        assert tree.tokens[row, 0] == text[-1] and len(set(paths)) == len(paths)
        if shape.kind == "dynamic":
            assert set(paths) == naive.dynamic(shape)
        for path in {path[:-1] for path in paths}:
            children = [other[-1] for other in paths if other[:-1] == path]
            ranked = [token for token, _ in naive.best(path)]
            assert children == ranked[: len(children)], "siblings are the likeliest, in order of preference"


def test_shapes_keep_to_their_limits() -> None:
    assert EagleDrafter(target(), random_head(target()), DraftShape("chain", depth=4)).nodes == 5
    assert EagleDrafter(target(), random_head(target()), DraftShape("static", 3, 4, nodes=17)).nodes == 17
    assert EagleDrafter(target(), random_head(target()), DraftShape("dynamic", 3, 4, 2, nodes=17)).nodes == 17
    reachable = EagleDrafter(target(), random_head(target()), DraftShape("dynamic", 2, 3, 2, nodes=60))
    assert reachable.nodes == 1 + 3 + 2 * 3, "a budget that can't be reached is lowered"


@pytest.mark.parametrize(
    ("settings_", "why"),
    [
        ({"kind": "bush"}, "kind='bush' is not a draft shape"),
        ({"depth": 0}, "depth=0 is not allowed"),
        ({"top_k": -1}, "top_k=-1 is not allowed"),
        ({"width": 0}, "width=0 is not allowed"),
        ({"nodes": 1}, "nodes=1 is not allowed"),
    ],
)
def test_shapes_out_of_range_are_refused(settings_: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DraftShape(**settings_)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ([], "no prompt was given"),
        ([[1], []], "prompt 1 has no tokens"),
        ([[1] * 24], "prompt 0 has 24 tokens, the target's context holds 24"),
        ([[1, VOCAB]], f"prompt 0 holds token ids outside 0..{VOCAB - 1}"),
        ([[1], [3, -1]], "prompt 1 holds token ids outside"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_at_once(prompts: list[list[int]], why: str) -> None:
    engine = Engine(tiny_target(context=24), VanillaDrafter())
    with pytest.raises(PromptError, match=why):
        engine.run(prompts, SamplingParams(), StopParams())  # at the call, not at the first token


def test_a_prompt_that_just_fits_is_answered() -> None:
    engine = Engine(tiny_target(context=24), VanillaDrafter())
    assert len(collect(engine.run([[1] * 23], SamplingParams(), StopParams(9)), 1)[0]) == 1


@pytest.mark.parametrize("value", [0, -3])
def test_a_limit_below_one_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens={value} is not allowed"):
        StopParams(value)
