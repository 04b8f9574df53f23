"""`haast import`, `haast export` and `haast check` end to end on a tiny saved model, with what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_heads import PlainMtp, write_checkpoint
from test_cli import EXACT, haast_run, refused, save_random_head, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from haast.cli.settings import Loading
from haast.heads.checkpoint import load_head


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_random_head(folder / "head", tiny_config())
    save_random_head(folder / "other-head", tiny_config(64))
    return folder


def model(home: Path) -> list[str]:
    return ["--model", str(home / "model"), *EXACT]


def document(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_a_head_goes_out_and_comes_back(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = haast_run("export", home / "head", "--to", "sglang", *model(home), "--out", "theirs", "--json", "out.json")
    assert out.exit_code == 0, out.output
    assert "its drafts are the same" in out.stdout and "sglang.launch_server" in out.stdout
    assert "the draft vocabulary of 129 tokens is lost" in out.stdout
    assert document("out.json")["engine"] == "sglang" and (tmp_path / "theirs" / "README.md").is_file()
    back = haast_run("import", "theirs", *model(home), "--out", "ours", "--json", "in.json")
    assert back.exit_code == 0, back.output
    assert "eagle head, official layout, 10 tensors" in back.stdout and "rope style" in back.stdout
    assert document("in.json")["about"]["source"] == "theirs"
    ours, theirs = load_head(tmp_path / "ours").module.state_dict(), load_head(home / "head").module.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "What was measured" in (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
    for head in ("theirs", "ours"):  # a foreign head is taken as it is, and says the target's text
        text = [
            haast_run("generate", "Hi", *model(home), "--head", given, "--drafter", drafter, "--max-new-tokens", "8")
            for given, drafter in ((head, "eagle"), ("none", "none"))
        ]
        assert text[0].exit_code == 0, text[0].output
        assert text[0].stdout == text[1].stdout


def test_check_says_what_it_finds(home: Path, tmp_path: Path) -> None:
    bad = haast_run("check", home / "head", *model(home), "--json", tmp_path / "check.json")
    assert bad.exit_code == 1, bad.output
    assert "rarely right" in bad.stdout and "likely:" in bad.stdout and "tau of a chain" in bad.stdout
    found = document(str(tmp_path / "check.json"))
    assert found["fine"] is False and found["positions"] > 150 and found["tried"][0]["question"] == "rope style"


def test_an_unknown_engine_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(_: Loading) -> None:
        raise AssertionError("this loads torch, which takes seconds")

    monkeypatch.setattr(Loading, "check", late)
    refused(haast_run("export", "default", "--to", "tensorrt"), "tensorrt", "official, vllm")
    assert haast_run("export", "default", "--to", "vllm").exit_code == 3, "an engine that there is comes that far"


def test_what_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(haast_run("import", home / "head", *model(home)), "is a Haast head already")
    refused(haast_run("import", "nowhere", *model(home)), "no head at nowhere", "hub id")
    refused(haast_run("check", "nowhere", *model(home)), "no head at nowhere")
    refused(haast_run("export", home / "head", "--to", "tensorrt", *model(home)), "tensorrt", "official, vllm")
    refused(haast_run("export", home / "head", "--to", "speculators", *model(home)), "EAGLE-1", "--head eagle3")
    refused(haast_run("export", home / "other-head", "--to", "vllm", *model(home)), "hidden_size is 64")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for words in (["export", home / "head", "--to", "vllm"], ["import", home / "other-head"]):
        told = haast_run(*words, *model(home), "--out", "there")
        assert told.exit_code == 2 and (tmp_path / "there" / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_head_in_a_checkpoint_is_shown_used_and_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    whole = Qwen3ForCausalLM(Qwen3Config(**tiny_config().to_diff_dict() | {"model_type": "qwen3", "head_dim": 8}))
    write_checkpoint(tmp_path / "model", whole, PlainMtp(whole, "Qwen"))
    tiny_tokenizer().save_pretrained("model")
    own = ["--model", "model", *EXACT]
    shown = haast_run("info", *own, "--head", "mtp")
    assert "1 layer, Qwen's names; --head mtp drafts with it" in shown.output, shown.output
    assert "mtp head, MTP layout" in shown.output
    back = haast_run("import", "mtp", *own)
    assert back.exit_code == 0 and "state read" in back.stdout, back.output
    text = [
        haast_run("generate", "Hi", *own, "--head", head, "--drafter", drafter, "--max-new-tokens", "8")
        for head, drafter in (("mtp", "eagle"), ("./mtp", "eagle"), ("none", "none"))
    ]
    assert text[0].exit_code == text[1].exit_code == 0, text[0].output + text[1].output
    assert text[0].stdout == text[1].stdout == text[2].stdout
    refused(haast_run("check", "mtp", "--model", "smollm2-135m-instruct", *EXACT), "head='mtp'", ".gguf")
