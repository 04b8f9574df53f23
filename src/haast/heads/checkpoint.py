"""Save and load a head: `config.json`, `model.safetensors` and, for EAGLE-1 and Medusa, `draft_vocab.safetensors`.

Owns the files and their checks; `acceptance.json`, which may be next to them, is `acceptance`'s. `model.safetensors`
holds the official EAGLE-1, EAGLE-3, Medusa or DSpark layout. Above 20 MB it is split into shards with an index, as
transformers does. Options that the official layouts do not have (more layers, a Markov bias, normed states) add tensors
with their own names. A draft vocabulary that is smaller than the target's is stored as `d2t` (target id = draft id +
d2t[draft id]). For EAGLE-1 and Medusa heads, whose official layouts have no such tensor, it is in the file of its own;
for EAGLE-3 and block heads it is among the weights together with `t2d` (which target ids are drafted), as in the
official files.
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
from haast.heads.acceptance import Acceptance
from haast.heads.acceptance import load as load_acceptance
from haast.heads.block import BlockConfig, BlockHead
from haast.heads.config import FusedConfig, HeadSizes
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.heads.module import DraftModule
from haast.heads.mtp import MtpConfig, MtpHead
from haast.heads.mtp_chain import MtpChain

_CONFIGS: dict[str, type[HeadSizes]] = {
    "haast-feat-extrapolator-1": FeatExtrapolatorConfig,
    "haast-eagle3-1": Eagle3Config,
    "haast-medusa-1": MedusaConfig,
    "haast-mtp-1": MtpConfig,
    "haast-block-1": BlockConfig,
}
_SHARD_SIZE = "20MB"  # largest weight file, small enough for code hosts
_INDEX = "model.safetensors.index.json"
AnyModule = DraftModule | MedusaHeads
# What transformers and torch raise for invalid sizes of a Llama layer: a word, zero, a negative, an unknown name.
_SIZE_ERRORS = (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class Head:
    """A loaded head: the module, the target ids it drafts over (None: all), and the training data in its files."""

    module: AnyModule
    draft_vocab: Tensor | None  # (draft vocabulary,) int64, ascending target ids
    about: dict[str, Any]  # how the head was trained, from config.json
    acceptance: Acceptance | None = None  # how likely its drafts are accepted, from acceptance.json

    @property
    def trained_length(self) -> int | None:
        """Tokens of the longest sequence that the head was trained on; None if config.json does not have it.

        Raises HeadMismatchError if the entry is not a positive integer.
        """
        length = self.about.get("trained_length")
        if length is not None and (type(length) is not int or length < 1):
            raise HeadMismatchError(
                f"trained_length={length!r} in the head's config.json is not a number of tokens: give 1 or more, or "
                f"remove the entry"
            )
        return length


def save_head(
    folder: Path,
    config: HeadSizes,
    weights: dict[str, Tensor],
    draft_vocab: Tensor | None,
    about: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a head; each file is replaced atomically. `weights` are plain tensors with the official names.

    `draft_vocab` are the ascending target ids that the head drafts over; None is all of them. Raises ValueError if a
    weight is not finite in `dtype`.
    """
    stored = {name: tensor.detach().to(dtype) for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that {dtype} can't hold: save the head in torch.float32")
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, each in _CONFIGS.items() if each is type(config))
    document: dict[str, Any] = {"format": kind, "head": asdict(config), "about": about or {}}
    if draft_vocab is not None:
        document["draft_vocab_size"] = len(draft_vocab)
        offsets = {"d2t": draft_vocab.long() - torch.arange(len(draft_vocab))}
        if isinstance(config, FusedConfig):
            stored |= {**offsets, "t2d": _drafted(draft_vocab, config.vocab_size)}
        else:
            _write(folder / "draft_vocab.safetensors", offsets)
    _write_weights(folder, stored)
    write_json(document, folder / "config.json")


def head_folder(head: str | Path) -> Path:
    """The folder with a head's files: `head` itself, or its subfolder `best` if `head` is a training run's folder."""
    folder = expanded(head, "no head at")
    best = folder / "best"
    return best if not (folder / "config.json").exists() and (best / "config.json").exists() else folder


