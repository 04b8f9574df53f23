"""Both kinds of head, as trained and as users get them: the same function, the same drafts, losslessly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import drafted
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, StopParams
from haast.errors import HeadMismatchError
from haast.heads.checkpoint import Head, load_head, save_head
from haast.heads.config import HeadConfig
from haast.heads.eagle3 import Eagle3Config, default_layers
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.heads.module import DraftModule
from haast.target.fusing import fuse_small_modules
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.training import initialise
from haast.training.batches import Example, pack
from haast.training.config import TrainConfig
from haast.training.data import TokenSequence
from haast.training.diagnostics import overfit_self_test
from haast.training.features import extract, stream_examples
from haast.training.losses import teacher_loss
from haast.training.objective import Objective
from haast.training.run import head_config, start_parts
from haast.training.scaled_head import TrainedHead, make_head
from haast.training.shards import ShardIdentity, read_shards
from haast.training.target_weights import TargetWeights, bigram_directions
from haast.training.trainer import Trainer
from haast.training.training_time_test import chain_passes

VOCAB, HIDDEN, LAYERS = 60, 32, (1, 2, 3)
DRAFTED = torch.arange(2, 50)
KINDS: dict[str, dict[str, Any]] = {
    "feat": {},
    "feat, two layers": {"num_hidden_layers": 2},
    "feat, markov": {"markov_rank": 4},
    "feat, unshifted": {"inputs": "feature+token"},
    "feat, feature alone": {"inputs": "feature"},
    "feat, token alone": {"inputs": "token"},
    "feat, context": {"layer_ids": (*LAYERS, 4)},
    "eagle3": {"layer_ids": LAYERS},
    "eagle3, all options": {"layer_ids": LAYERS, "fc_norm": True, "num_hidden_layers": 2, "markov_rank": 4},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(dtype: torch.dtype = torch.float64) -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return Target(model.to(dtype))


@pytest.fixture(scope="module")
def target() -> Target:
    return llama()


def sequences(count: int = 10) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        prompt, answer = 3 + number % 3, 9 + number % 4
        tokens = torch.randint(2, VOCAB, (prompt + answer,), generator=generator).tolist()
        made.append(TokenSequence(tokens, [False] * prompt + [True] * answer, {"id": str(number)}))
    return made


@pytest.fixture(scope="module")
def examples(target: Target) -> list[Example]:
    made = stream_examples(target, sequences(), topk=8, batch_tokens=64, layer_ids=LAYERS)
    return [example for _, example in sorted(made, key=lambda pair: pair[0])]


def sizes(target: Target, kind: str) -> HeadConfig:
    settings: dict[str, Any] = KINDS[kind]
    family: type[HeadConfig] = Eagle3Config if kind.startswith("eagle3") else FeatExtrapolatorConfig
    return family.for_target(target.config, **settings)


def shaken(head: TrainedHead) -> TrainedHead:
    """Every parameter away from its start, so that no factor is hidden behind a one or a zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
    return head


def trained(target: Target, kind: str, examples: list[Example], dtype: torch.dtype = torch.float64) -> TrainedHead:
    frozen = TargetWeights.of(target)
    frozen = replace(frozen, embeddings=frozen.embeddings.to(dtype), lm_head=frozen.lm_head.to(dtype))
    config = TrainConfig(head="eagle3" if kind.startswith("eagle3") else "feat-extrapolator", output_init=1.0)
    return shaken(make_head(config, sizes(target, kind), frozen, examples, DRAFTED))


