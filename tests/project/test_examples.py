"""The examples run, and what they build is lossless."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import random_head, tiny_llama, tiny_target
from test_cli import save_random_head, tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from haast import Haast
from haast.core import SamplingParams, StopParams
from haast.drafters.factory import head_drafter
from haast.drafters.ngram import SuffixDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.errors import HeadMismatchError
from haast.formats import opened
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, open_head
from haast.heads.checkpoint import load_head
from haast.stats import Stats
from haast.target.target import Target
from haast.training import Loss, TrainConfig, TrainingData, train

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name=name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_of_ones_own_is_lossless_and_short(temperature: float) -> None:
    target, stats = tiny_target(), Stats()
    drafter, params = example("own_drafter.py")["RepeatDrafter"](), SamplingParams(temperature, seed=2)
    prompts = [[3, 4, 5], [7, 7, 7, 7]]
    expected = Engine(target, VanillaDrafter()).complete(prompts, params, StopParams(40))
    assert Engine(target, drafter).complete(prompts, params, StopParams(40), stats) == expected
    assert stats.nodes > stats.target_forwards, "it drafts"
    assert len((EXAMPLES / "own_drafter.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_the_drafters_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    haast = Haast(tiny_target(vocab=len(tokenizer)), SuffixDrafter(5))
    haast.target.tokenizer = tokenizer
    monkeypatch.setattr(Haast, "from_pretrained", lambda: haast)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two")), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["own_drafter.py", str(prompts)])
    runpy.run_path(str(EXAMPLES / "own_drafter.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["vanilla", "repeat", "suffix"]
    assert lines[0].split()[2] == "1.00"


def test_the_moving_picture_is_drawn_from_its_recording() -> None:
    root, drawn = EXAMPLES.parent, example("demo_svg.py")["drawn"]
    recording = json.loads((root / "results/demo.json").read_text(encoding="utf-8"))
    assert drawn(recording) == (root / "docs/demo.svg").read_text(encoding="utf-8")
    texts = ["".join(text for _, text, _ in panel["pieces"]) for panel in recording["panels"]]
    assert texts[0] == texts[1], "both decoders give one text"
    recording["panels"][0]["tokens_per_s"] += 100
    assert drawn(recording) != (root / "docs/demo.svg").read_text(encoding="utf-8")


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Given text for training, and `valid.jsonl` next to it."""
    texts = [{"id": str(n), "prompt": f"say {n}", "response": f"one two {n} three four " * 3} for n in range(6)]
    (tmp_path / "valid.jsonl").write_text(json.dumps({"prompt": "say it"}) + "\n", encoding="utf-8")
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return path


def tiny_texts() -> Target:
    """A tiny target that reads bytes."""
    tokenizer = tiny_tokenizer()
    return Target(tiny_llama(len(tokenizer), std=0.3), tokenizer)


def settings(**changes: Any) -> TrainConfig:
    few: dict[str, Any] = {"views": 600, "draft_vocab": 64, "batch_tokens": 200, "evaluate_every": 400, "warmup": 0.0}
    few |= {"optimizer": "adamw"}  # learns more of so few views
    return TrainConfig(**few | changes)


def test_a_loss_of_ones_own_is_the_one_that_trains(answers: Path, tmp_path: Path) -> None:
    """Without smoothing and over all tokens it is Haast's own loss, and trains the same head; the control differs."""
    own, target, data = example("own_loss.py")["SmoothedTopK"], tiny_texts(), TrainingData(answers=answers, topk=258)
    renormalised = settings(teacher_top=258, draft_vocab=258)  # as SmoothedTopK does it

    def trained(folder: str, loss: Loss | None, config: TrainConfig = renormalised) -> dict[str, Tensor]:
        result = train(target, data, tmp_path / folder, config, loss=loss)
        return dict(load_head(Path(result["head"])).module.state_dict())

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    default = trained("default", None)
    assert distance(default, trained("same", own(258, 0.0))) < 1e-3
    assert distance(default, trained("smoothed", own(258, 0.5))) > 1e-2
    about = json.loads((tmp_path / "smoothed/best/config.json").read_text(encoding="utf-8"))["about"]
    assert about["loss"] == "smoothed top-k, k=258, smoothing=0.5"
    assert "| loss | smoothed top-k, k=258, smoothing=0.5 |" in (tmp_path / "smoothed/best/README.md").read_text()
    for loss in (None, own(258, 0.25)):
        with pytest.raises(ValueError, match=r"other settings.*'loss': ..smoothed top-k, k=258, smoothing=0.5"):
            train(target, data, tmp_path / "smoothed", renormalised, loss=loss, resume=True)
    train(target, data, tmp_path / "smoothed", renormalised, loss=own(258, 0.5), resume=True)


