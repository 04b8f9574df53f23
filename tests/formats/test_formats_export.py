"""Heads written for other engines: keys and tensors as those engines read them, drafts as before, refusals by name."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from fakes import tiny_target
from safetensors.torch import load_file, save_file

from haast.formats import ENGINES
from haast.formats.export import exact_dtype, export_head, serving_command
from haast.formats.opened import OpenedHead, open_head, reading_of
from haast.heads.checkpoint import Head
from haast.target.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=8, std=0.3)


def export(head: Head, engine: str, target: Target, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of an export."""
    export_head(head, engine, "someone/tiny", target.model.config, out)
    file = next(out.glob("*.safetensors"))
    return json.loads((out / "config.json").read_text(encoding="utf-8")), load_file(file)


def test_eagle1_for_vllm_has_no_bias_and_no_lm_head(target: Target, tmp_path: Path) -> None:
    document, tensors = export(others.eagle1(target), "vllm", target, tmp_path)
    assert document["architectures"] == ["LlamaForCausalLM"] and document["vocab_size"] == target.vocab_size
    assert not {"fc.bias", "lm_head.weight", "d2t"} & tensors.keys()
    assert all(name.startswith(("fc.", "layers.0.")) for name in tensors)
    with pytest.raises(ValueError, match=r"vllm does not support fc_bias=True"):
        export_head(others.eagle1(target, fc_bias=True), "vllm", "someone/tiny", target.model.config, tmp_path / "b")


def test_eagle1_for_sglang_has_a_bias_of_zeros(target: Target, tmp_path: Path) -> None:
    document, tensors = export(others.eagle1(target), "sglang", target, tmp_path)
    assert document["architectures"] == ["LlamaForCausalLMEagle"]
    assert tensors["fc.bias"].shape == (target.hidden_size,) and not tensors["fc.bias"].any()


def test_one_eagle3_folder_for_all_where_layers_are_the_default(target: Target, tmp_path: Path) -> None:
    head = others.eagle3(target)
    for engine in ("vllm", "llama.cpp"):
        document, tensors = export(head, engine, target, tmp_path / engine)
        assert "eagle_config" not in document and "eagle_aux_hidden_state_layer_ids" not in document
        assert document["architectures"] == ["LlamaForCausalLMEagle3"] and document["tie_word_embeddings"] is False
        assert document["norm_before_residual"] is False and document["draft_vocab_size"] == len(others.DRAFTED)
        assert "layers.0.hidden_norm.weight" in tensors and not any(name.startswith("midlayer") for name in tensors)
        assert (tensors["d2t"] + torch.arange(len(others.DRAFTED))).tolist() == list(others.DRAFTED)
        assert tensors["t2d"].nonzero().flatten().tolist() == list(others.DRAFTED)


