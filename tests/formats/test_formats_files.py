"""Where a head may lie, and what is wrong with files: hub ids, caches, pickles, indexes, other targets, other kinds."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from fakes import tiny_llama, tiny_target
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from haast.api import Haast
from haast.errors import HeadMismatchError
from haast.formats.files import locate
from haast.formats.opened import OpenedHead, open_head
from haast.target.target import Target

ONES = torch.ones(32)
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=8, std=0.3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of our own, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, name: str, write: Callable[[Path], object], revision: str = "a" * 40) -> Path:
    """A repository as the hub's client keeps it: files in a snapshot, and which one `main` is."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    write(snapshot)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    return snapshot


def test_a_hub_id_is_found_in_the_cache(target: Target, cache: Path) -> None:
    native = others.eagle3(target)
    snapshot = cached(cache, "someone/tiny-eagle3", lambda folder: others.official_eagle3(folder, native, target))
    place, source = locate("someone/tiny-eagle3")
    assert (place, source) == (snapshot, "someone/tiny-eagle3@aaaaaaaaaaaa")
    assert locate("someone/tiny-eagle3@" + "a" * 40)[0] == snapshot
    haast = Haast.from_pretrained(tiny_llama(layers=8, std=0.3), head="someone/tiny-eagle3", drafter="eagle")
    assert haast.drafter.name == "eagle" and haast.drafter.target_layers == others.IDS
    plain = Haast.from_pretrained(tiny_llama(layers=8, std=0.3), head=None, drafter="none")
    assert haast.generate([1, 2, 3], max_new_tokens=8).tokens == plain.generate([1, 2, 3], max_new_tokens=8).tokens


@pytest.mark.parametrize("name", ["someone/nothing", "someone/tiny-eagle3@" + "b" * 40])
def test_what_the_cache_does_not_hold_is_told_offline(target: Target, cache: Path, name: str) -> None:
    cached(cache, "someone/tiny-eagle3", lambda folder: others.official_eagle3(folder, others.eagle3(target), target))
    with pytest.raises(HeadMismatchError, match="HF_HUB_OFFLINE"):
        locate(name)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "/nowhere/at/all", "a b/c"])
def test_what_is_no_place_is_told(name: str) -> None:
    with pytest.raises(HeadMismatchError, match="hub id"):
        locate(name)


def test_parts_and_their_index(target: Target, tmp_path: Path) -> None:
    folder = others.speculators(tmp_path, others.eagle3(target), target)
    tensors = load_file(folder / WEIGHTS)
    names, parts = sorted(tensors), dict[str, str]()
    for number in range(2):
        part = f"model-0000{number + 1}-of-00002.safetensors"
        parts |= dict.fromkeys(names[number::2], part)
        save_file({name: tensors[name] for name in names[number::2]}, folder / part)
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    found = open_head(folder)
    assert isinstance(found, OpenedHead) and found.files.tensors.keys() == tensors.keys()


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran-code",)


def _document(folder: Path, **changed: Any) -> None:
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**document, **changed}))


def _layers(folder: Path, **changed: Any) -> None:
    found = json.loads((folder / CONFIG).read_text())["transformer_layer_config"]
    _document(folder, transformer_layer_config={**found, **changed})


def _tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **{name.replace("__", "."): each for name, each in changed.items()}}
    save_file({name: each.contiguous() for name, each in tensors.items() if each is not None}, folder / WEIGHTS)


def _pickle(folder: Path, value: Any) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(value, folder / "pytorch_model.bin")