@pytest.mark.parametrize("head", ["eagle3", "medusa"])
def test_a_loss_of_ones_own_trains_every_kind_of_head(answers: Path, tmp_path: Path, head: str) -> None:
    class Counted(Loss):
        name, calls = "counted", 0

        def __call__(self, logits: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
            assert ids.shape == probs.shape == (len(logits), 16) and logits.shape[1] == 64
            Counted.calls += logits.requires_grad
            return -(probs * logits.log_softmax(-1).gather(1, ids)).sum(-1)

    data, target = TrainingData(answers=answers), tiny_texts()
    train(target, data, tmp_path / "run", settings(head=head, medusa_heads=2), loss=Counted())
    assert Counted.calls >= 4


def test_what_a_loss_of_ones_own_cannot_do_is_refused(answers: Path, tmp_path: Path) -> None:
    class Mean(Loss):
        name = "mean"

        def __call__(self, logits: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
            return logits.mean()

    data, target = TrainingData(answers=answers), tiny_texts()
    with pytest.raises(ValueError, match=r"'mean' returned \(\): return one value for each of the"):
        train(target, data, tmp_path / "run", settings(), loss=Mean())
    for other in ({"lk_after": 0.5}, {"rejected_weight": 2.0}):
        with pytest.raises(ValueError, match=r"takes the place of the cross-entropy.*leave both at 1"):
            train(target, data, tmp_path / "run", settings(**other), loss=Mean())


def test_losses_are_compared(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = example("own_loss.py")
    names["main"](str(answers), str(tmp_path / "valid.jsonl"), str(tmp_path / "runs"), tiny_texts(), settings())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cross-entropy", "smoothed"]
    assert all(Path(line.split()[-1], "config.json").is_file() for line in lines)
    assert len((EXAMPLES / "own_loss.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("vocabulary", [None, range(0, 32, 2)], ids=["whole", "half"])
def test_a_format_of_ones_own_is_written_found_and_drafts_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: Sequence[int] | None
) -> None:
    monkeypatch.setattr(opened, "_REGISTERED", {})
    target, place = tiny_target(), tmp_path / "one"
    head = random_head(target, vocabulary)
    with pytest.raises(ValueError, match="can't export to --to one-file"):
        export_head(head, "one-file", "tiny", target.model.config, place)
    example("own_format.py")
    serve = export_head(head, "one-file", "tiny", target.model.config, place).serve
    assert serve == f"Haast.from_pretrained('tiny', head='{place}')"
    assert {path.name for path in place.iterdir()} == {"one.safetensors", "README.md"}
    loaded = open_head(place)
    assert isinstance(loaded, OpenedHead) and loaded.format.name == "one-file"

    def drafts(of: Haast) -> tuple[Any, list[Any]]:
        trees, propose = list[Any](), of.drafter.propose

        def spied(*given: Any) -> Any:
            tree = propose(*given)
            trees.append((tree.tokens.tolist(), tree.parents.tolist()))
            return tree

        monkeypatch.setattr(of.drafter, "propose", spied)
        return of.generate([3, 1, 4, 1, 5], max_new_tokens=24).tokens, trees

    shape = DraftShape(nodes=6, depth=3, top_k=2, width=2)
    read = Haast.from_pretrained(target.model, head=place, drafter="eagle", shape=shape)
    original = Haast(target, head_drafter(target, head, shape))
    assert drafts(read) == drafts(original)
    other = Haast(target, head_drafter(target, random_head(target, vocabulary, seed=2), shape))
    text, trees = drafts(other)
    assert (text, trees != drafts(original)[1]) == (drafts(read)[0], True), "the control: another head drafts otherwise"
    # Other folders are still read by the formats of Haast.
    export_head(head, "official", "tiny", target.model.config, tmp_path / "official")
    elsewhere = open_head(tmp_path / "official")
    assert isinstance(elsewhere, OpenedHead) and elsewhere.format.name == "official"
    monkeypatch.setattr(opened, "_REGISTERED", {})
    with pytest.raises(HeadMismatchError, match=r"there is no config\.json"):
        open_head(place)
    assert len((EXAMPLES / "own_format.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with model/ and head/."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save_random_head(tmp_path / "head", tiny_config())
    return tmp_path


def test_drafters_are_compared_on_prompts_of_ones_own(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = saved / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two", "three")), "utf-8")
    few = {"MODEL": saved / "model", "HEAD": saved / "head", "PROMPTS": prompts, "LIMIT": 2, "TOKENS": 12, "ROUNDS": 1}
    for name, value in few.items():
        monkeypatch.setenv(name, str(value))
    names = example("compare_drafters.py")
    _, heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["drafter", "tau", "tokens/s", "speed-up", "equal", "text"]
    assert [row.split()[0] for row in rows] == ["vanilla", "suffix", "lookup", "eagle", "eagle+suffix"]
    assert rows[0].split()[1] == "1.00" and not any("bug" in row for row in rows)
    assert all(row.endswith("2 of 2") or "tie" in row for row in rows)
    assert len(names["encoded"]) == 2


def test_a_head_is_trained_from_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_in_15_minutes.py", "--quick"])
    monkeypatch.setenv("MODEL", str(saved / "model"))
    monkeypatch.setenv("OUT", str(saved / "run"))
    names = example("train_in_15_minutes.py")
    printed = capsys.readouterr().out
    assert printed.startswith(f"plan for {saved / 'model'}") and "views  tau " in printed
    assert load_head(Path(names["result"]["head"])).about["tau"] == pytest.approx(names["result"]["tau"])
    assert not {each.id for each in names["held_out"]} & {each.id for each in names["taught"]}
    assert printed.count(" yes ") == len(names["held_out"]), "the text is the target's own"
    example("train_in_15_minutes.py")  # again: it continues
    assert f"answers: 0 new, {len(names['taught'])} from before" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["compare_drafters.py", "train_in_15_minutes.py"])
def test_every_cell_of_a_notebook_is_explained(name: str) -> None:
    cells = re.findall(r"^# %%( \[markdown\]\n# .)?", (EXAMPLES / name).read_text(encoding="utf-8"), re.MULTILINE)
    explained = [bool(text) for text in cells]
    assert explained[:2] == [True, False], "a title, then the imports"
    assert all(explained[i - 1] for i, text in enumerate(explained) if not text)
