"""A head on disk: `config.json`, `model.safetensors`, and `draft_vocab.safetensors` where it drafts over fewer tokens.

Owns the files and their checks. `model.safetensors` holds the official EAGLE-1 layout and nothing else; the draft
vocabulary lies beside it as `d2t` (target id = draft id + d2t[draft id], the EAGLE-3 convention).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from haast.errors import HeadMismatchError
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig

_FORMAT = "haast-feat-extrapolator-1"
# What transformers and torch raise at sizes that make no Llama layer: a word, zero, a negative, an unknown name.
_NO_SIZES = (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class Head:
    """A loaded head: the module, the target ids it drafts over (None: all), and what its files say of its making."""

    module: FeatExtrapolator
    draft_vocab: Tensor | None  # (draft vocabulary,) int64, ascending target ids
    about: dict[str, Any]


def save_head(
    folder: Path,
    config: FeatExtrapolatorConfig,
    weights: dict[str, Tensor],
    draft_vocab: Tensor | None,
    about: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a head atomically file by file. `weights` are plain tensors under the official names.

    Raises:
        ValueError: a weight is not finite in `dtype`.
    """
    stored = {name: tensor.detach().to(dtype) for name, tensor in weights.items()}
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that {dtype} can't: save the head in torch.float32")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.safetensors", stored)
    if draft_vocab is not None:
        offsets = draft_vocab.long() - torch.arange(len(draft_vocab))
        _write(folder / "draft_vocab.safetensors", {"d2t": offsets})
    document: dict[str, Any] = {"format": _FORMAT, "head": asdict(config), "about": about or {}}
    if draft_vocab is not None:
        document["draft_vocab_size"] = len(draft_vocab)
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "config.json")


def load_head(folder: Path) -> Head:
    """Read a head in float32 and check every tensor.

    Raises:
        HeadMismatchError: files are missing or corrupt, tensors are missing, unknown or of the wrong shape.
    """
    document = _read_config(folder)
    known = {field.name for field in fields(FeatExtrapolatorConfig)}
    unknown = set(document["head"]) - known
    if unknown:
        raise HeadMismatchError(f"{folder / 'config.json'}: unknown keys {sorted(unknown)}; known are {sorted(known)}")
    try:
        module = FeatExtrapolator(FeatExtrapolatorConfig(**document["head"]))
    except _NO_SIZES as error:
        raise HeadMismatchError(f"{folder / 'config.json'}: sizes do not make a head: {error}") from error
    weights = _read_tensors(folder / "model.safetensors")
    _check_tensors(folder, module, weights)
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    vocab = None
    size = document.get("draft_vocab_size")
    if size is not None:
        vocab = _draft_vocab(folder / "draft_vocab.safetensors", int(size), module.config.vocab_size)
    return Head(module.eval().requires_grad_(False), vocab, dict(document.get("about", {})))


def check_fits(head: FeatExtrapolatorConfig, hidden_size: int, vocab_size: int, target: str) -> None:
    """Refuse a head made for another target.

    Raises:
        HeadMismatchError: hidden size or vocabulary differ; the message gives both sides.
    """
    for name, mine, theirs in (
        ("hidden_size", head.hidden_size, hidden_size),
        ("vocab_size", head.vocab_size, vocab_size),
    ):
        if mine != theirs:
            raise HeadMismatchError(
                f"the head was made for another model: its {name} is {mine}, {target} has {theirs}; "
                f"use a head trained for {target}, or train one with `haast train --model {target}`"
            )


def read_head_config(folder: Path) -> FeatExtrapolatorConfig:
    """The head's sizes alone, to check them before a model loads. Raises HeadMismatchError as `load_head` does."""
    try:
        return FeatExtrapolatorConfig(**_read_config(folder)["head"])
    except TypeError as error:
        raise HeadMismatchError(f"{folder / 'config.json'}: sizes do not make a head: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise HeadMismatchError(f"no head at {folder}: there is no config.json; give a folder written by `haast train`")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HeadMismatchError(f"{path} is not JSON ({error}); fetch or train the head again") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT or "head" not in document:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise HeadMismatchError(f"{path}: format {found!r} is not {_FORMAT!r}; this file was not written by Haast")
    return document


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise HeadMismatchError(f"{path} is missing; fetch or train the head again") from error
    except (SafetensorError, OSError) as error:
        raise HeadMismatchError(f"{path} is corrupt ({error}); fetch or train the head again") from error


def _check_tensors(folder: Path, module: FeatExtrapolator, weights: dict[str, Tensor]) -> None:
    wanted = module.state_dict()
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unknown:
        raise HeadMismatchError(
            f"{folder / 'model.safetensors'}: missing tensors {missing}, unknown tensors {unknown}; "
            f"a FeatExtrapolator has exactly {sorted(wanted)}"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise HeadMismatchError(
                f"{folder / 'model.safetensors'}: {name} is {tuple(tensor.shape)}, config.json says "
                f"{tuple(wanted[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise HeadMismatchError(
                f"{folder / 'model.safetensors'}: {name} holds NaN or infinity; train the head again"
            )


def _draft_vocab(path: Path, size: int, vocab_size: int) -> Tensor:
    tensors = _read_tensors(path)
    if set(tensors) != {"d2t"}:
        raise HeadMismatchError(f"{path}: expected the tensor d2t alone, found {sorted(tensors)}")
    ids = tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))
    ascending = len(ids) > 0 and bool((ids[1:] > ids[:-1]).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocab_size
    if len(ids) != size or not ascending:
        raise HeadMismatchError(
            f"{path}: {len(ids)} ids do not form a draft vocabulary of {size} ascending ids below {vocab_size}"
        )
    return ids


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
