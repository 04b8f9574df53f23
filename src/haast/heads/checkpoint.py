"""A head on disk: `config.json`, `model.safetensors`, and `draft_vocab.safetensors` where a FeatExtrapolator or
MedusaHeads draft over fewer tokens than the target knows.

Owns the files and their checks. `model.safetensors` (in parts with an index, as transformers splits a large model,
where it would pass 20 MB) holds the official EAGLE-1, EAGLE-3 or Medusa layout; options that the official layouts do
not know (more layers, a Markov bias, normed states) add tensors under names of their own. The draft vocabulary is `d2t`
(target id = draft id + d2t[draft id]): beside an EAGLE-1 or Medusa head, which have no such tensor, in a file of its
own; inside an EAGLE-3 head, with `t2d` (which target ids are drafted), as its official files have it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from haast.errors import HeadMismatchError, expanded
from haast.files import replacing, write_json
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.heads.module import DraftModule

_CONFIGS: dict[str, type[HeadSizes]] = {
    "haast-feat-extrapolator-1": FeatExtrapolatorConfig,
    "haast-eagle3-1": Eagle3Config,
    "haast-medusa-1": MedusaConfig,
}
_PART = "20MB"  # largest file of weights: what code hosts take without complaint
_INDEX = "model.safetensors.index.json"
AnyModule = DraftModule | MedusaHeads
# What transformers and torch raise at sizes that make no Llama layer: a word, zero, a negative, an unknown name.
_NO_SIZES = (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class Head:
    """A loaded head: the module, the target ids it drafts over (None: all), and what its files say of its making."""

    module: AnyModule
    draft_vocab: Tensor | None  # (draft vocabulary,) int64, ascending target ids
    about: dict[str, Any]

    @property
    def trained_length(self) -> int | None:
        """Tokens of the longest sequence that the head was trained on; None where its files do not say.

        Raises HeadMismatchError where they say something that is no length.
        """
        told = self.about.get("trained_length")
        if told is not None and (type(told) is not int or told < 1):
            raise HeadMismatchError(
                f"trained_length={told!r} in the head's config.json is no number of tokens: give 1 or more, or take "
                f"the entry out"
            )
        return told


def save_head(
    folder: Path,
    config: HeadSizes,
    weights: dict[str, Tensor],
    draft_vocab: Tensor | None,
    about: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a head, file by file whole or not at all. `weights` are plain tensors under the official names.

    `draft_vocab` are the ascending target ids that the head drafts over; None is all of them. Raises ValueError where a
    weight is not finite in `dtype`.
    """
    stored = {name: tensor.detach().to(dtype) for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that {dtype} can't: save the head in torch.float32")
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, each in _CONFIGS.items() if each is type(config))
    document: dict[str, Any] = {"format": kind, "head": asdict(config), "about": about or {}}
    if draft_vocab is not None:
        document["draft_vocab_size"] = len(draft_vocab)
        offsets = {"d2t": draft_vocab.long() - torch.arange(len(draft_vocab))}
        if isinstance(config, Eagle3Config):
            stored |= {**offsets, "t2d": _drafted(draft_vocab, config.vocab_size)}
        else:
            _write(folder / "draft_vocab.safetensors", offsets)
    _write_weights(folder, stored)
    write_json(document, folder / "config.json")


def head_folder(head: str | Path) -> Path:
    """Where a head's files are: the folder given, or `best` in the folder of a training run."""
    folder = expanded(head, "no head at")
    best = folder / "best"
    return best if not (folder / "config.json").exists() and (best / "config.json").exists() else folder


def is_own(folder: Path) -> bool:
    """Whether a folder's config.json is one that Haast writes, sound or not."""
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("format")).startswith("haast-")


def load_head(folder: Path) -> Head:
    """Read a head in float32 and check every tensor.

    Raises HeadMismatchError: files are missing or corrupt, tensors are missing, unknown or of the wrong shape.
    """
    document, path = _read_config(folder), folder / "model.safetensors"
    config, size, weights = _config(folder, document), document.get("draft_vocab_size"), _read_weights(folder)
    # Sizes of another head are refused before modules are built for them, which takes time and memory.
    if isinstance(config, MedusaConfig) and (wanted := config.heads * (2 * config.blocks + 1)) != len(weights):
        told = f"{config.heads} Medusa heads of {config.blocks} blocks have {wanted} tensors"
        raise _damaged(folder / "config.json", f": {told}, the files hold {len(weights)}")
    try:
        module = build_module(config, size)
    except _NO_SIZES as error:
        raise _damaged(folder / "config.json", f": sizes do not make a head: {error}") from error
    vocab = None
    if isinstance(config, Eagle3Config):
        mapping: dict[str, Tensor] = {n: weights.pop(n) for n in ("d2t", "t2d") if n in weights}
        if len(mapping) == 1:
            raise _damaged(path, f" has {next(iter(mapping))} alone of d2t and t2d")
        if size is not None or mapping:
            vocab = _draft_vocab(path, mapping, config.drafts, config.vocab_size)
            if not torch.equal(mapping["t2d"].bool(), _drafted(vocab, config.vocab_size)):
                raise _damaged(path, ": t2d and d2t name different tokens")
    elif size is not None:
        beside = folder / "draft_vocab.safetensors"
        vocab = _draft_vocab(beside, _read_tensors(beside), int(size), config.vocab_size)
    _check_tensors(path, module, weights)
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return Head(module.eval().requires_grad_(False), vocab, document["about"])