def _index(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": name}}))


def _compressed(folder: Path) -> None:
    _pickle(folder, {"fc.weight": torch.zeros(100_000)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


# What is done to a sound EAGLE-3 head's files, and what is said of it.
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "there is no config.json"),
    "torn config": (lambda f: (f / CONFIG).write_text('{"a": '), "is not JSON"),
    "config of another shape": (lambda f: (f / CONFIG).write_text("[1]"), "holds a list"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no weights"),
    "torn weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), "is corrupt"),
    "code in a pickle": (lambda f: _pickle(f, {"fc.weight": _Evil()}), "code in it is not run"),
    "a pickle of something else": (lambda f: _pickle(f, [torch.zeros(2)]), "holds list"),
    "a pickle with other things": (lambda f: _pickle(f, {"fc.weight": 3}), "'fc.weight'"),
    "an index that leads away": (lambda f: _index(f, "../../etc/passwd.safetensors"), "no file of weights in the head"),
    "an index to what is not there": (lambda f: _index(f, "gone.safetensors"), "is missing"),
    "an index of nothing": (lambda f: (f / "a.index.json").write_text("{}"), "weight_map is missing"),
    "a missing tensor": (lambda f: _tensors(f, norm__weight=None), "norm.weight is missing"),
    "a tensor too many": (lambda f: _tensors(f, extra__weight=torch.zeros(3)), "extra.weight"),
    "another shape": (lambda f: _tensors(f, norm__weight=torch.zeros(3)), r"norm.weight is \(3,\)"),
    "numbers that are none": (lambda f: _tensors(f, norm__weight=torch.full((32,), float("nan"))), "NaN"),
    "quantised to bytes": (
        lambda f: _tensors(f, fc__weight=torch.zeros(32, 96, dtype=torch.int8)),
        "is quantised: fc.weight is torch.int8",
    ),
    "quantised with scales": (lambda f: _tensors(f, fc__weight_scale=torch.ones(1)), "fc.weight_scale"),
    "a number that is a word": (lambda f: _document(f, rms_norm_eps="abc"), "rms_norm_eps='abc'"),
    "a number beyond all": (lambda f: _document(f, max_position_embeddings=10**400), "max_position_embeddings=1000"),
    "a list where none is": (lambda f: _document(f, eagle_config=[1]), r"eagle_config=\[1\]"),
    "layers in words": (lambda f: _document(f, eagle_aux_hidden_state_layer_ids="2,4,5"), "layer_ids='2,4,5'"),
    "layers that are switches": (lambda f: _document(f, eagle_aux_hidden_state_layer_ids=[True, False]), "layer_ids"),
    "a switch in words": (lambda f: _document(f, norm_output="false"), "norm_output='false'"),
    "no name of a class": (lambda f: _document(f, architectures=3), "architectures=3"),
    "another activation": (lambda f: _layers(f, hidden_act="abc"), "transformer_layer_config.hidden_act='abc'"),
    "a rotation without a factor": (lambda f: _layers(f, rope_parameters={"rope_type": "yarn"}), "factor"),
    "a rotation of no kind": (
        lambda f: _layers(f, rope_parameters={"rope_type": "nope", "rope_theta": 1e4}),
        "rope_type': 'nope'",
    ),
    "no size": (lambda f: _layers(f, hidden_size=None), "hidden_size"),
    "a number where a matrix is": (lambda f: _tensors(f, fc__weight=torch.tensor(1.0)), r"fc.weight is \(\)"),
    "whole numbers for weights": (
        lambda f: _tensors(f, norm__weight=torch.ones(32, dtype=torch.int64)),
        "norm.weight is torch.int64",
    ),
    "rows for other tokens": (
        lambda f: _tensors(f, lm_head__weight=torch.ones(28, 32)),
        r"lm_head.weight is \(28, 32\)",
    ),
    "too few rows": (lambda f: _tensors(f, lm_head__weight=torch.ones(7, 32)), r"lm_head.weight is \(7, 32\)"),
    "another tokenizer's table": (
        lambda f: _tensors(f, embed_tokens__weight=torch.ones(64, 32)),
        r"embed_tokens.weight is \(64, 32\), the target has 32 tokens",
    ),
    "no maps": (lambda f: _tensors(f, d2t=None, t2d=None), "lm_head.weight has 14 rows for the target's 32 tokens"),
    "an empty map": (lambda f: _tensors(f, d2t=torch.zeros(0, dtype=torch.int64)), "d2t"),
    "a layer without a number": (lambda f: _tensors(f, layers__x__y=ONES), "layers.x.y"),
    "a table that repeats one number": (
        lambda f: _pickle(f, {"fc.weight": torch.zeros(1).as_strided((60000, 60000), (0, 0))}),
        "fc.weight is no plain tensor",
    ),
    "a tensor without numbers": (lambda f: _pickle(f, {"fc.weight": torch.empty(2, device="meta")}), "no plain tensor"),
    "a sparse tensor": (lambda f: _pickle(f, {"fc.weight": torch.eye(3).to_sparse()}), "no plain tensor"),
    "a compressed pickle": (lambda f: _compressed(f), "compressed"),
    "an index with an endless name": (lambda f: _index(f, "x" * 5000 + ".bin"), "no file of weights in the head"),
    "no heads": (lambda f: _layers(f, num_attention_heads=5), "5"),
    "layers of another kind": (lambda f: _layers(f, model_type="mamba"), "mamba"),
    "too many layers of the target": (lambda f: _document(f, eagle_aux_hidden_state_layer_ids=[2, 4, 50]), "50"),
    "two layers of the target": (lambda f: _document(f, eagle_aux_hidden_state_layer_ids=[2, 4]), r"\[2, 4\]"),
    "a vocabulary beyond": (lambda f: _tensors(f, d2t=torch.full((14,), 500)), "d2t"),
    "maps that contradict": (lambda f: _tensors(f, t2d=torch.ones(32, dtype=torch.bool)), "t2d"),
    "a map alone": (lambda f: _tensors(f, d2t=None), "t2d alone"),
    "DFlash with another head's keys": (
        lambda f: _tensors(f, layers__0__self_attn__q_proj__weight=torch.zeros(32, 32), hidden_norm__weight=ONES),
        "mask_token_id=None",
    ),
    "DSpark with a recurrent Markov head": (
        lambda f: _tensors(f, markov_head__joint_proj__weight=torch.zeros(12, 40)),
        "a DSpark head with a recurrent Markov head",
    ),
    "DFlash2": (lambda f: _tensors(f, candidate_selector__successor_codebook=torch.zeros(32, 4)), "a DFlash2 head"),
    "Domino": (lambda f: _tensors(f, prefix_gru__weight_ih_l0=torch.zeros(4, 4)), "a Domino head"),
    "XPress": (lambda f: _tensors(f, refiner_head__mix_l=torch.zeros(4, 4)), "an XPress head"),
    "no head at all": (lambda f: save_file({"model.embed_tokens.weight": ONES}, f / WEIGHTS), "no head that"),
}


@pytest.mark.parametrize(("spoil", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_by_name(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = others.speculators(tmp_path / "head", others.eagle3(target), target)
    spoil(folder)
    with pytest.raises(HeadMismatchError, match=words) as told:
        open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]
    assert ";" in str(told.value) or ":" in str(told.value)
    assert not (tmp_path / "ran-code").exists()


def test_a_head_for_another_target(target: Target, tmp_path: Path) -> None:
    folder = others.official_eagle3(tmp_path, others.eagle3(target), target)
    with pytest.raises(HeadMismatchError, match="its hidden_size is 32, this one has 48"):
        open_head(folder).fitted(Target(tiny_llama(hidden=48, layers=8)))  # type: ignore[union-attr]
    with pytest.raises(HeadMismatchError, match="d2t"):
        open_head(folder).fitted(tiny_target(vocab=20, layers=8), probe=False)  # type: ignore[union-attr]


def test_an_lm_head_in_the_file_wins_over_what_config_says_of_ties(target: Target, tmp_path: Path) -> None:
    native = others.eagle3(target)
    fitted, _ = open_head(others.angelslim(tmp_path, native, target)).fitted(target, probe=False)  # type: ignore[union-attr]
    assert torch.equal(fitted.module.state_dict()["lm_head.weight"], native.module.state_dict()["lm_head.weight"])


def test_a_head_without_an_lm_head_has_the_targets_rows(target: Target, tmp_path: Path) -> None:
    folder = others.speculators(tmp_path, others.eagle3(target), target)
    _tensors(folder, lm_head__weight=None)
    fitted, _ = open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]
    rows = target.head_rows(torch.tensor(others.DRAFTED)).float()
    assert torch.equal(fitted.module.state_dict()["lm_head.weight"].float(), rows)


def test_a_table_that_is_the_targets_own_is_not_kept_twice(target: Target, tmp_path: Path) -> None:
    folder = others.official_eagle1(tmp_path, others.eagle1(target), target)
    fitted, _ = open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]
    assert "embed_tokens.weight" not in fitted.module.state_dict()


def test_a_gguf_file_of_something_else(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(HeadMismatchError, match="holds a 'llama' model, not a head"):
        open_head(tmp_path / "model.gguf")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:40])
    with pytest.raises(HeadMismatchError, match="GGUF"):
        open_head(tmp_path / "torn.gguf")
    # An array of 2 ** 60 strings, in a file of 70 bytes.
    (tmp_path / "long.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**60) + bytes(9))
    with pytest.raises(HeadMismatchError, match="or is corrupt"):
        open_head(tmp_path / "long.gguf")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(HeadMismatchError, match="is a file"):
        open_head(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Head\n", "mit"),
        ("# Head\n", None),
        ("---\nmodel-index: 3\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_of_the_card_is_kept(target: Target, tmp_path: Path, card: str | None, licence: str | None) -> None:
    folder = others.official_eagle1(tmp_path, others.eagle1(target), target)
    if card is not None:
        (folder / "README.md").write_text(card)
    fitted, _ = open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]
    assert fitted.about.get("licence") == licence
