"""Bad input, line by line: a message with the value and the remedy, before the model runs, else stock's text.

Through `model.generate(custom_generate=...)`, `Decoder` and `Haast.generate`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from fakes import random_head, tiny_llama, tiny_target
from test_custom_generate import tokenizer
from test_custom_generate_arguments import examples
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import haast
from haast.api import Haast
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import HeadMismatchError, PromptError, UnsupportedArgumentError, UnsupportedModelError
from haast.integrations.arguments import REFUSED_SETTINGS
from haast.target.target import Target

IDS = torch.tensor([[1, 2, 3, 4]])
PLAIN: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
LONG = torch.long


class Watched:
    """A tiny model, and how many forwards it has run."""

    def __init__(self) -> None:
        self.model: Any = tiny_llama()
        self.forwards = 0
        self.run()  # its probe, so that what follows counts the calls' own forwards
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def run(self, **given: Any) -> Any:
        self.forwards = 0
        return self.model.generate(**{"input_ids": IDS, **PLAIN, "custom_generate": haast.custom_generate, **given})


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def ints(*rows: list[int]) -> Any:
    return torch.tensor(rows)


# ------------------------------------------------------------------ prompts and masks


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"attention_mask": torch.ones(1, 7, dtype=LONG)}, r"\(1, 7\), .* input_ids of shape \(1, 4\): give one entry"),
        ({"attention_mask": torch.ones(2, 4, dtype=LONG)}, r"\(2, 4\), .* input_ids of shape \(1, 4\): give one entry"),
        ({"attention_mask": torch.ones(4, dtype=LONG)}, r"shape \(4,\): give \(rows, tokens\)"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"shape \(1, 1, 4, 4\): give \(rows, tokens\)"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask is a list: give"),
        ({"attention_mask": torch.tensor([[0.5, 1, 1, 1]])}, "contains 0.5: give 1 for a token and 0 for padding"),
        ({"attention_mask": torch.tensor([[-torch.inf, 0, 0, 0]])}, "contains -inf: .* attention biases"),
        ({"attention_mask": torch.tensor([[torch.nan, 1, 1, 1]])}, "contains nan"),
        ({"attention_mask": ints([0, 2, 2, 1])}, "contains 2"),
        ({"attention_mask": ints([-1, 1, 1, 1])}, "contains -1"),
        ({"attention_mask": ints([1, 1, 1, 0])}, "row 0: .*pad on the left"),
        ({"attention_mask": ints([0, 1, 0, 1])}, "row 0: .*pad on the left"),
        ({"attention_mask": ints([0, 0, 0, 0])}, "row 0 of the batch is empty: .*leave the row out"),
        ({"attention_mask": torch.ones(1, 4, device="meta")}, "attention_mask is on the meta device"),
        ({"input_ids": [[1, 2]]}, r"input_ids is a list: .* generate\(\*\*inputs\)"),
        ({"input_ids": {"input_ids": IDS}}, "input_ids is a dict"),
        ({"input_ids": IDS[0]}, r"shape \(4,\): give \(rows, tokens\)"),
        ({"input_ids": IDS[None]}, r"shape \(1, 1, 4\)"),
        ({"input_ids": IDS.float()}, "torch.float32: give token ids as torch.int64"),
        ({"input_ids": IDS.bool()}, "torch.bool"),
        ({"input_ids": IDS.to(torch.int16)}, "torch.int16"),
        ({"input_ids": IDS.to("meta")}, "input_ids is on the meta device"),
        ({"input_ids": ints([1, -1])}, r"row 0 has the token id -1, .* 0\.\.31"),
        ({"input_ids": ints([1, 32])}, "row 0 has the token id 32"),
        ({"input_ids": ints([-100, 1]), "attention_mask": ints([0, 1])}, "token id -100"),
    ],
)
def test_prompts_and_masks_are_checked_before_the_model_runs(watched: Watched, given: Any, why: str) -> None:
    with pytest.raises(PromptError, match=why):
        watched.run(**given)
    assert watched.forwards == 0


def test_ids_given_by_place_are_checked_too(watched: Watched) -> None:
    with pytest.raises(PromptError, match=r"shape \(2,\)"):
        watched.model.generate(torch.tensor([1, 2]), **PLAIN, custom_generate=haast.custom_generate)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_zeros_and_ones_may_have_any_dtype(watched: Watched, dtype: torch.dtype) -> None:
    mask = ints([0, 1, 1, 1]).to(dtype)
    stock = watched.run(attention_mask=mask, custom_generate=None)
    assert torch.equal(watched.run(attention_mask=mask), stock)
    assert not torch.equal(stock, watched.run()), "the mask counts"


RAGGED: dict[str, Any] = {
    "input_ids": ints([0, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]),
    "attention_mask": ints([0, 0, 1, 1], [1] * 4, [1] * 4),
}


def test_a_ragged_batch_without_a_pad_token(watched: Watched) -> None:
    """Without an end token no row is padded; with one, `generate` itself takes it for the pad token."""
    for ends in (None, 19):
        given = {**RAGGED, "pad_token_id": None, "eos_token_id": ends, "max_new_tokens": 16}
        said = watched.run(**given)
        assert torch.equal(said, watched.run(**given, custom_generate=None))
    assert (said == 19).sum(1).unique().numel() > 1, "rows end at different places"


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize("place", ["generation_config", "model"])
@pytest.mark.parametrize("name", sorted(set(REFUSED_SETTINGS) - {"token_healing"}))
def test_what_a_config_asks_for_is_refused_by_name(watched: Watched, name: str, place: str) -> None:
    """Values that a GenerationConfig holds, the call's or the model's own."""
    config: Any = GenerationConfig(**PLAIN, return_dict_in_generate=True)  # type: ignore[no-untyped-call]
    setattr(config, name, examples(watched.model)[name])
    kept = watched.model.generation_config
    given: dict[str, Any] = {"custom_generate": haast.custom_generate}
    if place == "model":
        watched.model.generation_config = config
    else:
        given["generation_config"] = config
    watched.forwards = 0
    vars(watched.model).pop("_cache", None)  # transformers 5.0 stumbles over the static cache of a refused call
    try:
        with pytest.raises(UnsupportedArgumentError, match=rf"^{name}="):
            watched.model.generate(IDS, **given)
    finally:
        watched.model.generation_config = kept
    assert watched.forwards == 0


def test_a_config_of_the_user_is_not_changed(watched: Watched) -> None:
    config: Any = GenerationConfig(**PLAIN, eos_token_id=[5, 6])  # type: ignore[no-untyped-call]
    before = config.to_dict()
    watched.model.generate(IDS, generation_config=config, custom_generate=haast.custom_generate)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"foo": 3}, "not used by the model: .*'foo'"),
        ({"pixel_values": torch.zeros(1)}, "'pixel_values'"),
        ({"labels": IDS}, "^labels is not supported by Haast"),
        ({"position_ids": ints([5, 6, 7, 8])}, "^position_ids is not supported by Haast"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be greater than 0, but is -1"),
        ({"max_new_tokens": None, "max_length": 2}, "`max_length` is set to 2"),
        ({"do_sample": True, "temperature": 0.0}, r"`temperature` \(=0.0\)"),
        ({"do_sample": True, "temperature": -1.0}, r"`temperature` \(=-1.0\)"),
        ({"do_sample": True, "top_k": -1}, "`top_k`.* is -1"),
        ({"do_sample": True, "top_p": -0.1}, "`top_p`.* is -0.1"),
        ({"do_sample": True, "min_p": 2.0}, "`min_p`.* is 2.0"),
        ({"repetition_penalty": 0.0}, "`penalty`.* is 0.0"),
        ({"num_return_sequences": 2}, "`num_return_sequences` different than 1 .got 2."),
        ({"stop_strings": ["a"]}, "tokenizer"),
        ({"stop_strings": [""], "tokenizer": 0}, "stop_strings holds ''"),
        ({"stop_strings": ["a", ""], "tokenizer": 0}, "stop_strings holds ''"),
        ({"stop_strings": "", "tokenizer": 0}, "stop_strings holds ''"),
        ({"stop_strings": [], "tokenizer": 0}, "stop_strings is an empty list: leave it out"),
        ({"stop_strings": [3], "tokenizer": 0}, "stop_strings holds 3: give strings"),
        ({"stop_strings": b"ab", "tokenizer": 0}, "stop_strings=b'ab' is not allowed"),
        ({"stop_strings": ["\u1234"], "tokenizer": 0}, "Stop string preprocessing was unable"),
        ({"stop_strings": ["a\u1234"], "tokenizer": 0}, "Stop string preprocessing was unable"),
    ],
)
def test_values_that_cannot_be_meant_are_told_before_the_model_runs(watched: Watched, given: Any, why: str) -> None:
    """Some by transformers itself, whose word comes first."""
    if "tokenizer" in given:
        given = {**given, "tokenizer": tokenizer()}
    with pytest.raises(ValueError, match=why):
        watched.run(**given)
    assert watched.forwards == 0


def test_stop_strings_of_a_config_are_looked_at(watched: Watched) -> None:
    config: Any = GenerationConfig(**PLAIN, stop_strings=[""])  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="stop_strings holds ''"):
        watched.model.generate(
            IDS, generation_config=config, tokenizer=tokenizer(), custom_generate=haast.custom_generate
        )


@pytest.mark.parametrize(
    "given",
    [
        {"eos_token_id": [99, 23]},
        {"eos_token_id": []},
        {"max_new_tokens": 2.5},
        {"use_cache": False},
        {"position_ids": ints([0, 1, 2, 3])},
        {"stop_strings": ["\u1234", "x"]},  # 23 is an x; the other can't come up, and harms nothing
        {"stop_strings": [a + b + c for a in "abcdefghijkl" for b in "abcdefghijkl" for c in "abcdefghijklx"]},
        {"stop_strings": "x" * 5000},
        {"max_time": 0.0},
        {"suppress_tokens": [], "bad_words_ids": [[28, 23]]},
    ],
)
def test_values_at_the_edge_give_stock_generates_text(watched: Watched, given: Any) -> None:
    if "stop_strings" in given:
        given = {**given, "tokenizer": tokenizer()}
    assert torch.equal(watched.run(**given), watched.run(**given, custom_generate=None))


# ------------------------------------------------------------------ models


def test_models_that_cannot_answer_now_are_refused(watched: Watched) -> None:
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        watched_call(tiny_llama().to("meta"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        haast.Decoder(tiny_llama().to("meta"), drafter="lookup")  # type: ignore[arg-type]
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"torch\.autocast is on for the CPU"),
    ):
        watched.run()
    with pytest.raises(UnsupportedModelError, match="model is a str"):
        haast.Decoder("gpt2")  # type: ignore[arg-type]
    wrapped: Any = nn.Sequential(watched.model)
    for load in (haast.Decoder, lambda model: Haast.from_pretrained(model, head=None)):
        with pytest.raises(UnsupportedModelError, match=r"model is a Sequential: .*get_base_model"):
            load(wrapped)


def watched_call(model: Any) -> Any:
    return model.generate(IDS, **PLAIN, custom_generate=haast.custom_generate)


def test_an_encoder_decoder_is_refused_before_its_encoder_runs() -> None:
    sizes: Any = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
    sizes["decoder_start_token_id"] = 0
    model: Any = T5ForConditionalGeneration(T5Config(**sizes))
    model.eval()
    ran: list[Any] = []
    model.encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        watched_call(model)
    assert not ran


class Shifted(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Prepares other ids than the text's, as adapters of virtual tokens do."""

    def prepare_inputs_for_generation(self, *places: Any, **names: Any) -> Any:
        prepared: Any = GenerationMixin.prepare_inputs_for_generation(cast(Any, self), *places, **names)
        return {**prepared, "input_ids": (prepared["input_ids"] + 1) % 32}


