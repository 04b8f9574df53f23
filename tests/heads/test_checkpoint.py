"""A head on disk: what is saved is what is loaded; whatever is wrong with the files is told by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import VOCAB, decode, random_head, tiny_target, vanilla
from safetensors.torch import load_file, save_file
from torch import Tensor

from haast.drafters.eagle import EagleDrafter
from haast.errors import HeadMismatchError
from haast.heads.checkpoint import Head, check_fits, load_head, read_head_config, save_head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.target.target import Target

DRAFT_VOCAB = torch.tensor([0, 2, 3, 9, VOCAB - 1])
TENSORS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, head: Head) -> Path:
    save_head(tmp_path / "head", head.module.config, head.module.state_dict(), DRAFT_VOCAB, {"tokens": 7})
    return tmp_path / "head"


def test_a_loaded_head_answers_as_the_saved_one(tmp_path: Path, head: Head) -> None:
    save_head(tmp_path, head.module.config, head.module.state_dict(), None, dtype=torch.float32)
    loaded = load_head(tmp_path)
    assert loaded.draft_vocab is None and loaded.about == {}
    assert loaded.module.config == head.module.config == read_head_config(tmp_path)
    embeddings, features = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(4).unsqueeze(0)
    assert torch.equal(loaded.module(embeddings, features, places), head.module(embeddings, features, places))
    assert not loaded.module.training and not any(p.requires_grad for p in loaded.module.parameters())


def test_half_precision_draft_vocabulary_and_about_survive(folder: Path, head: Head) -> None:
    loaded = load_head(folder)
    assert loaded.draft_vocab is not None and torch.equal(loaded.draft_vocab, DRAFT_VOCAB)
    assert loaded.about == {"tokens": 7}
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, head.module.state_dict()[name].half().float()), name
    assert load_file(folder / "draft_vocab.safetensors")["d2t"].tolist() == [0, 1, 1, 6, VOCAB - 5]
    assert {path.name for path in folder.iterdir()} == {"config.json", TENSORS, "draft_vocab.safetensors"}


def test_the_file_has_the_official_tensor_names(folder: Path) -> None:
    layer = "layers.0."
    assert set(load_file(folder / TENSORS)) == {
        "fc.weight",
        *(f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        f"{layer}post_attention_layernorm.weight",
    }


def test_a_loaded_head_drafts_losslessly(folder: Path, llama: Target) -> None:
    prompts = [[1, 2, 3], [9]]
    assert decode(llama, EagleDrafter(llama, load_head(folder)), prompts, 12) == vanilla(llama, prompts, 12)


# ------------------------------------------------------------------ what can be wrong


def edit(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = dict(load_file(folder / name))
        change(tensors)
        save_file(tensors, folder / name)

    return spoil


def configure(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return spoil


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, keep: float) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def poison(value: float) -> Callable[[Path], object]:
    return edit(TENSORS, lambda tensors: tensors["fc.weight"][0].fill_(value))


def sizes(**changes: Any) -> Callable[[Path], object]:
    return configure(lambda document: document["head"].update(changes))


def vocab(ids: list[int]) -> Callable[[Path], object]:
    offsets = torch.tensor(ids) - torch.arange(len(ids))
    return edit("draft_vocab.safetensors", lambda tensors: tensors.update(d2t=offsets))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "no head at .*config.json"),
    "config is not JSON": (write("config.json", b'{"format": '), "config.json is not JSON"),
    "config is not text": (write("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "config is a list": (write("config.json", b"[1]"), "format 'list' is none of"),
    "another tool's format": (
        write("config.json", b'{"architectures": ["LlamaForCausalLM"]}'),
        "format None is none of",
    ),
    "a later format": (configure(lambda d: d.update(format="haast-feat-extrapolator-9")), "extrapolator-9' is none of"),
    "no sizes": (configure(lambda d: d.pop("head")), "was not written by Haast"),
    "unknown size": (sizes(colour="red"), "config.json.*colour"),
    "a size is missing": (configure(lambda d: d["head"].pop("hidden_size")), "config.json.*hidden_size"),
    "a size is a word": (sizes(hidden_size="many"), "config.json.*invalid sizes of a head"),
    "a size is nothing": (sizes(num_attention_heads=0), "config.json.*invalid sizes of a head"),
    "a size is negative": (sizes(intermediate_size=-4), "config.json.*invalid sizes of a head"),
    "an unknown activation": (sizes(hidden_act="wobble"), "config.json.*invalid sizes of a head"),
    "an unknown rope": (sizes(rope_parameters={"rope_type": "spiral"}), "config.json.*invalid sizes of a head"),
    "sizes are a list": (configure(lambda d: d.update(head=[])), "config.json.*'head' is not a JSON object"),
    "other sizes": (sizes(intermediate_size=48), r"down_proj.weight is \(32, 64\).*\(32, 48\)"),
    "no tensors": (remove(TENSORS), "model.safetensors is missing"),
    "empty tensors file": (write(TENSORS, b""), "model.safetensors is corrupt"),
    "truncated tensors file": (truncate(TENSORS, 0.5), "model.safetensors is corrupt"),
    "text instead of tensors": (write(TENSORS, b"version https://git-lfs"), "model.safetensors is corrupt"),
    "a tensor is missing": (edit(TENSORS, lambda t: t.pop("fc.weight")), r"missing tensors \['fc.weight'\]"),
    "an unknown tensor": (edit(TENSORS, lambda t: t.update(extra=torch.ones(2))), r"unknown tensors \['extra'\]"),
    "a wrong shape": (edit(TENSORS, lambda t: t.update({"fc.weight": torch.ones(32, 32)})), r"fc.weight is \(32, 32\)"),
    "NaN": (poison(float("nan")), "fc.weight has NaN or infinite values"),
    "infinity": (poison(float("inf")), "fc.weight has NaN or infinite values"),
    "no draft vocabulary": (remove("draft_vocab.safetensors"), "draft_vocab.safetensors is missing"),
    "draft vocabulary cut": (truncate("draft_vocab.safetensors", 0.6), "draft_vocab.safetensors is corrupt"),
    "draft vocabulary too short": (vocab([0, 1]), "2 ids do not form a draft vocabulary of 5"),
    "draft vocabulary not ascending": (vocab([0, 3, 3, 9, 12]), "do not form a draft vocabulary"),
    "draft vocabulary too large": (vocab([0, 2, 3, 9, VOCAB]), f"ascending ids below {VOCAB}"),
    "draft vocabulary negative": (vocab([-1, 2, 3, 9, 12]), "do not form a draft vocabulary"),
    "draft vocabulary misnamed": (
        edit("draft_vocab.safetensors", lambda t: t.update(t2d=t.pop("d2t"))),
        r"found \['t2d'\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_whatever_is_wrong_is_told_by_name(name: str, folder: Path) -> None:
    spoil, message = WRONG[name]
    spoil(folder)
    with pytest.raises(HeadMismatchError, match=message):
        load_head(folder)


def test_what_is_not_a_folder_is_no_head(tmp_path: Path) -> None:
    for wrong in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        for read in (load_head, read_head_config):
            with pytest.raises(HeadMismatchError, match="no head at"):
                read(wrong)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_a_head_for_another_target_is_refused_with_both_sizes(field: str, llama: Target, head: Head) -> None:
    changes: dict[str, Any] = {field: 64}
    assert isinstance(head.module.config, FeatExtrapolatorConfig)
    config = replace(head.module.config, **changes)
    with pytest.raises(HeadMismatchError, match=f"its {field} is 64, mine has 32"):
        check_fits(config, 32, VOCAB, "mine")
    check_fits(head.module.config, 32, VOCAB, "mine")
    with pytest.raises(HeadMismatchError, match=f"its {field} is 64, LlamaForCausalLM has 32"):
        EagleDrafter(llama, Head(FeatExtrapolator(config), None, {}))


def test_a_head_trained_for_a_larger_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(HeadMismatchError, match="its vocab_size is 32, LlamaForCausalLM has 40"):
        EagleDrafter(tiny_target(vocab=40), load_head(folder))


def test_a_head_made_for_one_target_is_taken_by_its_twin(folder: Path, llama: Target) -> None:
    assert EagleDrafter(llama, random_head(llama)).nodes == EagleDrafter(tiny_target(seed=5), load_head(folder)).nodes
