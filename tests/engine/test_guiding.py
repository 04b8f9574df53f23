"""What requests say about their drafts: trees get better or worse by it, texts never change."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from fakes import VOCAB, OracleChain, tiny_target, vanilla
from hypothesis import given, settings
from hypothesis import strategies as st

from haast.core import DraftHints, Guide, Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats
from haast.engine.guiding import GUIDED_NODES, guided
from haast.engine.scheduler import Scheduler
from haast.engine.step import Step
from haast.errors import PromptError
from haast.heads.checkpoint import Head
from haast.target.target import Target
from haast.tree import DraftTree


class Fixed:
    """A guide that knows the text; `cut` also forbids all that is not it."""

    def __init__(self, text: Sequence[int], cut: bool = True) -> None:
        self._text, self._cut = list(text), cut

    def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        rest = self._text[len(history) :]
        found = []
        for path in drafted:
            right = next((at for at, token in enumerate(path) if at >= len(rest) or token != rest[at]), len(path))
            kept = list(path[:right]) if self._cut else list(path)
            found.append(kept + (rest[right : right + most] if right == len(kept) else []))
        return [path for path in found if path] or [rest[:most]]


class Wild:
    """A guide that says anything."""

    def __init__(self, seed: int) -> None:
        self._coins = random.Random(seed)

    def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        coins = self._coins
        paths = [list(path[: coins.randrange(len(path) + 1)]) for path in drafted if coins.random() < 0.7]
        return [[*path, *(coins.randrange(VOCAB) for _ in range(coins.randrange(most + 3)))] for path in paths]


def said(
    target: Target, drafter: Drafter, prompts: Sequence[Sequence[int]], hints: Sequence[DraftHints],
    sampling: SamplingParams, steps: list[Step] | None = None,
) -> tuple[list[list[int]], list[Stats]]:  # fmt: skip
    """The new tokens of requests that run together."""
    engine, stats = Engine(target, drafter), [Stats() for _ in prompts]
    watch = None if steps is None else steps.append
    requests = [
        engine.submit(prompt, sampling, StopParams(24), hints=hint, stats=each, row=row, watch=watch)
        for row, (prompt, hint, each) in enumerate(zip(prompts, hints, stats, strict=True))
    ]
    return [[token for emission in engine.read(request) for token in emission.tokens] for request in requests], stats


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3]]
HOT = SamplingParams(temperature=0.9, seed=5)


def test_a_guide_that_knows_lengthens_the_steps(llama: Target) -> None:
    texts = [[*prompt, *new] for prompt, new in zip(PROMPTS, vanilla(llama, PROMPTS, 24, HOT), strict=True)]
    hints = [DraftHints(guide=Fixed(text)) for text in texts]
    found, stats = said(llama, VanillaDrafter(), PROMPTS, hints, HOT)
    assert [[*prompt, *new] for prompt, new in zip(PROMPTS, found, strict=True)] == texts
    assert all(each.tau > 10 for each in stats)


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0]), st.sampled_from([None, 1, 2, 5]))
def test_no_guide_changes_a_text(llama: Target, head: Head, seed: int, temperature: float, most: int | None) -> None:
    sampling = SamplingParams(temperature=temperature, seed=seed)
    expected = vanilla(llama, PROMPTS, 24, sampling)
    eagle = EagleDrafter(llama, head)
    for drafter in (VanillaDrafter(), SuffixDrafter(), PromptLookupDrafter(), eagle, HybridDrafter(eagle)):
        hints = [DraftHints(Wild(seed), tuple(PROMPTS[0] * 3), most), DraftHints(max_nodes=most), DraftHints()]
        assert said(llama, drafter, PROMPTS, hints, sampling)[0] == expected, drafter.name


def test_lookahead_keeps_its_own_trees(llama: Target) -> None:
    expected = vanilla(llama, PROMPTS, 24)
    hints = [DraftHints(guide=Wild(1))] * 3
    assert said(llama, LookaheadDrafter(VOCAB, 2, 2, 2), PROMPTS, hints, SamplingParams())[0] == expected


def test_max_nodes_bounds_every_tree(llama: Target) -> None:
    texts = [[*prompt, *new] for prompt, new in zip(PROMPTS, vanilla(llama, PROMPTS, 24), strict=True)]
    steps = list[Step]()
    drafter = OracleChain(texts, 6, lambda row, position: True)
    hints = [DraftHints(max_nodes=3)] * 3
    said(llama, drafter, PROMPTS, hints, SamplingParams(), steps)
    assert steps and all(step.tree.nodes <= 3 for step in steps)


def test_what_one_row_wants_is_not_run_for_all() -> None:
    tree = DraftTree.roots(torch.tensor([1, 1, 1, 1]))
    long = Fixed([1, *range(2, 30)])
    requests = [request(DraftHints(guide=long)), *(request(DraftHints()) for _ in range(3))]
    assert guided(tree, requests).nodes == 1, "one of four"
    requests = [request(DraftHints(guide=long)) for _ in range(2)] + requests[2:]
    assert guided(tree, requests).nodes == 1 + GUIDED_NODES, "two of four"


def test_cut_drafts_are_not_run() -> None:
    tree = DraftTree.from_parents(torch.tensor([[1, 2, 9, 3, 8]]), torch.tensor([[-1, 0, 0, 1, 2]]))
    found = guided(tree, [request(DraftHints(guide=Fixed([1, 2, 3, 4])))])
    assert found.tokens.tolist() == [[1, 2, 3, 4]] and found.parents.tolist() == [[-1, 0, 1, 2]]


def test_a_guide_that_raises_ends_its_request_alone(llama: Target) -> None:
    class Broken:
        def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> list[list[int]]:
            raise PromptError("the guide has failed")

    expected = vanilla(llama, PROMPTS, 12)
    engine = Engine(llama, SuffixDrafter())
    guides: list[Guide | None] = [None, Broken(), None]
    requests = [
        engine.submit(prompt, SamplingParams(), StopParams(12), hints=DraftHints(guide=guide))
        for prompt, guide in zip(PROMPTS, guides, strict=True)
    ]
    assert [token for emission in engine.read(requests[0]) for token in emission.tokens] == expected[0]
    with pytest.raises(PromptError, match="the guide has failed"):
        list(engine.read(requests[1]))
    assert [token for emission in engine.read(requests[2]) for token in emission.tokens] == expected[2]
    assert llama.pool.available == llama.pool.blocks, "all blocks are free or can be evicted"


def test_foreseen_text_is_drafted() -> None:
    target = tiny_target(std=0.6, seed=3)
    prompt = list(range(1, 12))
    (text,) = vanilla(target, [prompt], 24, HOT)
    for drafter in (SuffixDrafter(nodes=8), PromptLookupDrafter(nodes=8)):
        blind = said(target, drafter, [prompt], [DraftHints()], HOT)
        seeing = said(target, drafter, [prompt], [DraftHints(prediction=(*prompt[-8:], *text))], HOT)
        assert blind[0] == seeing[0] == [text]
        assert seeing[1][0].tau > 3 > blind[1][0].tau, drafter.name


def test_a_tight_pool_serves_guided_rows_after_one_another() -> None:
    target = tiny_target()
    target.use_pool(96)
    target.scheduler = Scheduler(target, 8)
    expected = vanilla(target, PROMPTS, 24)
    hints = [DraftHints(guide=Wild(2)), DraftHints(), DraftHints(guide=Wild(3))]
    assert said(target, SuffixDrafter(), PROMPTS, hints, SamplingParams())[0] == expected


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "3"])
def test_wrong_bounds_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"max_nodes=.* is not allowed: give 1"):
        DraftHints(max_nodes=wrong)


def request(hints: DraftHints) -> Request:
    return Request([1], SamplingParams(), StopParams(8), None, VanillaDrafter(), hints=hints)  # type: ignore[arg-type]