def test_other_layers_are_told_to_each_engine_in_its_own_count(target: Target, tmp_path: Path) -> None:
    head = others.eagle3(target, ids=(1, 4, 6))
    vllm, _ = export(head, "vllm", target, tmp_path / "vllm")
    assert vllm["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6] and "eagle_config" not in vllm
    sglang, _ = export(head, "sglang", target, tmp_path / "sglang")
    assert sglang["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}
    with pytest.raises(ValueError, match=r"export to vllm, sglang or llama\.cpp"):
        export_head(head, "official", "someone/tiny", target.model.config, tmp_path / "official")
    # What is read back counts as what was meant.
    for engine in ("vllm", "sglang"):
        found = open_head(tmp_path / engine)
        assert isinstance(found, OpenedHead)
        fitted, _ = found.fitted(target, probe=False)
        assert fitted.module.config.layer_ids == (1, 4, 6)  # type: ignore[union-attr]


def test_speculators_layout(target: Target, tmp_path: Path) -> None:
    head = others.eagle3(target, ids=(1, 4, 6), qk_norm=True, fc_norm=True, norm_output=True)
    document, tensors = export(head, "speculators", target, tmp_path)
    assert document["speculators_model_type"] == "eagle3" and "model_type" not in document
    assert document["transformer_layer_config"]["model_type"] == "qwen3"
    assert document["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]
    assert (document["norm_before_residual"], document["fc_norm"], document["norm_output"]) == (False, True, True)
    assert document["speculators_config"]["verifier"]["name_or_path"] == "someone/tiny"
    assert {"layers.0.self_attn.q_norm.weight", "fc_norm.2.weight", "t2d", "d2t"} <= tensors.keys()


@pytest.mark.parametrize("scaled", [False, True])
def test_gguf(target: Target, tmp_path: Path, scaled: bool) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    head = others.eagle3(target, ids=(1, 4, 6), norm_before_residual=True)
    config = target.model.config
    if scaled:
        rope["original_max_position_embeddings"] = 128
        plain: Any = head.module
        sizes = replace(plain.config, rope_parameters=rope)
        other = others.random_weights(type(head.module)(sizes))
        head = Head(other, head.draft_vocab, {})  # type: ignore[arg-type]
        config = type(config)(**{**config.to_dict(), "rope_parameters": rope})
    written = export_head(head, "gguf", "someone/tiny", config, tmp_path)
    assert written.path.name == "head.gguf" and "--spec-type draft-eagle3" in written.serve


def test_medusa_is_written_for_its_own_code_alone(target: Target, tmp_path: Path) -> None:
    document, tensors = export(others.medusa(target, 2, 1), "official", target, tmp_path)
    assert document["medusa_num_heads"] == 2 and "1.1.weight" in tensors
    for engine in ("vllm", "sglang", "speculators", "llama.cpp", "gguf"):
        with pytest.raises(ValueError, match=r"Medusa|only (hold|read) EAGLE-3 heads"):
            export_head(others.medusa(target), engine, "someone/tiny", target.model.config, tmp_path / engine)


@pytest.mark.parametrize(
    ("form", "engine", "key"),
    [
        ({"markov_rank": 4}, "vllm", "markov_rank"),
        ({"norm_before_residual": True}, "sglang", "norm_before_residual"),
        ({"qk_norm": True}, "llama.cpp", "qk_norm"),
        ({"fc_norm": True}, "gguf", "fc_norm"),
        ({"mask_token_id": 3}, "sglang", "mask_token_id"),
    ],
)
def test_what_an_engine_does_not_know_is_refused_by_name(
    target: Target, tmp_path: Path, form: dict[str, Any], engine: str, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        export_head(others.eagle3(target, **form), engine, "someone/tiny", target.model.config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["official", "vllm", "sglang"])
def test_a_head_that_reads_more_layers_than_eagle1_is_refused(target: Target, tmp_path: Path, engine: str) -> None:
    head = others.eagle1(target, layer_ids=(1, target.layers))
    with pytest.raises(ValueError, match=r"cannot read a FeatExtrapolator that also reads layers \[1\]"):
        export_head(head, engine, "someone/tiny", target.model.config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_are_kept_as_they_are(target: Target, tmp_path: Path, engine: str) -> None:
    head = others.eagle3(target)
    if engine == "official":
        assert exact_dtype(dict(head.module.state_dict())) is torch.float32
    head.module.half().float()
    written = export_head(head, engine, "someone/tiny", target.model.config, tmp_path)
    assert written.dtype is torch.float16


def test_a_writer_that_errs_is_found(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an export whose files are not what they should be."""
    from haast.formats import export as exporting

    def torn(out: Path, document: dict[str, Any], tensors: dict[str, Any]) -> None:
        swapped = {"layers.0.self_attn.q_proj.weight": tensors["layers.0.self_attn.q_proj.weight"].flip(0)}
        save_file({name: each.contiguous() for name, each in {**tensors, **swapped}.items()}, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps(document), encoding="utf-8")

    monkeypatch.setattr(exporting, "_write_folder", torn)
    with pytest.raises(ValueError, match="gives other states"):
        export_head(others.eagle3(target), "vllm", "someone/tiny", target.model.config, tmp_path)


def test_the_card_is_read_by_hubs(target: Target, tmp_path: Path) -> None:
    import yaml  # type: ignore[import-untyped]

    head = others.eagle3(target)
    head.about.update(licence="Apache-2.0", tau=2.5, tau_measured_on="20 prompts")
    export(head, "vllm", target, tmp_path)
    _, front, words = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "transformers" and found["base_model"] == "someone/tiny"
    assert found["license"] == "apache-2.0" and "speculative-decoding" in found["tags"]
    assert "vllm serve someone/tiny" in words and "tau 2.50" in words


def test_what_fails_leaves_nothing_and_what_is_there_stays(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haast.formats import export as exporting

    head = others.eagle3(target)
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_card", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_head(head, "vllm", "someone/tiny", target.model.config, tmp_path / "out")
        patched.setattr(exporting, "save_file", lambda *words, **more: (_ for _ in ()).throw(OSError(28, "no space")))
        with pytest.raises(ValueError, match="no space"):
            export_head(head, "vllm", "someone/tiny", target.model.config, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_head(head, "vllm", "someone/tiny", target.model.config, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    export_head(head, "vllm", "someone/tiny", target.model.config, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("engine", [each for each in ENGINES if each not in ("speculators", "gguf")])
def test_printed_commands_quote_what_a_shell_would_split(target: Target, engine: str) -> None:
    command = serving_command(engine, reading_of(others.eagle3(target)), "my model's", Path("x y"))
    assert "my model's" in shlex.split(command)
