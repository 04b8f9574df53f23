"""The bench on a tiny model: counting rules, order, differences, the JSON schema, and refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from test_cli import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from haast.bench import aggregate
from haast.bench.calibrate import measure_v_curve
from haast.bench.decoders import Decoder, DecoderRun, EngineDecoder, StockDecoder, check_decoders, drafter_for
from haast.bench.runner import (
    BenchConfig,
    BenchPrompt,
    Records,
    Suite,
    differences,
    peak_rss_mb,
    reset_peak_rss,
    run_suite,
)
from haast.bench.tables import text
from haast.cli import app
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.heads.checkpoint import Head, save_head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.stats import loop_share
from haast.target.target import Target

ROW_KEYS = {
    "decoder",
    "tokens_per_s",
    "speedup_vs_vanilla",
    "speedup_vs_hf",
    "tau",
    "tau_loop_filtered",
    "alpha_by_depth",
    "acceptance_by_depth",
    "ms_draft",
    "ms_verify",
    "ms_overhead",
    "peak_rss_mb",
    "tokens",
    "prompts",
    "tau_by_category",
}
ENVIRONMENT_KEYS = {
    "cpu",
    "threads",
    "dtype",
    "packing",
    "versions",
    "commit",
    "command",
    "prompts_sha256",
    "prompts_count",
    "settings",
    "tau_convention",
    "date",
}
PROMPTS = [BenchPrompt(str(i), "ab"[i % 2], (1 + i, 2, 3)) for i in range(3)]


def run_file(
    arms: Sequence[Decoder], prompts: Sequence[BenchPrompt], settings: BenchConfig, seen: list[str] | None = None
) -> Records:
    """What every decoder did with the prompts of one file; `seen` gets who answered, in turn."""
    told, suites = [] if seen is None else seen, {"": Suite("", "", tuple(prompts))}
    at = {settings.sampling.temperature: arms}
    (records,) = run_suite(at, suites, settings, {}, lambda turn, answer: told.append(turn.decoder)).values()
    return records


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(vocab: int = 12) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config()).double()


@pytest.fixture(scope="module")
def target(model: LlamaForCausalLM) -> Target:
    copy = LlamaForCausalLM(config()).double()
    copy.load_state_dict(model.state_dict())
    return Target(copy)


@pytest.fixture(scope="module")
def drafter(target: Target) -> EagleDrafter:
    torch.manual_seed(1)
    head = FeatExtrapolator(FeatExtrapolatorConfig.for_target(config())).eval().requires_grad_(False)
    return EagleDrafter(target, Head(head, None, {}), DraftShape(depth=2, top_k=3, width=2, nodes=8))


@pytest.fixture
def arms(model: LlamaForCausalLM, target: Target, drafter: EagleDrafter) -> list[Decoder]:
    greedy = SamplingParams()
    return [
        EngineDecoder(target, VanillaDrafter(), greedy, ()),
        EngineDecoder(target, drafter, greedy, ()),
        StockDecoder(model, ()),
    ]


def test_all_decoders_say_the_same_and_count_the_same(arms: list[Decoder], target: Target) -> None:
    seen: list[str] = []
    settings = BenchConfig(max_new_tokens=12, rounds=3, warmup_tokens=2)
    records = run_file(arms, PROMPTS, settings, seen)
    assert len(seen) == 3 * 3 * 3
    assert all(set(seen[i : i + 3]) == {"vanilla", "eagle", "hf"} for i in range(0, 27, 3)), "a prompt's, in a row"
    assert len({seen[i] for i in range(0, 27, 3)}) == 3  # each decoder goes first at times
    assert differences(records, PROMPTS, target, settings.sampling) == []
    rows = {row["decoder"]: row for row in aggregate.build_rows(records, PROMPTS)}
    assert set(rows) == {"vanilla", "eagle", "hf"}
    for name, row in rows.items():
        assert set(row) >= ROW_KEYS
        assert row["tokens"] == 36 and row["decoded_tokens"] == 33 and row["prompts"] == 3
        ms = sum(median(run.ms_decode for run in record) for record in records[name])
        assert row["tokens_per_s"] == pytest.approx(33e3 / ms)
        assert row["speedup_vs_hf"] == pytest.approx(row["tokens_per_s"] / rows["hf"]["tokens_per_s"])
    assert rows["vanilla"]["tau"] == 1.0 and rows["vanilla"]["speedup_vs_vanilla"] == 1.0
    assert rows["eagle"]["tau"] == pytest.approx(33 / rows["eagle"]["target_forwards"])
    assert rows["eagle"]["tau"] > 1 and set(rows["eagle"]["tau_by_category"]) == {"a", "b"}
    assert rows["hf"]["tau"] is None and rows["hf"]["ms_verify"] is None
    assert len(aggregate.per_prompt(records, PROMPTS)) == 3


def test_a_prompt_is_computed_as_a_whole_whoever_answered_it_before(target: Target, drafter: EagleDrafter) -> None:
    prompt = tuple(range(1, 11)) * 4
    arms = [EngineDecoder(target, each, SamplingParams(), ()) for each in (VanillaDrafter(), drafter, drafter)]
    runs = [arm.run(prompt, 4) for arm in arms for _ in range(2)]
    assert [run.stats.recalled_tokens for run in runs if run.stats is not None] == [0] * 6
    (found,) = Engine(target, drafter).run([prompt], SamplingParams(), StopParams(1), stats := Stats())
    assert found.finished and stats.recalled_tokens == 39, "an engine by itself does recall it"


class _Fixed(Decoder):
    """Says what it is told and took as long as it is told."""

    def __init__(self, name: str, tokens: Sequence[int], ms: Sequence[float]) -> None:
        self.name, self._tokens, self._ms = name, tuple(tokens), iter(ms)

    def run(self, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        stats = Stats(decoded_tokens=len(self._tokens) - 1, target_forwards=4, reached_by_depth=[4])
        stats.accepted_by_depth, stats.first_choice_by_depth = [2], [1]
        stats.ms_verify = ms = next(self._ms)
        return DecoderRun(self._tokens, 1.0, ms, stats)


def test_medians_loops_and_per_step_times_by_hand() -> None:
    loop = _Fixed("eagle", [1, 2] * 20, [30.0, 10.0, 500.0])
    records = run_file([loop], PROMPTS[:1], BenchConfig(rounds=3, warmup_tokens=0))
    (row,) = aggregate.build_rows(records, PROMPTS[:1])
    assert row["tokens_per_s"] == pytest.approx(39 / 0.030)  # the median round, the first token not counted
    assert row["whole_call_tokens_per_s"] == pytest.approx(40 / 0.031)
    assert row["tau"] == 39 / 4 and row["tau_loop_filtered"] == 0.0 and row["looping_outputs"] == 1
    assert row["alpha_by_depth"] == [0.25] and row["acceptance_by_depth"] == [0.5]
    assert row["ms_verify"] == pytest.approx(30 / 4)
    assert row["speedup_vs_vanilla"] is None


def test_loop_share() -> None:
    assert loop_share(range(100)) == 0.0
    assert loop_share([1, 2, 3]) == 0.0
    assert loop_share([7] * 17) == pytest.approx(0.9)  # 10 grams, 1 of them new


def test_differences_are_judged_between_engine_decoders_only(target: Target, arms: list[Decoder]) -> None:
    said = arms[0].run(PROMPTS[0].tokens, 8).tokens
    wrong = (*said[:3], (said[3] + 1) % 12, *said[4:])
    settings = BenchConfig(warmup_tokens=0)
    fakes = [_Fixed("vanilla", said, [1.0]), _Fixed("eagle", wrong, [1.0]), _Fixed("hf", wrong, [1.0])]
    records = run_file(fakes, PROMPTS[:1], settings)
    found = differences(records, PROMPTS[:1], target, settings.sampling)
    assert [(each.decoder, each.index, each.kind) for each in found] == [
        ("eagle", 3, "bug"),
        ("hf", 3, "precision"),
    ]


def test_decoders_are_judged_by_one_of_the_engine_also_where_hf_is_named_first(
    target: Target, arms: list[Decoder]
) -> None:
    said = arms[0].run(PROMPTS[0].tokens, 8).tokens
    wrong = (*said[:3], (said[3] + 1) % 12, *said[4:])
    fakes = [_Fixed("hf", said, [1.0]), _Fixed("eagle", said, [1.0]), _Fixed("lookup", wrong, [1.0])]
    records = run_file(fakes, PROMPTS[:1], BenchConfig(warmup_tokens=0))
    (found,) = differences(records, PROMPTS[:1], target, SamplingParams())
    assert (found.decoder, found.reference) == ("lookup", "eagle") and found.kind == "bug" and found.gap
    assert differences({}, PROMPTS[:1], target, SamplingParams()) == []


def test_v_curve_has_a_point_per_node_count(target: Target, drafter: EagleDrafter) -> None:
    curve = measure_v_curve(target, drafter, rounds=2, node_counts=(1, 2, 8))
    assert [point["nodes"] for point in curve["points"]] == [1, 2, 8]
    assert curve["points"][0]["v"] == 1.0 and all(point["ms"] > 0 for point in curve["points"])
    assert curve["draft"]["ms"] > 0 and curve["committed_slots"] == 160
    assert "draft" not in measure_v_curve(target, None, rounds=1, node_counts=(1,))


def test_peak_rss_is_plausible() -> None:
    reset_peak_rss()
    assert peak_rss_mb() > 50


@pytest.mark.parametrize(
    ("names", "head", "temperature", "wanted"),
    [
        ("", True, 0.0, "names none"),
        (" , ", True, 0.0, "names none"),
        ("vanilla,medusa", True, 0.0, "medusa"),
        ("eagle,eagle", True, 0.0, "twice"),
        ("eagle", False, 0.0, "needs a head"),
        ("vanilla,small-model", True, 0.0, "--small-model NAME"),
        ("vanilla,hf", True, 0.5, "temperature=0.5"),
    ],
)
def test_decoder_lists_are_checked(names: str, head: bool, temperature: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        check_decoders(names, head, temperature)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"max_new_tokens": 1}, {"warmup_tokens": -1}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        BenchConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    sizes = FeatExtrapolatorConfig.for_target(config(258))
    LlamaForCausalLM(config(258)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_head(folder / "head", sizes, dict(FeatExtrapolator(sizes).state_dict()), None)
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "category": "x"}\n{"turns": ["b"]}\n')
    return folder


def test_the_command_writes_one_json_whose_numbers_the_table_shows(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", "--model", home / "model", "--head", home / "head", "--dtype", "float32", "--packing", "off"]
    words += ["--prompts", home / "prompts.jsonl", "--decoders", "vanilla,eagle,hf", "--max-new-tokens", 10]
    words += ["--nodes", 8, "--depth", 2, "--rounds", 2, "--v-curve", "--json", out]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    written: dict[str, Any] = json.loads(out.read_text())
    assert set(written) == {"kind", "rows", "differences", "per_prompt", "environment", "v_curve"}
    assert [row["decoder"] for row in written["rows"]] == ["vanilla", "eagle", "hf"]
    for row in written["rows"]:
        assert set(row) >= ROW_KEYS
        assert f"{row['tokens_per_s']:.1f}" in result.stdout
    environment = written["environment"]
    assert set(environment) >= ENVIRONMENT_KEYS
    assert environment["prompts_sha256"] == hashlib.sha256((home / "prompts.jsonl").read_bytes()).hexdigest()
    assert environment["prompts_count"] == 2 and environment["packing"] == "off"
    assert environment["settings"]["shape"]["nodes"] == 8 and environment["settings"]["rounds"] == 2
    assert "bonus token included" in environment["tau_convention"]
    assert [point["nodes"] for point in written["v_curve"]["points"]] == [1, 2, 4, 6, 8, 12, 16, 24, 32, 60]


def test_json_to_stdout_keeps_the_table_off_it(home: Path) -> None:
    words = ["bench", "--model", home / "model", "--packing", "off", "--prompts", home / "prompts.jsonl"]
    words += ["--decoders", "vanilla", "--max-new-tokens", 4, "--json", "-", "--head", "none", "--limit", 1]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][0]["speedup_vs_hf"] is None
    assert "vanilla" in result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--decoders", "vanilla,warp"], "warp"),
        (["--decoders", ""], "names none"),
        (["--head", "./nowhere"], "nowhere"),
        (["--head", "none"], "needs a head"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--rounds", "-1"], "rounds=-1"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_the_command_refuses_before_loading(
    home: Path, words: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haast.target.load.load_target", None)
    begin = ["bench", "--model", str(home / "model"), "--head", str(home / "head")]
    result = CliRunner().invoke(app, [*begin, "--prompts", str(home / "prompts.jsonl"), *words])
    assert result.exit_code == 2 and named in result.stderr and result.stderr.count("\n") == 1


def test_the_table_survives_missing_numbers(arms: list[Decoder]) -> None:
    records = run_file(arms[:1], PROMPTS[:1], BenchConfig(max_new_tokens=2, warmup_tokens=0))
    document = {
        "rows": aggregate.build_rows(records, PROMPTS[:1]),
        "differences": [],
        "environment": {"model": "tiny", "prompts_count": 1},
    }
    assert "vanilla" in text("bench.txt", d=document)


def test_a_record_of_one_token_has_no_speed() -> None:
    record = [DecoderRun((5,), 1.0, 0.0, None)]
    (row,) = aggregate.build_rows({"hf": [record]}, PROMPTS[:1])
    assert row["decoded_tokens"] == row["tokens_per_s"] == 0 and row["ms_draft"] is None


def test_every_decoder_of_the_engine_says_the_same(target: Target, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    decoders = "vanilla,eagle,eagle+suffix,small-model,lookahead,lookup,suffix"
    words = ["bench", "--model", home / "model", "--head", home / "head", "--dtype", "float64", "--packing", "off"]
    words += ["--prompts", home / "prompts.jsonl", "--decoders", decoders, "--max-new-tokens", 24, "--json", out]
    words += ["--small-model", home / "model"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    written: dict[str, Any] = json.loads(out.read_text())
    assert [row["decoder"] for row in written["rows"]] == decoders.split(",")
    assert written["differences"] == []
    nodes = {row["decoder"]: row["nodes_per_forward"] for row in written["rows"]}
    assert nodes["vanilla"] == 1 and 1 < nodes["lookup"] <= 6 and 1 < nodes["lookahead"] <= 5, "no padding is run"
    most = {name: drafter_for(name, target).nodes for name in ("lookup", "suffix", "lookahead")}
    assert most == {"lookup": 6, "suffix": 6, "lookahead": 5}
    assert len({row["tokens"] for row in written["rows"]}) == 1


def test_a_suffix_branch_needs_the_head_too() -> None:
    with pytest.raises(ValueError, match=r"eagle\+suffix.*needs a head"):
        check_decoders("vanilla,eagle+suffix", False, 0.0)
