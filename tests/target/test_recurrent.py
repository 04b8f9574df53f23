"""Recurrent layers: what is measured of a mixer when a model is loaded, calls for trees, and kept states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from fakes import decode, random_head, vanilla
from hybrids import (
    INCONSISTENT,
    PURE,
    families,
    fast,
    fresh_hybrid,
    hybrid_target,
    needs_cache,
    some_text,
    tiny_hybrid,
)
from torch import Tensor, nn

from haast.device import without_autograd
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.errors import UnsupportedModelError
from haast.heads.checkpoint import Head
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.target import mixers, projections
from haast.target.kv_pool import BLOCK, KVPool
from haast.target.packing import pack_linears
from haast.target.recurrent import TextState
from haast.target.snapshots import Snapshots
from haast.target.target import Target
from haast.training.data import TokenSequence
from haast.training.features import in_memory
from haast.training.initialise import why_not_last_layer
from haast.tree import DraftTree

pytestmark = needs_cache
ONE_TOKEN = ("jamba", "zamba", "mamba", "falcon_mamba")  # from a given state these take one token only
PARENTS = [-1, 0, 0, 1, 1, 2, 3]


@families
def test_what_is_measured_of_a_model(kind: str) -> None:
    layout = hybrid_target(kind).probed.layout
    assert layout is not None and layout.nbytes > 0
    for mixer in layout.mixers:
        assert mixer.continues == (kind not in ONE_TOKEN)
        assert mixer.consistent == (kind not in INCONSISTENT)
        assert mixer.ends.first and (mixer.ends.last or kind == "zaya")
    assert bool(layout.attention_layers) == (kind not in PURE)


@families
def test_a_node_is_its_path(kind: str) -> None:
    """Features and logits of a tree after a past are those of its paths, each as a chain; the rows differ in length."""
    target = hybrid_target(kind)
    past = torch.tensor([some_text(7, 1), some_text(7, 2)])
    live = torch.arange(7) < torch.tensor([[7], [4]])
    nodes = torch.tensor([some_text(7, 3), some_text(7, 4)])

    def run(tree: DraftTree) -> Any:
        cache = target.new_cache(2)
        target.forward(DraftTree.chain(past, live), cache, last_only=True)
        cache.advance([7, 4])
        return target.forward(tree, cache)

    whole = run(DraftTree.from_parents(nodes, torch.tensor([PARENTS] * 2)))
    for path in ([0, 1, 3, 6], [0, 1, 4], [0, 2, 5]):
        alone = run(DraftTree.chain(nodes[:, path]))
        assert float((whole.features[:, path] - alone.features).abs().max()) < 1e-5
        assert float((whole.logits[:, path] - alone.logits).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", INCONSISTENT)
def test_what_was_decoded_is_computed_one_by_one_again(kind: str) -> None:
    """After a preemption, where a model computes a prompt's tokens otherwise than single ones."""
    target, text, prompt = hybrid_target(kind), some_text(15), 10

    def state(parts: list[list[int]], decoded_from: int | None = None) -> Tensor:
        cache = target.new_cache()
        cache.sequences[0].decoded_from = decoded_from
        for part in parts:
            target.forward(DraftTree.chain(torch.tensor([part])), cache, last_only=True)
            cache.advance([len(part)])
        kept = cache.sequences[0].state
        assert isinstance(kept, TextState) and kept.length == len(text)
        return torch.cat([each.flatten().double() for states in kept.states for each in states.values()])

    decoded = state([text[:prompt], *([token] for token in text[prompt:])])
    assert float((state([text], decoded_from=prompt) - decoded).abs().max()) < 1e-9
    assert float((state([text]) - decoded).abs().max()) > 1e-7, "as a prompt it has another state"


# ------------------------------------------------------------------ linear layers at the ends


@fast
def test_linear_layers_run_once_per_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_hybrid(kind)
    target = Target(model)
    layout = target.probed.layout
    assert layout is not None
    mixer = layout.mixers[0]
    ends = {model.get_submodule(f"{mixer.name}.{name}") for name in (*mixer.ends.first, mixer.ends.last)}
    calls, forward = Counter[nn.Module](), nn.Linear.forward

    def counting(self: nn.Linear, states: Tensor) -> Tensor:
        calls[self] += 1
        return forward(self, states)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    tree = DraftTree.from_parents(torch.tensor([some_text(7)]), torch.tensor([PARENTS]))
    shared = target.forward(tree, target.new_cache()).logits
    assert {calls[module] for module in ends} == {1}
    calls.clear()
    for module in ends:  # a user's hook sees what it would see without sharing
        module.register_forward_hook(lambda _module, _inputs, _output: None)
    plain = target.forward(tree, target.new_cache()).logits
    assert {calls[module] for module in ends} == {4}
    assert float((plain - shared).abs().max()) < 1e-6


