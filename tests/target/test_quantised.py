"""Quantised targets: their text is their own, heads draft for them, and another precision than a head's is told."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import collect, decode, random_head, vanilla
from test_cli import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import haast
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, StopParams
from haast.errors import HeadMismatchError, PrecisionWarning, UnsupportedModelError
from haast.heads import precision as of_heads
from haast.heads.checkpoint import Head
from haast.target.load import load_target
from haast.target.packing import PackedLinear
from haast.target.precision import TORCHAO, quantisation, quantise, weight_rows
from haast.target.target import Target

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5], [4]]
SHAPE = DraftShape("dynamic", depth=3, top_k=4, width=3, nodes=9)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32, on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    place = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(params=["torchao-int8", "torchao-int4", "bitsandbytes-8bit", "bitsandbytes-4bit"])
def quantised(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, model)"""
    name = str(request.param)
    pytest.importorskip(name.split("-")[0])
    yield name, _made(name, folder)


def _made(name: str, folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    if name in TORCHAO:
        model = auto.from_pretrained(folder)
        quantise(model, name)
        return model
    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # type: ignore[no-untyped-call]
    four = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return auto.from_pretrained(folder, quantization_config=eight if "8" in name else four, device_map="cpu")


def head_for(target: Target, precision: str | None = None, vocab: list[int] | None = None) -> Head:
    head = random_head(target, vocab)
    return Head(head.module, head.draft_vocab, {} if precision is None else {"precision": precision})


def test_a_quantised_target_says_what_it_says_by_itself(quantised: tuple[str, Any]) -> None:
    name, model = quantised
    target = Target(model)
    assert target.precision == target.packing == quantisation(model) == name
    for vocab in (None, list(range(0, 258, 2))):
        eagle = EagleDrafter(target, head_for(target, name, vocab), SHAPE)
        assert decode(target, eagle, PROMPTS, 16) == vanilla(target, PROMPTS, 16)
        law = SamplingParams(temperature=0.9, seed=3)
        assert decode(target, eagle, PROMPTS, 12, law) == vanilla(target, PROMPTS, 12, law)


def test_inside_generate_it_says_what_stock_generate_says(quantised: tuple[str, Any]) -> None:
    name, model = quantised
    ids = torch.tensor([[5, 6, 7, 8]])
    stock = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=haast.custom_generate), stock
    )
    target = Target(model)
    decoder = haast.Decoder(model, head=head_for(target, name))
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=decoder), stock)


def test_a_layers_weights_can_be_read_whatever_holds_them(quantised: tuple[str, Any]) -> None:
    _, model = quantised
    layer: nn.Linear = model.model.layers[0].mlp.up_proj
    rows = weight_rows(layer, 128)
    states = torch.randn(5, 128)
    assert rows.shape == (256, 128)
    scale = float(layer(states).abs().max())
    assert (
        float((layer(states) - states @ rows.T.float()).abs().max()) < 0.03 * scale
    )  # 8-bit activations, in bitsandbytes


def test_plain_and_packed_weights_are_read_as_they_are() -> None:
    layer = nn.Linear(40, 24)
    assert torch.equal(weight_rows(layer, 40), layer.weight)
    packed = PackedLinear(layer.weight, layer.bias)
    assert torch.equal(weight_rows(packed, 40), packed.unpack())


@pytest.mark.parametrize("form", TORCHAO)
def test_it_is_quantised_on_load(folder: Path, form: str) -> None:
    pytest.importorskip("torchao")
    target = load_target(str(folder), packing=form)
    assert target.precision == form and not target.packed and not target.one_call
    head = target.lm_head
    assert isinstance(head, nn.Linear) and type(head.weight.data) is torch.Tensor, "the LM head is left out"
    eagle = EagleDrafter(target, head_for(target), SHAPE)
    assert decode(target, eagle, PROMPTS, 12) == vanilla(target, PROMPTS, 12)


