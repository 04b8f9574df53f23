"""Files of MTP heads: where they are found, which are refused, and what measuring says of their conventions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mtp_heads as mtp
import pytest
import torch
from fakes import decode, tiny_llama, vanilla
from safetensors.torch import load_file, save_file
from torch import Tensor

from haast import Haast
from haast.drafters.factory import find_head, head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.errors import HeadMismatchError, HeadWarning
from haast.formats import probe
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, facts_of, open_head
from haast.heads.checkpoint import Head, load_head, save_head
from haast.target.hf import BEFORE_NORM
from haast.target.target import Target
from haast.tree import DraftTree

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def written(folder: Path, producer: str = "Qwen", **more: Any) -> tuple[Target, Path]:
    model = mtp.tiny_model(producer)
    return Target(model), mtp.write_checkpoint(folder, model, mtp.PlainMtp(model, producer), **more)


def fitted(target: Target, folder: Path, check: bool = False) -> Head:
    opened = open_head(folder)
    assert isinstance(opened, OpenedHead)
    return opened.fitted(target, probe=check)[0]


def test_only_the_heads_tensors_are_read_from_shards_and_from_files_that_no_index_lists(tmp_path: Path) -> None:
    target, whole = written(tmp_path / "whole")
    _, aside = written(tmp_path / "aside", own_file=True)
    sharded = tmp_path / "sharded"
    target.model.save_pretrained(sharded, max_shard_size="20KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensors = load_file(aside / "mtp.safetensors")
    save_file(tensors, sharded / "last.safetensors")
    index["weight_map"] |= dict.fromkeys(tensors, "last.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    heads = []
    for folder in (whole, aside, sharded):
        opened = open_head(folder)
        assert isinstance(opened, OpenedHead)
        assert set(opened.files.tensors) == {_ours(name) for name in tensors} | {"base_norm.weight"}
        heads.append(fitted(target, folder).module.state_dict())
    for head in heads[1:]:
        assert head.keys() == heads[0].keys() and all(torch.equal(head[name], heads[0][name]) for name in head)


def _ours(name: str) -> str:
    parts = {
        "fc": "inputs.0.eh_proj",
        "pre_fc_norm_embedding": "inputs.0.enorm",
        "pre_fc_norm_hidden": "inputs.0.hnorm",
    }
    bare = name.removeprefix("mtp.")
    stem = bare.split(".")[0]
    return bare.replace(stem, {**parts, "norm": "norms.0"}.get(stem, stem), 1)


def test_copies_of_the_targets_embedding_and_lm_head_are_not_kept(tmp_path: Path) -> None:
    target, folder = written(tmp_path, "DeepSeek")
    assert {"lm_head.weight", "embed_tokens.weight"} <= set(open_head(folder).files.tensors)  # type: ignore[union-attr]
    head: Any = fitted(target, folder)
    assert not head.module.config.own_lm_head and not head.module.config.own_embedding
    tensors = load_file(folder / "model.safetensors")
    own = {name: 2 * tensor if "shared_head.head" in name else tensor for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors")
    head = fitted(target, folder)
    assert head.module.config.own_lm_head and torch.equal(head.module.lm_head.weight, 2 * tensors["lm_head.weight"])


def test_it_is_found_by_the_models_name(tmp_path: Path) -> None:
    target, folder = written(tmp_path)
    assert find_head("mtp", str(folder)) == folder
    target.model.name_or_path = str(folder)
    haast: Any = Haast.from_pretrained(target.model, head="mtp", drafter="eagle", shape=DraftShape(nodes=6, depth=2))
    assert type(haast.drafter._module).__name__ == "MtpHead"
    assert haast.generate(PROMPT, max_new_tokens=8).tokens == tuple(vanilla(target, [PROMPT], 8)[0])


def test_it_is_kept_in_haasts_own_files(tmp_path: Path) -> None:
    target, folder = written(tmp_path / "theirs", "GLM")
    head = fitted(target, folder)
    weights = head.module.state_dict()
    save_head(tmp_path / "ours", head.module.config, weights, None, {}, torch.float32)
    again = load_head(tmp_path / "ours")
    assert again.module.config == head.module.config
    for name, tensor in weights.items():
        assert torch.equal(again.module.state_dict()[name], tensor.float()), name
    assert decode(target, head_drafter(target, again), [PROMPT], 6) == vanilla(target, [PROMPT], 6)


def test_the_state_before_the_final_norm_is_that_state(tmp_path: Path) -> None:
    target = Target(mtp.tiny_model("Qwen"))
    tree, cache = DraftTree.chain(torch.tensor([PROMPT])), target.new_cache(1, 16)
    output = target.forward(tree, cache, hidden_layers=(1, BEFORE_NORM, target.layers))
    norm: Any = target.model.get_decoder().norm  # type: ignore[no-untyped-call]
    assert torch.equal(norm(output.hidden[BEFORE_NORM]), output.features)
    assert torch.equal(output.hidden[target.layers], output.features)


# ---------------------------------------------------------------------- what is refused

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]  # of the checkpoint's tensors and its config.json


def _drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [each for each in tensors if each.startswith(old)]:
        tensors[name.replace(old, new)] = tensors.pop(name)


BROKEN: dict[str, tuple[Change, str]] = {
    "another vocabulary": (lambda _, keys: keys.update(vocab_size=48), "its vocab_size is 48, the target has 32"),
    "another family": (
        lambda _, keys: keys.update(model_type="llama"),
        "its model_type is llama, the target has qwen3",
    ),
    "another model's final norm": (
        lambda tensors, _: tensors.update({"model.norm.weight": 2 * tensors["model.norm.weight"]}),
        "its checkpoint's final norm is 50% off the target's",
    ),
    "a norm of another size": (
        lambda tensors, _: tensors.update({"mtp.pre_fc_norm_hidden.weight": torch.ones(16)}),
        r"inputs.0.hnorm.weight is \(16,\)",
    ),
    "norms that the class has not": (
        lambda tensors, _: tensors.update({"mtp.layers.0.self_attn.kv_norm.weight": torch.ones(8)}),
        "not one of a qwen3 model like this target: unknown: 0.self_attn.kv_norm.weight",
    ),
    "norms that are missing": (
        lambda tensors, _: _drop(tensors, "mtp.layers.0.self_attn.k_norm.weight"),
        "missing: 0.self_attn.k_norm.weight",
    ),
    "a matrix of another shape": (
        lambda tensors, _: tensors.update({"mtp.layers.0.mlp.up_proj.weight": torch.ones(8, 32)}),
        "of another shape: 0.mlp.up_proj.weight",
    ),
    "a part that is missing": (lambda tensors, _: _drop(tensors, "mtp.norm.weight"), "norms.0.weight is missing"),
    "two layers with one projection": (
        lambda tensors, _: tensors.update({"mtp.layers.1.input_layernorm.weight": torch.ones(32)}),
        "inputs.1.eh_proj.weight is missing",
    ),
    "quantised": (
        lambda tensors, _: tensors.update({"mtp.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}),
        "the head is quantised: layers.0.mlp.up_proj.weight_scale_inv",
    ),
    "not finite": (
        lambda tensors, _: tensors.update({"mtp.fc.weight": tensors["mtp.fc.weight"] * torch.inf}),
        "inputs.0.eh_proj.weight holds NaN or infinity",
    ),
    "a layout of somebody else": (
        lambda tensors, _: _renamed(tensors, "mtp.fc.", "mtp.layers.0.eh_proj."),
        "in a layout that Haast does not know",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_other_heads_are_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    target, folder = written(tmp_path)
    tensors, keys = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, keys)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(HeadMismatchError, match=message) as raised:
        fitted(target, folder)
    assert str(folder) in str(raised.value)


def test_a_head_of_another_target_is_refused_by_name(tmp_path: Path) -> None:
    _, folder = written(tmp_path)
    with pytest.raises(HeadMismatchError, match="its hidden_size is 32, this one has 16"):
        fitted(Target(tiny_llama(hidden=16)), folder)
    (folder / "config.json").write_text("{}")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "mtp." in name}, folder / "model.safetensors")
    with pytest.raises(HeadMismatchError, match=r"not one of a qwen2 model .* unknown: 0\.self_attn\.k_norm"):
        fitted(Target(mtp.tiny_model("MiMo")), folder)


def test_a_checkpoint_without_one_says_so(tmp_path: Path) -> None:
    mtp.tiny_model("Qwen").save_pretrained(tmp_path)
    with pytest.raises(HeadMismatchError, match="holds no MTP head"):
        find_head("mtp", str(tmp_path))
    with pytest.raises(HeadMismatchError, match="has no name"):
        find_head("mtp", None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(HeadMismatchError, match=r"is a \.gguf file"):
        find_head("mtp", str(tmp_path / "model.gguf"))


# ---------------------------------------------------------------------- what is measured

SLOW = pytest.mark.slow
LEARNT: dict[str, tuple[dict[str, Any], str, str]] = {  # how a head in Qwen's layout was trained, and what is found
    "as the producer": ({}, "", ""),
    "feeds back the state": ({"norm_output": False}, "fed back", "the state"),
    "reads the state before the norm": ({"reads_normed": False}, "state read", "before the final norm"),
    "reads the state first": ({}, "embedding and state", "the other order"),
}


def _by_heart(target: Target, head: Head, texts: list[probe.Text], steps: int = 40) -> dict[str, Tensor]:
    """Weights that draft the target's own text, trained on the chains that `probe` counts."""
    module: Any = head.module.double().requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for text in texts:
            pairs = text.pairs
            parts = [text.hidden[each] for each in module.target_layers] or [text.features]
            states, embedded = module.fuse(parts[0][:pairs].clone()[None]), []
            for depth in range(probe.DEPTHS):
                embedded.append(target.embed(text.tokens[depth + 1 : depth + 1 + pairs])[None].clone())
                found = probe._draft_states(module, torch.cat(embedded, 1), states, depth + 1, pairs)[:, -pairs:]
                states = torch.cat([states, found], 1)
                logits = module.lm_input(found, text.tokens)[0] @ target.lm_head.weight.detach().T  # type: ignore[operator]
                wanted = text.tokens[depth + 2 : depth + 2 + pairs].clone()
                loss = loss + torch.nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("form", "question", "answer"),
    [pytest.param(*case, id=name, marks=[] if case[2] == "the state" else SLOW) for name, case in LEARNT.items()],
)
def test_a_convention_that_differs_from_the_producers_is_found(
    tmp_path: Path, form: dict[str, Any], question: str, answer: str
) -> None:
    target, folder = written(tmp_path)
    opened = open_head(folder)
    assert isinstance(opened, OpenedHead)
    reading, _ = opened.read(facts_of(target))
    begun: Any = probe.module_of(target, reading.with_config(**form))
    texts = probe.own_text(target, [BEFORE_NORM])
    state = _by_heart(target, Head(begun, None, {}), texts)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.startswith("mtp."):
            tensors[name] = state[_ours(name)].contiguous()
    if question == "embedding and state":
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].roll(target.hidden_size, dims=1).contiguous()
    save_file(tensors, folder / "model.safetensors")
    head, settled = open_head(folder).fitted(target, texts)  # type: ignore[union-attr]
    assert settled is not None
    changed = [(each.question, each.answer) for each in settled.changed]
    assert changed == ([(question, answer)] if question else [])
    assert settled.agreement.first > 0.8 and head.about["probed"]["state read"]


