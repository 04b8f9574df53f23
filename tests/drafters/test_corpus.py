"""The corpus of earlier answers: what it offers, its file, its bound, and who may use it."""

from __future__ import annotations

import json
from pathlib import Path

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
