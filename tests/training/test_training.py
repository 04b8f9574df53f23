"""Training: index shift by brute force, scaled weights, losses, resume, shards, answers. Tiny models, no network."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import dies_after, drafted
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from haast import jsonl_log
from haast.core import SamplingParams
from haast.errors import HeadMismatchError
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.prompts import Prompt, read_prompts
from haast.sampling import Sampler, choose_nodes, keyed_uniform
from haast.target.fusing import fuse_small_modules
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.training import features, initialise, regenerate, shards, trainer
from haast.training.answers import read_answers
from haast.training.batches import BatchOrder, Example, PackedBatch, pack
from haast.training.chat import encode_prompt
from haast.training.config import RegenerateConfig, TrainConfig
from haast.training.data import TokenSequence, describe_supervised, encode_answer
from haast.training.diagnostics import overfit_self_test
from haast.training.generation_queue import AnswerRun, Question
from haast.training.losses import teacher_loss
from haast.training.scaled_head import TrainedHead, make_head
from haast.training.target_weights import TargetWeights
from haast.training.training_time_test import chain_passes
from haast.tree import DraftTree

VOCAB, HIDDEN, END = 64, 32, 2
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"] + [f"w{i}" for i in range(5, VOCAB)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast  # its constructor is untyped
    fast: PreTrainedTokenizerFast = make(tokenizer_object=words, eos_token="<|im_end|>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def target(tokenizer: PreTrainedTokenizerFast) -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=END,
        initializer_range=0.3,
    )
    return Target(LlamaForCausalLM(config).double(), tokenizer)


def sequences(count: int, seed: int = 0) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        prompt, answer = 4 + number % 3, 9 + number % 5
        tokens = torch.randint(5, VOCAB, (prompt + answer,), generator=generator).tolist()
        made.append(TokenSequence(tokens, [False] * prompt + [True] * answer, {"id": str(number), "temperature": 0.0}))
    return made


@pytest.fixture(scope="module")
def examples(target: Target) -> list[Example]:
    return [example for _, example in sorted(features.stream_examples(target, sequences(12), topk=8, batch_tokens=64))]


@pytest.fixture(scope="module")
def frozen(target: Target) -> TargetWeights:
    return TargetWeights.of(target)


def head_config(target: Target) -> FeatExtrapolatorConfig:
    return FeatExtrapolatorConfig.for_target(target.config)


def small(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        views=1500, draft_vocab=48, batch_tokens=60, log_every=100, evaluate_every=700, checkpoint_every=400,
        optimizer="adamw", feature_noise=0.0, alignment_steps=1,
    )  # fmt: skip
    return replace(base, **changes)


def scaled(target: Target, frozen: TargetWeights, examples: list[Example], seed: int = 3) -> TrainedHead:
    frozen = replace(frozen, embeddings=frozen.embeddings.double(), lm_head=frozen.lm_head.double())
    config = TrainConfig(seed=seed, output_init=1.0)
    return make_head(config, head_config(target), frozen, examples, torch.arange(VOCAB))


def passes_of(
    head: TrainedHead, target: Target, batch: PackedBatch, passes: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    assert isinstance(head.module, FeatExtrapolator)
    embedded = target.embed(batch.next_tokens).clone()
    return enumerate(chain_passes(head.module, batch, embedded, batch.features.double(), passes))


# Index shift and packing


def test_pack_follows_the_drawing_by_brute_force(examples: list[Example]) -> None:
    batch = pack(examples[:3])
    row = query = 0
    for example in examples[:3]:
        tokens = example.tokens.tolist()
        for t in range(len(tokens) - 2):
            assert torch.equal(batch.features[row], example.features[t].float())
            assert int(batch.next_tokens[row]) == tokens[t + 1]
            assert int(batch.positions[row]) == t
            if example.supervised[t + 1] and example.supervised[t + 2]:
                assert int(batch.queries[query]) == row
                assert torch.equal(batch.target_features[query], example.features[t + 1].float())
                assert torch.equal(batch.teacher_ids[query], example.topk_ids[t + 1].long())
                query += 1
            row += 1
    assert (row, query) == (len(batch.features), batch.supervised_count)


def test_the_teacher_predicts_the_token_after_next(target: Target) -> None:
    tokens = [7, 8, 9, 10, 11, 12]
    ((_, example),) = features.stream_examples(target, [TokenSequence(tokens, [False] * 2 + [True] * 4)], topk=4)
    with torch.inference_mode():
        logits = target.model(input_ids=torch.tensor([tokens])).logits[0]
    batch = pack([example])
    assert batch.positions[batch.queries].tolist() == [1, 2, 3]  # x_{t+1} and x_{t+2} are both the assistant's
    for query, t in enumerate([1, 2, 3]):
        assert batch.teacher_ids[query].tolist() == logits[t + 1].topk(4).indices.tolist()
        law = logits[t + 1].softmax(-1)[batch.teacher_ids[query]]
        assert torch.allclose(batch.teacher_probs[query].double(), law, atol=1e-3)


def test_every_example_comes_once_an_epoch() -> None:
    order = BatchOrder([5 + i % 7 for i in range(1200)], 40, 1)
    assert sorted(i for batch in order.epoch(0) for i in batch) == list(range(1200))
    assert order.epoch(0) == order.epoch(0) != order.epoch(1)


# The head


def test_the_trained_head_is_the_feat_extrapolator(
    target: Target, frozen: TargetWeights, examples: list[Example]
) -> None:
    head = scaled(target, frozen, examples)
    norm = head.trained("layers.0.post_attention_layernorm.weight")
    with torch.no_grad():
        norm.add_(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.1)
    batch = pack(examples[:4])
    ((_, (got, _)),) = passes_of(head, target, batch, 1)
    plain = FeatExtrapolator(head_config(target)).double()
    plain.load_state_dict(head.plain_weights())
    start, rows = 0, []
    for length in batch.lengths.tolist():
        part = slice(start, start + length)
        embedded = target.embed(batch.next_tokens[part]).clone().unsqueeze(0)
        known = batch.features[part].double().unsqueeze(0)
        rows.append(plain(embedded, known, batch.positions[part].unsqueeze(0))[0])
        start += length
    assert torch.allclose(got, torch.cat(rows)[batch.queries], atol=1e-5)
    other = scaled(target, frozen, examples, seed=4)
    assert not torch.allclose(other.trained("fc.weight"), head.trained("fc.weight"))
    other.load_plain(head.plain_weights())
    assert torch.allclose(other.trained("fc.weight"), head.trained("fc.weight"))
    with pytest.raises(ValueError, match=r"fc\.weight"):
        other.load_plain({})


def test_what_is_trained_has_unit_size(target: Target, frozen: TargetWeights, examples: list[Example]) -> None:
    """Whatever a dimension's rms, its trained weights start alike; the plain ones differ as the dimensions do."""
    odd = [replace(e, features=e.features * torch.linspace(0.1, 3, HIDDEN).half()) for e in examples]
    head = scaled(target, frozen, odd)
    sizes = [head.trained("fc.weight")[:, HIDDEN:], head.plain_weights()["fc.weight"][:, HIDDEN:]]
    rms = [weight.detach().square().mean(0).sqrt() for weight in sizes]
    assert float(rms[0].max() / rms[0].min()) < 2 and float(rms[1].max() / rms[1].min()) > 10


