"""A head that looks back a sliding window of positions: the same text, bounded work, and no other draft for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import packed_target, vanilla
from torch import Tensor

from haast import native
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.candidates import Candidates
from haast.drafters.eagle import EagleDrafter
from haast.drafters.head_runner import Flight
from haast.drafters.pending_features import EagleState
from haast.drafters.tree_shape import DraftShape
from haast.drafters.window import DraftWindow
from haast.engine.engine import Engine, StopParams
from haast.heads.checkpoint import Head
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.stats import Stats
from haast.target.kv_cache import KVCache
from haast.target.target import Target
from haast.tree import DraftTree

SHAPE = DraftShape(depth=3, top_k=3, width=3, nodes=10)
PROMPTS = [[(7 * i + 3) % 31 for i in range(90)], [(5 * i * i + 1) % 29 for i in range(41)]]
HEADS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_hidden_layers": 2},
    "unshifted": {"inputs": "feature+token"},
    "eagle3": {"layer_ids": (0, 1)},
    "eagle3, two layers": {"layer_ids": (0, 1), "num_hidden_layers": 2},
}


def made_head(target: Target, kind: str = "one layer") -> Head:
    torch.manual_seed(5)
    sizes = HEADS[kind]
    module: FeatExtrapolator | Eagle3Head
    if kind.startswith("eagle3"):
        module = Eagle3Head(Eagle3Config.for_target(target.config, **sizes))
    else:
        module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config, **sizes))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Head(module.eval().requires_grad_(False), None, {})


class Watched(EagleDrafter):
    """Keeps every proposal, the state it grew from, and how many pairs the head has computed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trees: list[DraftTree] = []
        self.states: list[Tensor] = []
        self.pairs = 0
        inner = self._forward.run

        def counted(cache: KVCache, embeddings: Tensor, states: Tensor, flight: Flight) -> Tensor:
            if flight.positions is flight.flying:  # committed pairs: nothing of a tree is in flight
                self.pairs += states.shape[0] * states.shape[1]
            return inner(cache, embeddings, states, flight)

        self._forward.run = counted  # type: ignore[method-assign]

    def propose(
        self, states: Sequence[EagleState], budget: int | None = None, others: Sequence[Candidates] | None = None
    ) -> DraftTree:
        self._catch_up(states)
        self.states.append(torch.stack([each.extrapolated for each in states if each.extrapolated is not None]))
        self.trees.append(super().propose(states, budget, others))
        return self.trees[-1]


class WholeText(DraftWindow):
    """The same window, as a mask over everything: nothing is skipped."""

    def skipped(self, prompt: int) -> int:
        return 0


def run(drafter: Drafter, target: Target, prompts: Sequence[Sequence[int]] = PROMPTS, chunk: int = 512) -> Any:
    engine = Engine(target, drafter, prefill_chunk=chunk)
    target.pool.clear()  # every position is computed
    return engine.complete(prompts, SamplingParams(), StopParams(40))


# ------------------------------------------------------------------ the window


@pytest.mark.parametrize(
    "kind", ["one layer", "eagle3, two layers", *(pytest.param(k, marks=pytest.mark.slow) for k in list(HEADS)[1:4])]
)
def test_a_window_keeps_the_text_and_bounds_what_is_computed(llama: Target, kind: str) -> None:
    expected = vanilla(llama, PROMPTS, 40)
    for window in (1, 7, 70):
        drafter = Watched(llama, made_head(llama, kind), SHAPE, window)
        assert [run(drafter, llama, [prompt], 16)[0] for prompt in PROMPTS] == expected
        layers = drafter._module.config.num_hidden_layers
        reach = layers * (window - 1) + 1
        decoded = len(drafter.trees) * (SHAPE.depth + 1)
        assert drafter.pairs <= sum(min(len(prompt), reach) for prompt in PROMPTS) + decoded


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("window", "chunk"), [(4, 7), *(pytest.param(w, c, marks=pytest.mark.slow) for w in (1, 4, 30) for c in (7, 512))]
)
def test_what_a_window_leaves_out_changes_no_draft(llama: Target, kind: str, window: int, chunk: int) -> None:
    bounded, whole = (Watched(llama, made_head(llama, kind), SHAPE, window) for _ in range(2))
    whole._pairs = WholeText(window, 1, None)
    for prompt in PROMPTS:
        run(bounded, llama, [prompt], chunk)
        run(whole, llama, [prompt])
    assert len(bounded.trees) == len(whole.trees) > 10
    for mine, theirs, ours, all_of_it in zip(bounded.trees, whole.trees, bounded.states, whole.states, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.parents, theirs.parents)
        torch.testing.assert_close(ours, all_of_it, rtol=1e-9, atol=1e-9)
    assert bounded.pairs < whole.pairs


