"""Text as it comes: whole characters, stop strings across tokens, nothing lost. A real byte-level BPE, made here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from fakes import random_head, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from haast.api import Haast
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import PromptError
from haast.target.target import Target
from haast.text import StopWatch, TextStream

END = "<end>"
LETTERS = "ab é漢🙂\n"


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    build: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False
    )
    return wrapped


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three merges, one special token."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("ab", "a"), ("b", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(END, special=True)])
    return fast(bpe)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their space in front, which the decoder drops at the beginning of a text."""
    words = ["<unk>", "▁one", "▁two", "three", "▁"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.decoder = decoders.Metaspace()
    model.add_special_tokens([AddedToken(END, special=True)])
    return fast(model)


def decoded(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def pieces(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(st.text(alphabet=LETTERS, max_size=30))
def test_pieces_are_whole_characters_and_nothing_is_lost(text: str) -> None:
    tokens = byte_tokenizer()(text)["input_ids"]
    given_out = pieces(TextStream(byte_tokenizer()), tokens)
    assert "".join(given_out) == text
    assert all("\ufffd" not in piece for piece in given_out)


@given(st.lists(st.integers(0, 259), max_size=30))
def test_any_bytes_and_special_tokens_come_out_as_the_full_decode(tokens: list[int]) -> None:
    stream = TextStream(byte_tokenizer())
    assert "".join(pieces(stream, tokens)) == decoded(byte_tokenizer(), tokens) == stream.text


@given(st.lists(st.integers(1, 5), max_size=12))
def test_words_that_are_joined_by_looking_back(tokens: list[int]) -> None:
    assert "".join(pieces(TextStream(word_tokenizer()), tokens)) == decoded(word_tokenizer(), tokens)


def test_a_character_comes_with_its_last_byte() -> None:
    tokens = byte_tokenizer()("🙂é")["input_ids"]
    assert len(tokens) == 6
    assert pieces(TextStream(byte_tokenizer()), tokens) == ["", "", "", "🙂", "", "é", ""]


def test_half_a_character_at_the_end_is_still_told() -> None:
    tokens = byte_tokenizer()("a🙂")["input_ids"][:-1]
    assert pieces(TextStream(byte_tokenizer()), tokens) == ["a", "", "", "", "\ufffd"]


def one_by_one(text: str) -> list[int]:
    """Tokens of `text` without merges: every byte its own."""
    return [token for letter in text for token in byte_tokenizer()(letter)["input_ids"]]


@settings(max_examples=200)
@given(text=st.text(alphabet=LETTERS, max_size=20), stops=st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_stop_string_completed(text: str, stops: list[str]) -> None:
    stream = TextStream(byte_tokenizer(), stops)
    given_out = "".join(pieces(stream, one_by_one(text)))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(start for end, start in ends if end == min(ends)[0])] if ends else text
    assert given_out == stream.text == expected
    assert stream.stopped == bool(ends)


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    stream = TextStream(byte_tokenizer(), ["abab"])
    assert pieces(stream, one_by_one("xababb")) == ["x", "", "", "", "", "", ""]
    assert stream.stopped
    stream = TextStream(byte_tokenizer(), ["abab"])
    assert pieces(stream, one_by_one("xabaab")) == ["x", "", "", "", "aba", "", "ab"]
    assert not stream.stopped


def test_the_watch_says_when_and_only_from_then_on() -> None:
    watch, tokens = StopWatch(byte_tokenizer(), ["é\n"]), one_by_one("aé\nb")
    assert [watch(tokens[:n]) for n in range(1, len(tokens) + 1)] == [False, False, False, True, True]


def test_the_watch_takes_several_tokens_at_once() -> None:
    assert StopWatch(byte_tokenizer(), ["ba"])(one_by_one("abab"))


def test_the_watch_sees_a_step_again_that_was_interrupted() -> None:
    watch, tokens = StopWatch(byte_tokenizer(), ["b\n"]), one_by_one("ab\na")
    assert watch(tokens[:3]), "the step's last token ends the text, and then comes an interrupt"
    assert [watch(tokens[:n]) for n in range(1, 4)] == [False, False, True]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(byte_tokenizer(), ["a", ""])


# ------------------------------------------------------------------ through the front door


@cache
def target() -> Target:
    return Target(tiny_llama(vocab=260, std=0.5), byte_tokenizer())


def eagle() -> Haast:
    shape = DraftShape("dynamic", depth=3, top_k=100, width=20, nodes=200)
    return Haast(target(), EagleDrafter(target(), random_head(target()), shape))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_and_stream_agree_with_vanilla_and_with_each_other(temperature: float) -> None:
    mine, plain = eagle(), Haast(target(), VanillaDrafter())
    expected = plain.generate("ab a", max_new_tokens=30, temperature=temperature, eos=())
    assert expected.text == decoded(byte_tokenizer(), expected.tokens) and len(expected.tokens) == 30
    got = mine.generate("ab a", max_new_tokens=30, temperature=temperature, eos=())
    assert (got.text, got.tokens) == (expected.text, expected.tokens)
    assert got.stats.target_forwards < expected.stats.target_forwards
    stop = expected.text[4:7]
    stopped = mine.generate("ab a", max_new_tokens=30, temperature=temperature, eos=(), stop=[stop])
    assert stopped.text == expected.text[: expected.text.find(stop)]
    assert stopped.tokens == expected.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < 30


def test_pieces_put_together_are_the_generation_and_say_what_was_drafted() -> None:
    whole = eagle().generate("ab a", max_new_tokens=30, eos=())
    stream = list(eagle().stream("ab a", max_new_tokens=30, eos=()))
    assert "".join(piece.text for piece in stream) == whole.text
    assert tuple(token for piece in stream for token in piece.tokens) == whole.tokens
    assert {piece.drafted for piece in stream} == {True, False}


def test_text_needs_a_tokenizer_and_words() -> None:
    bare = Haast(Target(tiny_llama()), VanillaDrafter())
    assert len(bare.generate([1, 2], max_new_tokens=3).tokens) == 3
    for prompt, settings_ in (("hello", {}), ([1, 2], {"stop": ["x"]})):
        with pytest.raises(PromptError, match="tokenizer"):
            bare.generate(prompt, **settings_)  # type: ignore[call-overload]
    with pytest.raises(PromptError, match="empty"):
        Haast(target(), VanillaDrafter()).generate("")