def build_module(config: HeadSizes, draft_vocab_size: int | None) -> AnyModule:
    """The module of these sizes; an Eagle3Config has a `draft_vocab_size` of its own."""
    if isinstance(config, Eagle3Config):
        return Eagle3Head(config)
    if isinstance(config, MedusaConfig):
        return MedusaHeads(config, draft_vocab_size)
    assert isinstance(config, FeatExtrapolatorConfig), "there are three kinds"
    return FeatExtrapolator(config, draft_vocab_size)


def _config(folder: Path, document: dict[str, Any]) -> HeadSizes:
    kind = _CONFIGS[document["format"]]
    known = {field.name for field in fields(kind)}
    unknown = set(document["head"]) - known
    if unknown:
        raise HeadMismatchError(f"{folder / 'config.json'}: unknown keys {sorted(unknown)}; known are {sorted(known)}")
    try:
        return kind(**document["head"])
    except (TypeError, ValueError) as error:
        raise _damaged(folder / "config.json", f": sizes do not make a head: {error}") from error


def check_fits(head: HeadSizes, hidden_size: int, vocab_size: int, target: str) -> None:
    """Refuse a head made for another target: HeadMismatchError, with both sides of what differs."""
    for name, theirs in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        mine = getattr(head, name)
        if name == "hidden_size" and isinstance(head, Eagle3Config):
            mine = head.read_size
        if mine != theirs:
            raise HeadMismatchError(
                f"the head was made for another model: its {name} is {mine}, {target} has {theirs}; "
                f"use a head trained for {target}, or train one with `haast train --model {target}`"
            )


def check_weights(module: nn.Module) -> None:
    """Refuse a loaded head that drafts nothing: weights without numbers, or not finite. Raises HeadMismatchError."""
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise HeadMismatchError(
                f"the {type(module).__name__} is on the meta device, where weights ({name}) hold no numbers: load it "
                f"with haast.heads.checkpoint.load_head"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise HeadMismatchError(
                f"the head's {name} holds values that are not finite: fetch or train the head again"
            )


def read_head_config(folder: Path) -> HeadSizes:
    """The head's sizes alone, to check them before a model loads. Raises HeadMismatchError as `load_head` does."""
    return _config(folder, _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise HeadMismatchError(f"no head at {folder}: there is no config.json; give a folder written by `haast train`")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f" is not JSON ({error})") from error
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or str(found) not in _CONFIGS or "head" not in document:
        raise HeadMismatchError(
            f"{path}: format {found!r} is none of {', '.join(map(repr, _CONFIGS))}; this file was not written by Haast"
        )
    for part in ("head", "about"):
        if not isinstance(document.setdefault(part, {}), dict):
            raise _damaged(path, f": {part!r} is no JSON object")
    return document


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """In one file, or in parts and their index; the index, or the one file, comes last and the other is removed."""
    split = split_torch_state_dict_into_shards(weights, max_shard_size=_PART)
    index, whole = folder / _INDEX, folder / "model.safetensors"
    for name, tensors in split.filename_to_tensors.items():
        _write(folder / name, {each: weights[each] for each in tensors})
    if split.is_sharded:
        write_json({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, index)
    (whole if split.is_sharded else index).unlink(missing_ok=True)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index, weights = folder / _INDEX, dict[str, Tensor]()
    if not index.is_file():
        return _read_tensors(folder / "model.safetensors")
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, f" is no index of weights ({error})") from error
    for name in sorted(map(str, files)):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise _damaged(index, f" names {name!r}, which lies outside the head's folder")
        weights |= _read_tensors(folder / name)
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise _damaged(path, " is missing") from error
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f" is corrupt ({error})") from error


def _check_tensors(path: Path, module: AnyModule, weights: dict[str, Tensor]) -> None:
    wanted = module.state_dict()
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unknown:
        has = f"a {type(module).__name__} has exactly {sorted(wanted)}"
        raise _damaged(path, f": missing tensors {missing}, unknown tensors {unknown}; {has}")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise _damaged(path, f": {name} is {tuple(tensor.shape)}, config.json says {tuple(wanted[name].shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise _damaged(path, f": {name} holds NaN or infinity")


def _drafted(vocab: Tensor, vocab_size: int) -> Tensor:
    """Which target ids are drafted, (vocab_size,) bool."""
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, vocab.long(), True)


def _draft_vocab(path: Path, tensors: dict[str, Tensor], size: int, vocab_size: int) -> Tensor:
    if "d2t" not in tensors or set(tensors) - {"d2t", "t2d"}:
        raise _damaged(path, f": expected the draft vocabulary d2t, found {sorted(tensors)}")
    ids = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
    ascending = len(ids) > 0 and bool((ids[1:] > ids[:-1]).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocab_size
    if len(ids) != size or not ascending:
        form = f"a draft vocabulary of {size} ascending ids below {vocab_size}"
        raise _damaged(path, f": {len(ids)} ids do not form {form}")
    return ids


def _damaged(path: Path, why: str) -> HeadMismatchError:
    return HeadMismatchError(f"{path}{why}; fetch or train the head again")


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
