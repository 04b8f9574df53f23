"""`generate(custom_generate=...)` from where it is called: modes, threads, errors, calls within calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from fakes import random_head, tiny_llama, tiny_target
from test_custom_generate import DECODERS, PAD, RAGGED, batch, families, family, tokenizer
from test_medusa import medusa
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import haast
from haast.drafters.medusa import MedusaDrafter
from haast.errors import UnsupportedArgumentError
from haast.target import Target

IDS = torch.tensor([[1, 2, 3, 4]])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def decoder(model: Any) -> haast.Decoder:
    return haast.Decoder(model, head=random_head(tiny_target()))


def run(model: Any, **given: Any) -> Any:
    return model.generate(**{"input_ids": IDS, **GREEDY, "custom_generate": haast.custom_generate, **given})


# ------------------------------------------------------------------ sampled scores

WARPERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_k": 1},
    {"top_k": 0, "top_p": 0.6},
    {"top_p": 0.0},
    {"top_p": 2.0},
    {"min_p": 0.2},
    {"top_h": 0.4},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.05},
    {"renormalize_logits": True, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "temperature": 1.2, "top_p": 0.7},
    {"encoder_repetition_penalty": 1.5, "bad_words_ids": [[3], [5, 6]], "top_k": 12},
]


@pytest.mark.parametrize("warped", WARPERS, ids=lambda warped: ", ".join(warped))
def test_a_sampled_token_is_drawn_from_the_scores_that_stock_generate_has_there(model: Any, warped: Any) -> None:
    """Ragged rows, two texts a prompt. Stock `generate` is asked for one token behind each text so far."""
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    how = {"do_sample": True, "pad_token_id": PAD, **wanted, **warped}
    if "encoder_repetition_penalty" in warped:  # it is of the prompt, so only the first token can be asked for so
        how["max_new_tokens"] = 1
    torch.manual_seed(3)
    mine = model.generate(
        **RAGGED, **{"max_new_tokens": 6, **how}, num_return_sequences=2, custom_generate=haast.custom_generate
    )
    width = RAGGED["input_ids"].shape[1]
    mask = RAGGED["attention_mask"].repeat_interleave(2, 0)
    for step, (scores, logits) in enumerate(zip(mine.scores, mine.logits, strict=True)):
        text = mine.sequences[:, : width + step]
        seen = torch.cat([mask, mask.new_ones(len(mask), step)], dim=1)
        theirs = model.generate(text, attention_mask=seen, **{**how, "max_new_tokens": 1})
        assert torch.allclose(scores, theirs.scores[0], atol=1e-4) and scores.dtype == theirs.scores[0].dtype
        assert torch.allclose(logits, theirs.logits[0], atol=1e-4)
        assert bool(scores.gather(1, mine.sequences[:, width + step, None]).isfinite().all()), "a token that is allowed"


@families
def test_a_sampled_batch_goes_by_the_seed_and_leaves_the_generator_alone_when_greedy(name: str) -> None:
    how = {**RAGGED, "max_new_tokens": 8, "pad_token_id": PAD, "custom_generate": haast.custom_generate}
    model = family(name)  # made with a seed of its own
    torch.manual_seed(5)
    first, second = (model.generate(**how, do_sample=True) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(model.generate(**how, do_sample=True), first)
    assert not torch.equal(first, second), "the next call draws anew"
    before = torch.get_rng_state()
    model.generate(**how, do_sample=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_models_own_config_says_is_done() -> None:
    """Sampling, warpers and several end tokens that only `model.generation_config` names."""
    model: Any = tiny_llama()
    for name, value in {"do_sample": True, "top_k": 1, "eos_token_id": [10, 23], "pad_token_id": PAD}.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    stock = model.generate(**RAGGED, max_new_tokens=20)
    assert torch.equal(model.generate(**RAGGED, max_new_tokens=20, custom_generate=haast.custom_generate), stock)
    assert model.generation_config.to_dict() == before


# ------------------------------------------------------------------ stopping and streams


@pytest.mark.parametrize("stops", ["e", ["xk", "c"], [";k"], ["kx", "?!?"]])
def test_stop_strings_end_each_row_of_a_batch(model: Any, stops: Any) -> None:
    given = {**RAGGED, "max_new_tokens": 24, "stop_strings": stops, "tokenizer": tokenizer(), "eos_token_id": 31}
    assert torch.equal(run(model, **given), run(model, **given, custom_generate=None))


def test_a_text_streamer_takes_one_row_as_in_stock_generate(model: Any) -> None:
    make: Any = TextStreamer
    with pytest.raises(ValueError, match="only supports batch size 1"):
        run(model, **RAGGED, streamer=make(tokenizer()))


def test_another_thread_reads_a_stream(model: Any) -> None:
    make: Any = TextIteratorStreamer
    streamer = make(tokenizer(), skip_prompt=True, timeout=30)
    thread = threading.Thread(target=lambda: run(model, streamer=streamer))
    thread.start()
    heard = "".join(streamer)
    thread.join()
    assert heard == tokenizer().decode(run(model, custom_generate=None)[0, 4:])


# ------------------------------------------------------------------ where it is called from


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradients_are_neither_needed_nor_left(mode: Any) -> None:
    model: Any = tiny_llama()
    decoder = haast.Decoder(model, head=random_head(tiny_target()))
    with mode():
        said = run(model, custom_generate=decoder, return_dict_in_generate=True, output_logits=True)
    assert not said.logits[0].requires_grad
    assert torch.equal(said.sequences, run(model, custom_generate=None))
    model(input_ids=said.sequences.clone(), labels=said.sequences.clone()).loss.backward()
    assert model.lm_head.weight.grad is not None, "the model can be trained after it"


class Fails(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """A processor, criterion or streamer with an error in it, at the third token."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.calls = error, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise self.error("the user's own")
        return scores if scores is not None else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value: Any) -> None:
        self(value, value)

    def end(self) -> None:
        raise AssertionError("nobody says end behind an error")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "streamer"])
