"""Images and embeddings with a prompt: carried through prefill by the model's own forward, in tiny fp64 models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from fakes import RandomTrees, head_for, tiny_llama
from torch import Tensor

import haast
from haast.core import SamplingParams, StopParams
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.errors import UnsupportedArgumentError
from haast.target import prompt_inputs
from haast.target.prompt_inputs import PromptInputs
from haast.target.target import Target

NEW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20)
IMAGE, BEGIN = 60, 62  # tokens
PLAIN: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
KINDS = ("gemma3", "llava+images", "qwen2_5_vl+images")
pytestmark = pytest.mark.skipif(not NEW, reason="older transformers build other tiny models of images and text")
_models: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    if kind not in _models:
        _models[kind] = zoo.build(kind).double()
    return _models[kind]


def prompt(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Text, an image of four tokens, text; the image differs by the seed."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[2, 5, BEGIN, *[IMAGE] * 4, 7, 9, 5, 6]])
    kinds, vision = (ids == IMAGE).long(), model.config.vision_config
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "Qwen" in type(model).__name__:  # sixteen patches, four of which make one token
        size = 3 * vision.temporal_patch_size * vision.patch_size**2
        given |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
        return {**given, "pixel_values": torch.randn(16, size, generator=draw).double()}
    if "Gemma" in type(model).__name__:
        given["token_type_ids"] = kinds
    return {**given, "pixel_values": torch.randn(1, 3, 28, 28, generator=draw).double()}


def said(model: Any, given: dict[str, Any], **more: Any) -> list[int]:
    text: Tensor = model.generate(**given, **PLAIN, **more)
    return text[0, given["input_ids"].shape[1] :].tolist()


def trees(model: Any, given: dict[str, Any], text: list[int]) -> haast.Decoder:
    full = [*given["input_ids"][0].tolist(), *text]
    vocab = model.config.get_text_config().vocab_size
    return haast.Decoder(model, drafter=RandomTrees(14, 3, [full], rate=0.6, vocab=vocab))


def eagle(model: Any, given: dict[str, Any], text: list[int]) -> haast.Decoder:
    head = head_for(model.config.get_text_config())
    return haast.Decoder(model, head=head, drafter="eagle", shape=DraftShape(depth=3, nodes=12))


def suffix(model: Any, given: dict[str, Any], text: list[int]) -> haast.Decoder:
    return haast.Decoder(drafter="suffix")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder_of", [trees, eagle, suffix])
def test_an_image_is_seen_as_stock_sees_it(kind: str, decoder_of: Callable[..., haast.Decoder]) -> None:
    model = model_of(kind)
    given, other = prompt(model), prompt(model, seed=1)
    stock, of_other = said(model, given), said(model, other)
    assert stock != of_other, "the image matters"
    decoder = decoder_of(model, given, stock)
    assert said(model, given, custom_generate=decoder) == stock
    if decoder_of is trees:
        assert decoder.stats.tau > 1.5, "no draft was right, so that no tree was needed"
    assert said(model, other, custom_generate=decoder) == of_other, "nothing is shared between images"


def test_an_image_has_fewer_positions_than_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: with positions that count tokens the text is another one."""
    model = model_of("qwen2_5_vl+images")
    given = prompt(model)
    stock = said(model, given)
    monkeypatch.setattr(prompt_inputs, "_shift", lambda *_: 0)
    assert said(model, given, custom_generate=trees(model, given, stock)) != stock


@pytest.mark.parametrize("kind", KINDS)
def test_a_preempted_request_sees_its_image_again(kind: str) -> None:
    model = model_of(kind)
    given, target = prompt(model), Target(model)
    stock, ids = said(model, given), given["input_ids"]
    engine = Engine(target, VanillaDrafter())
    arguments = {**given, "position_ids": positions_of(model, given)}
    inputs = PromptInputs.of(model, ids, {key: value for key, value in arguments.items() if key != "input_ids"})
    request = engine.submit(ids[0].tolist(), SamplingParams(), StopParams(14), inputs=inputs)
    emissions = engine.read(request)
    first = [next(emissions) for _ in range(6)]
    engine.scheduler._admission.preempt(request)
    assert request.kv is None
    assert [token for each in [*first, *emissions] for token in each.tokens] == stock


def positions_of(model: Any, given: dict[str, Any]) -> Tensor:
    """What `generate` would pass as positions."""
    seen: list[Tensor] = []

    def forward(model: Any, input_ids: Tensor, **more: Any) -> Tensor:
        seen.append(more["position_ids"])
        return input_ids

    model.generate(**given, **PLAIN, custom_generate=forward)
    return seen[0]


# ------------------------------------------------------------------ embeddings


def test_embeddings_stand_in_for_tokens() -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 9, 5, 6, 7]])
    embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3)).double()
    given: dict[str, Any] = {"input_ids": ids, "inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)}
    stock = said(model, given)
    assert stock != said(model, {"input_ids": ids}), "the embeddings matter"
    assert said(model, given, custom_generate=trees(model, given, stock)) == stock
    with pytest.raises(UnsupportedArgumentError, match=r"^inputs_embeds .* a token id for each embedding"):
        said(model, {**given, "inputs_embeds": embeddings[:, :4]}, custom_generate=haast.custom_generate)


def padded(given: dict[str, Any], count: int = 3) -> dict[str, Any]:
    """With `count` padding tokens on the left."""
    by_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    more = {name: torch.nn.functional.pad(given[name], (count, 0)) for name in by_token if name in given}
    if "inputs_embeds" in given:
        more["inputs_embeds"] = torch.nn.functional.pad(given["inputs_embeds"], (0, 0, count, 0), value=1.0)
    return {**given, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_prompt_with_an_image(kind: str) -> None:
    model = model_of(kind)
    given = prompt(model)
    wide, stock = padded(given), said(model, given)
    assert said(model, wide) == stock, "a control: stock ignores padding"
    assert said(model, wide, custom_generate=trees(model, given, stock)) == stock


def test_padded_embeddings() -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 9, 5, 6, 7]])
    embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3)).double()
    given: dict[str, Any] = {"input_ids": ids, "inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)}
    stock = said(model, given)
    assert said(model, padded(given), custom_generate=trees(model, given, stock)) == stock


# ------------------------------------------------------------------ refused by name


def refusal(model: Any, **given: Any) -> str:
    with pytest.raises(UnsupportedArgumentError) as error:
        model.generate(**given, **PLAIN, custom_generate=haast.custom_generate)
    return str(error.value)


def test_several_rows_are_refused() -> None:
    model = model_of("llava+images")
    two = {name: torch.cat([value, value]) for name, value in prompt(model).items()}
    assert refusal(model, **two).startswith("pixel_values is not supported by Haast: with 2 rows")


def test_a_prompt_that_ends_with_an_image_is_refused() -> None:
    model = model_of("qwen2_5_vl+images")
    given = prompt(model)
    cut = {name: value[:, :-4] if value.shape == given["input_ids"].shape else value for name, value in given.items()}
    assert "must be 0 at the prompt's last token" in refusal(model, **cut)


def test_scores_that_are_capped_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma3")
    monkeypatch.setattr(model.config.get_text_config(), "attn_logit_softcapping", 50.0, raising=False)
    assert "Gemma3ForConditionalGeneration caps its scores" in refusal(model, **prompt(model))