def is_own(folder: Path) -> bool:
    """Whether the folder's config.json was written by Haast, even if it is damaged otherwise."""
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
    # Check before the modules are built: wrong sizes could take much time and memory.
    if isinstance(config, MedusaConfig) and (count := config.heads * (2 * config.blocks + 1)) != len(weights):
        expected = f"{config.heads} Medusa heads of {config.blocks} blocks have {count} tensors"
        raise _damaged(folder / "config.json", f": {expected}, the files have {len(weights)}")
    try:
        module = build_module(config, size)
    except _SIZE_ERRORS as error:
        raise _damaged(folder / "config.json", f": invalid sizes of a head: {error}") from error
    vocab = None
    if isinstance(config, FusedConfig):
        mapping: dict[str, Tensor] = {n: weights.pop(n) for n in ("d2t", "t2d") if n in weights}
        if len(mapping) == 1:
            raise _damaged(path, f" has {next(iter(mapping))} but not the other one of d2t and t2d")
        if size is not None or mapping:
            vocab = _draft_vocab(path, mapping, config.drafts, config.vocab_size)
            if not torch.equal(mapping["t2d"].bool(), _drafted(vocab, config.vocab_size)):
                raise _damaged(path, ": t2d and d2t name different tokens")
    elif size is not None:
        vocab_file = folder / "draft_vocab.safetensors"
        vocab = _draft_vocab(vocab_file, _read_tensors(vocab_file), int(size), config.vocab_size)
    _check_tensors(path, module, weights)
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return Head(module.eval().requires_grad_(False), vocab, document["about"], load_acceptance(folder))


def build_module(config: HeadSizes, draft_vocab_size: int | None) -> AnyModule:
    """The module for these sizes. A FusedConfig has its own `draft_vocab_size`; the argument is ignored for it."""
    if isinstance(config, Eagle3Config):
        return Eagle3Head(config)
    if isinstance(config, BlockConfig):
        return BlockHead(config)
    if isinstance(config, MedusaConfig):
        return MedusaHeads(config, draft_vocab_size)
    if isinstance(config, MtpConfig):
        return (MtpHead if config.num_hidden_layers == 1 else MtpChain)(config, draft_vocab_size)
    assert isinstance(config, FeatExtrapolatorConfig), "there are five kinds"
    return FeatExtrapolator(config, draft_vocab_size)


def _config(folder: Path, document: dict[str, Any]) -> HeadSizes:
    kind = _CONFIGS[document["format"]]
    allowed = {field.name for field in fields(kind)}
    unknown = set(document["head"]) - allowed
    if unknown:
        raise HeadMismatchError(f"{folder / 'config.json'}: unknown keys {sorted(unknown)}; known: {sorted(allowed)}")
    try:
        return kind(**document["head"])
    except (TypeError, ValueError) as error:
        raise _damaged(folder / "config.json", f": invalid sizes of a head: {error}") from error


def check_fits(head: HeadSizes, hidden_size: int, vocab_size: int, target: str) -> None:
    """Raise HeadMismatchError, with both sizes, if the head's sizes are not those of `target`."""
    for name, target_size in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        head_size = getattr(head, name)
        if name == "hidden_size" and isinstance(head, FusedConfig):
            head_size = head.read_size
        if head_size != target_size:
            raise HeadMismatchError(
                f"the head was made for another model: its {name} is {head_size}, {target} has {target_size}; "
                f"use a head trained for {target}, or train one with `haast train --model {target}`"
            )


def check_widths(module: DraftModule, embedding: int, features: int, target: str) -> None:
    """Raise HeadMismatchError if the head's states don't have the widths of the embedding and the LM head it shares."""
    width = module.config.hidden_size
    for name, shared, own in (
        ("embedding", embedding, module.config.own_embedding),
        ("LM head", features, module.own_lm_head),
    ):
        if shared != width and not own:
            raise HeadMismatchError(
                f"the head's states have width {width}, but {target}'s {name}, which it would share, has width "
                f"{shared}: use a drafter without a head"
            )