class Verbatim(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """An own way to the same inputs."""

    def prepare_inputs_for_generation(self, *places: Any, **names: Any) -> Any:
        return GenerationMixin.prepare_inputs_for_generation(cast(Any, self), *places, **names)


def test_a_model_that_prepares_other_inputs_is_refused_and_one_that_does_not_is_not(watched: Watched) -> None:
    made: list[Any] = []
    for kind in (Shifted, Verbatim):
        model: Any = kind(watched.model.config)
        model.double().eval().load_state_dict(watched.model.state_dict())
        made.append(model)
    with pytest.raises(UnsupportedModelError, match="Shifted prepares input_ids of its own"):
        watched_call(made[0])
    assert torch.equal(watched_call(made[1]), watched.run())


def embedded(model: Any, **names: Any) -> dict[str, Any]:
    return {"input_ids": None, "inputs_embeds": torch.zeros(1, 7, 32)}


def test_virtual_tokens_of_an_adapter_are_not_left_out_silently() -> None:
    """PEFT puts its own preparation on the model that it wraps, which `generate` then calls."""
    model: Any = tiny_llama()
    model.prepare_inputs_for_generation = embedded
    with pytest.raises(UnsupportedModelError, match=r"prepares input_ids of its own.*merge the adapter"):
        watched_call(model)


def test_a_compiled_model_is_known_by_the_model_inside() -> None:
    """Its `generate` is the inner model's, so that is whom the decoder is made for."""
    model: Any = tiny_llama()
    compiled: Any = torch.compile(model, backend="eager")
    decoder = haast.Decoder(compiled, head=random_head(tiny_target()))
    stock = model.generate(IDS, **PLAIN)
    assert torch.equal(compiled.generate(IDS, **PLAIN, custom_generate=decoder), stock)
    assert torch.equal(compiled.generate(IDS, **PLAIN, custom_generate=haast.custom_generate), stock)
    said = Haast.from_pretrained(compiled, head=None).generate([1, 2, 3, 4], max_new_tokens=3)
    assert list(said.tokens) == stock[0, 4:].tolist()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))])
