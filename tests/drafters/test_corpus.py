"""The corpus of earlier answers: what it offers, its file, its bound, and who may use it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import IO, Any

import pytest
from fakes import random_head, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from haast.core import SamplingParams, StopParams
from haast.drafters.corpus import Corpus
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import check_corpus, make_drafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.ngram import SuffixDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.files import write_text
from haast.stats import Stats
from haast.target.target import Target
from haast.tuning.online import MatchOdds


@settings(max_examples=60)
@given(
    answers=st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=20), min_size=1, max_size=3),
    text=st.lists(st.integers(0, 2), min_size=4, max_size=12),
)
def test_the_longest_match_and_what_followed_it(answers: list[list[int]], text: list[int],
                                                tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    with Corpus(tmp_path_factory.mktemp("corpus") / "answers.jsonl", 3) as corpus:
        for answer in answers:
            corpus.add(answer)
        best, following = 0, set[int]()
        for answer in answers:
            for end in range(4, len(answer) + 1):
                length = 0
                while length < min(end, len(text)) and answer[end - 1 - length] == text[-1 - length]:
                    length += 1
                if length >= 4 and length >= best:
                    following = following if length == best else set()
                    best = length
                    following |= set(answer[end : end + 1])
        assert corpus.match(text)[0] == best
        found = corpus.candidates(text, MatchOdds(), 20)
        roots = {token for token, parent in zip(found.tokens, found.parents, strict=True) if parent < 0}
        assert roots <= following and found.scores == sorted(found.scores, reverse=True)


def test_frequencies_weight_the_continuations(tmp_path: Path) -> None:
    with Corpus(tmp_path / "answers.jsonl", 10) as corpus:
        for last in (7, 8, 7, 7):
            corpus.add([1, 2, 3, 4, last, 9])
        found = corpus.candidates([1, 2, 3, 4], MatchOdds(), 3)
        assert (found.tokens, found.parents) == ([7, 9, 8], [-1, 0, -1])


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.mark.parametrize("kind", ["suffix", "eagle+suffix"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_second_answer_is_vanillas_and_drafted_from_the_first(
    kind: str, temperature: float, target: Target, tmp_path: Path
) -> None:
    prompts, params = [[3, 4, 5], [6, 7]], SamplingParams(temperature=temperature, seed=2)
    expected = Engine(target, VanillaDrafter()).complete(prompts, params, StopParams(24))
    with Corpus(tmp_path / "answers.jsonl", target.vocab_size) as corpus:
        eagle = EagleDrafter(target, random_head(target), DraftShape(nodes=6))
        drafter = SuffixDrafter(6, corpus=corpus) if kind == "suffix" else HybridDrafter(eagle, corpus)
        first, second = Stats(), Stats()
        assert Engine(target, drafter).complete(prompts, params, StopParams(24), first) == expected
        assert corpus.tokens >= 2 * 24
        assert Engine(target, drafter).complete(prompts, params, StopParams(24), second) == expected
        assert second.tau > 1.5 * first.tau
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(line["tokens"][:24] for line in lines[1:3]) == sorted(expected)


def test_it_is_bounded_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Corpus(path, 100, most=40) as corpus:
        for number in range(50):
            corpus.add([number] * 9)
            assert corpus.tokens <= 80
        corpus.add([1, 2])  # too short to match
        held = corpus.tokens
    assert len(path.read_text().splitlines()) == 1 + held // 10
    with path.open("a") as file:
        file.write('{"tokens": [4, 5')  # a process was killed while writing
    with Corpus(path, 100, most=40) as corpus:
        assert corpus.tokens == held and corpus.match([49] * 5)[0] >= 4


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Logs are cut off after `room` more bytes, and no file is replaced, as on a full disk."""

    def append(file: IO[bytes], value: dict[str, Any], path: Path, synced: bool) -> None:
        file.write(json.dumps(value).encode()[:room])
        raise ValueError(f"cannot write {path}")

    def write_text(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("haast.jsonl_log.append", append)
    monkeypatch.setattr("haast.drafters.corpus.write_text", write_text)


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_ends_no_request(
    room: int, target: Target, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts = tmp_path / "answers.jsonl", [[3, 4, 5], [6, 7]]
    expected = Engine(target, VanillaDrafter()).complete(prompts, SamplingParams(), StopParams(24))
    with Corpus(path, target.vocab_size, most=40) as corpus:
        corpus.add([1, 2, 3, 4, 5])
        engine = Engine(target, SuffixDrafter(6, corpus=corpus))
        fill_disk(monkeypatch, room)
        for _ in range(3):
            assert engine.complete(prompts, SamplingParams(), StopParams(24)) == expected
        assert caplog.text.count("no longer added to the corpus") == 1
        assert 0 < corpus.tokens <= 80, "the corpus goes on in memory, with the same bound"
        with Corpus(path, target.vocab_size) as again:
            assert again.tokens == 6, "an incomplete line is repaired, and the file is free"


def test_a_file_that_cannot_be_shortened_ends_no_request(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.jsonl"
    with Corpus(path, 100, most=40) as corpus:
        for number in range(8):
            corpus.add([number] * 9)
        before = path.read_bytes()
        fill_disk(monkeypatch, 0)
        for number in range(8, 30):
            corpus.add([number] * 9)
        assert corpus.match([29] * 5)[0] == 5 and corpus.tokens <= 80
    assert path.read_bytes() == before and "no longer added to the corpus" in caplog.text


def test_another_process_may_take_a_file_while_it_is_shortened(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, others = tmp_path / "answers.jsonl", list[Corpus]()

    def written(path: Path, text: str) -> None:
        write_text(path, text)
        others.append(Corpus(path, 100))

    with Corpus(path, 100, most=40) as corpus:
        monkeypatch.setattr("haast.drafters.corpus.write_text", written)
        for number in range(12):
            corpus.add([number] * 9)
        assert corpus.match([11] * 5)[0] == 5 and corpus.tokens <= 80
    others[0].close()
    assert others[0].tokens and "no longer added to the corpus" in caplog.text


def test_what_is_not_a_corpus_of_this_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Corpus(path, 100).close()
    with pytest.raises(ValueError, match="not a corpus for a vocabulary of 99"):
        Corpus(path, 99)
    Corpus(path, 100).close()  # a refused corpus leaves no lock behind
    with path.open("a") as file:
        file.write('{"tokens": [100]}\n')
    with pytest.raises(ValueError, match="line 2: not an answer"):
        Corpus(path, 100)
    with pytest.raises(ValueError, match="not for 'lookahead'"):
        make_drafter("lookahead", tiny_target(), corpus=path)
    with pytest.raises(ValueError, match="cannot write"):
        check_corpus("suffix", tmp_path / "missing" / "answers.jsonl")


def test_a_second_user_is_refused(tmp_path: Path) -> None:
    """The lock is of the open file, so a second opening stands for a second process."""
    path = tmp_path / "answers.jsonl"
    with Corpus(path, 100), pytest.raises(ValueError, match=r"another run is writing .* give another corpus file"):
        Corpus(path, 100)
    Corpus(path, 100).close()