def plain(head: TrainedHead) -> DraftModule:
    module = head.plain()
    assert isinstance(module, DraftModule)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_passes_read_what_drafts_read(kind: str, target: Target, examples: list[Example]) -> None:
    """Pass s at the end of a chain equals the users' module over true pairs, then over its own states."""
    head = trained(target, kind, examples)
    module = plain(head)
    batch = pack(examples[:2], head.reads)
    embedded = target.embed(batch.next_tokens if module.follows_token else batch.tokens).clone()
    assert isinstance(head.module, DraftModule)
    first = int(batch.lengths[0])
    known = module.fuse(batch.features[:first].double().unsqueeze(0))[0].detach()
    seen = 0
    chain = chain_passes(head.module, batch, embedded, batch.features.double(), 3)
    for number, (output, rows) in enumerate(chain):
        for place, query in enumerate(rows.tolist()):
            end = int(batch.queries[query])
            if end >= first:
                break
            wanted = drafted(module, embedded, known[: end - number + 1], number)
            assert torch.allclose(output[place], wanted, atol=2e-5), (number, query)
            seen += 1
    assert number == 2 and seen > 20


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_drafting_see_the_same_logits(kind: str, target: Target, examples: list[Example]) -> None:
    """The cross-entropy of a batch is that of the users' module, states and logits computed sequence by sequence."""
    head = trained(target, kind, examples)
    module = plain(head)
    frozen = TargetWeights.of(target)
    frozen = replace(frozen, embeddings=frozen.embeddings.double(), lm_head=frozen.lm_head.double())
    config = TrainConfig(head="eagle3" if not head.regresses else "feat-extrapolator")
    batch, wanted = pack(examples[:3], head.reads), torch.zeros((), dtype=torch.float64)
    _, sums = Objective(head, frozen, DRAFTED, config)(batch)
    place = {int(token): number for number, token in enumerate(DRAFTED)}
    rows = module.lm_rows(target.head_rows(DRAFTED))
    for example in examples[:3]:
        one = pack([example], head.reads)
        embedded = target.embed(one.next_tokens if module.follows_token else one.tokens).clone().unsqueeze(0)
        states = module(embedded, module.fuse(one.features.double().unsqueeze(0)), one.positions.unsqueeze(0))
        read = module.lm_input(states, one.next_tokens.unsqueeze(0))[0, one.queries]
        for said, ids, probs in zip((read @ rows.T).log_softmax(-1), one.teacher_ids, one.teacher_probs, strict=True):
            for token, prob in zip(ids.tolist(), probs.tolist(), strict=True):
                wanted = wanted - prob * said[place[token]] if token in place else wanted
    assert torch.allclose(sums["ce"], wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_weights_come_back(kind: str, target: Target, examples: list[Example]) -> None:
    head = trained(target, kind, examples)
    other = trained(target, kind, examples)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_plain(head.plain_weights())
    for (name, one), (_, two) in zip(head.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(one, two), name
    with pytest.raises(ValueError, match=r"fc\.weight"):
        other.load_plain({})
    assert TargetWeights.of(target).final_gain is not None


@pytest.mark.parametrize("kind", KINDS)
def test_any_head_drafts_losslessly(kind: str, target: Target, examples: list[Example], tmp_path: Path) -> None:
    module = plain(trained(target, kind, examples))
    save_head(tmp_path, module.config, dict(module.state_dict()), DRAFTED, dtype=torch.float32)
    head = load_head(tmp_path)
    assert head.draft_vocab is not None and torch.equal(head.draft_vocab, DRAFTED)
    prompts = [[5, 9, 3, 7], [4, 4, 8]]
    stop, texts = StopParams(24), []
    for drafter in (VanillaDrafter(), EagleDrafter(target, head, DraftShape(depth=3, top_k=3, width=3, nodes=10))):
        for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=3)):
            rows: list[list[int]] = [[], []]
            for emission in Engine(target, drafter).run(prompts, sampling, stop):
                rows[emission.row].extend(emission.tokens)
            texts.append(rows)
    assert texts[:2] == texts[2:]


@pytest.mark.parametrize(
    "kind",
    [
        "feat, context",
        "eagle3, all options",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("feat", "feat, markov", "feat, two layers", "eagle3")
        ),
    ],
)
def test_a_batch_learnt_by_heart_is_drafted_by_heart(kind: str, examples: list[Example], tmp_path: Path) -> None:
    """Training, export and engine belong together: what the head was overfitted on is accepted nearly whole."""
    target = llama(torch.float32)
    generator = Engine(target, VanillaDrafter())
    prompt = [5, 9, 3, 7]
    text = prompt + [t for e in generator.run([prompt], SamplingParams(), StopParams(40)) for t in e.tokens]
    sequence = TokenSequence(text, [False] * 4 + [True] * 40, {})
    some = [e for _, e in stream_examples(target, [sequence], topk=4, layer_ids=LAYERS)]
    config = TrainConfig(
        views=38 * (350 if kind in ("feat", "feat, context") else 250), batch_tokens=60, draft_vocab=VOCAB,
        learning_rate=5e-3,
        alignment_steps=3,
        initialisation="random",
        log_every=10**6, evaluate_every=10**6, checkpoint_every=10**6,
        head="eagle3" if kind.startswith("eagle3") else "feat-extrapolator",
    )  # fmt: skip
    run = Trainer(config, sizes(target, kind), TargetWeights.of(target), some, some, tmp_path, quiet=True)
    found = run.run()
    assert found["valid_top1"] > 0.95, found
    drafter = EagleDrafter(target, Head(run.plain_head(), run.draft_vocab, {}), DraftShape(kind="chain", depth=3))
    engine, steps = Engine(target, drafter), 0
    got: list[int] = []
    for emission in engine.run([prompt], SamplingParams(), StopParams(40)):
        got.extend(emission.tokens)
        steps += 1
    assert prompt + got == text and steps <= 16, steps  # 40 tokens in chains of 3 drafts and a bonus