def test_a_decoder_for_any_model_is_copied_and_one_for_a_model_says_why_not(watched: Watched, how: Any) -> None:
    assert torch.equal(watched.run(custom_generate=how(haast.Decoder(drafter="lookup"))), watched.run())
    with pytest.raises(TypeError, match=r"belongs to one LlamaForCausalLM.*make one where it is needed"):
        how(haast.Decoder(tiny_llama(), head=random_head(tiny_target())))


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_head_of_another_dtype_is_brought_to_the_models(watched: Watched, dtype: torch.dtype) -> None:
    head = random_head(tiny_target())
    head.module.to(dtype)
    decoder = haast.Decoder(watched.model, head=head)
    assert torch.equal(watched.run(custom_generate=decoder), watched.run(custom_generate=None))
    assert {each.dtype for each in head.module.parameters()} == {torch.float64}


def spoilt(module: nn.Module) -> None:
    with torch.no_grad():
        next(iter(module.parameters()))[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda module: module.to("meta"), r"meta device, where weights \(fc.weight\) have no values"),
        (spoilt, "fc.weight .*not finite"),
    ],
)
def test_a_head_that_drafts_nothing_is_refused(watched: Watched, spoil: Any, why: str) -> None:
    for loaded in (
        lambda head: haast.Decoder(watched.model, head=head),
        lambda head: head_drafter(tiny_target(), head, DraftShape()),
    ):
        head = random_head(tiny_target())
        spoil(head.module)
        with pytest.raises(HeadMismatchError, match=why):
            loaded(head)


