"""Which calibration belongs to a target and its drafter, and how it is put to use. Measures nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from haast.drafters.eagle import EagleDrafter
from haast.drafters.shape import DraftShape, shape_for, usual_nodes
from haast.drafters.ways import Way, usual_ways
from haast.speed.calibration import Calibration
from haast.speed.machine import machine_identity
from haast.speed.packing import PackedLinear
from haast.target import Target


def identity(target: Target, drafter: EagleDrafter) -> dict[str, Any]:
    """What a calibration is good for: this machine, this model and head, these settings."""
    config = target.config
    return {
        **machine_identity(),
        "device": str(target.device),
        "class": type(target.model).__name__,
        "layers": target.layers,
        "hidden": target.hidden_size,
        "vocabulary": target.vocab_size,
        "inner": int(getattr(config, "intermediate_size", 0) or 0),
        "dtype": str(target.dtype).removeprefix("torch."),
        "packing": target.packing,
        "head": _digest(drafter),
        **({} if target.compiled is None else {"compile": "on"}),
        **({"spread": target.spread} if target.spread else {}),
    }


def default_path(known: dict[str, Any]) -> Path:
    """Where the calibration for this identity is kept between runs."""
    key = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()[:16]
    folder: Path = cached_assets_path(library_name="haast", namespace="calibration", subfolder="default")
    return folder / f"{key}.json"


def find_calibration(target: Target, drafter: EagleDrafter, wanted: str | Path = "auto") -> Calibration | None:
    """The calibration to use: "auto" is the kept one if there is one, "off" none, else a file.

    Raises:
        ValueError: a file that is not there, no calibration, or one of another machine, model or head.
    """
    if wanted == "off":
        return None
    known = identity(target, drafter)
    if wanted != "auto":
        return Calibration.load(Path(wanted), known)
    path = default_path(known)
    if not path.is_file():
        return None
    try:
        return Calibration.load(path, known)
    except ValueError:
        return None  # of an older Haast; `haast calibrate` writes it anew


def apply_calibration(drafter: EagleDrafter, calibration: Calibration) -> bool:
    """Draft as the calibration found best; False, and nothing changed, where it found that drafting does not pay."""
    if not calibration.pays:
        return False
    shape = DraftShape(**calibration.shape)
    measured = {
        rows: Way(DraftShape(**batch.shape) if batch.shape else None, batch.chosen_pace)
        for rows, batch in calibration.batches.items()
    }
    drafter.reshape(shape, calibration.chosen_pace, measured or usual_ways(shape, drafter.device.type))
    return True


def draft_as_usual(target: Target, drafter: EagleDrafter, wanted: str | Path = "auto") -> bool:
    """Draft what a calibration found best here, else what is usual for the device; False where none pays.

    Raises:
        ValueError: see `find_calibration`.
    """
    kind = target.device.type
    usual = shape_for(usual_nodes(kind))
    drafter.reshape(usual, ways=usual_ways(usual, kind))
    found = find_calibration(target, drafter, wanted)
    return found is None or apply_calibration(drafter, found)


def weights_read(target: Target) -> tuple[int, int]:
    """Bytes and parameters of the linear layers, LM head included: what one forward reads and multiplies."""
    size = parameters = 0
    for module in target.model.modules():
        if isinstance(module, PackedLinear):
            size += module.packed.nbytes + module.dense.nbytes
            parameters += module.in_features * module.out_features
        elif isinstance(module, torch.nn.Linear):
            size += module.weight.nbytes
            parameters += module.weight.numel()
    return size, parameters


def _digest(drafter: EagleDrafter) -> str:
    """A head by its tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(drafter.tensors().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