def test_an_end_that_is_none_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a layer that is taken for an end, and is none, is found out when the model is loaded."""
    wrong = projections.Ends({"out_proj": 1.0})
    monkeypatch.setattr(mixers, "find_ends", lambda *_: wrong)
    layout = Target(fresh_hybrid("lfm2")).probed.layout
    assert layout is not None and not any(mixer.ends.first for mixer in layout.mixers)


@without_autograd
def test_packed_layers_are_the_ends_too() -> None:
    target = Target(fresh_hybrid("lfm2", torch.float32))
    pack_linears(target.model)
    prompts = [some_text(9), some_text(5)]
    assert vanilla(target, prompts, 6) == [vanilla(target, [prompt], 6)[0] for prompt in prompts]


# ------------------------------------------------------------------ what is refused


def test_a_mixer_that_is_of_no_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no state for several tokens, and computes one token otherwise: a prompt would depend on its chunks."""
    monkeypatch.setattr(mixers, "_close", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match="that takes no state for several tokens"):
        Target(fresh_hybrid("lfm2"))


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers, "_LAYER", None)
    with pytest.raises(UnsupportedModelError, match=r"^Lfm2ForCausalLM .* use transformers 5\.23 or newer"):
        Target(fresh_hybrid("lfm2"))


# ------------------------------------------------------------------ kept states


class Kept:
    """A state of a text."""

    def __init__(self, length: int, nbytes: int = 10) -> None:
        self.length, self.nbytes = length, nbytes


def test_the_least_recently_used_states_are_dropped() -> None:
    snapshots, blocks = Snapshots(30), [object(), object()]
    states = [Kept(length) for length in (5, 16, 20, 30)]
    snapshots.put(blocks[0], 5, states[0])
    snapshots.put(blocks[0], 16, states[1])
    snapshots.put(blocks[1], 4, states[2])
    assert snapshots.before(blocks, 30, 16) is states[2] and snapshots.before(blocks, 19, 16) is states[1]
    assert snapshots.before(blocks, 15, 16) is states[0] and snapshots.before(blocks, 4, 16) is None
    snapshots.put(blocks[1], 14, states[3])  # the one that was used the longest ago goes
    assert len(snapshots) == 3 and snapshots.before(blocks, 29, 16) is states[1]
    other = object()
    snapshots.move(blocks[0], other)
    assert snapshots.before([other], 16, 16) is states[1] and snapshots.before(blocks[:1], 16, 16) is None
    snapshots.forget(other)
    snapshots.put(blocks[0], 1, Kept(1, nbytes=31))  # larger than all that may be kept
    assert snapshots.nbytes == 10 * len(snapshots) and snapshots.before(blocks, 3, 16) is None


def test_a_prefix_is_reused_up_to_its_last_state() -> None:
    pool = KVPool(20 * BLOCK, snapshots=Snapshots(1000))
    text = list(range(50))
    first = pool.sequence()
    first.reserve(50)
    for length in (32, 40, 50):
        first.length = length
        first.enter(Kept(length))
    first.release(text, 50)
    # The last common position is computed again, for its features.
    for tokens, length in (([*text, 7], 40), (text[:41], 40), (text[:40], 32), ([*text[:33], 7], 32), (text[:32], 0)):
        again = pool.sequence()
        assert pool.usable(tokens, None, None, False) == (length + 1 if length else 0)
        assert again.reuse(tokens)[0] == again.length == length
        assert (again.state.length if again.state else 0) == length
        again.release()
    assert pool.available == pool.blocks


def test_states_of_a_long_prompt_are_thinned_out() -> None:
    """Every other one, from the end: the newest stays, and all parts of the prompt keep some."""
    pool = KVPool(200 * BLOCK, snapshots=Snapshots(80))
    text = list(range(100 * BLOCK))
    prompt = pool.sequence()
    prompt.reserve(len(text))
    for number in range(1, 101):
        prompt.length = number * BLOCK
        prompt.enter(Kept(prompt.length))
    prompt.publish(text, len(text))
    snapshots = pool.snapshots
    assert snapshots is not None and 4 <= len(snapshots) <= 8
    assert pool.usable([*text, 1], None, None, False) == len(text) - BLOCK + 1
    assert pool.usable(text[: 70 * BLOCK], None, None, False) > 0


# ------------------------------------------------------------------ training


@fast
def test_features_of_a_hybrid_are_the_models_own(kind: str) -> None:
    """Batches of texts of different lengths: padding enters no state."""
    model, texts = tiny_hybrid(kind), [some_text(length, length) for length in (17, 9, 12)]
    target = hybrid_target(kind)
    sequences = [TokenSequence(text, [True] * len(text), {}) for text in texts]
    examples = in_memory(target, sequences, topk=4, layer_ids=(1,))
    for text, example in zip(texts, examples, strict=True):
        with torch.inference_mode():
            output = model(torch.tensor([text]), output_hidden_states=True)
        for mine, theirs in ((example.features, output.hidden_states[-1]), (example.hidden, output.hidden_states[1])):
            assert float((mine.double() - theirs[0]).abs().max()) < 2e-3 * float(theirs.abs().max())


@fast
def test_heads_fit_a_hybrid(kind: str) -> None:
    """An Eagle3Head reads any layers; a FeatExtrapolator starts from random weights, and a line says why."""
    target = hybrid_target(kind)
    config = FeatExtrapolatorConfig.for_target(target.config)
    assert why_not_last_layer(target, config), "no line that says why"
    torch.manual_seed(2)
    eagle3 = Eagle3Head(Eagle3Config.for_target(target.config, layer_ids=(0, 1, 2))).to(target.dtype)
    for head in (random_head(target), Head(eagle3, None, {})):
        drafter = EagleDrafter(target, head, DraftShape(nodes=6))
        prompt = some_text(20)
        assert decode(target, drafter, [prompt], 8) == vanilla(hybrid_target(kind), [prompt], 8)