def test_alignment_pass_reads_what_a_draft_reads(
    target: Target, frozen: TargetWeights, examples: list[Example]
) -> None:
    """Pass s at the end of one chain equals a plain head run over true pairs, then its own features."""
    head = scaled(target, frozen, examples)
    batch = pack(examples[:2])
    plain = FeatExtrapolator(head_config(target)).double()
    plain.load_state_dict(head.plain_weights())
    first = int(batch.lengths[0])
    known = batch.features[:first].double()
    embedded = target.embed(batch.next_tokens[:first]).clone()
    for number, (output, rows) in passes_of(head, target, batch, 3):
        for place, query in enumerate(rows.tolist()):
            end = int(batch.queries[query])
            if end >= first:
                break
            wanted = drafted(plain, embedded, known[: end - number + 1], number)
            assert torch.allclose(output[place], wanted, atol=1e-5)
    assert number == 2


def test_teacher_cross_entropy_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haast.training.losses._CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(8)])
    probs = torch.rand(8, 3, generator=generator, dtype=torch.float64) / 3
    probs[2] = 0  # nothing of the teacher is in the draft vocabulary
    sums = teacher_loss(states, weight, ids, probs, bias)
    got, hits = sums.ce / 8, sums.hits
    (own,) = torch.autograd.grad(sums.loss / 8, states)
    law = functional.log_softmax(states @ weight.T + bias, dim=-1)
    wanted = -(law.gather(1, ids) * probs).sum(-1).mean()
    (reference,) = torch.autograd.grad(wanted, states)
    assert torch.allclose(got, wanted) and torch.allclose(own, reference)
    agree = ((states @ weight.T + bias).argmax(-1) == ids[:, 0]) & (probs[:, 0] > 0)
    assert int(hits) == int(agree.sum())


