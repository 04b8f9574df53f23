"""Medusa heads: what each guesses, the tree of their guesses, training, files, and losslessness."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import decode, random_head, tiny_target, vanilla
from torch import Tensor

from haast.core import Accepted, SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import head_drafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.tree_shape import DraftShape, likeliest_paths
from haast.errors import HeadMismatchError
from haast.heads import checkpoint
from haast.heads.checkpoint import Head, load_head, save_head
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.target.kv_pool import KVPool
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.training.batches import Example, pack
from haast.training.config import TrainConfig
from haast.training.data import TokenSequence
from haast.training.diagnostics import overfit_self_test
from haast.training.features import stream_examples
from haast.training.objective import Objective, rank_accuracies
from haast.training.scaled_head import TrainedHead, make_head
from haast.training.target_weights import TargetWeights
from haast.tree import DraftTree

ACCURACIES = [[0.6, 0.2, 0.1], [0.4, 0.3, 0.1], [0.3, 0.1, 0.1]]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def medusa(target: Target, heads: int = 3, blocks: int = 2, drafted: Tensor | None = None, **about: Any) -> Head:
    config = MedusaConfig(target.hidden_size, target.vocab_size, heads, blocks)
    module = MedusaHeads(config, None if drafted is None else len(drafted)).to(target.dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.4)
    return Head(module.eval().requires_grad_(False), drafted, {"rank_accuracies": ACCURACIES[:heads], **about})


def sequences(vocab: int, count: int = 8) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        prompt, answer = 3 + number % 3, 7 + number % 4
        tokens = torch.randint(2, vocab, (prompt + answer,), generator=generator).tolist()
        made.append(TokenSequence(tokens, [False] * prompt + [True] * answer, {"id": str(number)}))
    return made


@pytest.fixture(scope="module")
def examples(target: Target) -> list[Example]:
    made = dict(stream_examples(target, sequences(target.vocab_size), topk=6, batch_tokens=64))
    return [made[i] for i in range(len(made))]


def scaled(
    target: Target, examples: list[Example], drafted: Tensor, heads: int = 3
) -> tuple[TrainedHead, TargetWeights]:
    frozen = TargetWeights.of(target)
    frozen = replace(frozen, embeddings=frozen.embeddings.double(), lm_head=frozen.lm_head.double())
    sizes = MedusaConfig(target.hidden_size, target.vocab_size, heads, 2)
    return make_head(TrainConfig(head="medusa", medusa_heads=heads), sizes, frozen, examples, drafted), frozen


def shake(head: TrainedHead) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)


def test_every_block_has_weights_of_its_own(target: Target) -> None:
    module = medusa(target).module
    assert isinstance(module, MedusaHeads)
    assert len({parameter.data_ptr() for parameter in module.parameters()}) == 3 * (2 * 2 + 1)
    feature = torch.randn(2, target.hidden_size, dtype=target.dtype)
    before = module(feature)
    second: Any = module[1]
    second[0].linear.weight[0, 0] += 1.0
    changed = (module(feature) != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_untrained_heads_all_say_what_the_target_says_next(target: Target, examples: list[Example]) -> None:
    every = torch.arange(target.vocab_size)
    plain = scaled(target, examples, every)[0].plain()
    features = examples[0].features.double()
    for logits in plain(features):
        torch.testing.assert_close(logits, target.head_logits(features))


def test_the_trained_head_is_the_one_that_users_get(target: Target, examples: list[Example]) -> None:
    drafted = torch.arange(2, 20)
    head, frozen = scaled(target, examples, drafted)
    shake(head)
    config, batch = TrainConfig(head="medusa"), pack(examples)
    _, sums = Objective(head, frozen, drafted, config)(batch)
    ce, right, tried = brute_force(head.plain().requires_grad_(False), examples, drafted, frozen)
    torch.testing.assert_close(sums["ce"], ce[0])
    assert [int(sums[f"right_{i}"]) for i in range(3)] == right
    assert [int(sums[f"tried_{i}"]) for i in range(3)] == tried
    mean = sum(0.8**i * float(ce[i]) / tried[i] for i in range(3)) / (1 + 0.8 + 0.64)
    assert float(sums["loss"]) == pytest.approx(mean * batch.supervised_count)
    measured = rank_accuracies(head.plain(), examples, drafted)  # type: ignore[arg-type]
    assert [row[0] for row in measured] == [round(r / t, 5) for r, t in zip(right, tried, strict=True)]
    assert all(sum(row) <= 1.0001 for row in measured)


def test_blocks_and_lm_heads_have_the_gradient_of_the_plain_formula(target: Target, examples: list[Example]) -> None:
    drafted = torch.arange(2, 20)
    head, frozen = scaled(target, examples, drafted)
    shake(head)
    loss, sums = Objective(head, frozen, drafted, TrainConfig(head="medusa"))(pack(examples))
    loss.backward()
    plain = head.plain()
    ce, _, tried = brute_force(plain, examples, drafted, frozen)
    mean = sum(0.8**i * ce[i] / tried[i] for i in range(3)) / (1 + 0.8 + 0.64) * float(sums["views"])
    mean.backward()  # type: ignore[union-attr]
    units = head.scales.feature  # plain = trained / units
    for name, wanted in plain.named_parameters():
        assert wanted.grad is not None and float(wanted.grad.abs().max()) > 0, name
        own = wanted.grad / units if wanted.ndim == 2 else wanted.grad
        torch.testing.assert_close(head.trained(name).grad, own, msg=name)


def test_training_moves_the_lm_heads_below_what_blocks_alone_reach(target: Target, examples: list[Example]) -> None:
    drafted = torch.arange(target.vocab_size)

    def trained(lm_heads: bool) -> tuple[float, float]:
        """The loss after a few steps without weight decay, and how far the LM heads went."""
        head, frozen = scaled(target, examples, drafted)
        objective, batch = Objective(head, frozen, drafted, TrainConfig(head="medusa")), pack(examples)
        own = [head.trained(f"{i}.2.weight") for i in range(3)]
        before = [weight.detach().clone() for weight in own]
        for weight in own:
            weight.requires_grad_(lm_heads)
        learning = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.01)
        for _ in range(20):
            learning.zero_grad()
            objective(batch)[0].backward()
            learning.step()
        moved = [float((now.detach() - then).abs().max()) for now, then in zip(own, before, strict=True)]
        return float(objective(batch)[0].detach()), min(moved)

    (whole, moved), (blocks, still) = trained(lm_heads=True), trained(lm_heads=False)
    assert moved > 0.05 and still == 0 and whole < 0.9 * blocks, (whole, blocks, moved)


def brute_force(
    plain: Any, examples: list[Example], drafted: Tensor, frozen: TargetWeights
) -> tuple[list[Tensor], list[int], list[int]]:
    """Position by position: head i at t is held against what the target says after x_{t+1+i}."""
    ce, right, tried = [torch.zeros(()).double() for _ in range(3)], [0, 0, 0], [0, 0, 0]
    ids = drafted.tolist()
    for example in examples:
        answer = example.supervised.bool().tolist()
        for t in range(len(example.tokens) - 2):
            for i in range(3):
                span = range(t + 1, t + i + 3)  # x_{t+1} .. x_{t+2+i}, the last being what is guessed
                if span[-1] >= len(answer) or not all(answer[j] for j in span):
                    continue
                logits = plain[i](example.features[t].double())
                chances = logits.log_softmax(-1)
                teacher = zip(example.topk_ids[t + 1 + i].tolist(), example.topk_probs[t + 1 + i].double(), strict=True)
                ce[i] -= sum((p * chances[ids.index(token)] for token, p in teacher if token in ids), torch.zeros(()))
                tried[i] += 1
                right[i] += ids[int(logits.argmax())] == int(example.topk_ids[t + 1 + i, 0])
    return ce, right, tried


def test_likeliest_paths() -> None:
    chances: dict[tuple[int, ...], float] = {}
    for depth in (1, 2, 3):
        for path in itertools.product(range(3), repeat=depth):
            chances[path] = math.prod(ACCURACIES[level][rank] for level, rank in enumerate(path))
    best = sorted(chances.values(), reverse=True)
    for count in range(1, 40):
        found = likeliest_paths(ACCURACIES, count)
        assert [chances[path] for path in found] == pytest.approx(
            best[:count]
        )  # the most that a tree of so many nodes can bring
        assert all(path[:-1] in found for path in found if len(path) > 1)
    assert len(likeliest_paths(ACCURACIES, 99)) == len(chances)


@pytest.mark.parametrize("nodes", [2, 6, 20])
def test_the_tree_combines_the_heads_best_guesses(target: Target, nodes: int) -> None:
    drafted = torch.arange(3, 30)
    head = medusa(target, drafted=drafted)
    drafter = MedusaDrafter(target, head, nodes)
    features = torch.randn(2, 3, target.hidden_size, dtype=target.dtype)
    states = begun(drafter, 2)
    drafter.observe(states, Accepted(torch.tensor([[4, 5, 6], [7, 8, 0]]), features, torch.tensor([3, 2])))
    assert drafter.propose(states).nodes == nodes == drafter.nodes
    check_guesses(drafter.propose(states), head, features, nodes)
    for budget in (1, 2, 5, nodes, nodes + 9):  # the likeliest of them
        check_guesses(drafter.propose(states, budget), head, features, min(budget, nodes))


def begun(drafter: MedusaDrafter, rows: int) -> list[Any]:
    return [drafter.begin([1], KVPool(16).sequence(), 0) for _ in range(rows)]


def check_guesses(tree: DraftTree, head: Head, features: Tensor, nodes: int) -> None:
    """The tree of so many nodes for two rows whose last kept positions are the third and the second."""
    module: Any = head.module
    assert head.draft_vocab is not None
    drafted = head.draft_vocab
    assert tree.nodes == nodes and bool(tree.live.all()) and tree.height == int(tree.depths.max())
    assert tree.tokens[:, 0].tolist() == [6, 8]
    paths = sorted(likeliest_paths(ACCURACIES, nodes - 1), key=lambda path: (len(path), path))
    for row, feature in enumerate((features[0, 2], features[1, 1])):
        best = [drafted[logits.topk(3).indices].tolist() for logits in (module[i](feature) for i in range(3))]
        for node, path in enumerate(paths, start=1):
            assert tree.tokens[row, node] == best[len(path) - 1][path[-1]]
            parent = int(tree.parents[row, node])
            assert parent == (0 if len(path) == 1 else 1 + paths.index(path[:-1]))
            assert tree.depths[row, node] == len(path)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_vanillas(target: Target, temperature: float) -> None:
    prompts = [[3, 4, 5, 6], [7, 8], [9] * 11]
    sampling = SamplingParams(temperature, seed=4)
    drafter = MedusaDrafter(target, medusa(target), 12)
    wanted = vanilla(target, prompts, 30, sampling)
    assert decode(target, drafter, prompts, 30, sampling) == wanted


def test_a_packed_target_drafts_the_same_guesses() -> None:
    plain = tiny_target()
    head = medusa(plain)
    model: Any = plain.model
    packed = Target(model.float())
    pack_linears(packed.model)
    reference = copy.deepcopy(head.module).float()
    drafter = MedusaDrafter(packed, head, 4)
    features, same = torch.randn(40, packed.hidden_size, generator=torch.Generator().manual_seed(1)), 0
    for feature in features:
        states = begun(drafter, 1)
        drafter.observe(states, Accepted(torch.tensor([[4]]), feature.view(1, 1, -1), torch.tensor([1])))
        same += int(drafter.propose(states).tokens[0, 1]) == int(reference(feature)[0].argmax())
    assert same >= 38  # 8-bit LM heads may swap two guesses that are all but equal


def test_accuracies_that_are_none_are_refused(target: Target) -> None:
    for wrong in ([[0.5]], [[0.5], [2.0], [0.1]], [[0.5], [], [0.1]], "much", [0.5, 0.3, 0.2]):
        with pytest.raises(ValueError, match="rank_accuracies"):
            MedusaDrafter(target, medusa(target, rank_accuracies=wrong), 6)
    told = medusa(target)
    del told.about["rank_accuracies"]
    assumed = MedusaDrafter(target, told, 6)
    assert len(assumed.accuracies) == 3 and assumed.accuracies[0][0] > assumed.accuracies[1][0]
    with pytest.raises(ValueError, match="nodes=1"):
        MedusaDrafter(target, medusa(target), 1)


def test_kinds_of_head_are_told_apart(target: Target) -> None:
    with pytest.raises(HeadMismatchError, match="MedusaHeads can't draft as EAGLE"):
        EagleDrafter(target, medusa(target))
    with pytest.raises(HeadMismatchError, match="FeatExtrapolator does not draft as Medusa"):
        MedusaDrafter(target, random_head(target), 6)
    shape = DraftShape(nodes=7)
    assert isinstance(head_drafter(target, medusa(target), shape), MedusaDrafter)
    assert head_drafter(target, medusa(target), shape).nodes == 7
    assert isinstance(head_drafter(target, random_head(target), shape), EagleDrafter)
    other = medusa(tiny_target(vocab=target.vocab_size + 1))
    with pytest.raises(HeadMismatchError, match="vocab_size"):
        MedusaDrafter(target, other, 6)


@pytest.mark.parametrize("part", ["20MB", "1KB"])
def test_files(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    drafted = torch.arange(2, 30)
    head = medusa(target, drafted=drafted)
    config: Any = head.module.config
    save_head(tmp_path, config, dict(head.module.state_dict()), drafted, head.about, torch.float32)
    monkeypatch.setattr(checkpoint, "_SHARD_SIZE", part)
    save_head(tmp_path, config, dict(head.module.state_dict()), drafted, head.about, torch.float32)
    split = part == "1KB"
    assert (tmp_path / "model.safetensors").exists() != split
    assert (tmp_path / "model.safetensors.index.json").exists() == split
    loaded = load_head(tmp_path)
    assert loaded.module.config == config and loaded.about == head.about
    assert loaded.draft_vocab is not None and loaded.draft_vocab.tolist() == drafted.tolist()
    names = {f"{i}.{j}.linear.{kind}" for i in range(3) for j in range(2) for kind in ("weight", "bias")}
    assert set(loaded.module.state_dict()) == names | {f"{i}.2.weight" for i in range(3)}
    feature = torch.randn(2, target.hidden_size)
    torch.testing.assert_close(loaded.module(feature), head.module.float()(feature))
    head.module.double()
    if split:
        index = tmp_path / "model.safetensors.index.json"
        told = json.loads(index.read_text())
        index.write_text(json.dumps({"weight_map": {"0.2.weight": "../elsewhere.safetensors"}}))
        with pytest.raises(HeadMismatchError, match="outside the head's folder"):
            load_head(tmp_path)
        index.write_text("{}")
        with pytest.raises(HeadMismatchError, match="not an index of weights"):
            load_head(tmp_path)
        index.write_text(json.dumps(told))
        (tmp_path / next(iter(told["weight_map"].values()))).unlink()
        with pytest.raises(HeadMismatchError, match="is missing"):
            load_head(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head": 3}, "'head' is not a JSON object"), ({"head": None}, "'head' is not a JSON object"),
        ({"about": [1]}, "'about' is not a JSON object"), ({"format": []}, "not written by Haast"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_told_by_name(target: Target, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    head = medusa(target)
    config: Any = head.module.config
    save_head(tmp_path, config, dict(head.module.state_dict()), None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HeadMismatchError, match=words):
        load_head(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(HeadMismatchError, match="is not JSON"):
        load_head(tmp_path)


def test_a_head_count_that_the_files_do_not_hold_is_refused_at_once(target: Target, tmp_path: Path) -> None:
    head = medusa(target)
    config: Any = head.module.config
    save_head(tmp_path, config, dict(head.module.state_dict()), None)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["head"]["heads"] = 10**9  # modules of so many heads would never be built
    path.write_text(json.dumps(document))
    with pytest.raises(HeadMismatchError, match="1000000000 Medusa heads"):
        load_head(tmp_path)


@pytest.mark.parametrize("sizes", [{"heads": 0}, {"blocks": 0}, {"neads": 3}])
def test_sizes_that_make_no_head_are_refused(target: Target, tmp_path: Path, sizes: dict[str, int]) -> None:
    head = medusa(target)
    config: Any = head.module.config
    save_head(tmp_path, config, dict(head.module.state_dict()), None)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["head"] |= sizes
    path.write_text(json.dumps(document))
    with pytest.raises(HeadMismatchError, match=next(iter(sizes))):
        load_head(tmp_path)


def test_a_batch_is_learned_by_heart(target: Target, examples: list[Example], tmp_path: Path) -> None:
    sizes = MedusaConfig(target.hidden_size, target.vocab_size, 2, 1)
    assert overfit_self_test(sizes, TargetWeights.of(target), examples, tmp_path, steps=200) >= 0.9


def test_options_of_eagle_are_refused() -> None:
    for wrong in ({"alignment_steps": 2}, {"markov_rank": 4}, {"inputs": "feature"}, {"ce_weight": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainConfig(head="medusa", **wrong)
