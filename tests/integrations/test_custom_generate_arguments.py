"""What `generate` accepts and Haast does not is refused by name; docs/drop-in.md too. Bad input has a remedy."""

from __future__ import annotations

import copy
import gc
import inspect
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import random_head, tiny_llama, tiny_target
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

import haast
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import HeadMismatchError, PromptError, UnsupportedArgumentError, UnsupportedModelError
from haast.heads.checkpoint import save_head
from haast.integrations import arguments
from haast.integrations.arguments import (
    HONOURED_SETTINGS,
    IDLE_SETTINGS,
    PARAMETERS,
    REFUSED_ARGUMENTS,
    REFUSED_SETTINGS,
    refuse_settings,
    unknown_settings,
)
from haast.target.kv_cache import CACHE_NAMES, cache_name
from haast.target.load import DEFAULT_MODEL, load_stock
from haast.target.target import Target

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
PINS = Path(__file__).parents[2] / "constraints.txt"
IDS = torch.tensor([[1, 2, 3, 4]])
SETTINGS: Any = GenerationConfig()  # type: ignore[no-untyped-call]


def run(model: Any, **given: Any) -> Any:
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "custom_generate": haast.custom_generate}
    return model.generate(**{"input_ids": IDS, **settings, **given})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


# ------------------------------------------------------------------ refused by name


def examples(model: Any) -> dict[str, Any]:
    """A value of each refused argument that asks for something."""
    return {
        "num_beams": 2, "num_beam_groups": 2, "constraints": [object()], "force_words_ids": [[3]], "penalty_alpha": 0.6,
        "low_memory": True, "dola_layers": "low", "guidance_scale": 1.5, "use_mtp": True, "prompt_lookup_num_tokens": 3,
        "assistant_early_exit": 1, "speculation_type": "dflash", "is_assistant": True, "token_healing": True,
        "cache_implementation": "static", "cache_config": {"backend": "quanto"}, "max_cache_len": 64,
        "compile_config": CompileConfig(), "prefill_chunk_size": 2,
        "continuous_batching_config": {"a": 1}, "output_attentions": True, "output_hidden_states": True,
        "assistant_model": model, "assistant_tokenizer": object(), "synced_gpus": True,
        "inputs_embeds": torch.zeros(1, 3, 32, dtype=torch.float64), **dict.fromkeys(CACHE_NAMES, DynamicCache()),
    }  # fmt: skip


def test_there_is_an_example_of_every_refusal(model: Any) -> None:
    assert set(examples(model)) == {*REFUSED_SETTINGS, *REFUSED_ARGUMENTS}


def test_token_healing_is_refused_too() -> None:
    """`generate` heals before it calls us, so this looks at what it would pass on."""
    with pytest.raises(UnsupportedArgumentError, match=r"^token_healing=True"):
        refuse_settings(GenerationConfig(token_healing=True))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", sorted({*REFUSED_SETTINGS, *REFUSED_ARGUMENTS} - {"token_healing"}))
def test_what_is_not_honoured_is_refused_by_name(model: Any, name: str) -> None:
    current = cache_name(type(model).forward)
    newer = (name == "cache" != current) or (name in REFUSED_SETTINGS and name not in vars(SETTINGS))
    if newer or name == "cache_params":  # than this transformers, or another model's: it refuses them itself
        with pytest.raises(ValueError, match=rf"not used by the model: \['{name}'\]"):
            run(model, **{name: examples(model)[name]})
        return
    if name == "past_key_values" and name != current:  # transformers renames it, and says so
        with pytest.warns(FutureWarning, match=name), pytest.raises(UnsupportedArgumentError, match=r"^cache "):
            run(model, **{name: examples(model)[name]})
        return
    with pytest.raises(UnsupportedArgumentError, match=rf"^{name}.* is not supported by Haast: .*") as refusal:
        run(model, **{name: examples(model)[name], "return_dict_in_generate": True})
    assert refusal.value.argument.split("=")[0] == name


@pytest.mark.parametrize("name", sorted(REFUSED_SETTINGS))
def test_what_asks_for_nothing_is_not_refused(model: Any, name: str) -> None:
    neutral = {"num_beams": 1, "num_beam_groups": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0}
    stock = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(run(model, **{name: neutral.get(name)}), stock)


