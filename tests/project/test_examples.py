"""The examples run, and what they build is lossless."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny_target
from test_cli import tiny_tokenizer

from haast import Haast
from haast.core import SamplingParams, StopParams
from haast.drafters.ngram import SuffixDrafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.stats import Stats

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