def check_layers(module: DraftModule, layers: int, target: str) -> None:
    """Raise HeadMismatchError if the head reads layers that a target with this number of layers does not have."""
    ids = module.target_layers
    wrong = max(ids, default=0) > layers or (isinstance(module, FeatExtrapolator) and ids and ids[-1] != layers)
    if wrong:
        raise HeadMismatchError(
            f"the head was made for another model: it reads layers {list(ids)}, {target} has {layers} layers; use a "
            f"head trained for {target}"
        )


def check_weights(module: nn.Module) -> None:
    """Raise HeadMismatchError for a head whose weights are not finite or on the meta device."""
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise HeadMismatchError(
                f"the {type(module).__name__} is on the meta device, where weights ({name}) have no values: load it "
                f"with haast.heads.checkpoint.load_head"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise HeadMismatchError(f"the head's {name} has values that are not finite: fetch or train the head again")


def read_head_config(folder: Path) -> HeadSizes:
    """Only the head's sizes, to check them before a model is loaded. Raises HeadMismatchError as `load_head` does."""
    return _config(folder, _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise HeadMismatchError(f"no head at {folder}: there is no config.json; give a folder written by `haast train`")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f" is not JSON ({error})") from error
    form = document.get("format") if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or str(form) not in _CONFIGS or "head" not in document:
        raise HeadMismatchError(
            f"{path}: format {form!r} is none of {', '.join(map(repr, _CONFIGS))}; this file was not written by Haast"
        )
    for part in ("head", "about"):
        if not isinstance(document.setdefault(part, {}), dict):
            raise _damaged(path, f": {part!r} is not a JSON object")
    return document


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write one file, or shards and then their index. Removes the index, or the one file, of an earlier save."""
    split = split_torch_state_dict_into_shards(weights, max_shard_size=_SHARD_SIZE)
    index, single = folder / _INDEX, folder / "model.safetensors"
    for name, tensors in split.filename_to_tensors.items():
        _write(folder / name, {each: weights[each] for each in tensors})
    if split.is_sharded:
        write_json({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, index)
    (single if split.is_sharded else index).unlink(missing_ok=True)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index, weights = folder / _INDEX, dict[str, Tensor]()
    if not index.is_file():
        return _read_tensors(folder / "model.safetensors")
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, f" is not an index of weights ({error})") from error
    for name in sorted(map(str, files)):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise _damaged(index, f" names {name!r}, which is outside the head's folder")
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
    expected = module.state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        all_names = f"a {type(module).__name__} has exactly {sorted(expected)}"
        raise _damaged(path, f": missing tensors {missing}, unknown tensors {unknown}; {all_names}")
    for name, tensor in weights.items():
        shape = tuple(expected[name].shape)
        if tensor.shape != shape:
            raise _damaged(path, f": {name} is {tuple(tensor.shape)}, by config.json it must be {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise _damaged(path, f": {name} has NaN or infinite values")


def _drafted(vocab: Tensor, vocab_size: int) -> Tensor:
    """Which target ids are drafted, (vocab_size,) bool."""
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, vocab.long(), True)


def _draft_vocab(path: Path, tensors: dict[str, Tensor], size: int, vocab_size: int) -> Tensor:
    if "d2t" not in tensors or set(tensors) - {"d2t", "t2d"}:
        raise _damaged(path, f": expected the draft vocabulary d2t, found {sorted(tensors)}")
    ids = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
    ascending = len(ids) > 0 and bool((ids[1:] > ids[:-1]).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocab_size
    if len(ids) != size or not ascending:
        expected = f"a draft vocabulary of {size} ascending ids below {vocab_size}"
        raise _damaged(path, f": {len(ids)} ids do not form {expected}")
    return ids


def _damaged(path: Path, why: str) -> HeadMismatchError:
    return HeadMismatchError(f"{path}{why}; fetch or train the head again")


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
