"""Several turns answered by the target in this process, and loops left out of training. A tiny model, no network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import family
from fakes import dies_after, random_head, tiny_llama
from typer.testing import CliRunner, Result

from haast import jsonl_log
from haast.cli import app
from haast.core import Request, SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.admission import Admission
from haast.engine.scheduler import Scheduler
from haast.prompts import Prompt
from haast.sampling import Sampler, inverse_cdf
from haast.stats import LOOP_SHARE, loop_share, loops
from haast.target.target import Target
from haast.training import features, shards
from haast.training.answers import read_answers
from haast.training.chat import encode_prompt
from haast.training.config import RegenerateConfig
from haast.training.data import encode_answer
from haast.training.generation_queue import AnswerRun, Outcome, Question, Questions
from haast.training.regenerate import regenerate

TOKENIZER = family("smollm2")


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_llama(len(TOKENIZER), context=300), TOKENIZER)


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", tuple(f"say {i} {turn}" for turn in range(1 + i % 3))) for i in range(5)]


def settings(**changes: Any) -> RegenerateConfig:
    return replace(RegenerateConfig(batch=3, max_new_tokens=8, max_prompt_tokens=250, seed=5, turns=2), **changes)


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in read_answers(path)}


def ask(target: Target, out: Path, **changes: Any) -> Outcome:
    return regenerate(target, AnswerRun(TOKENIZER, prompts(), out, settings(**changes), quiet=True))


def test_a_later_turn_is_answered_knowing_the_earlier_answers(target: Target, tmp_path: Path) -> None:
    outcome, got = ask(target, tmp_path / "a.jsonl"), by_id(tmp_path / "a.jsonl")
    count = sum(len(record["response_ids"]) for record in got.values())
    assert outcome == Outcome(total=8, before=0, added=8, tokens=count)
    assert set(got) == {"p0", "p1", "p1#2", "p2", "p2#2", "p3", "p4", "p4#2"}
    first, second = got["p1"], got["p1#2"]
    assert "history" not in first and second["history"] == ["say 1 0", first["response"]]
    assert second["prompt"] == "say 1 1" and second["temperature"] == first["temperature"]
    greedy = next(r for r in got.values() if r["id"].endswith("#2") and r["temperature"] == 0)
    tokens = encode_prompt(TOKENIZER, [*greedy["history"], greedy["prompt"]])
    begin, sampler = len(tokens), Sampler(SamplingParams())
    while len(tokens) - begin < len(greedy["response_ids"]):
        with torch.inference_mode():
            logits = target.model(input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(sampler.choose(tokens, logits))
    assert tokens[begin:] == greedy["response_ids"]
    sequence = encode_answer(TOKENIZER, greedy)
    assert sequence.tokens == tokens and sum(sequence.supervised) == len(tokens) - begin


def test_the_draws_of_a_turn_are_those_of_its_question(target: Target, tmp_path: Path) -> None:
    """So files that were made before there was an engine for many requests go on with the same text."""
    ask(target, tmp_path / "a.jsonl", temperatures="0.7:1")
    for record in by_id(tmp_path / "a.jsonl").values():
        index, turn = int(record["id"][1]), 1 if record["id"].endswith("#2") else 0
        question = Question(index, turn, prompts()[index])
        tokens = encode_prompt(TOKENIZER, [*record.get("history", []), record["prompt"]])
        for token in record["response_ids"]:
            with torch.inference_mode():
                logits = target.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert token == inverse_cdf((logits / 0.7).softmax(-1), question.draw(5, len(tokens)))
            tokens.append(token)


def test_a_drafter_changes_no_answer_and_no_feature(target: Target, tmp_path: Path) -> None:
    drafter = EagleDrafter(target, random_head(target), DraftShape(depth=3, top_k=3, width=2, nodes=6))
    settled = settings(shards=tmp_path / "shards", topk=4)
    regenerate(target, AnswerRun(TOKENIZER, prompts(), tmp_path / "a.jsonl", settled, quiet=True), drafter=drafter)
    ask(target, tmp_path / "b.jsonl")
    assert by_id(tmp_path / "a.jsonl") == by_id(tmp_path / "b.jsonl")
    same_as_extracted(target, tmp_path / "shards")


def test_answers_and_features_are_the_same_where_requests_have_to_wait_for_memory(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, preempt = list[object](), Admission.preempt

    def noted(self: Admission, request: Request, keep: bool = True) -> None:
        waited.append(request)
        preempt(self, request, keep)

    monkeypatch.setattr(Admission, "preempt", noted)
    ask(target, tmp_path / "a.jsonl", max_new_tokens=40)
    assert not waited
    narrow = Target(target.model, TOKENIZER)
    narrow.use_pool(tokens=352)
    settled = settings(max_new_tokens=40, shards=tmp_path / "shards", topk=4)
    regenerate(narrow, AnswerRun(TOKENIZER, prompts(), tmp_path / "b.jsonl", settled, quiet=True))
    assert waited and by_id(tmp_path / "a.jsonl") == by_id(tmp_path / "b.jsonl")
    same_as_extracted(target, tmp_path / "shards")


def test_neither_the_batch_nor_a_kill_between_turns_changes_answers(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ask(target, whole, batch=1)
    monkeypatch.setattr(jsonl_log, "append", dies_after(jsonl_log.append, 3))
    with pytest.raises(KeyboardInterrupt):
        ask(target, cut)
    monkeypatch.undo()
    again = ask(target, cut, batch=4)
    assert (again.before, again.added) == (3, 5) and by_id(cut) == by_id(whole)
    more = ask(target, cut, turns=3)  # a run that asks for more goes on from there
    assert (more.total, more.before, more.added) == (9, 8, 1) and "p2#3" in by_id(cut)
    assert len(by_id(cut)["p2#3"]["history"]) == 4


def test_features_come_from_the_generation_itself(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second pass over the text; one is left for answers that are in the file without features."""
    passes, states = list[int](), features._states

    def counted(target: Target, tokens: torch.Tensor, *rest: Any) -> Any:
        passes.append(len(tokens))
        return states(target, tokens, *rest)

    monkeypatch.setattr(features, "_states", counted)
    ask(target, tmp_path / "a.jsonl", shards=tmp_path / "shards", topk=4, loops="keep")
    assert not passes and len(shards.read_shards(tmp_path / "shards")[0]) == 8
    ask(target, tmp_path / "b.jsonl", loops="keep")
    ask(target, tmp_path / "b.jsonl", loops="keep", shards=tmp_path / "late", topk=4)
    assert sum(passes) == 8
    now, late = (
        dict(zip([r["id"] for r in records], examples, strict=True))
        for examples, records in (shards.read_shards(tmp_path / name) for name in ("shards", "late"))
    )
    for name, example in now.items():
        assert torch.equal(example.tokens, late[name].tokens)
        assert torch.equal(example.topk_ids[:-1], late[name].topk_ids[:-1])