@pytest.mark.parametrize("kind", ["eagle3", "eagle3, all options", "feat, markov", "feat, context"])
def test_packed_targets_pack_every_head(kind: str, examples: list[Example]) -> None:
    target = llama(torch.float32)
    pack_linears(target.model)
    fuse_small_modules(target.model)
    head = Head(plain(trained(target, kind, examples, torch.float32)), DRAFTED, {})
    drafter = EagleDrafter(target, head, DraftShape(depth=2, top_k=3, width=3, nodes=6))
    texts = []
    for each in (VanillaDrafter(), drafter):
        out = Engine(target, each).run([[5, 9, 3, 7]], SamplingParams(), StopParams(24))
        texts.append([token for emission in out for token in emission.tokens])
    assert texts[0] == texts[1]


def test_the_lk_mix_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haast.training.losses._CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(8)])
    probs = torch.rand(8, 3, generator=generator, dtype=torch.float64) / 3
    importance = torch.rand(8, generator=generator, dtype=torch.float64)
    settings: dict[str, Any] = {"frozen_columns": 2, "sharpness": 3.0, "rejected": 2.0, "weights": importance}
    sums = teacher_loss(states, weight, ids, probs, **settings)
    own = torch.autograd.grad(sums.loss, (states, weight))
    law = (states @ weight.T).softmax(-1).gather(1, ids)
    acceptance = torch.minimum(law, probs).sum(-1)
    share = torch.exp(-3.0 * acceptance).detach()
    counts = importance * torch.where((states @ weight.T).argmax(-1) == ids[:, 0], 1.0, 2.0)
    wanted = (counts * (share * -(law.log() * probs).sum(-1) - (1 - share) * acceptance)).sum()
    reference = torch.autograd.grad(wanted, (states, weight))
    assert torch.allclose(sums.loss, wanted) and torch.allclose(sums.acceptance, acceptance)
    assert torch.allclose(own[0], reference[0])
    assert torch.allclose(own[1][:, 2:], reference[1][:, 2:]) and not own[1][:, :2].any()


def test_bigram_directions_tell_what_follows_what(target: Target) -> None:
    """Two groups of tokens, each followed by its own: one direction parts them, and unseen tokens are at zero."""
    tokens = [2, 10, 3, 11, 2, 11, 3, 10, 2, 10] * 3 + [4, 20, 5, 21, 4, 21, 5, 20] * 3
    made = stream_examples(target, [TokenSequence(tokens, [True] * len(tokens), {})], topk=2)
    directions = bigram_directions([e for _, e in made], VOCAB, DRAFTED, 4)
    assert directions.shape == (VOCAB, 4) and not directions[40].any()
    assert float(directions[[2, 3, 10, 11, 4, 5, 20, 21]].square().mean()) == pytest.approx(1.0, rel=1e-4)
    unit_rows = torch.nn.functional.normalize(directions, dim=1)
    alike = unit_rows @ unit_rows.T
    assert float(alike[2, 3]) > 0.9 and float(alike[4, 5]) > 0.9 and abs(float(alike[2, 4])) < 0.1


