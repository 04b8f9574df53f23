"""`model.generate(custom_generate=...)` says what stock `generate` says: families, processors, stopping, streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from fakes import OracleChain, chi_square_p, random_head, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import stock
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import haast
from haast.drafters.small_model import SmallModelDrafter
from haast.sampling import keyed_uniform
from haast.target.target import Target

VOCAB, PAD = 32, 0
WIDER = 48  # a self-hashing watermark tries 40 tokens
SIX = ["llama", "qwen3", "mistral-sliding", "gpt2", "phi3", "gpt_neox"]
families = pytest.mark.parametrize("name", SIX)


@cache
def family(name: str) -> Any:
    model = stock(name)
    model.set_attn_implementation("sdpa")  # eager answers a padded row with nan, by itself
    return model


@cache
def llama() -> Any:
    return tiny_llama()


@cache
def shallow() -> Target:
    model = tiny_llama(vocab=WIDER, layers=1)
    target = Target(model)
    model.set_attn_implementation("sdpa")  # the decoder switches it for each call
    return target


def batch(*rows: list[int]) -> dict[str, Any]:
    """Left-padded prompts. The padding is a token like any other: only the mask says what it is."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def shallow_model() -> Any:
    return shallow().model


RAGGED = batch([1, 2, 3, 1, 2, 3, 1], [7], [9, 9, 4, 1])


def both(model: Any, **settings: Any) -> tuple[Any, Any]:
    """The same call, stock and through Haast."""
    settings = {"do_sample": False, "pad_token_id": PAD, **settings}
    return model.generate(**settings), model.generate(**settings, custom_generate=haast.custom_generate)


# ------------------------------------------------------------------ families


@families
def test_greedy_text_scores_and_logits_are_stock_generates(name: str) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, mine = both(
        family(name), **RAGGED, max_new_tokens=20, repetition_penalty=1.2, eos_token_id=[11, 23], **wanted
    )
    assert torch.equal(mine.sequences, theirs.sequences)
    assert len(set(mine.sequences[0].tolist())) > 4, "a constant text would show little"
    new = mine.sequences[:, RAGGED["input_ids"].shape[1] :]
    assert mine.scores[0].dtype == theirs.scores[0].dtype and len(mine.logits) == len(theirs.logits) == new.shape[1]
    for step in range(new.shape[1]):
        running = ~torch.isin(new[:, :step], torch.tensor([11, 23])).any(1)
        for ours, others in ((mine.scores, theirs.scores), (mine.logits, theirs.logits)):
            assert ours[step].shape == others[step].shape
            assert float((ours[step] - others[step])[running].abs().max()) < 2e-4
    given = family(name).compute_transition_scores(mine.sequences, mine.scores, normalize_logits=True)
    assert bool(torch.isfinite(given).all())


@families
def test_a_sampled_text_has_stock_generates_distribution(name: str) -> None:
    """Chi-square of the first two tokens against the enumerated distribution; that without top-p must not pass."""
    model, prompt = family(name), torch.tensor([[3, 5, 3]])
    warped = {"temperature": 1.4, "top_k": 6, "top_p": 0.8}
    torch.manual_seed(1)
    drawn = model.generate(
        prompt, do_sample=True, max_new_tokens=2, num_return_sequences=400, pad_token_id=PAD, **warped,
        custom_generate=haast.custom_generate,
    )  # fmt: skip
    seen = Counter(map(tuple, drawn[:, 3:].tolist()))
    chain = [TemperatureLogitsWarper(1.4), TopKLogitsWarper(6), TopPLogitsWarper(0.8)]
    assert p_value(seen, chances_of(model, prompt, chain)) > 1e-3
    assert p_value(seen, chances_of(model, prompt, chain[:2])) < 1e-9


def chances_of(model: Any, prompt: Tensor, chain: list[LogitsProcessor]) -> dict[tuple[int, int], float]:
    """The chance of each pair of tokens, by enumeration."""
    chances: dict[tuple[int, int], float] = {}
    for first, one in enumerate(following(model, prompt, chain).tolist()):
        if one > 0:
            longer = torch.cat([prompt, torch.tensor([[first]])], dim=1)
            chances |= {(first, i): one * two for i, two in enumerate(following(model, longer, chain).tolist())}
    return chances