# A start from the target's last layer


def lone_pair(target: Target) -> list[Example]:
    """One supervised pair, whose norms are therefore the typical ones."""
    return [e for _, e in features.stream_examples(target, [TokenSequence([7, 8, 9], [False, True, True])], topk=4)]


def test_a_head_begins_as_the_targets_last_layer(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rms is what it is taken for, and one pair leaves the regression no error, the closed form is exact."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=END, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    layer = model.model.layers[-1]
    with torch.no_grad():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.uniform_(0.5, 2.0)
        layer.self_attn.o_proj.weight.zero_()  # the target's position 1 looks at position 0, the head's pair 0 cannot
    plain_target = Target(model, tokenizer)
    monkeypatch.setattr(initialise, "_RIDGE", 1e-6)
    (example,) = lone_pair(plain_target)
    weights = initialise.last_layer_weights(plain_target, head_config(plain_target), [example])
    head = FeatExtrapolator(head_config(plain_target))
    head.load_state_dict(weights)
    following = plain_target.embed(example.tokens[1:2].long()).clone().unsqueeze(0)
    with torch.no_grad():
        fused = head.fc(torch.cat([following, example.features[:1].float().unsqueeze(0)], -1))
        extrapolated = head(following, example.features[:1].float().unsqueeze(0), torch.zeros(1, 1, dtype=torch.long))
    assert torch.allclose(extrapolated[0, 0], example.features[1].float(), atol=0.02)
    entering = plain_target.forward(
        DraftTree.chain(example.tokens[:2].long().unsqueeze(0)), plain_target.new_cache(), hidden_layers=(1,)
    ).hidden[1][:, 1]
    with torch.no_grad():
        for ours, theirs in (("q_proj", layer.self_attn.q_proj), ("v_proj", layer.self_attn.v_proj)):
            got = functional.linear(fused[0], weights[f"layers.0.self_attn.{ours}.weight"])
            assert torch.allclose(got, theirs(layer.input_layernorm(entering)), atol=0.02), ours


def test_packed_and_plain_targets_give_the_same_start(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=END,
    )  # fmt: skip
    plain_target = Target(LlamaForCausalLM(config), tokenizer)
    some = [e for _, e in features.stream_examples(plain_target, sequences(8), topk=4)]
    wanted = initialise.last_layer_weights(plain_target, head_config(plain_target), some)
    packed_target = Target(plain_target.model, tokenizer)
    pack_linears(packed_target.model)
    fuse_small_modules(packed_target.model)
    one_call = packed_target.use_one_call()
    got = initialise.last_layer_weights(packed_target, head_config(packed_target), some)
    assert packed_target.one_call == one_call, "the hooks that it takes are gone, and so is the way round the call"
    for name, weight in wanted.items():
        assert float((got[name] - weight).norm() / weight.norm()) < 0.01, name


def test_a_target_without_a_llama_layer_is_named(target: Target, examples: list[Example]) -> None:
    gpt2 = Target(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)))
    assert "GPT2LMHeadModel" in initialise.why_not_last_layer(gpt2, head_config(gpt2))
    assert not initialise.why_not_last_layer(target, head_config(target))
    with pytest.raises(ValueError, match=r"gate_proj is \(48, 32\), the head's \(40, 32\).*'random'"):
        initialise.last_layer_weights(target, replace(head_config(target), intermediate_size=40), examples)


