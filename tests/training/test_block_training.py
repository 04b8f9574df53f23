"""Training of block heads: states of packed blocks, the loss and its gradient, the start from the target, a run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import decode, vanilla
from test_heads import DRAFTED, LAYERS, VOCAB, llama, sequences
from torch import Tensor
from torch.nn.functional import cross_entropy

from haast.drafters.block import BlockDrafter
from haast.drafters.tree_shape import shape_for
from haast.heads.block import BlockConfig, BlockHead
from haast.heads.checkpoint import load_head
from haast.stats import Stats
from haast.target.target import Target
from haast.training.batches import Example, PackedBatch, pack
from haast.training.block_loss import block_loss
from haast.training.block_passes import block_states, choose_anchors
from haast.training.config import TrainConfig
from haast.training.data import TokenSequence
from haast.training.features import stream_examples
from haast.training.initialise import last_layers
from haast.training.objective import Objective
from haast.training.run import Run
from haast.training.scaled_head import TrainedHead, make_head
from haast.training.target_weights import TargetWeights

SIZES = {"layer_ids": LAYERS, "num_hidden_layers": 2, "block_size": 4, "markov_rank": 4, "confidence": True}


@cache
def target() -> Target:
    return llama()


@cache
def examples() -> list[Example]:
    made = stream_examples(target(), sequences(), topk=8, batch_tokens=64, layer_ids=LAYERS)
    return [example for _, example in sorted(made, key=lambda pair: pair[0])]


def weights(layers: int = 0) -> TargetWeights:
    frozen = TargetWeights.of(target())
    frozen = replace(frozen, embeddings=frozen.embeddings.double(), lm_head=frozen.lm_head.double())
    return replace(frozen, layers=last_layers(target(), config(), layers)) if layers else frozen


def config(**more: Any) -> BlockConfig:
    return BlockConfig.for_target(target().config, **(SIZES | {"confidence_markov": True} | more))


def made(sizes: BlockConfig | None = None, layers: int = 0) -> TrainedHead:
    settings = TrainConfig(head="block", output_init=1.0)
    return make_head(settings, sizes or config(), weights(layers), examples(), DRAFTED)


def block_of(head: BlockHead, example: Example, anchor: int) -> Tensor:
    """States (slots, hidden) of the block at one anchor, by the head's own forward."""
    embeddings, tokens = weights().embeddings, example.tokens.long()
    context = head.fuse(example.hidden[:anchor].double())
    return head.at_anchors(context, lambda ids: embeddings[ids], tokens[anchor][None], torch.tensor([anchor]))[0]


@pytest.mark.parametrize("more", [{}, {"causal": True, "qk_norm": True}])
def test_packed_blocks_have_the_states_that_drafting_has(more: dict[str, Any]) -> None:
    head: Any = made(config(**more)).plain()
    head.double()
    chosen = examples()[:3]
    batch = pack(chosen, ("hidden",))
    anchors = choose_anchors(batch, 4, seed=3)
    found = block_states(head, batch, weights().embeddings, batch.features.double(), anchors)
    sequence = batch.query_places[anchors] // batch.query_slots.shape[1]
    for index, (row, number) in enumerate(zip(anchors.tolist(), sequence.tolist(), strict=True)):
        anchor = int(batch.positions[batch.queries[row]]) + 1
        expected = block_of(head, chosen[number], anchor)
        assert torch.allclose(found[index], expected, rtol=1e-5, atol=1e-5)  # norms round to fp32


def test_anchors_are_a_function_of_the_seed_and_limited_per_sequence() -> None:
    batch = pack(examples(), ("hidden",))
    sequence = batch.query_places // batch.query_slots.shape[1]
    for seed in (None, 1):
        anchors = choose_anchors(batch, 3, seed)
        assert torch.equal(anchors, choose_anchors(batch, 3, seed)) and bool((anchors.diff() > 0).all())
        assert torch.bincount(sequence[anchors]).tolist() == [3] * len(examples())
    assert not torch.equal(choose_anchors(batch, 3, 1), choose_anchors(batch, 3, 2))
    assert torch.equal(choose_anchors(batch, 99, 1), torch.arange(batch.supervised_count))