def test_an_error_of_the_users_own_leaves_no_trace(model: Any, decoder: Any, place: str, error: Any) -> None:
    stock = run(model, custom_generate=None)
    for method in (haast.custom_generate, decoder):
        fails = Fails(error)
        with pytest.raises(error, match="the user's own"):
            run(model, custom_generate=method, **{place: fails if place == "streamer" else [fails]})
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(run(model, custom_generate=None), stock)
        assert torch.equal(run(model, custom_generate=method), stock)


class Asks(LogitsProcessor):
    """Generates inside a generation."""

    def __init__(self, model: Any, method: Any) -> None:
        self.model, self.method = model, method
        self.heard: list[list[int]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        said = run(self.model, input_ids=input_ids, max_new_tokens=2, custom_generate=self.method)
        self.heard.append(said[0, -2:].tolist())
        return scores


def test_a_processor_may_call_generate_on_the_same_model(model: Any, decoder: Any) -> None:
    expected = Asks(model, None)
    stock = run(model, logits_processor=[expected], custom_generate=None)
    for inner in (None, haast.custom_generate):
        for outer in (haast.custom_generate, decoder):
            asks = Asks(model, inner)
            assert torch.equal(run(model, logits_processor=[asks], custom_generate=outer), stock)
            assert asks.heard == expected.heard
    with pytest.raises(RuntimeError, match="another generation was started with this drafter"):
        run(model, logits_processor=[Asks(model, decoder)], custom_generate=decoder)
    assert torch.equal(run(model, custom_generate=decoder), stock)


def test_threads_share_a_model_and_a_decoder_with_stock_calls(model: Any, decoder: Any) -> None:
    stock = run(model, custom_generate=None)
    methods = [decoder, haast.custom_generate, None] * 3
    found: list[Any] = [None] * len(methods)

    def work(number: int) -> None:
        found[number] = run(model, custom_generate=methods[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(methods))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, stock) for each in found)
    assert model.config._attn_implementation == "sdpa"


def test_a_decoder_of_medusa_heads_says_the_same() -> None:
    model: Any = tiny_llama()
    target = Target(model)
    method = haast.Decoder.of(target, MedusaDrafter(target, medusa(target), 8))
    given = {**RAGGED, "max_new_tokens": 16, "eos_token_id": 19}
    assert torch.equal(run(model, **given, custom_generate=method), run(model, **given, custom_generate=None))
    assert "medusa" not in DECODERS, "this test stands for it"
    one = batch([1, 2, 1])
    assert torch.equal(run(model, **one, custom_generate=method), run(model, **one, custom_generate=None))


# ------------------------------------------------------------------ state that objects share


class Counts(LogitsProcessor):
    """Forces the token that its own calls so far amount to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        return scores


class Forces(LogitsProcessor):
    """Forces the token that another processor has counted to."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.counts.calls] = 0
        return scores


class Enough(StoppingCriteria):
    """Looks at a processor."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.counts.calls >= 3)


@pytest.mark.parametrize("first", [True, False])
def test_what_processors_share_their_copies_share(model: Any, first: bool) -> None:
    counts = Counts()
    given = [counts, Forces(counts)] if first else [Forces(counts), counts]
    texts = run(model, input_ids=IDS.repeat(3, 1), logits_processor=given)
    begin = int(first)
    assert texts[:, 4:].tolist() == [list(range(begin, begin + 8))] * 3
    assert counts.calls == 0


def test_a_criterion_that_looks_at_a_processor_works_alone_and_is_named_in_a_batch(model: Any) -> None:
    counts = Counts()
    given: dict[str, Any] = {"logits_processor": [counts], "stopping_criteria": [Enough(counts)]}
    assert run(model, **given).shape == (1, 7)
    with pytest.raises(UnsupportedArgumentError, match="stopping_criteria Enough with logits_processor Counts in a"):
        run(model, input_ids=IDS.repeat(2, 1), **given)


def test_a_function_with_state_works_alone_and_is_named_in_a_batch(model: Any) -> None:
    calls = 0
    banned = [3, 5]

    def counting(_ids: Any, scores: Any) -> Any:
        nonlocal calls
        calls += 1
        return scores

    def banning(_ids: Any, scores: Any) -> Any:
        scores[:, banned] = -torch.inf
        return scores

    two = IDS.repeat(2, 1)
    run(model, logits_processor=[counting])
    assert calls == 8
    with pytest.raises(UnsupportedArgumentError, match="logits_processor counting in a batch"):
        run(model, input_ids=two, logits_processor=[counting])
    stock = model.generate(two, **GREEDY, logits_processor=[banning])
    assert torch.equal(run(model, input_ids=two, logits_processor=[banning]), stock)
