"""From prompts to a head in one call: the plan, and that every interruption continues. Tiny models, no network."""

from __future__ import annotations

import json
from pathlib import Path

import kill_jobs
import pytest
import torch
from fakes import dies_after
from safetensors.torch import load_file
from test_cli import document, haast_run, refused, tiny_config, tiny_tokenizer
from test_kill import answers, count_lines, run
from transformers import LlamaForCausalLM

from haast import jsonl_log
from haast.prompts import Prompt
from haast.training.config import RegenerateConfig, TrainConfig
from haast.training.plan import Rates, make_plan

RATES = Rates(answers=500.0, features=1500.0, training=4000.0, aligned=2500.0, prompt_tokens=60.0)
MANY = [Prompt(f"p{i}", ("say", "more")) for i in range(20_000)]


def test_the_plan_is_the_sum_of_its_stages() -> None:
    plan = make_plan(RATES, MANY, RegenerateConfig(answers=10_000, lengths="256:1"), TrainConfig(), None)
    assert plan.answers == 10_000 and plan.tokens_per_answer == pytest.approx(179.2)
    assert plan.views == 6 * 1_792_000
    training = (0.7 * plan.views / 4000 + 0.3 * plan.views / 2500) / 60
    assert plan.minutes == pytest.approx((1_792_000 / 500 / 60, 2_392_000 / 1500 / 60, training))
    assert "10000 of about 179 tokens" in plan.lines()[0] and len(plan.lines()) == 4
    assert make_plan(RATES, MANY, RegenerateConfig(), TrainConfig(), None).answers == 40_000, "all turns"


def test_minutes_decide_the_number_of_answers() -> None:
    for minutes in (30.0, 120.0, 600.0):
        plan = make_plan(RATES, MANY, RegenerateConfig(), TrainConfig(), minutes)
        assert 0.95 * minutes < sum(plan.minutes) <= minutes and plan.answers < 40_000
    few = RegenerateConfig(answers=500)
    assert make_plan(RATES, MANY, few, TrainConfig(), 600.0).answers == 500
    with pytest.raises(ValueError, match="minutes=1 is too short: 100 answers"):
        make_plan(RATES, MANY, RegenerateConfig(), TrainConfig(), 1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = [{"id": f"p{i}", "category": "chat", "turns": [f"Say {i}."]} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def begin(home: Path, out: Path, *more: object) -> list[object]:
    sizes = ["--lengths", "12:1", "--views", 60, "--packing", "off"]
    return ["make-head", home / "model", "--prompts", home / "prompts.jsonl", "--out", out, *sizes, *more]


def test_one_command_makes_a_head_and_goes_on_after_ctrl_c(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    planned = haast_run(*begin(home, out, "--plan"))
    assert planned.exit_code == 0 and "together, by rates measured" in planned.stdout, planned.output
    assert not list(out.iterdir())
    monkeypatch.setattr(jsonl_log, "append", dies_after(jsonl_log.append, 2))
    stopped = haast_run(*begin(home, out))
    assert stopped.exit_code == 130 and "the same command resumes" in stopped.stderr and len(answers(out)) == 2
    monkeypatch.undo()
    refused(haast_run(*begin(home, out, "--seed", 1)), "begun with other settings", "'seed': (0, 1)")
    plan = json.loads((out / "make-head.json").read_text())
    training = plan["settings"]["training"]
    assert training["mixed_precision"] == "auto" and not training.pop("reach_weights")
    training["mixed_precision"] = "no"
    (out / "make-head.json").write_text(json.dumps(plan))  # as a version without these settings wrote it
    refused(haast_run(*begin(home, out, "--temperatures", "0:1")), "'temperatures'")
    made = document(haast_run(*begin(home, out, "--json", "-")))
    assert made["head"] == str(out / "best") and len(answers(out)) == 4
    card = (out / "best" / "README.md").read_text()
    assert "## Plan" in card and "| answers | 4 |" in card and "| schedule | muon" in card
    assert document(haast_run(*begin(home, out, "--json", "-")))["head"] == made["head"], "nothing is left to do"
    (out / "make-head.json").write_text("{")
    refused(haast_run(*begin(home, out)), "is damaged", "delete it")


def test_wrong_input_is_refused_before_anything_loads(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(haast_run("make-head", home / "model", "--out", out), "--prompts")
    refused(haast_run(*begin(home, out, "--minutes", 0)), "minutes=0")
    refused(haast_run(*begin(home, out, "--head", "hydra")), "head='hydra'")
    refused(haast_run(*begin(home, out, "--mix", "chat")), "mix='chat'")
    refused(haast_run(*begin(home, home / "prompts.jsonl")), "cannot write")
    assert not out.exists()


@pytest.mark.parametrize(("output", "lines"), [("answers.jsonl", 5), ("metrics.jsonl", 2)])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path, output: str, lines: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run(kill_jobs.make_head, whole, False, 1200)
    killed = run(kill_jobs.make_head, cut, False, 1200, (cut / output, lines, 0.0))
    assert killed and (output != "metrics.jsonl" or count_lines(cut / "answers.jsonl") == kill_jobs.ANSWERS)
    run(kill_jobs.make_head, cut, True, 1200)
    assert answers(cut) == answers(whole)
    about = [json.loads((folder / "best/config.json").read_text())["about"] for folder in (whole, cut)]
    assert about[0]["sequences"] == about[1]["sequences"] == kill_jobs.ANSWERS
    one, other = (load_file(folder / "best/model.safetensors") for folder in (whole, cut))
    if output == "metrics.jsonl":  # the same shards, so the same batches: bit for bit
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