def test_a_prompt_reaches_no_farther_than_its_layers_windows(llama: Target) -> None:
    """One pair less, and a head of two layers drafts from another state."""
    short, exact = (Watched(llama, made_head(llama, "two layers"), SHAPE, 8) for _ in range(2))
    assert exact._pairs.reach == 15
    short._pairs.reach = 14
    run(short, llama, PROMPTS[:1])
    run(exact, llama, PROMPTS[:1])
    assert not torch.allclose(short.states[0], exact.states[0], rtol=1e-9)


@pytest.mark.parametrize("kind", HEADS)
def test_the_mask_is_the_window_that_it_says(llama: Target, kind: str) -> None:
    """By brute force: all pairs at once, each under an explicit mask."""
    window, prompt = 6, PROMPTS[0]
    drafter = Watched(llama, made_head(llama, kind), SHAPE, window)
    (first, *_) = run(drafter, llama, [prompt])[0]
    module, count = drafter._module, len(prompt)
    output = llama.forward(
        DraftTree.chain(torch.tensor([prompt])), llama.new_cache(1, 512), hidden_layers=drafter.target_layers
    )
    layers = drafter.target_layers
    features = torch.cat([output.hidden[i] for i in layers], -1) if layers else output.features
    held = [*prompt[1:], first] if module.follows_token else prompt
    back = torch.arange(count).unsqueeze(1) - torch.arange(count)
    hidden = (back < 0) | (back >= window)
    bias = torch.zeros(count, count, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)
    with torch.inference_mode():
        states = module(
            llama.embed(torch.tensor([held])), module.fuse(features), torch.arange(count).unsqueeze(0), bias[None, None]
        )
    torch.testing.assert_close(drafter.states[0], states[:, -1], rtol=1e-9, atol=1e-9)


def test_a_window_as_long_as_the_context_drafts_as_none_does(llama: Target) -> None:
    every, windowed = (Watched(llama, made_head(llama), SHAPE, window) for window in (None, 512))
    run(every, llama)
    run(windowed, llama)
    pairs = list(zip(every.trees, windowed.trees, strict=True))
    assert len(pairs) > 10
    for mine, theirs in pairs:
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.parents, theirs.parents)
    narrow = Watched(llama, made_head(llama), SHAPE, 3)
    run(narrow, llama)
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(every.trees, narrow.trees, strict=False))


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("layers", [1, 2])
def test_native_code_drafts_through_the_window_as_modules_do(layers: int) -> None:
    target = packed_target(vocab=61)
    torch.manual_seed(7)
    sizes = FeatExtrapolatorConfig.for_target(target.config, num_hidden_layers=layers)
    head = Head(FeatExtrapolator(sizes).requires_grad_(False), torch.arange(0, 61, 2), {})
    expected = vanilla(target, PROMPTS, 40)
    for window in (1, 12):
        found: list[Watched] = []
        for path in ("proposals", "layers", "modules"):
            drafter = Watched(target, copy.deepcopy(head), SHAPE, window)
            growing = drafter._prepared(drafter.configs[1], None)
            assert growing is not None and growing.one_call is not None and drafter._forward.stack is not None
            if path != "proposals":
                drafter._forward._native_head = None
                drafter._shapes.clear()
            if path == "modules":
                drafter._forward.stack = None
            found.append(drafter)
            assert run(drafter, target, chunk=32) == expected
        for trees in zip(*(drafter.trees for drafter in found), strict=True):
            assert all(torch.equal(trees[0].tokens, tree.tokens) for tree in trees[1:])
            assert all(torch.equal(trees[0].parents, tree.parents) for tree in trees[1:])
        for states in zip(*(drafter.states for drafter in found), strict=True):
            assert all(torch.equal(states[0], each) for each in states[1:])


def test_a_text_goes_on_after_what_a_window_has_skipped(llama: Target) -> None:
    """Turns of one dialogue: the next, one cut back a little, and one cut back behind the window."""
    drafter = EagleDrafter(llama, made_head(llama), SHAPE, 5)
    engine, text = Engine(llama, drafter), list(PROMPTS[0])
    reused = []
    for keep in (None, 100, 20):
        text, stats = [*text[:keep], 3, 1, 4], Stats()
        said = [t for e in engine.run([text], SamplingParams(), StopParams(75), stats) for t in e.tokens]
        assert said == vanilla(llama, [text], 75)[0]
        reused.append(stats.recalled_tokens)
        text = [*text, *said]
    assert reused[1] == 99 and reused[2] in (0, 19), "where the head has not what it needs, nothing is reused"


def test_a_window_below_one_is_refused(llama: Target) -> None:
    with pytest.raises(ValueError, match="draft_window=0 is not allowed: give 1 or more"):
        EagleDrafter(llama, made_head(llama), SHAPE, 0)