# Training runs


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("views_per_s", "seconds")} for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "learning_rate": 1e-3},
        {"feature_noise": 0.2, "ema": 0.9, "alignment_steps": 2},
    ],
)
def test_a_resumed_run_repeats_the_curve_bit_for_bit(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path, changes: dict[str, Any]
) -> None:
    def make(name: str) -> trainer.Trainer:
        parts = (small(**changes), head_config(target), frozen, examples[:9], examples[9:], tmp_path / name)
        return trainer.Trainer(*parts, measure_tau=lambda head, vocab: 1.5, quiet=True)

    whole = make("whole")
    whole.run()
    killed = make("killed")
    step, left = killed._step, iter(range(37))

    def dying(batches: Sequence[PackedBatch]) -> dict[str, float]:
        if next(left, None) is None:
            raise RuntimeError("killed")
        return step(batches)

    killed._step = dying  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        killed.run()
    again = make("killed")
    with pytest.raises(ValueError, match="resume it"):
        again.run()
    again.run(resume=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for one, other in zip(whole.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(list((tmp_path / "whole").glob("state-*.pt"))) == 2
    assert (tmp_path / "whole" / "best" / "head.pt").exists()


def test_ctrl_c_finishes_the_step_and_saves(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    run = trainer.Trainer(small(), head_config(target), frozen, examples, [], tmp_path, quiet=True)
    step, count = run._step, 0

    def interrupted(batches: Sequence[PackedBatch]) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)
        return step(batches)

    run._step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert count == 3 and [path.name for path in tmp_path.glob("*.pt")] == ["state-00000003.pt"]


def test_resume_refuses_other_settings_and_unreadable_states(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    def make(config: TrainConfig) -> trainer.Trainer:
        return trainer.Trainer(config, head_config(target), frozen, examples, [], tmp_path, quiet=True)

    make(small(views=100)).run()
    with pytest.raises(ValueError, match="clip"):
        make(small(views=100, clip=0.5)).run(resume=True)
    for path in tmp_path.glob("state-*.pt"):
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="delete them"):
        make(small(views=100)).run(resume=True)


def test_a_tau_of_one_raises_the_alarm_and_the_best_is_kept(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    taus = iter([1.6, 1.01, 1.2])
    kept: list[float] = []
    trainer.Trainer(
        small(views=1500, evaluate_every=500),
        head_config(target),
        frozen,
        examples,
        [],
        tmp_path,
        measure_tau=lambda head, vocab: next(taus),
        export=lambda folder, head, vocab: kept.append(1.0),
        quiet=True,
    ).run()
    assert [("alarm" in line) for line in curve(tmp_path) if "tau" in line] == [False, True, False]
    assert len(kept) == 1


def test_a_run_that_starts_from_a_head_never_ends_below_it(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    def start(taus: Sequence[float]) -> tuple[list[dict[str, Any]], FeatExtrapolator]:
        measured = iter(taus)

        def measure(head: Any, vocab: Tensor) -> float:
            if (tau := next(measured, None)) is None:
                raise KeyboardInterrupt
            return tau

        first = FeatExtrapolator(head_config(target))
        weights = {name: tensor.detach() for name, tensor in first.state_dict().items()}
        config, sizes = small(views=300, evaluate_every=200), head_config(target)
        more: dict[str, Any] = {"start_from": weights, "evaluate_first": True, "quiet": True}
        trainer.Trainer(config, sizes, frozen, examples, [], tmp_path, measure, **more).run()
        return [line for line in curve(tmp_path) if "tau" in line], first

    with pytest.raises(KeyboardInterrupt):
        start([3.0])  # before the first checkpoint, so the next run begins anew
    evaluations, first = start([3.0, 1.5, 2.5])
    assert [(line["step"] > 0, line["tau"]) for line in evaluations] == [(False, 3.0), (True, 1.5), (True, 2.5)]
    best = torch.load(tmp_path / "best" / "head.pt", weights_only=True)["weights"]
    for name, tensor in first.state_dict().items():
        assert torch.allclose(best[name], tensor, atol=1e-6)


def test_overfit_self_test_passes_and_fails_on_shuffled_labels(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    run = overfit_self_test
    assert run(head_config(target), frozen, examples[:4], tmp_path, draft_vocab=VOCAB, steps=120) > 0.9
    shuffled = []
    for e in examples[:4]:
        order = torch.randperm(len(e.tokens), generator=torch.Generator().manual_seed(1))
        shuffled.append(replace(e, topk_ids=e.topk_ids[order], topk_probs=e.topk_probs[order]))
    with pytest.raises(ValueError, match="do not belong together"):
        run(head_config(target), frozen, shuffled, tmp_path, draft_vocab=VOCAB, steps=20)
    with pytest.raises(ValueError, match="after 2 steps"):
        run(head_config(target), frozen, examples, tmp_path, draft_vocab=VOCAB, steps=2)


def test_settings_are_checked() -> None:
    for name in ("views", "learning_rate", "batch_tokens", "clip"):
        wrong: dict[str, Any] = {name: -1}
        with pytest.raises(ValueError, match=f"{name}=-1"):
            TrainConfig(**wrong)
    with pytest.raises(ValueError, match=r"initialisation='zero'.*last-layer"):
        TrainConfig(initialisation="zero")
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        TrainConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="matmul_precision='low'"):
        TrainConfig(matmul_precision="low")
    with pytest.raises(TypeError, match="speed"):
        TrainConfig(speed=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="batch=0"):
        RegenerateConfig(batch=0)
    with pytest.raises(ValueError, match="temperatures"):
        RegenerateConfig(temperatures="-1:1")
    with pytest.raises(ValueError, match="not of the form"):
        RegenerateConfig(temperatures="warm")
    rates = [TrainConfig(views=10**7).learning_rate_at(v * 10**5) for v in range(101)]
    assert rates[0] < rates[5] == pytest.approx(8e-4) and rates[-1] == pytest.approx(1.6e-5)


def test_the_defaults_are_the_recipe() -> None:
    """The command of results/time-to-tau.json, without its flags."""
    names = ("optimizer", "learning_rate", "weight_decay", "alignment_steps", "align_after", "feature_noise")

    def recipe(**changes: Any) -> tuple[Any, ...]:
        return tuple(getattr(TrainConfig(**changes), name) for name in names)

    assert recipe() == ("muon", 8e-4, 0.1, 2, 0.7, 0.2)
    assert recipe(head="eagle3") == ("muon", 8e-4, 0.1, 2, 0.7, 0.0)
    assert recipe(head="medusa") == ("muon", 8e-4, 0.1, 1, 0.0, 0.0)
    assert recipe(optimizer="adamw")[:3] == recipe(shard=True)[:3] == ("adamw", 2e-3, 0.01)
    assert recipe(alignment_steps=3)[3:5] == (3, 0.0), "passes that were asked for begin at once"
    views = [TrainConfig().for_data(576, count).views for count in (1000, 10**6, 10**8)]
    assert views == [500_000, 6 * 10**6, 50_000_000] and TrainConfig(views=7).for_data(576, 10**6).views == 7


def test_sizes_that_differ_are_refused(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(HeadMismatchError, match="vocabulary 65"):
        trainer.Trainer(small(), replace(head_config(target), vocab_size=65), frozen, examples, [], tmp_path)
    unsupervised = [replace(e, supervised=torch.zeros_like(e.supervised)) for e in examples]
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer.Trainer(small(), head_config(target), frozen, unsupervised, [], tmp_path)


# Shards


def identity(target: Target) -> shards.ShardIdentity:
    return shards.ShardIdentity.of(target, "tiny", topk=8)


def test_shards_round_trip_and_resume(target: Target, examples: list[Example], tmp_path: Path) -> None:
    assert features.extract(target, sequences(5), tmp_path, identity(target), quiet=True) == 5
    assert features.extract(target, sequences(12), tmp_path, identity(target), quiet=True) == 7
    stored, records = shards.read_shards(tmp_path, identity(target))
    assert sorted(record["id"] for record in records) == sorted(str(i) for i in range(12))
    for example, record in zip(stored, records, strict=True):
        wanted = examples[int(record["id"])]
        assert torch.equal(example.tokens, wanted.tokens) and torch.equal(example.topk_ids, wanted.topk_ids)
        assert torch.allclose(example.features.float(), wanted.features.float(), atol=1e-3)


def test_what_came_before_an_interruption_is_in_a_shard(
    target: Target, examples: list[Example], tmp_path: Path
) -> None:
    def interrupted() -> Iterator[tuple[Example, dict[str, Any]]]:
        yield from ((example, {"id": str(number)}) for number, example in enumerate(examples[:3]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(tmp_path, identity(target), interrupted())
    stored, records = shards.read_shards(tmp_path, identity(target))
    assert len(stored) == 3 and [record["id"] for record in records] == ["0", "1", "2"]


def test_shards_over_the_cap_are_refused_before_anything_is_written(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the limit is 1e-06 GB"):
        features.extract(target, sequences(12), tmp_path, identity(target), max_gb=1e-6, quiet=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="are free"):
        shards.check_room(tmp_path, 10**15, identity(target), 1e15)


def test_shards_take_another_answer_of_the_same_id_and_count_what_is_there(target: Target, tmp_path: Path) -> None:
    first = [TokenSequence(s.tokens, s.supervised, {"id": "0", "response_ids": s.tokens[4:]}) for s in sequences(2)]
    assert features.extract(target, first[:1], tmp_path, identity(target), quiet=True) == 1
    assert features.extract(target, first, tmp_path, identity(target), quiet=True) == 1
    used = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 10**9
    with pytest.raises(ValueError, match=r"in addition to .* of existing shards, the limit is"):
        features.extract(target, sequences(12), tmp_path, identity(target), max_gb=used * 1.01, quiet=True)


def test_corrupt_and_foreign_shards_are_refused(target: Target, tmp_path: Path) -> None:
    features.extract(target, sequences(3), tmp_path, identity(target), quiet=True)
    changes: list[tuple[str, Any]] = [("hidden_size", 31), ("vocab_size", 65), ("tokenizer", "other")]
    for name, value in changes:
        with pytest.raises(HeadMismatchError, match=name):
            shards.read_shards(tmp_path, replace(identity(target), **{name: value}))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="corrupt"):
        shards.read_shards(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="no feature shards"):
        shards.read_shards(tmp_path)


# Text


def test_only_the_assistants_tokens_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"id": "a", "prompt": "w7 w8", "response": "w9", "response_ids": [9, 10, END]}
    sequence = encode_answer(tokenizer, record)
    assert " ".join(WORDS[i] for i in sequence.tokens) == (
        "<|im_start|> user w7 w8 <|im_end|> <|im_start|> assistant w9 w10 <|im_end|>"
    )
    assert sequence.supervised == [False] * 7 + [True] * 3
    shown = describe_supervised(tokenizer, sequence)
    assert "3 of 10 tokens supervised" in shown.plain
    assert [shown.plain[s.start : s.end] for s in shown.spans if "green" in str(s.style)] == ["w9 w10 <|im_end|>"]
    with pytest.raises(ValueError, match="another target's"):
        encode_answer(tokenizer, {**record, "response_ids": [VOCAB]})


def test_prompt_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"turns": ["two", "three"], "id": "x", "source": "s"}\n')
    first, second = read_prompts(path)
    assert (first.turns, second.id, second.turns, second.extra) == (("one",), "x", ("two", "three"), {"source": "s"})
    (tmp_path / "other.jsonl").write_text(
        '{"prompt": "two"}\n{"prompt": "one"}\n{"prompt": "six"}\n{"prompt": "ten"}\n'
    )
    two, one, *_ = read_prompts(tmp_path / "other.jsonl")
    assert one.id == first.id != two.id, "a prompt without an id is known by its text, not by its line"
    assert [p.turns for p in read_prompts(tmp_path / "other.jsonl", 2, spread=True)] == [("two",), ("six",)]
    assert len(read_prompts(path, 1)) == 1
    for text, message in (
        ('{"prompt": "one"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "one"}\n[1]\n', "line 2: expected a JSON object"),
        ('{"prompt": "one"}\n{"turns": []}\n', "line 2"),
        ("", "holds no prompts"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
    with pytest.raises(ValueError, match="limit=0"):
        read_prompts(path, 0)
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(tmp_path / "none.jsonl")
    path.write_text('{"id": "a", "prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*response_ids"):
        read_answers(path)


# Regeneration


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", (" ".join(f"w{5 + (7 * i + j) % 50}" for j in range(1 + i % 4)),)) for i in range(9)]


def settings(**changes: Any) -> RegenerateConfig:
    return replace(RegenerateConfig(batch=3, max_new_tokens=12, max_prompt_tokens=64, seed=5), **changes)


def answered(path: Path) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in read_answers(path)}


def test_answers_are_those_of_one_row_at_a_time(
    target: Target, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = settings()
    regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), tmp_path / "a.jsonl", config, quiet=True))
    got = answered(tmp_path / "a.jsonl")
    assert len(got) == 9 and len({r["temperature"] for r in got.values()}) > 1
    for index, prompt in enumerate(prompts()):
        tokens = encode_prompt(tokenizer, prompt.turns)
        begin = len(tokens)
        sampler = Sampler(SamplingParams(temperature=config.temperature(index), seed=5), index)
        while len(tokens) - begin < 12 and (len(tokens) == begin or tokens[-1] != END):
            with torch.inference_mode():
                logits = target.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(sampler.choose(tokens, logits))
        assert got[prompt.id]["response_ids"] == tokens[begin:]
        assert got[prompt.id]["finished"] == (tokens[-1] == END)


def test_a_killed_regeneration_resumes_to_the_same_answers(
    target: Target, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), whole, settings(), quiet=True))
    tail = b'{"id": "p0", "resp'
    monkeypatch.setattr(jsonl_log, "append", dies_after(jsonl_log.append, 4, tail))
    with pytest.raises(KeyboardInterrupt):
        regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), cut, settings(), quiet=True))
    monkeypatch.undo()
    again = regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), cut, settings(batch=2), quiet=True))
    assert (again.before, again.added) == (4, 5) and answered(cut) == answered(whole)
    cut.write_text("{\n" + cut.read_text())
    with pytest.raises(ValueError, match="line 1"):
        regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), cut, settings(), quiet=True))