def test_features_over_the_cap_are_not_written_and_no_answer_is_lost(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the limit is 1e-06 GB"):
        ask(target, tmp_path / "a.jsonl", shards=tmp_path / "shards", topk=4, max_gb=1e-6)
    assert len(by_id(tmp_path / "a.jsonl")) == 8 and not list((tmp_path / "shards").glob("*.safetensors"))
    assert ask(target, tmp_path / "a.jsonl", shards=tmp_path / "shards", topk=4).added == 0
    same_as_extracted(target, tmp_path / "shards")


def same_as_extracted(target: Target, folder: Path) -> None:
    stored, records = shards.read_shards(folder)
    wanted = dict(features.stream_examples(target, [encode_answer(TOKENIZER, r) for r in records], topk=4))
    assert len(stored) == 8
    for number, example in enumerate(stored):
        assert torch.equal(example.tokens, wanted[number].tokens)
        assert torch.equal(example.supervised, wanted[number].supervised)
        assert torch.equal(example.topk_ids[:-1], wanted[number].topk_ids[:-1])
        assert torch.allclose(example.features[:-1].float(), wanted[number].features[:-1].float(), atol=2e-3)


def test_features_of_later_turns_are_those_of_the_whole_conversation(target: Target, tmp_path: Path) -> None:
    ask(target, tmp_path / "a.jsonl", shards=tmp_path / "shards", topk=4)
    same_as_extracted(target, tmp_path / "shards")


def test_what_stands_behind_a_missing_answer_is_left_out(target: Target, tmp_path: Path) -> None:
    many = [Prompt("long", ("x" * 400, "more")), Prompt("late", ("say", "y" * 400, "more")), Prompt("fine", ("say",))]
    outcome = regenerate(target, AnswerRun(TOKENIZER, many, tmp_path / "a.jsonl", settings(turns=3), quiet=True))
    assert (outcome.total, outcome.added, outcome.left_out) == (6, 2, 4)


def test_another_prompt_of_the_same_id_is_refused(target: Target, tmp_path: Path) -> None:
    ask(target, tmp_path / "a.jsonl")
    other = [Prompt("p0", ("something else",))]
    with pytest.raises(ValueError, match=r"'p0' to another prompt.*--out"):
        regenerate(target, AnswerRun(TOKENIZER, other, tmp_path / "a.jsonl", settings(), quiet=True))
    with pytest.raises(ValueError, match="the same id 'p0'"):
        twice = [*other, Prompt("p0", ("a third",))]
        regenerate(target, AnswerRun(TOKENIZER, twice, tmp_path / "b.jsonl", settings(), quiet=True))


def test_questions_follow_one_another() -> None:
    records: dict[str, dict[str, Any]] = {"p2": {"response": "two"}}
    questions = Questions(prompts(), 3, records)
    assert (questions.total, questions.before) == (9, 1)
    taken = [question.id for question in iter(questions.take, None)]
    assert taken == ["p0", "p1", "p2#2", "p3", "p4"] and questions.take() is None
    records["p1"] = {"response": "one"}
    questions.mark_answered(Question(1, 0, prompts()[1]))
    following = questions.take()
    assert following is not None and following.turns == ["say 1 0", "one", "say 1 1"]
    with pytest.raises(ValueError, match="same id"):
        Questions([Prompt("a", ("x", "y")), Prompt("a#2", ("z",))], 2, {})
    draws = {question.draw(5, 10) for question in (following, Question(1, 0, prompts()[1]))}
    assert len(draws) == 2, "turns draw apart"


def test_a_log_gets_lines_and_the_rest_is_quiet(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("haast.progress.EVERY", 0.001)
    step = Scheduler.step

    def slow(self: Scheduler) -> bool:
        time.sleep(0.01)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow)
    regenerate(target, AnswerRun(TOKENIZER, prompts(), tmp_path / "a.jsonl", settings(batch=1)))
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("answers: 0 of 8 answers, ")
    assert "answers: 3 of 8 answers, " in said.err and " tokens/s, " in said.err
    regenerate(target, AnswerRun(TOKENIZER, prompts(), tmp_path / "b.jsonl", settings(), quiet=True))
    assert capsys.readouterr() == ("", "")


# Loops


def haast_run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """model/ and answers.jsonl: two straight answers and a loop."""
    model: Any = tiny_llama(len(TOKENIZER), context=300)  # `float` is untyped
    model.float().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    texts = ["one two three", "one and two and three", "and so " * 12]
    records = [
        {"id": f"a{i}", "prompt": "say", "response": text, "response_ids": TOKENIZER.encode(text)}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    yield tmp_path


def test_the_limit_of_a_loop() -> None:
    assert not loops(range(100)) and loops([1, 2] * 20) and loop_share([1, 2] * 20) > LOOP_SHARE


def test_records_say_how_much_they_loop(target: Target, tmp_path: Path) -> None:
    ask(target, tmp_path / "a.jsonl", max_new_tokens=30)
    for record in read_answers(tmp_path / "a.jsonl"):
        assert record["loop_share"] == pytest.approx(loop_share(record["response_ids"]), abs=1e-4)


@pytest.mark.parametrize("shards", [False, True])
def test_loops_are_left_out_on_demand(home: Path, shards: bool) -> None:
    begin = ["train", "--model", home / "model", "--packing", "off", "--answers", home / "answers.jsonl"]
    begin += ["--topk", 4, "--draft-vocab", 64, "--batch-tokens", 64, "--views", 20, "--json", "-"]
    begin += ["--shards", home / "shards"] if shards else []
    counts = {}
    for choice in ("keep", "drop"):
        result = haast_run(*begin, "--loops", choice, "--out", home / choice)
        assert result.exit_code == 0, result.output
        assert ("1 of 3 answers left out, since they loop" in result.stderr) == (choice == "drop")
        counts[choice] = json.loads((home / choice / "best" / "config.json").read_text())["about"]["sequences"]
    assert counts == {"keep": 3, "drop": 2}


def test_the_viewer_shows_what_is_left(home: Path) -> None:
    begin = ["train", "--model", home / "model", "--packing", "off", "--answers", home / "answers.jsonl"]
    shown = haast_run(*begin, "--out", home / "run", "--show-data", 9, "--loops", "drop")
    assert shown.exit_code == 0 and shown.stdout.count("tokens supervised") == 2 and "and so" not in shown.stdout
    wrong = haast_run(*begin, "--out", home / "run", "--loops", "maybe")
    assert wrong.exit_code == 2 and "loops='maybe'" in wrong.stderr
    (home / "answers.jsonl").write_text((home / "answers.jsonl").read_text().splitlines()[2] + "\n")
    none = haast_run(*begin, "--out", home / "run", "--loops", "drop")
    assert none.exit_code == 2 and "there is nothing to train on" in none.stderr


def test_given_text_is_trained_on_with_a_warning(home: Path) -> None:
    chat = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "one two three and two"}]
    given = [{"prompt": "say", "response": "one two three one"}, {"messages": chat}]
    (home / "given.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
    words = ["train", "--model", home / "model", "--packing", "off", "--answers", home / "given.jsonl", "--topk", 4]
    words += ["--draft-vocab", 64, "--batch-tokens", 64, "--views", 20, "--out", home / "run"]
    result = haast_run(*words)
    assert result.exit_code == 0, result.output
    assert "2 of 2 answers are given text" in result.stderr


# Whose features


def test_features_of_a_sibling_model_are_refused(home: Path) -> None:
    torch.manual_seed(0)
    other: Any = tiny_llama(len(TOKENIZER), context=300, seed=7)
    other.float().save_pretrained(home / "sibling")
    TOKENIZER.save_pretrained(home / "sibling")
    begin = ["train", "--packing", "off", "--topk", 4, "--draft-vocab", 64, "--batch-tokens", 64, "--views", 20]
    begin += ["--shards", home / "shards", "--out", home / "run"]
    made = haast_run(*begin, "--model", home / "model", "--answers", home / "answers.jsonl")
    assert made.exit_code == 0, made.output
    refused = haast_run(*begin, "--model", home / "sibling", "--resume")
    assert refused.exit_code == 2 and "not this target's" in refused.stderr and "another folder" in refused.stderr