def test_a_head_of_other_sizes_or_none_is_refused(watched: Watched) -> None:
    wider = random_head(tiny_target(vocab=48))
    with pytest.raises(HeadMismatchError, match="vocab_size is 48, LlamaForCausalLM has 32"):
        haast.Decoder(watched.model, head=wider)
    broader = random_head(Target(tiny_llama(hidden=64)))
    with pytest.raises(HeadMismatchError, match="hidden_size is 64, LlamaForCausalLM has 32"):
        haast.Decoder(watched.model, head=broader)
    for wrong in (3, wider.module):
        with pytest.raises(HeadMismatchError, match=f"head is a {type(wrong).__name__}: give its folder"):
            haast.Decoder(watched.model, head=wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ Haast.generate


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"drafter": None}, "drafter=None is unknown: choose one of auto, eagle"),
        ({"drafter": 3}, "drafter=3 is unknown"),
        ({"drafter": ["eagle"]}, r"drafter=\['eagle'\] is unknown"),
        ({"model": "/no/such.gguf"}, "no GGUF file at /no/such.gguf"),
        ({"calibration": "/no/such.json"}, r"no calibration at /no/such.json \(.*\): run `haast calibrate`"),
        ({"kv_tokens": 0}, "kv_tokens=0 is not allowed for a KV pool: give 1 or more"),
        ({"kv_bytes": 10, "kv_tokens": 1}, "kv_tokens=1 and kv_bytes=10 both set the size"),
    ],
)
def test_it_is_refused_before_a_model_is_loaded(
    given: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haast.api.load_target", lambda *_, **__: pytest.fail("it loads"))
    with pytest.raises(ValueError, match=why):
        Haast.from_pretrained(**given)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "assistant", "content": "Hi"}],
    ],
)
def test_messages_that_the_template_cannot_take_are_told(messages: Any) -> None:
    words: Any = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if loop.first and m.role != 'user' %}{{ raise_exception('begin with the user') }}"
        "{% endif %}{{ m.role + ' ' + m.content }}{% endfor %}"
    )
    model = Haast(Target(tiny_llama(), words), VanillaDrafter())
    with pytest.raises(
        PromptError, match=r"the model's chat template can't take these messages \(\w+: .*\): give each"
    ):
        model.generate(messages, max_new_tokens=2)
    assert model.generate([{"role": "user", "content": "a"}], max_new_tokens=2).text is not None