def test_an_official_eagle3_layout(target: Target, examples: list[Example], tmp_path: Path) -> None:
    module = plain(trained(target, "eagle3", examples))
    save_head(tmp_path, module.config, dict(module.state_dict()), DRAFTED)
    stored = load_file(tmp_path / "model.safetensors")
    wide = {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2}
    wanted: dict[str, tuple[int, ...]] = {
        f"midlayer.self_attn.{name}.weight": (rows, 2 * HIDDEN) for name, rows in wide.items()
    }
    wanted |= {"midlayer.self_attn.o_proj.weight": (HIDDEN, HIDDEN), "fc.weight": (HIDDEN, 3 * HIDDEN)}
    wanted |= {f"midlayer.mlp.{name}_proj.weight": (48, HIDDEN) for name in ("gate", "up")}
    wanted |= {"midlayer.mlp.down_proj.weight": (HIDDEN, 48), "lm_head.weight": (48, HIDDEN), "norm.weight": (HIDDEN,)}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    wanted |= {f"midlayer.{name}.weight": (HIDDEN,) for name in norms} | {"d2t": (48,), "t2d": (VOCAB,)}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == wanted
    assert int(stored["t2d"].sum()) == 48 and torch.equal(torch.arange(48) + stored["d2t"], DRAFTED)
    stored["t2d"] = stored["t2d"].roll(1)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(HeadMismatchError, match="t2d and d2t name different tokens"):
        load_head(tmp_path)
    del stored["t2d"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(HeadMismatchError, match="has d2t but not the other one"):
        load_head(tmp_path)


def test_shards_of_another_layer_set_are_refused(target: Target, examples: list[Example], tmp_path: Path) -> None:
    identity = ShardIdentity.of(target, "tiny", 8, LAYERS)
    assert extract(target, sequences(3), tmp_path, identity, quiet=True) == 3
    found, _ = read_shards(tmp_path, identity)
    assert found[0].hidden.shape == (len(found[0].tokens), 3 * HIDDEN)
    assert torch.allclose(found[0].hidden.float(), examples[0].hidden.float(), atol=1e-2)
    with pytest.raises(HeadMismatchError, match=r"layer_ids \(1, 2, 3\), expected \(0, 2, 3\)"):
        read_shards(tmp_path, replace(identity, layer_ids=(0, 2, 3)))
    without, _ = read_shards(tmp_path, replace(identity, layer_ids=()))
    assert without[0].hidden.shape[1] == 0
    other = tmp_path / "other"
    extract(target, sequences(3), other, ShardIdentity.of(target, "tiny", 8), quiet=True)
    with pytest.raises(HeadMismatchError, match=r"layer_ids \(\), expected \(1, 2, 3\)"):
        read_shards(other, identity)


def test_wrong_sizes_and_settings_are_named(target: Target) -> None:
    assert default_layers(target.config) == (1, 2)
    assert default_layers(LlamaConfig(num_hidden_layers=30)) == (2, 15, 27)
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="layer_ids"):
            Eagle3Config.for_target(target.config, layer_ids=layers)
    with pytest.raises(ValueError, match="draft_vocab_size=99"):
        Eagle3Config.for_target(target.config, layer_ids=(1,), draft_vocab_size=99)
    with pytest.raises(ValueError, match="inputs='both'"):
        FeatExtrapolatorConfig.for_target(target.config, inputs="both")
    for wrong in ((4,), (2, 1), (-1, 4)):
        with pytest.raises(ValueError, match="layer_ids"):
            FeatExtrapolatorConfig.for_target(target.config, layer_ids=wrong)
    for given in ("2,x", "2,1", "-1,2"):
        with pytest.raises(ValueError, match=f"context_layers='{given}' is not allowed"):
            TrainConfig(context_layers=given)
    with pytest.raises(ValueError, match="context_layers='1,2' needs head='feat-extrapolator'"):
        TrainConfig(context_layers="1,2", head="eagle3")
    with pytest.raises(ValueError, match="num_hidden_layers=0"):
        FeatExtrapolatorConfig.for_target(target.config, num_hidden_layers=0)
    with pytest.raises(ValueError, match="head='hydra'"):
        TrainConfig(head="hydra")
    with pytest.raises(ValueError, match="an ablation of head='feat-extrapolator'"):
        TrainConfig(head="eagle3", inputs="token")
    with pytest.raises(ValueError, match="nothing to learn"):
        TrainConfig(head="eagle3", ce_weight=0)
    with pytest.raises(ValueError, match=r"last-layer.*'auto'"):
        TrainConfig(initialisation="last-layer", inputs="token")
    with pytest.raises(ValueError, match="adamw"):
        TrainConfig(shard=True, optimizer="muon")
    with pytest.raises(ValueError, match="fc_norm"):
        TrainConfig(fc_norm=True)


