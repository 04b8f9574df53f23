"""`generate(custom_generate=...)` from where it is called: modes, threads, errors, calls within calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from fakes import random_head, tiny_llama, tiny_target
from test_custom_generate import DECODERS, PAD, RAGGED, batch, families, family, tokenizer
from test_medusa import medusa
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import haast
from haast.core import SamplingParams, StopParams
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.ngram import SuffixDrafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.engine.scheduler import Scheduler
from haast.errors import UnsupportedArgumentError
from haast.integrations.rows import Ends, RowChooser
from haast.sampling import choose_nodes
from haast.target.target import Target

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
    """Ragged rows, two texts a prompt. Stock `generate` is asked for one token after each text so far."""
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


AT_ONCE: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_k": 0, "top_p": 0.6, "suppress_tokens": [3, 4]},
    {"top_p": 0.0, "remove_invalid_values": True},
    {"min_p": 0.2, "typical_p": 0.5, "epsilon_cutoff": 0.05},
    {"renormalize_logits": True, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    {"logits_processor": [TopKLogitsWarper(3)], "temperature": 1.5, "top_k": 0},
    {"do_sample": False, "logits_processor": [TopKLogitsWarper(3)], "suppress_tokens": [3, 4]},
    {"do_sample": False},
]
ONE_BY_ONE: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"do_sample": False, "min_new_tokens": 3, "eos_token_id": 5},
    {"logits_processor": [lambda _ids, scores: scores]},
    {"return_dict_in_generate": True, "output_logits": True},
]


def walks(model: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> bool:
    """Whether a call goes along a drafted path, token by token."""

    def refuse(*_: Any) -> Any:
        raise InterruptedError("a walk")

    with monkeypatch.context() as patched:
        patched.setattr("haast.engine.verify._walk", refuse)
        try:
            run(model, **given)
        except InterruptedError:
            return True
    return False


@pytest.mark.parametrize("warped", AT_ONCE, ids=lambda warped: ", ".join(warped))
def test_what_looks_at_scores_alone_is_chosen_for_all_nodes_at_once(
    model: Any, warped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded scores make the rows walk, so the two ways are compared."""
    how = {**RAGGED, "do_sample": True, "max_new_tokens": 16, "eos_token_id": 9, **warped}
    torch.manual_seed(4)
    walked = run(model, **how, return_dict_in_generate=True, output_scores=True).sequences
    torch.manual_seed(4)
    assert torch.equal(run(model, **how), walked)
    assert not walks(model, monkeypatch, **how)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 3])
def test_all_nodes_are_chosen_for_in_float32_as_generate_does(dtype: torch.dtype, seed: int | None) -> None:
    """Among them ties, and what only float64 tells apart."""
    torch.manual_seed(1)
    logits = (torch.randint(0, 4, (1, 8, 32)) / 2 + 1e-12 * torch.rand(1, 8, 32, dtype=torch.float64)).to(dtype)
    made = []
    for kept in (False, True):
        ends = Ends(StoppingCriteriaList([]), 1, 9, to_longest=False)
        warpers = LogitsProcessorList([TopKLogitsWarper(30)] if seed else [])
        made.append(RowChooser(0, IDS[0], 0, warpers, ends, seed=seed, keep_scores=kept))
    at_once, along = made
    assert at_once.stateless and not along.stateless
    said = [1, 2, 3, 4]
    for node in range(8):
        said.append(along.choose(said, logits[0, node]))
    assert choose_nodes(logits, [at_once], [4], torch.arange(8).unsqueeze(0), 7).tolist() == [said[4:]]
    assert [at_once.choose(said[: 4 + node], logits[0, node]) for node in range(8)] == said[4:]


@pytest.mark.parametrize("given", ONE_BY_ONE, ids=lambda given: ", ".join(given))
def test_what_looks_at_the_text_is_asked_along_the_path(
    model: Any, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert walks(model, monkeypatch, **{"do_sample": True, **given})


def test_each_row_says_what_a_request_with_its_seed_says_alone() -> None:
    """Row i draws by the i-th number that torch's generator gives; nothing else of the batch matters."""
    model: Any = tiny_llama()
    model.float()
    target = Target(model)
    warped: dict[str, Any] = {"temperature": 1.2, "top_k": 9, "top_p": 0.9}
    torch.manual_seed(11)
    seeds = torch.randint(2**63 - 1, (3,)).tolist()
    torch.manual_seed(11)
    together = run(model, **RAGGED, **warped, do_sample=True, max_new_tokens=12)[:, 7:].tolist()
    for row, seed in enumerate(seeds):
        prompt = RAGGED["input_ids"][row][RAGGED["attention_mask"][row] == 1].tolist()
        alone = Engine(target, VanillaDrafter()).complete([prompt], SamplingParams(**warped, seed=seed), StopParams(12))
        assert together[row] == alone[0]


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
        raise AssertionError("nobody says end after an error")


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
    with pytest.raises(RuntimeError, match="asked for tokens of the model that it is called by"):
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


class Heard(BaseStreamer):
    """Does something when the first new token comes."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act, self._calls = act, 0

    def put(self, value: Any) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self._act()

    def end(self) -> None:
        """Nothing."""


def in_threads(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises, at the same time."""
    found: list[Any] = [None] * len(works)

    def work(number: int) -> None:
        try:
            found[number] = works[number]()
        except ValueError as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("loaded", [False, True], ids=["plain", "loaded"])
def test_eight_threads_get_their_own_texts_from_shared_steps(loaded: bool) -> None:
    """All calls have begun before any goes on, so that later steps serve them all. One of them fails, alone."""
    model: Any = tiny_llama()
    method = haast.Haast.from_pretrained(model, head=None).custom_generate if loaded else haast.custom_generate
    prompts = [torch.tensor([[1 + row, 2, 3, 1 + row, 2]]) for row in range(8)]
    expected = [run(model, input_ids=each, max_new_tokens=16, custom_generate=None) for each in prompts]
    begun, widths = threading.Barrier(8), list[int]()
    model.register_forward_pre_hook(lambda _, __, given: widths.append(len(given["input_ids"])), with_kwargs=True)

    def failing(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 17:
            raise ValueError("the user's own")
        return scores

    def call(row: int) -> Any:
        given = {"logits_processor": [failing]} if row == 5 else {}
        streamer = Heard(lambda: begun.wait(60))
        return run(model, input_ids=prompts[row], max_new_tokens=16, streamer=streamer, custom_generate=method, **given)

    found = in_threads([lambda row=row: call(row) for row in range(8)])  # type: ignore[misc]
    assert str(found.pop(5)) == "the user's own"
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:5] + expected[6:], strict=True))
    assert max(widths) == 8
    assert model.config._attn_implementation == ("haast" if loaded else "sdpa")


