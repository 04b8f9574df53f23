"""What other engines make of an export, as far as keys and shapes tell it; and faults that the real programs showed.

SGLang does not run on a CPU, so that its part is just that: names and shapes of the parameters that SGLang 0.5.23
builds from such a config.json (`srt/models/llama_eagle.py`, `llama_eagle3.py` and `llama.py`), written down here. It
skips tensors that it has no parameter for and leaves parameters without a tensor as the memory was, both without a
word. The programs that do run are asked in `benchmarks/interop/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from fakes import tiny_target
from safetensors.torch import load_file

from haast.formats.export import export_head
from haast.formats.gguf import read_gguf
from haast.formats.opened import OpenedHead, embedding_of, open_head
from haast.heads.checkpoint import Head
from haast.target.target import Target

Shapes = dict[str, tuple[int, ...]]
EAGLE1: dict[str, dict[str, Any]] = {"plain": {}, "fc bias": {"fc_bias": True}, "two layers": {"num_hidden_layers": 2}}
EAGLE3: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole vocabulary": {"drafted": None},
    "other layers": {"ids": (1, 4, 6)},
    "four layers of the target": {"ids": (1, 3, 4, 6)},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "one norm before fc": {"input_norm": True},
    "fc bias": {"fc_bias": True},
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=8, std=0.3)


def written(head: Head, engine: str, target: Target, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of an export."""
    export_head(head, engine, "someone/tiny", target.model.config, out)
    document = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return document, load_file(out / "model.safetensors")


def layer(document: dict[str, Any], number: int, read: int, norms: tuple[str, ...], fused_bias: bool) -> Shapes:
    """Parameters of SGLang's Llama layer whose q, k and v read so many numbers."""
    hidden, inner, dim = (document[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    rows = {"q": document["num_attention_heads"] * dim, "k": document["num_key_value_heads"] * dim}
    rows["v"] = rows["k"]
    found: Shapes = {f"self_attn.{name}_proj.weight": (count, read) for name, count in rows.items()}
    found["self_attn.o_proj.weight"] = (hidden, rows["q"])
    found |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    found["mlp.down_proj.weight"] = (hidden, inner)
    found |= {f"{name}.weight": (hidden,) for name in norms}
    if document.get("attention_bias") or document.get("bias"):  # `bias` means attention's too
        found["self_attn.o_proj.bias"] = (hidden,)
        found |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items() if fused_bias}
    return {f"layers.{number}.{name}": shape for name, shape in found.items()}


def sglang_eagle1(document: dict[str, Any]) -> Shapes:
    """LlamaForCausalLMEagle, without the embedding and the LM head, which become the target's."""
    hidden = document["hidden_size"]
    found: Shapes = {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)}
    for number in range(document["num_hidden_layers"]):
        norms = ("post_attention_layernorm", *(("input_layernorm",) if number else ()))
        found |= layer(document, number, hidden, norms, fused_bias=True)
    return found