@pytest.mark.parametrize("kind", ["feat", "eagle3"])
def test_mixed_precision_learns_nearly_the_same(kind: str, examples: list[Example], tmp_path: Path) -> None:
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(), topk=8, layer_ids=LAYERS)]
    losses = []
    for precision in ("no", "bf16"):
        config = TrainConfig(
            views=1500, batch_tokens=60, draft_vocab=48, mixed_precision=precision, alignment_steps=2,
            initialisation="random", log_every=500, evaluate_every=10**6, checkpoint_every=10**6,
            head="eagle3" if kind == "eagle3" else "feat-extrapolator",
        )  # fmt: skip
        run = Trainer(
            config, sizes(target, kind), TargetWeights.of(target), some, some, tmp_path / precision, quiet=True
        )
        losses.append(run.run()["valid_ce"])
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


def test_mixed_precision_multiplies_by_the_lm_head_in_bf16() -> None:
    """Its products are most of the work; sums, gradients and the softmax stay in fp32."""
    generator = torch.Generator().manual_seed(0)
    count = 600  # several chunks
    states = torch.randn(count, 16, generator=generator, requires_grad=True)
    weight = torch.randn(30, 16, generator=generator, requires_grad=True)
    ids = torch.stack([torch.randperm(30, generator=generator)[:3] for _ in range(count)])
    probs = torch.rand(count, 3, generator=generator) / 3
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = teacher_loss(states, weight, ids, probs, frozen_columns=4).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, (states, weight))])
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype is torch.float32 and not torch.equal(exact, rounded)
        assert float((exact - rounded).norm() / exact.norm()) < 0.01


def test_a_run_goes_on_in_the_precision_it_began_with(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on another machine, where auto would choose differently."""
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(), topk=8, layer_ids=LAYERS)]
    for began, fast in (("bf16", True), ("no", False)):
        monkeypatch.setattr("haast.training.processes.multiplies_bf16", lambda fast=fast: fast)
        first = run_of(target, some, tmp_path / began)
        first.run()
        monkeypatch.setattr("haast.training.processes.multiplies_bf16", lambda fast=fast: not fast)
        again = run_of(target, some, tmp_path / began)
        assert first.config.mixed_precision == again.config.mixed_precision == began
        again.run(resume=True)


def test_passes_are_weighted_by_how_likely_drafting_reaches_them(examples: list[Example]) -> None:
    """A position of pass 1 has the weight of its predecessor's acceptance in pass 0."""
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(), topk=8, layer_ids=LAYERS)]
    drafted, frozen = torch.arange(target.vocab_size), TargetWeights.of(target)
    found = {}
    for reach in (False, True):
        config = TrainConfig(draft_vocab=10**6, initialisation="random", reach_weights=reach, feature_weight=0.0)
        head = make_head(config, sizes(target, "feat"), frozen, some, drafted)
        objective, batch = Objective(head, frozen, drafted, config), pack(some)
        found[reach] = [float(objective(batch, passes=n)[0].detach()) / batch.supervised_count for n in (1, 2)]
    assert found[True][0] == found[False][0]
    module: Any = head.module
    states = list(chain_passes(module, batch, target.embed(batch.next_tokens).float(), batch.features, 2))
    by_pass = []
    for state, rows in states:
        law = (state @ target.head_rows(drafted).T.float()).softmax(-1).gather(1, batch.teacher_ids[rows])
        probs = batch.teacher_probs[rows]
        by_pass.append((-(law.log() * probs).sum(-1), torch.minimum(law, probs).sum(-1), rows))
    (first, accepted, _), (second, _, rows) = by_pass
    reached = accepted[rows - 1]
    wanted = (first.mean() + (reached * second).mean()) / (1 + reached.mean())
    plain_weights = (first.mean() + 0.8 * second.mean()) / 1.8
    assert found[True][1] == pytest.approx(wanted.item(), rel=1e-4)
    assert found[False][1] == pytest.approx(plain_weights.item(), rel=1e-4)