def test_other_inputs_of_the_model_are_refused_by_name(model: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: Any = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    gpt2: Any = GPT2LMHeadModel(GPT2Config(**sizes))
    gpt2.eval()
    with pytest.raises(UnsupportedArgumentError, match=r"^token_type_ids"):
        run(gpt2, token_type_ids=torch.zeros_like(IDS))
    with pytest.raises(UnsupportedArgumentError, match=r"^position_ids"):
        run(model, position_ids=IDS)


# ------------------------------------------------------------------ the page


def page_tables() -> dict[str, set[str]]:
    """Heading -> the arguments in the first column of its table."""
    found: dict[str, set[str]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("| `"):
            found.setdefault(heading, set()).update(re.findall(r"`(\w+)`", line.split("|")[1]))
    return found


ARGUMENTS = {*PARAMETERS} - {"self", "kwargs"}


def test_the_page_lists_every_argument_once_and_truly() -> None:
    tables = page_tables()
    assert tables["Refused, by name"] == {*REFUSED_SETTINGS, *REFUSED_ARGUMENTS}
    listed = [name for names in tables.values() for name in names]
    assert len(listed) == len(set(listed)), "an argument stands in one table"
    assert set(listed) >= HONOURED_SETTINGS | IDLE_SETTINGS | ARGUMENTS
    assert tables["Honoured"] & (IDLE_SETTINGS | {*REFUSED_SETTINGS}) == set()
    more = {"tokenizer", "attention_mask", "position_ids", "assistant_tokenizer", "inputs_embeds", *CACHE_NAMES}
    assert set(listed) - HONOURED_SETTINGS - IDLE_SETTINGS - ARGUMENTS - {*REFUSED_SETTINGS} == more


def test_the_tables_are_whole_for_the_pinned_transformers() -> None:
    """Others may know more, which is refused, or less."""
    parameters = set(inspect.signature(GenerationMixin.generate).parameters)
    if f"transformers=={transformers.__version__}" not in PINS.read_text(encoding="utf-8").splitlines():
        assert {"inputs", "generation_config", "custom_generate"} <= parameters & PARAMETERS
        return
    assert unknown_settings() == {}
    assert parameters <= PARAMETERS


def test_a_setting_that_haast_does_not_know_is_refused_by_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "HONOURED_SETTINGS", HONOURED_SETTINGS - {"top_h", "min_length", "do_sample"})
    unknown_settings.cache_clear()
    try:
        assert set(unknown_settings()) >= {"top_h", "min_length", "do_sample"}
        assert run(model, top_h=None).shape == (1, 7)
        with pytest.raises(UnsupportedArgumentError, match=r"^min_length=2 .*this Haast does not know it"):
            run(model, min_length=2)
    finally:
        unknown_settings.cache_clear()


@pytest.mark.parametrize("name", sorted(unknown_settings()))
def test_what_this_transformers_adds_is_refused(name: str) -> None:
    config = copy.deepcopy(SETTINGS)
    setattr(config, name, "something")
    with pytest.raises(UnsupportedArgumentError, match=rf"^{name}='something'"):
        refuse_settings(config)


def test_a_parameter_that_haast_does_not_know_is_refused_by_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "PARAMETERS", PARAMETERS - {"negative_prompt_ids"})
    assert run(model).shape == (1, 7)
    with pytest.raises(UnsupportedArgumentError, match=r"^negative_prompt_ids is not supported"):
        run(model, negative_prompt_ids=IDS)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"attention_mask": torch.ones(1, 7, dtype=torch.long)}, "does not fit"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "does not fit"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.long)}, "does not fit"),
        ({"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1] * 4, [0] * 4])}, "row 1 .* is empty"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "pad on the left"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "at least one of each"),
        ({"input_ids": torch.empty(0, 4, dtype=torch.long)}, "at least one of each"),
        ({"input_ids": torch.tensor([[1, 99]])}, "outside 0..31"),
        ({"max_new_tokens": 509}, "set max_new_tokens to 508 or less"),
    ],
)
def test_bad_prompts_are_refused_with_a_remedy(model: Any, given: dict[str, Any], why: str) -> None:
    with pytest.raises(PromptError, match=why):
        run(model, **given)


def test_a_missing_pad_token_is_named(model: Any) -> None:
    from transformers.generation.stopping_criteria import EosTokenCriteria

    ends = [EosTokenCriteria(5)]
    given = {"input_ids": IDS.repeat(2, 1), "pad_token_id": None, "stopping_criteria": ends}
    with pytest.raises(PromptError, match="give pad_token_id"):
        run(model, **given, attention_mask=torch.ones(2, 4, dtype=torch.long))


def test_a_processor_that_allows_nothing_is_named(model: Any) -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return torch.full_like(scores, -torch.inf)

    with pytest.raises(PromptError, match="no token is possible in row 0 after 4 tokens"):
        run(model, do_sample=True, logits_processor=[Nothing()])


class Uncopiable(LogitsProcessor):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


