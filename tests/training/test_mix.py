"""Which prompts are answered: the mix of categories, near-duplicates, answers that loop. Tiny models, no network."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chats import family
from fakes import tiny_llama

from haast.prompts import Prompt
from haast.stats import loop_start, tail_loops
from haast.target.target import Target
from haast.training.answers import read_answers
from haast.training.config import RegenerateConfig
from haast.training.duplicates import NearDuplicates
from haast.training.generation_queue import AnswerRun
from haast.training.mix import category_of, select
from haast.training.regenerate import regenerate

TOKENIZER = family("smollm2")
WORDS = [f"{first}{second}" for first in "abcdefgh" for second in "aeiouklm"]


def prompts(**counts: int) -> list[Prompt]:
    """That many prompts of each category, sorted by category; those of `two` have two turns and no category."""
    draws, made = random.Random(0), list[Prompt]()
    for category, count in counts.items():
        for number in range(count):
            turns = tuple(" ".join(draws.choices(WORDS, k=12)) for _ in range(1 + (category == "two")))
            made.append(Prompt(f"{category}{number}", turns, "" if category == "two" else category))
    return made


def chosen(many: list[Prompt], **changes: Any) -> Counter[str]:
    config = RegenerateConfig(**changes)
    return Counter(category_of(many[index], config) for index in select(many, config).order)


def test_every_beginning_has_the_mix_until_a_category_runs_out() -> None:
    many = prompts(chat=300, coding=300, other=300)
    assert chosen(many, mix="chat:2,coding:1", answers=90) == {"chat": 60, "coding": 30}
    assert chosen(many, mix="chat:2,coding:1,*:3", answers=120) == {"chat": 40, "coding": 20, "other": 60}
    assert chosen(many, mix="chat:2,coding:1", answers=500) == {"chat": 300, "coding": 200}
    assert chosen(many) == {"chat": 300, "coding": 300, "other": 300}
    some, more = (select(many, RegenerateConfig(answers=count)).order for count in (50, 200))
    assert more[:50] == some and more != sorted(more)
    assert select(many, RegenerateConfig(mix="file", answers=50)).order == list(range(50))
    with pytest.raises(ValueError, match="leaves out all 900 prompts"):
        select(many, RegenerateConfig(mix="maths:1"))


def test_a_dialogue_counts_with_all_its_turns() -> None:
    many = prompts(chat=300, two=300)
    assert chosen(many, mix="chat:1,multi-turn:1", answers=80) == {"chat": 40, "multi-turn": 20}
    assert chosen(many, mix="chat:1,multi-turn:1,*:1", answers=80, turns=1) == {"chat": 40, "": 40}


@pytest.mark.parametrize("mix", ["chat", "chat:x", "chat:-1", "chat:0,*:0", ""])
def test_a_wrong_mix_is_refused(mix: str) -> None:
    with pytest.raises(ValueError, match="mix="):
        RegenerateConfig(mix=mix)


def test_lengths_are_drawn_by_their_shares() -> None:
    config = RegenerateConfig(lengths="10:3,50:1")
    assert Counter(config.length(index) for index in range(2000))[50] == pytest.approx(500, abs=60)
    assert {replace(config, max_new_tokens=7).length(index) for index in range(50)} == {7}
    for wrong in ("0:1", "10", "10:0", "long:1"):
        with pytest.raises(ValueError, match="lengths="):
            RegenerateConfig(lengths=wrong)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    draws, known = random.Random(1), NearDuplicates()
    texts = [draws.choices(WORDS, k=80) for _ in range(200)]
    assert all(known.add(" ".join(words)) for words in texts)
    for words in texts:
        changed = [*words[:-1], "entirely"]
        assert known.has(" ".join(changed).upper()), "75 of 77 shingles are common"
        assert not known.has(" ".join([*words[:40], *draws.choices(WORDS, k=40)])), "half of it is new"
    assert known.add("so short") and not known.add("So short!") and known.add("so long")
    assert known.add("?!") and known.add("") and not known.add("?!")


def test_near_duplicates_among_prompts_are_left_out_and_counted() -> None:
    many = prompts(chat=30)
    many += [Prompt(f"again{i}", (f"{many[i].turns[0]}!",)) for i in range(10)]
    selection = select(many, RegenerateConfig())
    assert sorted(selection.order) == list(range(30)) and selection.duplicates == 10
    assert len(select(many, RegenerateConfig(near_duplicates="keep")).order) == 40


def test_a_loop_is_found_where_it_begins() -> None:
    draws = random.Random(2)
    for period in (1, 2, 7, 40, 128):
        straight = [1000 + draws.randrange(10**6) for _ in range(50)]
        loop = [2000 + i for i in range(period)]
        text = straight + loop * (1 + -(-max(24, 2 * period) // period))
        assert loop_start(text) == 50 + period and tail_loops(text) >= 24
        assert loop_start(text[: 50 + 2 * period]) is None, "a second time is no loop"
        assert loop_start([*text, *straight]) == 50 + period, "what comes after the loop goes too"
    assert loop_start([]) is None and loop_start(list(range(600)) * 2) is None


def test_an_answer_ends_where_it_begins_to_repeat_itself(tmp_path: Path) -> None:
    """A model of small weights repeats itself soon; its answers are those of the uncut run, up to the loop."""
    target = Target(tiny_llama(len(TOKENIZER), context=300, std=0.02), TOKENIZER)
    many = [Prompt(f"p{i}", (f"say {i}", "more")) for i in range(6)]
    results = {}
    for loops in ("cut", "keep"):
        config = RegenerateConfig(batch=4, max_new_tokens=120, temperatures="0:1", loops=loops)
        out = tmp_path / f"{loops}.jsonl"
        outcome = regenerate(target, AnswerRun(TOKENIZER, many, out, config, quiet=True))
        results[loops] = outcome, {record["id"]: record for record in read_answers(out)}
    (cut, short), (kept, long) = results["cut"], results["keep"]
    assert kept.looped == 0 and cut.looped > 0 and cut.tokens < kept.tokens
    for name, record in short.items():
        if "#" in name:
            continue
        whole = long[name]["response_ids"]
        assert record["response_ids"] == whole[: loop_start(whole)]
        assert record.get("looped", False) == (loop_start(whole) is not None)
        assert not record.get("looped") or (f"{name}#2" not in short and not record["finished"])
    again = AnswerRun(TOKENIZER, many, tmp_path / "cut.jsonl", RegenerateConfig(max_new_tokens=120), quiet=True)
    assert regenerate(target, again).added == 0, "what was cut is answered"