def run_of(target: Target, some: list[Example], out: Path, kind: str = "eagle3", **more: Any) -> Trainer:
    config = TrainConfig(
        views=600, batch_tokens=60, draft_vocab=20, log_every=10**6, evaluate_every=10**6, checkpoint_every=200,
        head="eagle3" if kind == "eagle3" else "feat-extrapolator",
    )  # fmt: skip
    return Trainer(config, sizes(target, kind), TargetWeights.of(target), some, [], out, quiet=True, **more)


def test_a_resumed_head_keeps_the_vocabulary_that_its_rows_belong_to(examples: list[Example], tmp_path: Path) -> None:
    """A head that was started from another one drafts that one's tokens, also where --resume is not told of it."""
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(), topk=8, layer_ids=LAYERS)]
    own = torch.arange(30, 50)
    first = run_of(target, some, tmp_path, draft_vocab=own)
    assert not torch.equal(run_of(target, some, tmp_path / "other").draft_vocab, own), "else this proves nothing"
    first.run()
    again = run_of(target, some, tmp_path)
    assert torch.equal(again.draft_vocab, own)
    again.run(resume=True)
    with pytest.raises(ValueError, match=r"'data': \('10 sequences.*cannot be resumed|cannot be resumed.*'data'"):
        run_of(target, some[::-1], tmp_path).run(resume=True)
    with pytest.raises(ValueError, match="teacher_top=9 is more than the 8"):
        Trainer(
            TrainConfig(teacher_top=9),
            sizes(target, "feat"),
            TargetWeights.of(target),
            some,
            [],
            tmp_path / "x",
            quiet=True,
        )


def test_the_average_of_weights_is_the_head_that_is_given(examples: list[Example], tmp_path: Path) -> None:
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(), topk=8, layer_ids=LAYERS)]
    config = TrainConfig(views=600, batch_tokens=60, draft_vocab=20, ema=0.99, log_every=10**6, evaluate_every=10**6)
    run = Trainer(config, sizes(target, "feat"), TargetWeights.of(target), some, [], tmp_path, quiet=True)
    run.run()
    best = torch.load(tmp_path / "best" / "head.pt", weights_only=True)["weights"]
    assert torch.equal(run.plain_head().state_dict()["fc.weight"], best["fc.weight"])
    assert not torch.equal(run.head.plain_weights()["fc.weight"], best["fc.weight"])


def other(name: str) -> Target:
    """Targets whose norms or logits are unlike Llama's."""
    from transformers import CohereConfig, CohereForCausalLM, OlmoConfig, OlmoForCausalLM, PhiConfig, PhiForCausalLM

    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
        "bos_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    models: dict[str, Any] = {
        "cohere": lambda: CohereForCausalLM(CohereConfig(**shape, logit_scale=2.0)),
        "olmo": lambda: OlmoForCausalLM(OlmoConfig(**shape)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**shape)),
    }
    model = models[name]()
    if name == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return Target(model.eval())


@pytest.mark.parametrize("name", ["cohere", "olmo", "phi"])
@pytest.mark.parametrize("kind", ["feat", "eagle3"])
@pytest.mark.one_of_each
def test_targets_with_other_norms_and_logits_train_and_draft(name: str, kind: str, tmp_path: Path) -> None:
    target = other(name)
    prompt = [5, 9, 3, 7]
    texts = [
        t for e in Engine(target, VanillaDrafter()).run([prompt], SamplingParams(), StopParams(40)) for t in e.tokens
    ]
    sequence = TokenSequence(prompt + texts, [False] * 4 + [True] * 40, {})
    some = [e for _, e in stream_examples(target, [sequence], topk=8, layer_ids=LAYERS)]
    logits = target.model(input_ids=torch.tensor([sequence.tokens])).logits[0, 10].softmax(-1).detach()
    assert torch.allclose(some[0].topk_probs[10].float(), logits[some[0].topk_ids[10].long()], atol=2e-3), "the law"
    assert TargetWeights.of(target).final_gain is None, "a LayerNorm is no RMS norm"
    assert initialise.why_not_last_layer(target, sizes(target, "feat"))
    config = TrainConfig(
        views=38 * 200, batch_tokens=60, draft_vocab=VOCAB, learning_rate=5e-3, alignment_steps=2, log_every=10**6,
        evaluate_every=10**6, checkpoint_every=10**6, head="eagle3" if kind == "eagle3" else "feat-extrapolator",
    )  # fmt: skip
    run = Trainer(config, sizes(target, kind), TargetWeights.of(target), some, some, tmp_path, quiet=True)
    assert run.run()["valid_top1"] > 0.9
    head = Head(run.plain_head(), run.draft_vocab, {})
    engine = Engine(target, EagleDrafter(target, head, DraftShape(kind="chain", depth=3)))
    found, steps = list[int](), 0
    for emission in engine.run([prompt], SamplingParams(), StopParams(40)):
        found.extend(emission.tokens)
        steps += 1
    assert found == texts and steps <= 20, steps