def test_features_of_answers_equal_extracted_ones_and_come_once(
    target: Target, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = settings(shards=tmp_path / "shards", topk=8)
    for some in (prompts()[:4], prompts(), prompts()):  # a run that goes on, and one with nothing left to do
        run = AnswerRun(tokenizer, some, tmp_path / "a.jsonl", config, name="tiny", quiet=True)
        regenerate.regenerate(target, run)
    stored, records = shards.read_shards(tmp_path / "shards", identity(target))
    assert len(stored) == 9
    wanted = dict(features.stream_examples(target, [encode_answer(tokenizer, r) for r in records], topk=8))
    for number, example in enumerate(stored):
        assert torch.equal(example.tokens, wanted[number].tokens)
        assert torch.equal(example.supervised, wanted[number].supervised)
        assert torch.equal(example.topk_ids[:-1], wanted[number].topk_ids[:-1])
        assert torch.allclose(example.features[:-1].float(), wanted[number].features[:-1].float(), atol=2e-3)


def test_regeneration_refuses_before_the_model_runs(
    target: Target, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        out = tmp_path / "file" / "a.jsonl"
        regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), out, settings(), quiet=True))
    with pytest.raises(ValueError, match="same id"):
        twice = [*prompts(), Prompt("p0", ("w9 w9",))]
        regenerate.regenerate(target, AnswerRun(tokenizer, twice, tmp_path / "a.jsonl", settings(), quiet=True))
    with (tmp_path / "a.jsonl").open("ab") as held, pytest.raises(ValueError, match="another run is writing"):
        fcntl.flock(held, fcntl.LOCK_EX)
        regenerate.regenerate(target, AnswerRun(tokenizer, prompts(), tmp_path / "a.jsonl", settings(), quiet=True))
    (tmp_path / "b.jsonl").write_text('{"id": "p0", "model": "another"}\n')
    with pytest.raises(ValueError, match=r"answers of another, not of tiny.*--out"):
        regenerate.regenerate(
            target, AnswerRun(tokenizer, prompts(), tmp_path / "b.jsonl", settings(), name="tiny", quiet=True)
        )
    long = [Prompt("long", (" ".join(["w9"] * 80),))]
    assert (
        regenerate.regenerate(target, AnswerRun(tokenizer, long, tmp_path / "a.jsonl", settings(), quiet=True)).left_out
        == 1
    )