def test_the_last_call_that_leaves_gives_the_attention_back(model: Any, decoder: Any) -> None:
    seen: list[str] = []
    for method in (haast.custom_generate, decoder):

        def another() -> None:
            in_threads([lambda: run(model), lambda: run(model, custom_generate=decoder)])
            seen.append(model.config._attn_implementation)

        run(model, streamer=Heard(another), custom_generate=method)
    assert seen == ["haast", "haast"] and model.config._attn_implementation == "sdpa"


def test_a_call_that_ends_in_an_error_leaves_no_request_running() -> None:
    target = Target(tiny_llama())
    target.use_pool(256, retain=0)
    method = haast.Decoder.of(target, SuffixDrafter())
    for place in ("logits_processor", "stopping_criteria", "streamer"):
        fails = Fails(InterruptedError)
        with pytest.raises(InterruptedError):
            run(target.model, custom_generate=method, **{place: fails if place == "streamer" else [fails]})
        scheduler = Scheduler.of(target)
        assert (scheduler.running, scheduler.waiting) == (0, 0)
        assert target.pool.free_blocks == target.pool.blocks


def test_a_row_that_is_done_waits_for_the_longest_and_is_not_asked_beyond_it() -> None:
    """The pool holds one long row at a time: the others wait for room, and rows that are done must not keep it."""
    model: Any = tiny_llama()
    lengths: list[int] = []

    class Third(StoppingCriteria):
        """Ends a row after three tokens, but the last row, which it knows by its first token, after forty."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            lengths.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= IDS.shape[1] + (40 if row[0] == 9 else 3) for row in input_ids])

    target = Target(model)
    target.use_pool(160)
    method = haast.Decoder.of(target, SuffixDrafter())
    ids = torch.tensor([[1, 2, 3, 4], [2, 2, 3, 4], [3, 2, 3, 4], [9, 2, 3, 4]])
    given = {"input_ids": ids, "max_new_tokens": 120, "stopping_criteria": StoppingCriteriaList([Third()])}
    stock = run(model, **given, custom_generate=None)
    lengths.clear()
    assert torch.equal(run(model, **given, custom_generate=method), stock) and stock.shape == (4, 44)
    assert sorted(lengths) == sorted([*range(5, 45)] * 4), "each row was asked about once per token, and not beyond"


def test_a_step_that_is_taken_again_asks_nobody_twice() -> None:
    """An interrupt may come after a row has been judged: its tokens are not out yet, and are asked for again."""
    asked: list[int] = []

    def noting(ids: Tensor, scores: Tensor) -> Tensor:
        asked.append(ids.shape[1])
        return scores

    processors = LogitsProcessorList([noting])
    ends = Ends(StoppingCriteriaList([]), 1, 9, to_longest=False)
    chooser = RowChooser(0, IDS[0], 1, processors, ends, seed=3)
    torch.manual_seed(0)
    logits = torch.randn(4, 32)
    said = [2, 3, 4]
    for place in range(4):
        said.append(chooser.choose(said, logits[place]))
    assert [chooser.choose(said[: 3 + place], logits[place]) for place in range(4)] == said[3:]
    assert asked == [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match="row 0 has 5 new tokens, of which 4 were chosen"):
        chooser.choose([*said, 1], logits[0])


def test_a_forward_of_the_users_own_in_another_thread_is_not_taken_for_ours() -> None:
    """Features are caught by hooks on modules that others may call at the same time."""
    model: Any = tiny_llama()
    decoder = haast.Decoder(model, head=random_head(tiny_target()))
    stock, fired = run(model, custom_generate=None), list[int]()

    def meanwhile(*_: Any) -> None:
        fired.append(threading.get_ident())
        if len(fired) % 2:
            in_threads([lambda: model(torch.tensor([[1]]))])

    model.lm_head.register_forward_pre_hook(meanwhile)
    assert torch.equal(run(model, custom_generate=decoder), stock)
    assert len(set(fired)) > 1


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_what_only_one_of_several_processes_has_is_refused(name: str) -> None:
    target = Target(tiny_llama())
    method = haast.Decoder.of(target, VanillaDrafter())
    cast(Any, target).ranks = object()
    with pytest.raises(UnsupportedArgumentError, match=f"{name}=True .* tensor-parallel"):
        run(target.model, custom_generate=method, return_dict_in_generate=True, **{name: True})


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