def test_a_run_ends_at_its_tau_or_when_tau_no_longer_grows(examples: list[Example], tmp_path: Path) -> None:
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(), topk=8)]
    ends: dict[str, Any] = {"until_tau": 1.5, "patience": 2}
    for name, value in ends.items():
        taus = iter([1.2, 1.4, 1.6, 1.3, 1.1, 1.0])

        def measured(*_: Any, taus: Iterator[float] = taus) -> float:
            return next(taus)

        config = TrainConfig(
            views=6000, batch_tokens=60, draft_vocab=20, log_every=10**6, evaluate_every=500, checkpoint_every=10**6,
            **{name: value},
        )  # fmt: skip
        out, frozen = tmp_path / name, TargetWeights.of(target)
        run = Trainer(config, sizes(target, "feat"), frozen, some, [], out, measure_tau=measured, quiet=True)
        found = run.run()
        seen = [line["tau"] for line in found["metrics"]]
        assert seen == ([1.2, 1.4, 1.6] if name == "until_tau" else [1.2, 1.4, 1.6, 1.3, 1.1])
        assert found["seconds_to_tau"].keys() == {"1.5"}


def test_shards_of_another_layer_set_are_not_added_to(target: Target, tmp_path: Path) -> None:
    extract(target, sequences(3), tmp_path, ShardIdentity.of(target, "tiny", 8, LAYERS), quiet=True)
    with pytest.raises(HeadMismatchError, match="give another folder"):
        extract(target, sequences(5), tmp_path, ShardIdentity.of(target, "tiny", 8), quiet=True)


def test_the_self_test_overfits_an_eagle3_head(examples: list[Example], tmp_path: Path) -> None:
    target = llama(torch.float32)
    some = [e for _, e in stream_examples(target, sequences(4), topk=8, layer_ids=LAYERS)]
    reached = overfit_self_test(
        sizes(target, "eagle3"), TargetWeights.of(target), some, tmp_path, draft_vocab=VOCAB, steps=150
    )
    assert reached > 0.9


def test_a_head_may_start_to_read_more_layers(target: Target, examples: list[Example]) -> None:
    """It begins by not using them; a head that reads layers keeps them, and fits no target of another depth."""
    before = Head(plain(trained(target, "feat", examples)).requires_grad_(False), DRAFTED, {})
    wider = head_config(TrainConfig(context_layers="1,2,3"), target, before)
    assert isinstance(wider, FeatExtrapolatorConfig) and wider.layer_ids == (1, 2, 3, 4)
    weights, _ = start_parts(before, wider)
    grown = FeatExtrapolator(wider).double().requires_grad_(False)
    grown.load_state_dict(weights)
    states = torch.randn(2, 5, 4 * HIDDEN, dtype=torch.float64)
    assert torch.equal(grown.fuse(states), states[..., 3 * HIDDEN :])
    after = Head(grown, DRAFTED, {})
    assert head_config(TrainConfig(), target, after) == wider
    with pytest.raises(HeadMismatchError, match="layer_ids"):
        start_parts(after, head_config(TrainConfig(context_layers=""), target, after))
    with pytest.raises(ValueError, match=r"context_layers='1,4' is not allowed: give 0 to 3"):
        head_config(TrainConfig(context_layers="1,4"), target, before)
    with pytest.raises(HeadMismatchError, match=r"reads layers \[1, 5\].*has 4 layers"):
        EagleDrafter(target, Head(FeatExtrapolator(replace(wider, layer_ids=(1, 5))), None, {}))
    with pytest.raises(HeadMismatchError, match=r"reads layers \[1, 3\].*has 4 layers"):
        EagleDrafter(target, Head(FeatExtrapolator(replace(wider, layer_ids=(1, 3))), None, {}))
