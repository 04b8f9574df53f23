"""Which calibration belongs to a target and its drafter, and how it is put to use. Measures nothing."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from haast.drafters.batch_policy import Way, nodes_for, usual_ways
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.target.packing import PackedLinear
from haast.target.target import Target
from haast.tuning.calibration import Batch, Calibration
from haast.tuning.latency import file_for, target_identity


def identity(target: Target, drafter: EagleDrafter) -> dict[str, Any]:
    """What a calibration is good for: this machine, this model and head, these settings."""
    return {**target_identity(target), "head": _digest(drafter)}


def default_path(known: dict[str, Any]) -> Path:
    """Where the calibration for this identity is kept between runs."""
    return file_for(known, "calibration")


def find_calibration(target: Target, drafter: EagleDrafter, wanted: str | Path = "auto") -> Calibration | None:
    """The calibration to use: "auto" is the kept one if there is one, "off" none, else a file.

    Raises ValueError for a file that is not there, no calibration, or of another machine, model or head.
    """
    if wanted == "off":
        return None
    known = identity(target, drafter)
    if wanted != "auto":
        return Calibration.load(Path(wanted), known)
    path = default_path(known)
    with suppress(ValueError):  # of an older Haast; `haast calibrate` writes it anew
        return Calibration.load(path, known) if path.is_file() else None
    return None


def apply_calibration(drafter: EagleDrafter, calibration: Calibration) -> bool:
    """Draft as the calibration found best; False, and nothing changed, where it found that drafting does not pay."""
    if not calibration.pays:
        return False
    batches = {rows: _way(batch) for rows, batch in calibration.batches.items()}
    first = replace(_way(calibration), nodes=calibration.expected["nodes"])
    assert first.shape is not None, "it pays"
    drafter.reshape(first.shape, first.pace, {**(batches or usual_ways(first.shape, drafter.device.type)), 1: first})
    return True


def _way(found: Batch | Calibration) -> Way:
    if not found.shape:
        return Way(None, found.chosen_pace)
    gain = found.expected["tau"] - 1
    return Way(DraftShape(**found.shape), found.chosen_pace, nodes_for(gain), gain)


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