def sglang_eagle3(document: dict[str, Any]) -> Shapes:
    """LlamaForCausalLMEagle3, without the embedding, which becomes the target's."""
    hidden, read = document["hidden_size"], document.get("target_hidden_size", document["hidden_size"])
    said = (document.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    count = document.get("num_aux_hidden_states") or (len(said) if said else 3)
    found: Shapes = {"fc.weight": (hidden, read * count), "norm.weight": (hidden,)}
    found["lm_head.weight"] = (document["draft_vocab_size"], hidden)
    if document.get("bias"):
        found["fc.bias"] = (hidden,)
    if document.get("norm_before_fc"):
        found["input_norm.weight"] = (read * count,)
    if document.get("fc_norm"):
        found |= {f"fc_norm.{number}.weight": (read,) for number in range(count)}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    return found | layer(document, 0, 2 * hidden, norms, fused_bias=False)


def shapes(tensors: dict[str, torch.Tensor]) -> Shapes:
    """By the names that SGLang gives them; it reads no `t2d`, and `d2t` apart."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    return {name.replace("midlayer", "layers.0"): tuple(tensor.shape) for name, tensor in kept.items()}


@pytest.mark.parametrize("form", EAGLE1.values(), ids=EAGLE1)
def test_sglang_has_a_place_for_every_eagle1_tensor_and_no_other(
    target: Target, tmp_path: Path, form: dict[str, Any]
) -> None:
    document, tensors = written(others.eagle1(target, **form), "sglang", target, tmp_path)
    assert shapes(tensors) == sglang_eagle1(document)
    assert document["architectures"] == ["LlamaForCausalLMEagle"] and not document["tie_word_embeddings"]
    assert bool(tensors["fc.bias"].any()) is bool(form.get("fc_bias"))


@pytest.mark.parametrize("form", EAGLE3.values(), ids=EAGLE3)
def test_sglang_has_a_place_for_every_eagle3_tensor_and_no_other(
    target: Target, tmp_path: Path, form: dict[str, Any]
) -> None:
    document, tensors = written(others.eagle3(target, **form), "sglang", target, tmp_path)
    assert shapes(tensors) == sglang_eagle3(document)
    assert document["architectures"] == ["LlamaForCausalLMEagle3"] and not document["tie_word_embeddings"]
    assert document["norm_output"] is bool(form.get("norm_output"))
    # What the target captures: layers' inputs, one more than the ids that it is told; all of them by default.
    said = document.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    layers = target.config.num_hidden_layers
    assert form.get("ids", others.IDS) == tuple([e + 1 for e in said] if said else [2, layers // 2, layers - 3])
    if "drafted" not in form:
        assert (tensors["d2t"] + torch.arange(len(tensors["d2t"]))).tolist() == list(others.DRAFTED)


@pytest.mark.parametrize("make", [others.eagle1, others.eagle3])
def test_sglang_would_put_the_targets_table_in_place_of_a_heads_own(target: Target, tmp_path: Path, make: Any) -> None:
    with pytest.raises(ValueError, match=r"sglang does not support own_embedding=True"):
        written(make(target, own_embedding=True), "sglang", target, tmp_path)


@pytest.mark.parametrize("form", [{"qkv_bias": True}, {"o_bias": True}, {"qkv_bias": True, "o_bias": True}])
def test_speculators_has_one_switch_for_biases_of_attention(
    target: Target, tmp_path: Path, form: dict[str, Any]
) -> None:
    document, tensors = written(others.eagle3(target, **form), "speculators", target, tmp_path)
    assert document["transformer_layer_config"]["attention_bias"] is True
    for name in "qkvo":
        given = form.get("o_bias" if name == "o" else "qkv_bias", False)
        assert bool(tensors[f"layers.0.self_attn.{name}_proj.bias"].any()) is given


def test_speculators_folders_hold_the_targets_embedding(target: Target, tmp_path: Path) -> None:
    table = embedding_of(target)
    assert torch.equal(table, target.embed(torch.arange(target.vocab_size)).float())
    export_head(others.eagle3(target), "speculators", "someone/tiny", target.model.config, tmp_path / "a", table)
    assert torch.equal(load_file(tmp_path / "a" / "model.safetensors")["embed_tokens.weight"], table)
    found = open_head(tmp_path / "a")
    assert isinstance(found, OpenedHead)
    fitted, _ = found.fitted(target, probe=False)
    assert not fitted.module.config.own_embedding  # type: ignore[union-attr]
    export_head(others.eagle3(target), "vllm", "someone/tiny", target.model.config, tmp_path / "b", table)
    assert "embed_tokens.weight" not in load_file(tmp_path / "b" / "model.safetensors")


def test_small_ids_in_a_gguf_file_are_ids(target: Target, tmp_path: Path) -> None:
    drafted = tuple(range(0, 20, 2))  # as offsets they name tokens below the vocabulary's end too
    assert drafted[-1] + len(drafted) < target.vocab_size
    head = others.eagle3(target, drafted=drafted)
    place = export_head(head, "gguf", "someone/tiny", target.model.config, tmp_path).path
    assert read_gguf(place, "head.gguf").tensors["d2t"].tolist() == list(drafted)
    found = open_head(place)
    assert isinstance(found, OpenedHead)
    fitted, _ = found.fitted(target, probe=False)
    assert fitted.draft_vocab is not None and fitted.draft_vocab.tolist() == list(drafted)


def test_a_head_that_was_trained_without_validation_prompts_is_written(target: Target, tmp_path: Path) -> None:
    head = others.eagle3(target)
    head.about.update(command="haast train", tau=None)
    export_head(head, "vllm", "someone/tiny", target.model.config, tmp_path)
    assert "tau" not in (tmp_path / "README.md").read_text(encoding="utf-8")