def test_a_processor_that_cannot_be_copied_works_alone_and_is_named_in_a_batch(model: Any) -> None:
    assert run(model, logits_processor=[Uncopiable()]).shape == (1, 7)
    with pytest.raises(UnsupportedArgumentError, match="logits_processor Uncopiable in a batch"):
        run(model, input_ids=IDS.repeat(2, 1), logits_processor=[Uncopiable()])


def test_a_penalty_for_other_rows_is_named(model: Any) -> None:
    penalty: Any = RepetitionPenaltyLogitsProcessor(1.2)
    penalty.prompt_ignore_length = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="3 entries for 2 rows"):
        run(model, input_ids=IDS.repeat(2, 1), logits_processor=[penalty])


# ------------------------------------------------------------------ models and heads


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
        run(tiny_llama().train())


@pytest.mark.skipif(transformers.__version__ >= "5.24", reason="the probe refuses BART's kind there")
def test_padding_that_counts_as_positions_is_refused() -> None:
    """Stock BART's text depends on it; each row's own text would be another one."""
    make: Any = transformers.BartForCausalLM
    sizes: dict[str, Any] = {"d_model": 32, "decoder_ffn_dim": 48, "vocab_size": 64, "max_position_embeddings": 64}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "pad_token_id": 0}
    model = make(transformers.BartConfig(**sizes, is_decoder=True, is_encoder_decoder=False)).double().eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    own = model.generate(prompt, max_new_tokens=6, do_sample=False)
    mine = model.generate(prompt, max_new_tokens=6, do_sample=False, custom_generate=haast.custom_generate)
    assert mine.tolist() == own.tolist()
    padded = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    with pytest.raises(UnsupportedArgumentError, match="padding on the left"):
        model.generate(**padded, max_new_tokens=6, custom_generate=haast.custom_generate)