def following(model: Any, text: Tensor, chain: list[LogitsProcessor]) -> Tensor:
    with torch.no_grad():
        scores = model(text).logits[:, -1].float()
    return LogitsProcessorList(chain)(text, scores)[0].double().softmax(-1)  # type: ignore[arg-type]


def p_value(seen: Counter[tuple[int, ...]], chances: dict[tuple[int, int], float]) -> float:
    total = sum(seen.values())
    return chi_square_p([seen[pair] for pair in chances], [total * chance for chance in chances.values()])


# ------------------------------------------------------------------ processors

tokens = st.integers(1, VOCAB - 1)
forced, suppressed = st.integers(1, 15), st.integers(16, VOCAB - 1)  # transformers refuses to force what is suppressed
few = st.lists(suppressed, min_size=1, max_size=4, unique=True)
grams = st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=3, unique_by=tuple)
configurations = st.fixed_dictionaries(
    {"eos_token_id": st.lists(tokens, min_size=1, max_size=2, unique=True)},
    optional={
        "repetition_penalty": st.floats(0.5, 2.0).filter(lambda value: value != 1),
        "encoder_repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": grams,
        "min_new_tokens": st.integers(1, 8),
        "min_length": st.integers(1, 9),
        "forced_bos_token_id": forced,
        "forced_eos_token_id": forced,
        "suppress_tokens": few,
        "begin_suppress_tokens": few,
        "exponential_decay_length_penalty": st.tuples(st.integers(1, 4), st.floats(1.01, 1.5)),
        "sequence_bias": grams.map(lambda found: [[gram, 3.5 - len(gram)] for gram in found]),
        "renormalize_logits": st.booleans(),
        "remove_invalid_values": st.booleans(),
        "watermarking_config": st.sampled_from(
            [WatermarkingConfig(bias=4.0), WatermarkingConfig(seeding_scheme="selfhash", context_width=2, bias=3.0)]
        ),
        "logits_processor": st.booleans().map(lambda late: [Alternating(late)]),
        "prefix_allowed_tokens_fn": st.integers(1, 5).map(lambda step: Allowed(step)),
    },
)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=3)


class Alternating(LogitsProcessor):
    """Favours what its row's last call did not: state of its own, per row of the batch, as grammars keep it."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self._calls: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._calls is None or len(self._calls) != len(scores):
            self._calls = torch.zeros(len(scores), dtype=torch.long)
        self._calls += 1 + input_ids[:, -1] % 2
        favoured = (torch.arange(scores.shape[1]) + self._calls.unsqueeze(1)) % 3 == self._late
        return scores + 2.0 * favoured


class Allowed:
    """What a row may say depends on the row and on the text, padding included."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, row: int, text: Tensor) -> list[int]:
        begin = (row + len(text) + int(text[-1])) % 3
        return list(range(begin, WIDER, 1 + self._step % 3))


@pytest.mark.parametrize("examples", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_processors_that_look_at_history_give_stock_generates_tokens(examples: int) -> None:
    settings(max_examples=examples)(given(config=configurations, rows=prompts, seed=st.integers(0, 9))(compared))()


def compared(config: dict[str, Any], rows: Any, seed: int) -> None:
    """Drafted by an oracle that is right two times in three, so that accepted and refused tokens alternate."""
    inputs = batch(*rows)
    how = {**inputs, "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    theirs = shallow_model().generate(**how, **fresh(config))
    begins = (inputs["attention_mask"] == 0).sum(1).tolist()
    texts = [line[begin:] for line, begin in zip(theirs.tolist(), begins, strict=True)]
    oracle = OracleChain(texts, 3, lambda row, place: keyed_uniform(seed, row, place) < 0.67, WIDER)
    decoder = haast.Decoder.of(shallow(), oracle)
    mine = shallow_model().generate(**how, **fresh(config), custom_generate=decoder)
    assert torch.equal(mine, theirs)


def fresh(config: dict[str, Any]) -> dict[str, Any]:
    """Processors with state begin anew in every call."""
    if "min_new_tokens" in config:  # it takes precedence, with a warning
        config = {name: value for name, value in config.items() if name != "min_length"}
    return {**config, "logits_processor": [Alternating(each._late) for each in config.get("logits_processor", ())]}


def test_a_watermark_with_state_is_each_rows_own() -> None:
    """SynthID keeps its context per row. It changes only draws, so the processed scores are compared."""
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 6, 7], context_history_size=8)
    theirs, mine = both(
        llama(), **RAGGED, max_new_tokens=12, watermarking_config=mark, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine.scores, theirs.scores, strict=True))