def test_a_head_that_drafts_nonsense_is_told(tmp_path: Path) -> None:
    target, folder = written(tmp_path)
    drafter = head_drafter(target, fitted(target, folder), DraftShape("chain", depth=2))
    with pytest.warns(HeadWarning, match="the head's first drafts were accepted in"):
        said = decode(target, drafter, [PROMPT], 60)
    assert said == vanilla(target, [PROMPT], 60)


@pytest.mark.parametrize("producer", ["Qwen", "DeepSeek", "GLM", "MiMo"])
def test_it_is_written_under_its_producers_names(tmp_path: Path, producer: str) -> None:
    target, folder = written(tmp_path / "theirs", producer)
    head = fitted(target, folder)
    exported = export_head(head, "official", "tiny", target.model.config, tmp_path / "out")
    again, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    named = mtp.PlainMtp(target.model, producer).tensors()
    assert again.keys() == {name for name in named if "embed_tokens" not in name and "shared_head.head" not in name}
    for name, tensor in again.items():
        assert torch.equal(tensor.float(), before[name].float()), name
    assert "these tensors replace those of the target's checkpoint" in exported.notes
    with pytest.raises(ValueError, match="vllm reads an MTP head from the target's own checkpoint only"):
        export_head(head, "vllm", "tiny", target.model.config, tmp_path / "vllm")