def test_answers_drawn_together_are_those_drawn_one_by_one() -> None:
    logits = torch.randn(120, 1, 50, generator=torch.Generator().manual_seed(0)) * 2
    asked = [(temperature, row) for row in range(40) for temperature in (0.0, 0.7, 1.0)]
    questions = [Question(row, row % 3, Prompt(f"p{row}", ("a", "b", "c"))) for _, row in asked]
    samplers = [
        regenerate.TurnSampler(SamplingParams(temperature=temperature, seed=9), question)
        for (temperature, _), question in zip(asked, questions, strict=True)
    ]
    got = choose_nodes(logits, samplers, [4] * 120, torch.zeros(120, 1, dtype=torch.long), 0)[:, 0].tolist()
    for place, (sampler, question) in enumerate(zip(samplers, questions, strict=True)):
        assert sampler.draw(4) == question.draw(9, 4) == keyed_uniform(9, question.index, question.turn * 2**42 + 4)
        assert got[place] == sampler.choose([1, 2, 3, 4], logits[place, 0])


@pytest.mark.parametrize("content", ["my only note", "null\n", '{"id": "a"}\n5\n{"id": "b"}\n', '{"id": "a"}\nnote'])
def test_a_file_of_something_else_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"line \d: "):
        jsonl_log.read_repaired(path, b'{"id": ')
    assert path.read_text() == content


