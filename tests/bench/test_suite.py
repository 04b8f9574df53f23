"""`bench --suite` and `report` on a tiny model: the bootstrap, the order, the journal, merging, and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from readme import render
from safetensors.torch import load_file, save_file
from test_bench import config
from test_cli import tiny_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

from haast.bench.aggregate import Bootstrap, build_rows, describe_answer, pooled, rates, ratio
from haast.bench.decoders import DecoderRun, EngineDecoder
from haast.bench.document import FORMAT, merged
from haast.bench.journal import Journal, differing
from haast.bench.runner import BenchPrompt, Difference, Record, Turn, differences, order
from haast.bench.tables import suite_markdown
from haast.cli import app
from haast.engine.engine import Stats
from haast.heads.checkpoint import save_head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.prompts import read_suites

SIZES = {"one": 3, "two": 2}
WORDS = ["vanilla", "eagle", "lookup", "hf"]
DOCUMENT = {"format", "environment", "suites", "decoders", "temperatures", "rounds", "rows", "ratios", "differences"}
DOCUMENT |= {"kind", "answers", "bootstrap", "calibration", "traces"}
ANSWER = {"suite", "id", "category", "temperature", "decoder", "tokens", "ms_decode", "ms_prefill", "target_forwards"}
ANSWER |= {"tau", "nodes", "looping"}


# The bootstrap.


def test_a_constant_ratio_has_an_interval_without_width() -> None:
    draws = Bootstrap(samples=200).draws([4])
    slow, fast = rates([9, 20, 3, 7], [3.0, 5.0, 1.0, 2.0], draws), rates([9, 20, 3, 7], [1.5, 2.5, 0.5, 1.0], draws)
    found = Bootstrap().interval(ratio(fast, slow))
    assert found == pytest.approx((2.0, 2.0))


def test_an_interval_is_that_of_theory_and_narrows_with_more_prompts() -> None:
    generator, widths = np.random.default_rng(1), []
    for prompts in (25, 100, 400):
        ms = generator.normal(10.0, 1.0, prompts)
        draws = Bootstrap().draws([prompts])
        values = ratio(rates([10] * prompts, [10.0] * prompts, draws), rates([10] * prompts, list(ms), draws))
        low, high = Bootstrap().interval(values) or (0.0, 0.0)
        # The ratio is the mean of `ms` over 10, of standard error 0.1 / sqrt(prompts).
        assert high - low == pytest.approx(2 * 1.96 * ms.std() / 10 / prompts**0.5, rel=0.12)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


def test_draws_are_seeded_paired_and_within_their_suites() -> None:
    draws = Bootstrap(samples=50).draws([3, 4])
    assert draws.shape == (50, 7)
    assert draws[:, :3].max() == 2 and draws[:, 3:].min() == 3 and draws[:, 3:].max() == 6
    assert (draws == Bootstrap(samples=50).draws([3, 4])).all()
    assert (draws != Bootstrap(samples=50, seed=1).draws([3, 4])).any()


def test_an_interval_without_numbers_is_none() -> None:
    draws = Bootstrap(samples=20).draws([2])
    assert Bootstrap().interval(ratio(rates([1, 1], [1.0, 1.0], draws), rates([0, 0], [0.0, 0.0], draws))) is None


@pytest.mark.parametrize("values", [{"samples": 0}, {"seed": -1}, {"level": 1.0}])
def test_bootstrap_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Bootstrap(**values)


# The order.


@given(st.integers(0, 1000), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_the_order_is_complete_seeded_and_keeps_prompts_together(seed: int, rounds: int, sizes: list[int]) -> None:
    named = {f"s{i}": size for i, size in enumerate(sizes)}
    decoders = {0.0: ["vanilla", "eagle", "hf"], 1.0: ["vanilla", "eagle"]}
    turns = order(seed, rounds, named, decoders)
    assert turns == order(seed, rounds, named, decoders)
    turned = {temperature: names[::-1] for temperature, names in reversed(decoders.items())}
    assert turns == order(seed, rounds, dict(reversed(named.items())), turned)  # as asked for in another order
    wanted = {
        Turn(r, t, s, p, d)
        for r in range(rounds)
        for t, names in decoders.items()
        for s, size in named.items()
        for p in range(size)
        for d in names
    }
    assert len(turns) == len(wanted) and set(turns) == wanted
    assert [turn.round for turn in turns] == sorted(turn.round for turn in turns)
    visits = [(t.round, t.temperature, t.suite, t.place) for t in turns]
    changes = 1 + sum(a != b for a, b in pairwise(visits))
    assert changes == len(set(visits))  # each prompt is met once a round, by all its decoders in a row


def test_the_order_mixes_prompts_and_decoders() -> None:
    turns = order(0, 1, {"a": 20, "b": 20}, {0.0: ["x", "y", "z"], 1.0: ["x", "y", "z"]})
    firsts = Counter(turn.decoder for turn in turns[::3])
    assert min(firsts.values()) > 15  # of 80; each would be first 27 times
    assert turns != order(1, 1, {"a": 20, "b": 20}, {0.0: ["x", "y", "z"], 1.0: ["x", "y", "z"]})
    suites = [turn.suite for turn in turns[::3]]
    assert sum(a != b for a, b in pairwise(suites)) > 20


# The command.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, head/, suites/ with one.jsonl (3 prompts) and two.jsonl (2)."""
    folder = tmp_path_factory.mktemp("suite")
    torch.manual_seed(0)
    sizes = FeatExtrapolatorConfig.for_target(config(258))
    LlamaForCausalLM(config(258)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_head(folder / "head", sizes, dict(FeatExtrapolator(sizes).state_dict()), None)
    (folder / "suites").mkdir()
    for name, size in SIZES.items():
        lines = [{"id": f"p{i}", "category": "xy"[i % 2], "prompt": f"{name} {i}"} for i in range(size)]
        (folder / "suites" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def bench(home: Path, out: Path, *words: object, decoders: str = ",".join(WORDS)) -> Result:
    begin = ["bench", "--model", home / "model", "--head", home / "head", "--dtype", "float64", "--packing", "off"]
    begin += ["--suite", home / "suites", "--out", out, "--decoders", decoders, "--max-new-tokens", 8, "--nodes", 6]
    return CliRunner().invoke(app, [str(word) for word in (*begin, *words)])


@pytest.fixture(scope="module")
def done(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("done") / "results"
    result = bench(home, out)
    assert result.exit_code == 0, result.output
    return out


def read(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "suite.json").read_text())
    return value


def timeless(value: Any) -> Any:
    """A document without what another run of the same would time otherwise."""
    timed = ("ms_", "peak_rss", "tokens_per_s", "whole_call", "speedup", "spread", "date", "load_average", "ratio")
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.startswith(timed) and k not in ("low", "high")}
        return {key: timeless(own) for key, own in kept.items()}
    return [timeless(own) for own in value] if isinstance(value, list) else value


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("haast: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_the_document_has_every_row_ratio_and_answer(done: Path, home: Path) -> None:
    document = read(done)
    assert set(document) == DOCUMENT and document["format"] == FORMAT
    assert document["temperatures"] == [0.0, 1.0] and document["rounds"] == 2
    assert {name: suite["prompts"] for name, suite in document["suites"].items()} == SIZES
    assert list(document["decoders"]) == WORDS
    assert not any(decoder["lossy"] for decoder in document["decoders"].values())
    assert document["decoders"]["eagle"]["settings"]["shape"]["nodes"] == 6
    cells = [(row["temperature"], row["suite"], row["decoder"]) for row in document["rows"]]
    assert cells == [
        (t, s, d) for t in (0.0, 1.0) for s in (*SIZES, "all") for d in WORDS if d != "hf" or t == 0
    ]  # fmt: skip
    ratios = Counter((each["temperature"], each["suite"]) for each in document["ratios"])
    assert ratios == {(t, s): 12 if t == 0 else 6 for t in (0.0, 1.0) for s in (*SIZES, "all")}
    assert len(document["answers"]) == 5 * (4 + 3)
    for answer in document["answers"]:
        assert set(answer) == ANSWER and answer["tokens"] == 8 and len(answer["ms_decode"]) == 2
    for each in document["ratios"]:
        assert each["low"] <= each["ratio"] <= each["high"]
    assert document["differences"] == [] or {d["kind"] for d in document["differences"]} == {"precision"}
    words = (done / "suite.json").read_text()
    assert "one 0" not in words and "two 1" not in words  # no prompt's text


def test_ratios_and_spread_are_those_of_the_rows(done: Path) -> None:
    document = read(done)
    rows = {(row["temperature"], row["suite"], row["decoder"]): row for row in document["rows"]}
    for each in document["ratios"]:
        one, other = (rows[each["temperature"], each["suite"], each[key]] for key in ("decoder", "over"))
        assert each["ratio"] == pytest.approx(one["tokens_per_s"] / other["tokens_per_s"])
    for (temperature, suite, decoder), row in rows.items():
        answers = [
            a for a in document["answers"]
            if (a["temperature"], a["decoder"]) == (temperature, decoder) and suite in (a["suite"], "all")
        ]  # fmt: skip
        speeds = [7e3 * len(answers) / sum(a["ms_decode"][i] for a in answers) for i in range(2)]
        assert row["spread"] == pytest.approx({"low": min(speeds), "high": max(speeds)})
        vanilla = rows[temperature, suite, "vanilla"]["tokens_per_s"]
        assert row["speedup_vs_vanilla"] == pytest.approx(row["tokens_per_s"] / vanilla)


def test_intervals_draw_prompts_within_their_suites(done: Path) -> None:
    document = read(done)
    draws = Bootstrap(**document["bootstrap"]).draws(list(SIZES.values()))
    drawn = []
    for name in ("eagle", "vanilla"):
        own = [a for a in document["answers"] if (a["temperature"], a["decoder"]) == (1.0, name)]
        drawn.append(rates([a["tokens"] - 1 for a in own], [sum(a["ms_decode"]) / 2 for a in own], draws))
    (found,) = [
        r for r in document["ratios"]
        if (r["suite"], r["temperature"], r["decoder"], r["over"]) == ("all", 1.0, "eagle", "vanilla")
    ]  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx(Bootstrap().interval(drawn[0] / drawn[1]))


def test_texts_are_judged_at_the_temperature_they_were_drawn_at(
    home: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "journal.jsonl").write_bytes((done / "journal.jsonl").read_bytes())
    seen: list[float] = []

    def watched(*each: Any) -> list[Difference]:
        seen.append(each[3].temperature)
        return differences(*each)

    monkeypatch.setattr("haast.bench.document.differences", watched)
    assert bench(home, tmp_path, "--resume").exit_code == 0
    assert seen == [0.0, 0.0, 1.0, 1.0]


def test_pooled_rows_are_those_of_all_prompts_at_once() -> None:
    def record(tokens: int, steps: int, scale: float) -> Record:
        stats = Stats(decoded_tokens=tokens - 1, target_forwards=steps, nodes=3 * steps)
        stats.reached_by_depth, stats.accepted_by_depth = [steps, steps // 2], [steps // 2, 1]
        stats.first_choice_by_depth = [1, 1]
        stats.ms_draft = stats.ms_verify = stats.ms_overhead = scale
        return [DecoderRun(tuple(range(tokens)), 1.0 + i, scale * (i + 1), stats, scale) for i in range(2)]

    suites = {"a": [record(9, 4, 2.0), record(5, 3, 1.0)], "b": [record(12, 6, 5.0)]}
    prompts = {name: [BenchPrompt(str(i), "xy"[i % 2], (1,)) for i in range(len(own))] for name, own in suites.items()}
    parts = [build_rows({"eagle": own}, prompts[name])[0] for name, own in suites.items()]
    answers = [
        describe_answer({"suite": name, "temperature": 0.0}, prompt, "eagle", own)
        for name in suites
        for prompt, own in zip(prompts[name], suites[name], strict=True)
    ]
    (wanted,) = build_rows({"eagle": [*chain(*suites.values())]}, [*chain(*prompts.values())])
    found = pooled(parts, answers)
    for key in wanted.keys() - {"speedup_vs_vanilla", "speedup_vs_hf"}:
        if key == "decoder":
            assert found[key] == "eagle"
        else:
            assert found[key] == pytest.approx(wanted[key]), key


def test_hf_is_left_out_where_it_samples_and_the_documents_say_so(done: Path, home: Path, tmp_path: Path) -> None:
    document = read(done)
    assert [(each["decoder"], each["temperature"]) for each in document["environment"]["skipped"]] == [("hf", 1.0)]
    assert not any(answer["decoder"] == "hf" and answer["temperature"] > 0 for answer in document["answers"])
    assert "hf did not run at temperature 1" in (done / "suite.md").read_text()
    refused(bench(home, tmp_path / "out", decoders="hf"), "no decoder is left at temperature 1")


def test_both_temperatures_answer_alike_over_decoders_and_not_over_temperatures(done: Path) -> None:
    texts: dict[tuple[Any, ...], set[tuple[int, ...]]] = {}
    for line in (done / "journal.jsonl").read_text().splitlines()[1:]:
        value = json.loads(line)
        if value["decoder"] != "hf":
            key = (value["temperature"], value["suite"], value["place"])
            texts.setdefault(key, set()).add(tuple(value["tokens"]))
    assert len(texts) == 10 and all(len(own) == 1 for own in texts.values())
    assert texts[0.0, "one", 0] != texts[1.0, "one", 0]


def test_the_journal_is_in_the_order_of_the_seed(done: Path) -> None:
    lines = [json.loads(line) for line in (done / "journal.jsonl").read_text().splitlines()[1:]]
    wanted = order(0, 2, SIZES, {0.0: WORDS, 1.0: WORDS[:3]})
    assert [Turn(v["round"], v["temperature"], v["suite"], v["place"], v["decoder"]) for v in lines] == wanted


@pytest.mark.parametrize("torn", ["", '{"round": 0, "temp', "\0\0\0\n"])
def test_a_resumed_run_ends_in_the_same_document(home: Path, done: Path, tmp_path: Path, torn: str) -> None:
    lines = (done / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_text("".join(lines[:24]) + torn)
    refused(bench(home, tmp_path), "--resume")
    result = bench(home, tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    again = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    assert again[:24] == lines[:24] and len(again) == len(lines)
    assert timeless(read(tmp_path)) == timeless(read(done))


def test_a_finished_journal_gives_its_document_without_an_answer_more(
    home: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "journal.jsonl").write_bytes((done / "journal.jsonl").read_bytes())
    monkeypatch.setattr(EngineDecoder, "run", None)
    assert bench(home, tmp_path, "--resume").exit_code == 0
    assert (tmp_path / "suite.json").read_bytes() == (done / "suite.json").read_bytes()
    assert (tmp_path / "suite.md").read_bytes() == (done / "suite.md").read_bytes()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max-new-tokens", 9], "environment.settings.max_new_tokens was 8, now 9"),
        (["--seed", 1], "sampling.seed was 0, now 1"),
        (["--rounds", 3], "rounds was 2, now 3"),
        (["--only", "one"], "suites.two"),
        (["--limit", 1], "suites.one.tokens_sha256"),
        (["--temperatures", "0"], "temperatures"),
        (["--depth", 1], "decoders.eagle.settings.shape.depth"),
        (["--raw"], "environment.settings.raw was false, now true"),
        (["--threads", 2], "environment.threads was 1, now 2"),
    ],
)
def test_a_journal_of_other_settings_is_refused(
    home: Path, done: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    before = (done / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(before)
    try:
        refused(bench(home, tmp_path, "--resume", *words), named)
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_journal_of_another_commit_or_machine_is_refused(done: Path) -> None:
    header = json.loads((done / "journal.jsonl").read_text().splitlines()[0])
    other = copy.deepcopy(header)
    other["environment"] |= {"date": "now", "load_average": [9], "command": "haast bench --resume"}
    assert differing(header, other) == []
    other["environment"]["commit"], other["environment"]["cpu"] = {"hash": "b", "dirty": False}, "Z80"
    found = "; ".join(differing(header, other))
    assert "environment.commit" in found and "environment.cpu" in found and "Z80" in found


def test_a_journal_of_another_head_behind_the_same_name_is_refused(home: Path, done: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes((done / "journal.jsonl").read_bytes())
    sizes = FeatExtrapolatorConfig.for_target(config(258))
    save_head(tmp_path / "head", sizes, dict(FeatExtrapolator(sizes).state_dict()), None)
    refused(bench(home, tmp_path, "--resume", "--head", tmp_path / "head"), "decoders.eagle.settings.head_sha256")


def _answer(place: int) -> tuple[Turn, DecoderRun]:
    return Turn(0, 0.0, "one", place, "hf"), DecoderRun((1, 2), 1.0, 2.0, None, 5.0)


def test_a_damaged_or_foreign_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"rounds": 1}, False) as journal:
        for place in range(3):
            journal.keep(*_answer(place))
    lines = path.read_text().splitlines(keepends=True)
    for damage, named in (
        ([lines[0], "x\n", lines[2]], "line 2"),
        ([lines[0], '{"a": 1}\n', lines[2]], "line 2"),
        (["Dear diary"], "line 1"),
        (['{"format": "answers"}\n'], "not a journal"),
    ):
        path.write_text("".join(damage))
        with pytest.raises(ValueError, match=named), Journal(path, {"rounds": 1}, True):
            pass
        assert path.read_text() == "".join(damage)


def test_a_journal_that_was_killed_within_its_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"format": "haast-suite-journal-1", "rou')
    with Journal(path, {"rounds": 1}, True) as journal:
        journal.keep(*_answer(0))
    with Journal(path, {"rounds": 1}, True) as journal:
        assert list(journal.answers.items()) == [_answer(0)]


def test_one_run_at_a_time_writes_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with (
        Journal(path, {}, False),
        pytest.raises(ValueError, match="another run"),
        Journal(path, {}, True),
    ):
        pass


def test_ctrl_c_leaves_a_journal_that_goes_on(
    home: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = [0], EngineDecoder.run

    def interrupted(self: EngineDecoder, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return run(self, prompt, max_new_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(EngineDecoder, "run", interrupted)
        result = bench(home, tmp_path)
    assert result.exit_code == 130
    kept = len((tmp_path / "journal.jsonl").read_text().splitlines()) - 1
    assert f"{kept} of 70 answers" in result.stderr and "--resume" in result.stderr and kept >= 13
    assert not (tmp_path / "suite.json").exists()
    assert bench(home, tmp_path, "--resume").exit_code == 0
    assert timeless(read(tmp_path)) == timeless(read(done))


def _forge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookup says another fourth token."""
    run = EngineDecoder.run

    def wrong(self: EngineDecoder, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        done = run(self, prompt, max_new_tokens)
        if self.name != "lookup":
            return done
        tokens = (*done.tokens[:3], (done.tokens[3] + 1) % 250, *done.tokens[4:])
        return DecoderRun(tokens, done.ms_prefill, done.ms_decode, done.stats)

    monkeypatch.setattr(EngineDecoder, "run", wrong)


def test_a_decoder_that_says_something_else_fails_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forge(monkeypatch)
    result = bench(home, tmp_path, "--rounds", 1, decoders="vanilla,eagle,lookup")
    assert result.exit_code == 1 and "10 outputs differ" in result.stderr
    document = read(tmp_path)
    assert {(d["decoder"], d["index"], d["kind"]) for d in document["differences"]} == {("lookup", 3, "bug")}
    assert {d["suite"] for d in document["differences"]} == set(SIZES)
    assert "10 by a BUG" in (tmp_path / "suite.md").read_text()


def test_rules_with_texts_of_their_own_are_excused_above_zero_and_named(home: Path, tmp_path: Path) -> None:
    sizes = MedusaConfig.for_target(config(258), heads=2, blocks=1)
    save_head(tmp_path / "medusa", sizes, dict(MedusaHeads(sizes).state_dict()), None)
    words = ["--medusa-head", tmp_path / "medusa", "--small-model", home / "model", "--rounds", 1]
    result = bench(home, tmp_path, *words, decoders="vanilla,medusa-typical,small-model-block")
    assert result.exit_code == 0, result.output
    document = read(tmp_path)
    about = document["decoders"]
    assert about["medusa-typical"]["lossy"] and not about["small-model-block"]["lossy"]
    assert (about["medusa-typical"]["rule"], about["small-model-block"]["rule"]) == ("typical", "block")
    assert document["differences"] == []  # compared at temperature 0, where every rule keeps vanilla's text
    told = (tmp_path / "suite.md").read_text()
    assert "| medusa-typical (lossy) |" in told and "not compared there: small-model-block" in told
    greedy = sum(a["temperature"] == 0 and a["decoder"] != "vanilla" for a in document["answers"])
    assert f"Texts compared with vanilla's, token by token: {greedy};" in told
    drawn = next(r for r in document["rows"] if (r["decoder"], r["temperature"]) == ("small-model-block", 1.0))
    assert drawn["tau"] > 3  # the small model is the target: nearly every draft is kept


def test_decoders_with_parts_of_their_own_are_told_apart(home: Path, tmp_path: Path) -> None:
    sizes = MedusaConfig.for_target(config(258), heads=2, blocks=1)
    save_head(tmp_path / "medusa", sizes, dict(MedusaHeads(sizes).state_dict()), None)
    words = ["--medusa-head", tmp_path / "medusa", "--medusa-nodes", 4, "--small-model", home / "model"]
    words += ["--rounds", 1, "--temperatures", 1, "--only", "two"]
    result = bench(home, tmp_path / "out", *words, decoders="vanilla,medusa,small-model,lookahead")
    assert result.exit_code == 0, result.output
    document = read(tmp_path / "out")
    own = {name: decoder["settings"] for name, decoder in document["decoders"].items()}
    assert own["vanilla"] == {"nodes": 1} and own["medusa"]["nodes"] == 4 and len(own["medusa"]["head_sha256"]) == 64
    assert own["small-model"]["model"] == str(home / "model") and document["differences"] == []
    assert len({answer["tokens"] for answer in document["answers"]}) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--only", "three"], ["three", "one, two"]),
        (["--only", "one,one"], ["twice"]),
        (["--only", ""], ["choose some of"]),
        (["--limit", 0], ["limit=0"]),
        (["--decoders", "vanilla,warp"], ["warp"]),
        (["--head", "none"], ["needs a head"]),
        (["--temperatures", "0,hot"], ["temperatures='0,hot'"]),
        (["--temperatures", "0,0"], ["list each temperature once"]),
        (["--temperatures", "-1"], ["temperature=-1"]),
        (["--temperatures", "nan"], ["temperature=nan"]),
        (["--temperature", "1"], ["--temperatures 1"]),
        (["--json", "x.json"], ["--json"]),
        (["--v-curve"], ["--v-curve"]),
        (["--prompts", "x.jsonl"], ["not both"]),
        (["--rounds", 0], ["rounds=0"]),
    ],
)
def test_the_command_refuses_before_loading(
    home: Path, tmp_path: Path, words: list[object], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haast.target.load.load_target", None)
    refused(bench(home, tmp_path / "out", *words), *named)


def test_suite_options_need_a_suite(home: Path) -> None:
    begin = ["bench", "--model", str(home / "model"), "--prompts", str(home / "suites" / "one.jsonl")]
    for words in (["--resume"], ["--out", "x"], ["--only", "one"], ["--temperatures", "0"]):
        refused(CliRunner().invoke(app, [*begin, *words]), words[0], "needs --suite")
    refused(CliRunner().invoke(app, ["bench", "--suite", str(home / "suites")]), "--out")
    refused(bench(home, home / "suites"), "is the folder of --suite")


def test_folders_that_are_no_suites_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        read_suites(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no suites"):
        read_suites(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1.*--only"):
        read_suites(tmp_path)
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_suites(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    with pytest.raises(ValueError, match="two prompts with the id '1'"):
        read_suites(tmp_path)
    (tmp_path / "bad.jsonl").rename(tmp_path / "all.jsonl")
    with pytest.raises(ValueError, match="rename the file"):
        read_suites(tmp_path)
    assert [path.stem for path in read_suites(home / "suites", ["two", "one"])] == ["two", "one"]
    assert [len(own) for own in read_suites(home / "suites", limit=2).values()] == [2, 2]


# Reports and merging.


def part(document: dict[str, Any], suites: Sequence[str], decoders: Sequence[str]) -> dict[str, Any]:
    """What a run of some of the suites and decoders would have written."""
    own = copy.deepcopy(document)
    own["suites"] = {name: own["suites"][name] for name in suites}
    own["decoders"] = {name: own["decoders"][name] for name in decoders}
    for key in ("rows", "ratios", "differences", "answers"):
        own[key] = [e for e in own[key] if e["suite"] in suites and e["decoder"] in decoders]
    return own


def test_parts_merge_into_the_document_of_the_whole_run(done: Path) -> None:
    whole = read(done)
    suites = merged({"a": part(whole, ["one"], WORDS), "b": part(whole, ["two"], WORDS)})
    decoders = merged({"a": part(whole, [*SIZES], WORDS[:2]), "b": part(whole, [*SIZES], WORDS[2:])})
    for found in (suites, decoders):
        assert list(found) and set(found) == DOCUMENT
        assert found["ratios"] == whole["ratios"]
        assert {k: v for k, v in found.items() if k not in ("environment", "answers", "differences")} == {
            k: v for k, v in whole.items() if k not in ("environment", "answers", "differences")
        }
        assert len(found["environment"]["merged"]) == 2 and found["environment"]["warnings"] == []
        assert sorted(map(str, found["answers"])) == sorted(map(str, whole["answers"]))
    assert merged({"a": whole}) == whole


def test_a_decoder_that_missed_a_suite_has_no_row_over_all(done: Path) -> None:
    whole = read(done)
    found = merged({"a": part(whole, ["one"], WORDS), "b": part(whole, ["two"], WORDS[:2])})
    assert [r["decoder"] for r in found["rows"] if (r["suite"], r["temperature"]) == ("all", 0.0)] == WORDS[:2]
    assert "| lookup |" in suite_markdown(found)


@pytest.mark.parametrize("key", ["commit", "cpu", "threads", "model", "dtype", "packing", "versions", "sources_sha256"])
def test_other_machines_and_commits_merge_only_when_asked(done: Path, key: str) -> None:
    whole = read(done)
    one, two = part(whole, ["one"], WORDS), part(whole, ["two"], WORDS)
    two["environment"][key] = {"torch": "0.1", "transformers": "0", "hash": "b" * 40, "dirty": False}
    with pytest.raises(ValueError, match=rf"{key} is .* in a\.json, .* in b\.json.*--merge-anyway"):
        merged({"a.json": one, "b.json": two})
    found = merged({"a.json": one, "b.json": two}, anyway=True)
    assert [own.get(key) for own in found["environment"]["merged"]] == [e["environment"][key] for e in (one, two)]
    assert f"**Warning**: {key} is" in suite_markdown(found)


def test_settings_and_lengths_have_to_agree_too(done: Path) -> None:
    whole = read(done)
    one = part(whole, [*SIZES], WORDS[:1])
    for damage, named in (("settings", "max_new_tokens"), ("rounds", "rounds is"), ("answers", "differ in length")):
        two = part(whole, [*SIZES], WORDS[1:])
        if damage == "settings":
            two["environment"]["settings"]["max_new_tokens"] = 9
        elif damage == "rounds":
            two["rounds"] = two["environment"]["settings"]["rounds"] = 3
        else:
            two["answers"][0]["tokens"] += 1
        with pytest.raises(ValueError, match=named):
            merged({"a": one, "b": two})


def test_what_no_document_can_hold_is_always_refused(done: Path) -> None:
    whole = read(done)
    with pytest.raises(ValueError, match="eagle on one at temperature 0 is in a and in b"):
        merged({"a": part(whole, ["one"], ["eagle"]), "b": part(whole, ["one"], WORDS[1:])}, anyway=True)
    other = part(whole, ["one"], ["lookup"])
    other["suites"]["one"]["sha256"] = "0"
    with pytest.raises(ValueError, match="'one' has different prompts"):
        merged({"a": part(whole, ["one"], ["eagle"]), "b": other}, anyway=True)


def test_the_report_is_made_from_the_json_alone(done: Path, tmp_path: Path) -> None:
    whole = read(done)
    result = CliRunner().invoke(app, ["report", str(done / "suite.json")])
    assert result.exit_code == 0 and result.stdout == (done / "suite.md").read_text()
    row = next(r for r in whole["rows"] if (r["suite"], r["decoder"]) == ("all", "eagle"))
    found = next(r for r in whole["ratios"] if (r["suite"], r["decoder"], r["over"]) == ("all", "eagle", "vanilla"))
    assert f"{row['tokens_per_s']:.1f} ({row['spread']['low']:.1f} to" in result.stdout
    assert f"{found['ratio']:.2f}x ({found['low']:.2f} to {found['high']:.2f})" in result.stdout
    assert "bonus token included" in result.stdout and "| eagle over | one | two | all |" in result.stdout
    for name in SIZES:
        (tmp_path / f"{name}.json").write_text(json.dumps(part(whole, [name], WORDS)))
    words = ["report", *(str(tmp_path / f"{name}.json") for name in SIZES), "--json", str(tmp_path / "both.json")]
    result = CliRunner().invoke(app, [*words, "--markdown", str(tmp_path / "both.md")])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"written to {tmp_path / name}" for name in ("both.md", "both.json")]
    assert json.loads((tmp_path / "both.json").read_text())["rows"] == whole["rows"]
    assert "Merged from 2 runs" in (tmp_path / "both.md").read_text()
    page = render("<!-- results:both -->\n<!-- end -->", tmp_path)
    assert "| eagle over | one | two | all |" in page and "`results/both.json`" in page


@pytest.mark.parametrize(
    ("text", "named"), [("", "not JSON"), ("[]", "no document"), ('{"format": "haast-suite-1"}', "lacks answers")]
)
def test_files_that_are_no_documents_are_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "x.json").write_text(text)
    refused(CliRunner().invoke(app, ["report", str(tmp_path / "x.json")]), named)
    refused(CliRunner().invoke(app, ["report", str(tmp_path / "nowhere.json")]), "cannot read")
    refused(CliRunner().invoke(app, ["report", str(tmp_path / "x.json"), str(tmp_path / "x.json")]), "twice")


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "abc"}, {"tokens": []}, {"tokens": [2**40]}, {"ms_decode": None}, {"ms_decode": -1}, {"round": []},
        {"stats": None}, {"stats": {"tokens": "x"}}, {"peak_rss_mb": "much"},
    ],
)  # fmt: skip
def test_an_edited_journal_line_is_told_by_its_number(
    home: Path, done: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    lines = (done / "journal.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    result = bench(home, tmp_path, "--resume")
    assert result.exit_code == 2 and "line 4 is not an answer" in result.stderr, result.output


@pytest.mark.parametrize(
    "change",
    [
        {"rows": None}, {"rows": ["x"]}, {"suites": []}, {"answers": 3}, {"environment": []}, {"temperatures": ["a"]},
        {"decoders": {}}, {"rounds": "x"}, {"environment": {}},
    ],
)  # fmt: skip
def test_a_damaged_document_is_one_line(done: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(read(done) | change))
    result = CliRunner().invoke(app, ["report", str(path), "--markdown", str(tmp_path / "out.md")])
    assert result.exit_code == 2 and "suite.json" in result.stderr and "damaged" in result.stderr, result.output
    assert not (tmp_path / "out.md").exists()


def test_a_document_with_nan_is_refused(done: Path, tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text((done / "suite.json").read_text().replace('"rounds": ', '"rounds": NaN, "x": ', 1))
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 2 and "NaN is not a JSON number" in result.stderr


def test_a_run_does_not_go_on_with_other_weights(home: Path, done: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes((done / "journal.jsonl").read_bytes())
    copied = tmp_path / "home"
    shutil.copytree(home, copied)
    weights = copied / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    lines = (tmp_path / "journal.jsonl").read_text().replace(str(home), str(copied))
    (tmp_path / "journal.jsonl").write_text(lines)
    result = bench(copied, tmp_path, "--resume")
    assert result.exit_code == 2 and "weights_sha256 was" in result.stderr, result.output


def test_a_trace_joins_the_report(home: Path, done: Path, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "report.html"
    model = ["--model", home / "model", "--packing", "off", "--decoder", "lookup", "--max-new-tokens", 6]
    words = ["trace", "a prompt of its own", *model, "--json", trace]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    told = [str(word) for word in ("report", done / "suite.json", "--html", page)]
    joined = CliRunner().invoke(app, [*told, "--trace", str(trace)])
    assert (joined.exit_code, joined.stdout) == (0, f"written to {page}\n"), joined.output
    assert "a prompt of its own" in page.read_text()
    both = CliRunner().invoke(app, [*told, "--markdown", "-"])
    assert both.exit_code == 0 and "written to" not in both.stdout and f"written to {page}" in both.stderr
    refused = CliRunner().invoke(app, [*told, "--trace", str(done / "suite.json")])
    assert refused.exit_code == 2 and "give a file of `haast trace --json`" in refused.stderr