def test_a_model_that_cannot_take_a_tree_is_refused_and_left_as_it_was() -> None:
    from test_families import tiny

    model: Any = tiny("mpt", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128)()
    model.eval()
    configs = (model.config, model.config.attn_config)
    before = [config._attn_implementation for config in configs]
    with pytest.raises(UnsupportedModelError):
        run(model)
    assert [config._attn_implementation for config in configs] == before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(attention: str) -> None:
    model: Any = tiny_llama()
    model.set_attn_implementation(attention)
    ids = torch.tensor([[1, 2, 3, 1, 2], [4, 5, 6, 7, 8]])
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "output_scores": True}
    before = model.generate(ids, return_dict_in_generate=True, **settings)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    run(model, input_ids=ids)
    after = model.generate(ids, return_dict_in_generate=True, **settings)
    assert model.config._attn_implementation == attention
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.scores, after.scores, strict=True))
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_an_error_leaves_the_model_as_it_was(model: Any) -> None:
    class Breaks(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.ndim == 1:
                raise InterruptedError("the reader has gone")

        def end(self) -> None:
            raise AssertionError("nobody says end after an error")

    with pytest.raises(InterruptedError):
        run(model, streamer=Breaks())
    assert model.config._attn_implementation == "sdpa"


def test_no_model_is_kept_alive() -> None:
    model: Any = tiny_llama()
    run(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_memory_of_a_call_does_not_wait_for_the_garbage_collector(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def noted(*given: Any, **names: Any) -> Target:
        target = Target(*given, **names)
        made.append(weakref.ref(target))
        return target

    monkeypatch.setattr("haast.integrations.model_lock.Target", noted)
    gc.collect()
    gc.disable()
    try:
        run(model)
        run(model, do_sample=True, return_dict_in_generate=True, output_scores=True)
        assert [each() for each in made] == [None, None]
    finally:
        gc.enable()


def test_every_call_has_the_attention_that_takes_trees(model: Any) -> None:
    seen: list[str] = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(model.config._attn_implementation)
            return scores

    headed = haast.Decoder(model, head=random_head(tiny_target()))
    for decoder in (haast.custom_generate, headed, headed):
        run(model, logits_processor=[Looks()], custom_generate=decoder)
    assert seen == ["haast"] * 9 and model.config._attn_implementation == "sdpa"


def test_a_decoder_belongs_to_its_model(model: Any) -> None:
    decoder = haast.Decoder(model, head=random_head(tiny_target()))
    assert model.config._attn_implementation == "sdpa"
    assert run(model, custom_generate=decoder).shape == (1, 7)
    with pytest.raises(HeadMismatchError, match="made for another model"):
        run(tiny_llama(), custom_generate=decoder)


def test_a_model_that_was_moved_under_its_head_is_refused() -> None:
    model: Any = tiny_llama()
    head = random_head(tiny_target())
    head.module.half()  # a head of another dtype is brought to the model's
    decoder = haast.Decoder(model, head=head)
    assert run(model, custom_generate=decoder).shape == (1, 7)
    model.float()
    with pytest.raises(HeadMismatchError, match=r"torch.float32 now; .* in torch.float64: move the model first"):
        run(model, custom_generate=decoder)


def test_a_head_is_read_from_its_folder(model: Any, tmp_path: Path) -> None:
    head = random_head(tiny_target())
    save_head(tmp_path / "best", head.module.config, dict(head.module.state_dict()), None, dtype=torch.float32)
    assert run(model, custom_generate=haast.Decoder(model, head=tmp_path)).shape == (1, 7)
    with pytest.raises(HeadMismatchError):
        haast.Decoder(model, head=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"drafter": "eagle"}, "'eagle' needs an EAGLE head: .* choose one that needs none: suffix"),
        ({"drafter": "medusae"}, "'medusae' is unknown"),
        ({"shape": haast.DraftShape()}, "give a head too"),
        ({"head": "somewhere"}, "drafts for one target: give the model too"),
        ({"drafter": VanillaDrafter()}, "drafts for one target: give the model too"),
        ({"drafter": VanillaDrafter(), "head": "somewhere"}, "not both"),
        ({"drafter": "suffix", "head": "somewhere"}, "'suffix' drafts without a head: leave the head out"),
        ({"drafter": "medusae", "head": "somewhere"}, "'medusae' is unknown: choose one of auto"),
        ({"drafter": "eagle+suffix"}, "needs an EAGLE head"),
        ({"drafter": "medusa"}, "needs Medusa heads"),
        ({"drafter": "small-model"}, "needs a smaller model"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        haast.Decoder(**settings)


def test_names_of_drafters(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "none" nothing is drafted, with a head too. No costs are known: they would say how much is drafted."""
    monkeypatch.setattr("haast.drafters.factory.latency_of", lambda *_: None)
    head, small = random_head(tiny_target()), tiny_llama(layers=1)
    forwards: dict[str, int] = {}
    for name, given in {
        "none": {"drafter": "none"},
        "vanilla": {"drafter": "vanilla"},
        "none, headed": {"model": model, "head": head, "drafter": "none"},
        "auto": {"drafter": "auto"},
        "suffix": {"drafter": "suffix"},
        "auto, headed": {"model": model, "head": head},
        "eagle+suffix": {"model": model, "head": head, "drafter": "eagle+suffix"},
        "small-model": {"model": model, "drafter": "small-model", "small": small},
        "auto, small model": {"model": model, "small": small},
    }.items():
        decoder = haast.Decoder(**given)
        run(model, input_ids=torch.tensor([[1, 2] * 8]), max_new_tokens=24, custom_generate=decoder)
        forwards[name] = decoder.stats.nodes
    assert forwards["none"] == forwards["vanilla"] == forwards["none, headed"] == 23
    assert forwards["auto"] == forwards["suffix"] > 23
    assert forwards["auto, headed"] == forwards["eagle+suffix"] > 23
    assert forwards["auto, small model"] == forwards["small-model"] > 23


def test_the_default_head_is_the_default_models(model: Any) -> None:
    with pytest.raises(ValueError, match="no head is shipped for 'LlamaForCausalLM': give its folder"):
        haast.Decoder(model, head="default")
    named: Any = tiny_llama()
    named.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(HeadMismatchError, match="hidden_size"):
        haast.Decoder(named, head="default")


@pytest.mark.slow
def test_the_default_head_drafts_for_the_default_model() -> None:
    model, tokenizer = load_stock(DEFAULT_MODEL)
    ids = tokenizer("Water is", return_tensors="pt").input_ids
    decoder = haast.Decoder(model, head="default")
    stock: Any = model
    expected = stock.generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(stock.generate(ids, max_new_tokens=24, do_sample=False, custom_generate=decoder), expected)
    assert decoder.stats.tau > 1.2


def test_two_threads_share_a_model(model: Any) -> None:
    ids = [torch.tensor([[1, 2, 3]]), torch.tensor([[9, 8, 7]])]
    expected = [run(model, input_ids=each, max_new_tokens=20) for each in ids]
    found: list[Any] = [None, None]

    def work(number: int) -> None:
        found[number] = run(model, input_ids=ids[number], max_new_tokens=20)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_class_and_its_instances_have_the_signatures_that_readers_expect() -> None:
    assert "head" in inspect.signature(haast.Decoder).parameters
    assert list(inspect.signature(haast.custom_generate).parameters)[:3] == ["model", "input_ids", "logits_processor"]