@pytest.fixture(scope="module")
def loaded() -> Iterator[Haast]:
    yield Haast(Target(tiny_llama(), tokenizer()), VanillaDrafter())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "has no tokens; give at least one"),
        ({"prompt": [99]}, r"outside 0\.\.31"),
        ({"prompt": [1.5]}, "not a mixture"),
        ({"prompt": None}, "the prompt is a NoneType: give text"),
        ({"prompt": IDS.float()}, r"the prompt is a Tensor of torch.float32, .*: give token ids as integers"),
        ({"prompt": IDS[None]}, r"the prompt is a Tensor of torch.int64, shape \(1, 1, 4\)"),
        ({"prompt": b"ab"}, "the prompt is a bytes"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not allowed"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3' is not allowed"),
        ({"max_new_tokens": None}, "max_new_tokens=None is not allowed"),
        ({"temperature": -1}, "temperature=-1 is not allowed"),
        ({"temperature": "hot"}, "temperature='hot' is not allowed: give a number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 1.5}, "top_k=1.5 is not allowed: give a whole number"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"top_p": None}, "top_p=None is not allowed"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": 1.5}, "seed=1.5 is not allowed: give a whole number"),
        ({"seed": -1}, "seed=-1"),
        ({"processors": [3]}, "processors holds 3: give functions"),
        ({"eos": 5}, "eos=5 is not allowed: give a list of token ids"),
        ({"eos": "ab"}, "eos='ab' is not allowed"),
        ({"eos": [32]}, r"eos holds 32: give token ids in 0\.\.31"),
        ({"eos": [-1]}, "eos holds -1"),
        ({"stop": ""}, "an empty stop string"),
        ({"stop": ["a", ""]}, "an empty stop string"),
        ({"stop": 3}, "stop=3 is not allowed: give a string"),
        ({"stop": [3]}, "stop holds 3: give strings"),
        ({"stop": ["\u1234"]}, "stop string '\u1234' can't occur: .*leave it out"),
        ({"stop": ["a\u1234"]}, "no tokens for '\u1234'"),
    ],
)
def test_haast_generate_tells_what_is_wrong(loaded: Haast, given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        loaded.generate(**{"prompt": [1, 2, 3], "max_new_tokens": 3, **given})


def test_one_stop_string_is_one_string_and_not_its_letters(loaded: Haast) -> None:
    plain = loaded.generate([1, 2, 3], max_new_tokens=12)
    stop = plain.text[4:6]
    assert stop[0] in plain.text[:4] or stop[1] in plain.text[:4], "its letters come earlier"
    said = loaded.generate([1, 2, 3], max_new_tokens=12, stop=stop)
    assert said.text == plain.text[: plain.text.index(stop)]


def test_a_model_put_into_training_mode_later_is_told(loaded: Haast) -> None:
    model: Any = loaded.target.model
    model.train()
    try:
        with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
            loaded.generate([1, 2])
    finally:
        model.eval()
    with pytest.raises(PromptError, match="need a tokenizer"):
        Haast(tiny_target(), VanillaDrafter()).generate([1], stop="a")