class Counting(LogitsProcessor):
    """Notes how long the text was at every call."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        scores[:, 3] += 1.0  # in place, as some do
        return scores


def test_processors_are_asked_once_per_emitted_token_and_never_after_the_end() -> None:
    prompt = batch([1, 2] * 5)
    said = llama().generate(**prompt, max_new_tokens=20, do_sample=False)[0, 10:].tolist()
    mine, theirs = Counting(), Counting()
    for counting, method in ((theirs, None), (mine, haast.Decoder(drafter="lookup"))):
        llama().generate(
            **prompt, max_new_tokens=20, do_sample=False, logits_processor=[counting], custom_generate=method,
            eos_token_id=said[7], pad_token_id=PAD,
        )  # fmt: skip
    assert mine.lengths == theirs.lengths


# ------------------------------------------------------------------ stopping


class EndsAt(StoppingCriteria):
    """Ends a row at a token of a certain rest; notes what it was given."""

    def __init__(self, rest: int, seen: list[tuple[int, int]]) -> None:
        self._rest, self._seen = rest, seen

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._seen.append((input_ids.shape[1], 0 if scores is None else len(scores)))
        return input_ids[:, -1] % 7 == self._rest


@pytest.mark.parametrize("rest", range(7))
@pytest.mark.parametrize("eos", [None, 23])
def test_rows_end_where_stock_generate_ends_them(rest: int, eos: int | None) -> None:
    """Without an end-of-text token a row that is done goes on until all are; with one it is padded."""
    ends = StoppingCriteriaList([EndsAt(rest, [])])
    theirs, mine = both(llama(), **RAGGED, max_new_tokens=30, eos_token_id=eos, stopping_criteria=ends)
    assert torch.equal(mine, theirs)


def test_criteria_see_the_text_and_the_scores_that_stock_generate_shows() -> None:
    seen: list[tuple[int, int]] = []
    ends = StoppingCriteriaList([EndsAt(5, seen)])
    both(
        llama(), **batch([1, 2, 3]), max_new_tokens=30, stopping_criteria=ends, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    half = len(seen) // 2
    assert half > 3 and seen[:half] == seen[half:]


def test_a_criterion_that_answers_for_other_rows_is_named() -> None:
    class Wrong(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.zeros(3, dtype=torch.bool)

    with pytest.raises(ValueError, match=r"Wrong.*answered for 3 rows"):
        llama().generate(
            **RAGGED, max_new_tokens=4, stopping_criteria=[Wrong()], custom_generate=haast.custom_generate,
            pad_token_id=PAD,
        )  # fmt: skip


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz,.;:!?")}, merges=[])
    )
    words.decoder = decoders.Fuse()
    make: Any = PreTrainedTokenizerFast  # its constructor is untyped
    made: PreTrainedTokenizerFast = make(tokenizer_object=words)
    return made


def test_stop_strings_end_a_text() -> None:
    plain = llama().generate(**batch([1, 2, 3]), max_new_tokens=30, do_sample=False)[0, 3:]
    stop = tokenizer().decode(plain[11:13])
    theirs, mine = both(
        llama(), **batch([1, 2, 3]), max_new_tokens=30, stop_strings=[stop, "???"], tokenizer=tokenizer()
    )
    assert torch.equal(mine, theirs) and mine.shape[1] <= 3 + 13
    with pytest.raises(ValueError, match="Stop string preprocessing"):
        both(llama(), **batch([1]), max_new_tokens=3, stop_strings=["\u1234"], tokenizer=tokenizer())


def test_max_time_ends_a_text() -> None:
    _, mine = both(llama(), **batch([1, 2, 3]), max_new_tokens=200, max_time=1e-9)
    assert mine.shape[1] == 4, "it is looked at after each token, so one comes"


def test_max_length_counts_the_padding_as_stock_does() -> None:
    theirs, mine = both(llama(), **RAGGED, max_length=12, forced_eos_token_id=30, eos_token_id=29)
    assert torch.equal(mine, theirs)


# ------------------------------------------------------------------ streams


class Noting(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@families
@pytest.mark.parametrize("rows", [batch([1, 2, 1, 2, 1]), RAGGED], ids=["one", "batch"])
def test_a_streamer_hears_what_stock_generate_tells_it(name: str, rows: Any) -> None:
    heard = [Noting(), Noting()]
    for streamer, method in zip(heard, (None, haast.custom_generate), strict=True):
        family(name).generate(
            **rows, do_sample=False, max_new_tokens=12, eos_token_id=17, pad_token_id=PAD, streamer=streamer,
            custom_generate=method,
        )  # fmt: skip
    assert heard[0].calls == heard[1].calls and heard[1].calls[-1] == "end" and len(heard[1].calls) > 3


# ------------------------------------------------------------------ drafters

EIGHT = [
    [1, 2, 3, 1, 2, 3, 1, 2],
    [7],
    [9, 9, 4, 1],
    [5, 6],
    [31, 30, 29, 28, 31, 30],
    [2] * 7,
    [8, 1, 8],
    [12, 13, 12],
]


def small(model: Any) -> haast.Decoder:
    target = Target(model)
    return haast.Decoder.of(target, SmallModelDrafter(target, Target(tiny_llama(layers=1, seed=5))))


def headed(drafter: str) -> Callable[[Any], haast.Decoder]:
    def made(model: Any) -> haast.Decoder:
        return haast.Decoder(model, head=random_head(Target(model)), drafter=drafter)

    return made


DECODERS: dict[str, Callable[[Any], haast.Decoder]] = {
    "vanilla": lambda model: haast.Decoder(drafter="vanilla"),
    "none": lambda model: haast.Decoder(model, drafter="none"),
    "suffix": lambda model: haast.custom_generate,
    "lookup": lambda model: haast.Decoder(model, drafter="lookup"),
    "lookahead": lambda model: haast.Decoder(drafter="lookahead"),
    "eagle": headed("eagle"),
    "eagle+suffix": headed("eagle+suffix"),
    "small-model": small,
}
drafters = pytest.mark.parametrize("drafter", sorted(DECODERS))


@drafters
def test_eight_ragged_rows_say_what_eight_single_runs_say(drafter: str) -> None:
    model: Any = tiny_llama()
    decoder = DECODERS[drafter](model)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": 19, "pad_token_id": PAD}
    how["no_repeat_ngram_size"] = 4
    together = model.generate(**batch(*EIGHT), **how, custom_generate=decoder)[:, 8:].tolist()
    for row, prompt in zip(together, EIGHT, strict=True):
        alone = model.generate(**batch(prompt), **how, custom_generate=decoder)[0, len(prompt) :].tolist()
        assert row == alone + [PAD] * (len(row) - len(alone))
    stocks = model.generate(**batch(*EIGHT), **how)[:, 8:].tolist()
    assert together == stocks


@drafters
def test_the_same_manual_seed_gives_the_same_sampled_text(drafter: str) -> None:
    model: Any = tiny_llama()
    texts = []
    for decoder in (haast.Decoder(drafter="vanilla"), DECODERS[drafter](model)):
        torch.manual_seed(7)
        texts.append(
            model.generate(
                **RAGGED,
                do_sample=True,
                top_p=0.9,
                max_new_tokens=12,
                num_return_sequences=2,
                pad_token_id=PAD,
                custom_generate=decoder,
            )
        )
    assert torch.equal(*texts) and texts[0].shape[0] == 6
    assert texts[0][0].tolist() != texts[0][1].tolist(), "rows of one prompt have draws of their own"


def test_a_loaded_haast_has_a_decoder() -> None:
    model: Any = tiny_llama()
    loaded = haast.Haast.from_pretrained(model, head=None)
    theirs = model.generate(**RAGGED, do_sample=False, max_new_tokens=8, pad_token_id=PAD)
    mine = model.generate(
        **RAGGED, do_sample=False, max_new_tokens=8, pad_token_id=PAD, custom_generate=loaded.custom_generate
    )
    assert torch.equal(mine, theirs)


def test_lookup_drafts_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tests above: drafts that are never accepted would show little."""
    monkeypatch.setattr("haast.drafters.factory.latency_of", lambda *_: None)  # drafts, whatever forwards cost here
    decoder = haast.Decoder(drafter="lookup")
    model: Any = tiny_llama(std=0.1)
    model.generate(**batch([1, 2] * 6), max_new_tokens=40, do_sample=False, custom_generate=decoder)
    assert decoder.stats.tau > 1.3