def test_a_model_that_was_saved_quantised_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(folder, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    target = load_target(str(tmp_path))
    assert target.precision == "torchao-int8" and not target.packed
    with pytest.raises(ValueError, match="quantised already"):
        load_target(str(tmp_path), packing="f16")


def test_what_can_not_be_quantised_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="torchao-int4"):
        load_target(str(folder), packing="torchao-int2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'haast\[quantised\]'"):
        load_target(str(folder), packing="torchao-int8")


def test_layers_that_are_no_multiple_of_a_group_are_named() -> None:
    pytest.importorskip("torchao")
    config = LlamaConfig(vocab_size=8, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has 48 inputs: use packing='torchao-int8'"):
        quantise(LlamaForCausalLM(config), "torchao-int4")


def test_layers_that_mix_rows_are_refused_with_the_remedy(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    auto: Any = AutoModelForCausalLM
    outliers = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1.0)  # type: ignore[no-untyped-call]
    model = auto.from_pretrained(folder, quantization_config=outliers, device_map="cpu")
    with pytest.raises(UnsupportedModelError, match=r"llm_int8_threshold=0\.0"):
        Target(model)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "awq", "bits": 4}, "awq-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_others_are_known_by_what_their_config_says(settings: dict[str, Any], name: str) -> None:
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.config.quantization_config = settings
    assert quantisation(model) == name


# ------------------------------------------------------------------ heads


def test_another_precision_is_told_with_the_measured_effect(folder: Path) -> None:
    pytest.importorskip("torchao")
    target = load_target(str(folder), packing="torchao-int4")
    with pytest.warns(
        PrecisionWarning,
        match=r"target in float16.*in torchao-int4.*tau \d\.\d\d with float16, \d\.\d\d with torchao-int4",
    ):
        EagleDrafter(target, head_for(target, "float16"), SHAPE)
    with pytest.warns(PrecisionWarning, match="not measured for these two"):
        EagleDrafter(target, head_for(target, "gptq-4bit"), SHAPE)


@pytest.mark.parametrize("trained", [None, "float16", "bfloat16", "float32"])
def test_floats_and_heads_that_do_not_say_are_not_told(folder: Path, trained: str | None) -> None:
    target = load_target(str(folder), packing="off")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        EagleDrafter(target, head_for(target, trained), SHAPE)


def test_a_precision_that_is_no_name_is_refused(folder: Path) -> None:
    target = load_target(str(folder), packing="off")
    broken = Head(random_head(target).module, None, {"precision": 16})
    with pytest.raises(HeadMismatchError, match="precision=16"):
        EagleDrafter(target, broken, SHAPE)


def test_the_effect_in_the_message_is_the_measured_one() -> None:
    document = json.loads((ROOT / "results" / "precision.json").read_text(encoding="utf-8"))
    measured = {row["precision"]: round(row["tau"], 2) for row in document["precisions"]}
    assert measured == of_heads.MEASURED
    assert document["environment"]["settings"]["trained_on"] == "float16"
    full = [measured[name] for name in ("float16", "bfloat16", "float32", "gguf")]
    assert max(full) - min(full) < 0.1  # why they count as one: the texts differ as much


def test_the_shipped_head_says_what_it_was_trained_on() -> None:
    folder = ROOT / "src" / "haast" / "data" / "heads" / "smollm2-135m-instruct"
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["about"]
    assert about["precision"] == "gguf"  # its last run; float16 before, which counts as the same


def test_quantised_rows_leave_and_stream(quantised: tuple[str, Any]) -> None:
    _, model = quantised
    target = Target(model)
    stop = [StopParams(most) for most in (1, 4, 7)]
    run = Engine(target, EagleDrafter(target, head_for(target), SHAPE)).run(PROMPTS, SamplingParams(), stop)
    assert [len(text) for text in collect(run, 3)] == [1, 4, 7]