def test_answers_end_at_the_context(target: Target, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The target holds 256 positions."""
    many = [Prompt("long", (" ".join(["w9"] * 245),)), Prompt("longer", (" ".join(["w9"] * 300),))]
    config = settings(max_prompt_tokens=1000)
    regenerate.regenerate(target, AnswerRun(tokenizer, many, tmp_path / "a.jsonl", config, quiet=True))
    (record,) = read_answers(tmp_path / "a.jsonl")
    whole = len(encode_prompt(tokenizer, [record["prompt"]])) + len(record["response_ids"])
    assert record["id"] == "long" and whole <= 256


def test_the_batch_follows_the_optimiser_and_the_head() -> None:
    assert TrainConfig(optimizer="adamw").with_batch_tokens(4096).positions == 1536
    assert TrainConfig().with_batch_tokens(576).positions == 3456
    assert TrainConfig(batch_tokens=3072).with_batch_tokens(576).positions == 3072
    with pytest.raises(ValueError, match="batch_tokens=None"):
        TrainConfig().positions  # noqa: B018
    with pytest.raises(ValueError, match="batch_tokens=0"):
        TrainConfig(batch_tokens=0)


def test_training_is_a_library(tmp_path: Path) -> None:
    """`train` on a target in memory: a head by measured tau, as the command makes it; refusals before the features."""
    from test_cli import tiny_config, tiny_tokenizer

    from haast.heads.checkpoint import load_head
    from haast.training import TrainConfig as Config
    from haast.training import TrainingData, train

    tokenizer = tiny_tokenizer()
    model: Any = LlamaForCausalLM(tiny_config())
    target = Target(model.eval(), tokenizer)
    answers, valid = tmp_path / "answers.jsonl", tmp_path / "valid.jsonl"
    texts = [{"id": str(n), "prompt": f"say {n}", "response": "one two three four " * 3} for n in range(4)]
    answers.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    valid.write_text(json.dumps({"prompt": "say it"}) + "\n", encoding="utf-8")
    data = TrainingData(answers=answers, valid_prompts=valid, valid_tokens=6, valid_nodes=4)
    settings, said = Config(views=400, draft_vocab=64, evaluate_every=200), list[str]()
    result = train(target, data, tmp_path / "run", settings, report=said.append)
    assert load_head(Path(result["head"])).draft_vocab is not None and result["tau"] >= 1.0
    assert any("given text" in line for line in said)
    with pytest.raises(ValueError, match="has a training run: continue it"):
        train(target, data, tmp_path / "run", settings)
    with pytest.raises(ValueError, match="train needs data"):
        train(target, TrainingData(), tmp_path / "other", settings)


def test_a_run_from_before_a_head_had_some_option_goes_on(
    target: Target, frozen: TargetWeights, examples: list[Example], tmp_path: Path
) -> None:
    def make() -> trainer.Trainer:
        return trainer.Trainer(small(views=100), head_config(target), frozen, examples, [], tmp_path, quiet=True)

    make().run()
    for path in tmp_path.glob("state-*.pt"):
        state = torch.load(path)
        del state["head"]["layer_ids"]
        torch.save(state, path)
    make().run(resume=True)
    for path in tmp_path.glob("state-*.pt"):
        state = torch.load(path)
        state["head"]["layer_ids"] = (0, 2)
        torch.save(state, path)
    with pytest.raises(ValueError, match="layer_ids"):
        make().run(resume=True)
