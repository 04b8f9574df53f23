"""Validation prompts that `haast train` takes from the answers, and where it keeps features by default. Tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from haast.target.target import Target
from haast.training import TrainConfig, TrainingData, dataset, train
from haast.training.answers import read_answers
from haast.training.dataset import read_inputs
from haast.training.held_out import first_turn, split


def record(number: int, prompt: str, **more: Any) -> dict[str, Any]:
    return {"id": f"{number}", "prompt": prompt, "response": "one two three four", **more}


def records(count: int) -> list[dict[str, Any]]:
    return [record(number, f"say the word number {number} and nothing more than that") for number in range(count)]


def test_all_turns_and_near_duplicates_of_a_held_out_prompt_are_left_out() -> None:
    many = records(400)
    used, prompts = split(many, 5)
    held_out = {each["prompt"] for each, keep in zip(many, used, strict=True) if not keep}
    assert len(prompts) == 5 and set(prompts) <= held_out and 2 <= len(held_out) <= 20
    more = [
        record(1000, prompts[0].upper() + "!"),
        record(1001, "and now?", history=[prompts[1], "one"]),
        {"messages": [{"role": "user", "content": prompts[2]}, {"role": "assistant", "content": "one"}]},
        record(1002, "something else"),
    ]
    assert split([*many, *more], 5)[0][-4:] == [False, False, False, True]


def test_what_is_held_out_does_not_depend_on_the_other_answers() -> None:
    texts = [each["prompt"] for each in records(2000)]
    some, all_of_them = (
        {text for text, keep in zip(texts[:count], split(records(count), 9)[0], strict=True) if not keep}
        for count in (1000, 2000)
    )
    assert some == {text for text in all_of_them if text in texts[:1000]} and 5 < len(some) < 50


def test_few_prompts_are_all_trained_on() -> None:
    assert split(records(99), 12) == ([True] * 99, [])
    assert split([], 12) == ([], [])


def test_held_out_prompts_are_measured_and_stay_out_of_shards_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = LlamaForCausalLM(tiny_config())
    target = Target(model.eval(), tiny_tokenizer())
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(each) + "\n" for each in records(120)), encoding="utf-8")
    used, held_out = split(read_answers(answers), 3)
    assert len(held_out) >= 1 and not all(used)
    data = TrainingData(answers=answers, valid_tokens=6, valid_nodes=4, valid_limit=3)
    settings, said = TrainConfig(views=60, draft_vocab=64), list[str]()
    monkeypatch.setattr(dataset, "free_memory", lambda: 1000)
    result = train(target, data, tmp_path / "run", settings, report=said.append)
    assert result["tau"] >= 1.0 and any("more than half of the free memory" in line for line in said)
    files = (tmp_path / "run/features").glob("*.jsonl")
    stored = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(stored) == sum(used) and not {first_turn(each) for each in stored} & set(held_out)
    monkeypatch.setattr(dataset, "free_memory", lambda: 10**15)  # a resumed run keeps to its shards
    assert train(target, data, tmp_path / "run", settings, resume=True)["tau"] == result["tau"]
    about = json.loads((tmp_path / "run/best/config.json").read_text())["about"]
    assert about["tau_measured_on"].startswith(f"{len(held_out)} prompts")
    every = TrainingData(shards=tmp_path / "run/features", valid_limit=3)
    assert read_inputs(every, None) == ([], []), "shards without the held-out prompts hold out no others"