def test_the_loss_is_the_papers_and_so_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    teacher = torch.randn(300, 11, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    probs, ids = teacher.topk(11)
    labels = torch.randint(-1, 11, (300,), generator=generator)
    found = block_loss(features, weight, labels, ids, probs, bias, frozen_columns=2)
    gradients = torch.autograd.grad(found.loss, (features, weight))

    logits = features @ weight.T + bias
    distance = (logits.softmax(-1) - teacher).abs().sum(-1)
    ce = cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    expected = 0.1 * ce + 0.9 * distance.sum()
    wanted = torch.autograd.grad(expected, (features, weight))
    assert torch.allclose(found.loss, expected) and torch.allclose(found.ce, ce)
    assert torch.allclose(found.overlap, 1 - distance / 2)
    assert torch.allclose(gradients[0], wanted[0]) and torch.allclose(gradients[1][:, 2:], wanted[1][:, 2:])
    assert not gradients[1][:, :2].any()
    assert int(found.hits) == int((logits.argmax(-1) == teacher.argmax(-1)).sum())


def test_slots_learn_the_tokens_that_follow_their_anchor() -> None:
    """The labels of the objective, written down from the text: shifted by one they give another loss."""
    head, batch = made(), pack(examples(), ("hidden",))
    settings = TrainConfig(head="block", block_anchors=2)
    objective = Objective(head, weights(), DRAFTED, settings)
    _, sums = objective(batch)
    module: Any = head.module
    features = batch.features.double()
    states = module.normed(block_states(module, batch, weights().embeddings, features, anchors_of(batch)))
    hits, tried = [0] * 4, [0] * 4
    for index, row in enumerate(anchors_of(batch).tolist()):
        example = examples()[int(batch.query_places[row]) // batch.query_slots.shape[1]]
        anchor = int(batch.positions[batch.queries[row]]) + 1
        for slot in range(4):
            place = anchor + slot  # predicts the token at place + 1, after the one at place
            if place + 1 >= len(example.tokens):
                break
            logits = weights().lm_head[DRAFTED] @ states[index, slot]
            logits = logits + module.markov_bias(states[index, slot], example.tokens[place].long())
            tried[slot] += 1
            hits[slot] += int(DRAFTED[logits.argmax()] == example.topk_ids[place, 0])
    assert [int(sums[f"tried_{slot}"]) for slot in range(4)] == tried
    assert [int(sums[f"right_{slot}"]) for slot in range(4)] == hits


def anchors_of(batch: PackedBatch) -> Tensor:
    return choose_anchors(batch, 2, None)


def test_layers_start_as_the_targets_last_ones() -> None:
    """Fed with the target's stream, such a layer computes what the target's layer does, up to the units."""
    plain: Any = made(layers=2).plain().double()
    started, fresh = weights(2).layers, made().plain()
    assert isinstance(fresh, BlockHead)
    new: Any = fresh.layers[1]
    assert len(started) == 2
    model: Any = target().model
    layer = model.model.layers[-1]
    gain = layer.input_layernorm.weight.detach()
    expected = layer.self_attn.q_proj.weight.detach() * gain
    norm = plain.layers[1].input_layernorm.weight
    assert torch.allclose(plain.layers[1].self_attn.q_proj.weight * norm, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(new.self_attn.q_proj.weight.double(), plain.layers[1].self_attn.q_proj.weight)
    final = model.model.norm.weight.detach()
    assert torch.allclose(plain.norm.weight, final, rtol=1e-4)
    assert last_layers(target(), config(), 5) == ()  # the target has four
    other = replace(config(), intermediate_size=64)
    assert last_layers(target(), other, 2) == ()


def test_a_run_trains_saves_and_measures_tau(tmp_path: Path) -> None:
    settings = TrainConfig(
        head="block", views=300, block_size=4, block_markov_rank=4, block_anchors=4, draft_vocab=40, batch_tokens=60,
        evaluate_every=300, log_every=50, checkpoint_every=150, learning_rate=5e-3,
    )  # fmt: skip
    at = Target(llama(torch.float32).model)

    shards = examples_of(at)
    run, again = (Run(at, "tiny", settings, shards, [], "a test") for _ in range(2))
    result = run.train(tmp_path / "one", [], 8, 6, None, False)
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    head = load_head(tmp_path / "one" / "best")
    assert isinstance(head.module, BlockHead) and head.module.config.depths == 4
    assert "block head" in (tmp_path / "one" / "best" / "README.md").read_text()
    run._prompts = [[3, 4, 5]]
    assert head.draft_vocab is not None and run.measure_tau(head.module, head.draft_vocab) >= 1
    assert result["valid_ce"] == again.train(tmp_path / "two", [], 8, 6, None, False)["valid_ce"]


@pytest.mark.slow
def test_answers_learnt_by_heart_are_drafted_by_heart(tmp_path: Path) -> None:
    """All the way: the target's own text, a head that overfits it, and its drafts in the engine."""
    at = Target(llama(torch.float32).model)
    prompts = [[2 + (7 * row + place) % 50 for place in range(4)] for row in range(8)]
    answers = vanilla(at, prompts, 16)
    texts = [TokenSequence([*p, *a], [False] * 4 + [True] * len(a), {}) for p, a in zip(prompts, answers, strict=True)]
    learnt = [example for _, example in stream_examples(at, texts, topk=8, layer_ids=(1, 2))]
    views = 250 * sum(len(example.queries()) for example in learnt)
    rare: dict[str, Any] = {"log_every": views, "evaluate_every": views, "checkpoint_every": views}
    settings = TrainConfig(
        head="block", views=views, block_size=4, block_markov_rank=16, draft_vocab=VOCAB, batch_tokens=10_000,
        learning_rate=5e-3, **rare,
    )  # fmt: skip
    run = Run(at, "tiny", settings, learnt, [], "a test")
    run.train(tmp_path, [], 16, 6, None, False)
    stats, head = Stats(), load_head(tmp_path / "best")
    drafter = BlockDrafter(at, head, shape_for(8, depth=4))
    assert decode(at, drafter, prompts, 16, stats=stats) == answers
    assert stats.tau > 3


def examples_of(at: Target) -> list[Example]:
    made_ones = stream_examples(at, sequences(60), topk=8, batch_tokens=64, layer_ids=(1, 2))
    return [example for _, example in sorted(made_ones, key=lambda pair: pair[0])]


@pytest.mark.parametrize(
    "more", [{"layers": 2}, {"markov_rank": 8}, {"alignment_steps": 2}, {"lk_after": 0.5}, {"reach_weights": True}]
)
def test_settings_of_other_heads_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"head='block' does not use .*{next(iter(more))}"):
        TrainConfig(head="block", **more)
