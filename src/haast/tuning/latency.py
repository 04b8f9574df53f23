"""What a target forward costs by its nodes, and drafting by its levels: measured at first use, then kept on disk.

    v(n)   a forward over n nodes, of all rows together, in forwards over one: what eight rows of two nodes cost is
           about what one row of sixteen does

A busy machine seems slow all over; decisions rest on ratios, and the least time of several counts. No decision looks at
a clock again, so runs repeat. Knows no drafter: who drafts says how long that takes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from haast import native
from haast.files import write_json
from haast.native.library import thread_count
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.calibration import Calibration, milliseconds
from haast.tuning.machine import cpu_name
from haast.tuning.policy import interpolate

_LOG = logging.getLogger(__name__)
_version = functools.cache(version)  # it reads a file
FORMAT = 1
# The first three stand for all where a model is so slow that there is no time for more.
_POINTS: tuple[int, ...] = (1, 2, 8, 4, 16, 32, 64)
_DEVICE_POINTS: tuple[int, ...] = (1, 2, 64, 8, 256, 16, 32, 128)
DraftCost = tuple[float, dict[int, float]]  # ms of the first level, and of each further one by width
_LEAST, _ROUNDS, _SECONDS, _COMMITTED = 3, 5, 2.0, 32


@dataclass(frozen=True)
class Latency:
    """Milliseconds, of the fastest runs.

    `forward_ms` by the nodes of all rows together (has 1), `first_ms` of one row's first level of drafts, observing
    included, `level_ms` of every further level by its width.
    """

    forward_ms: dict[int, float]
    first_ms: float = 0.0
    level_ms: dict[int, float] = field(default_factory=dict)
    _found: dict[float, float] = field(default_factory=dict, init=False, repr=False, compare=False)  # every step asks

    def __post_init__(self) -> None:
        times = [*self.forward_ms.values(), *self.level_ms.values()]
        if 1 not in self.forward_ms or not all(0 < ms < math.inf for ms in times):
            raise ValueError(f"forward_ms={self.forward_ms}, level_ms={self.level_ms}: give ms above 0, of 1 node too")
        if not 0 <= self.first_ms < math.inf:
            raise ValueError(f"first_ms={self.first_ms} is no number from 0 on")

    def forward(self, nodes: float) -> float:
        """A target forward over so many nodes of all rows."""
        found = self._found.get(nodes)
        if found is None:
            found = interpolate(self.forward_ms, nodes)
            if nodes == int(nodes):
                self._found[nodes] = found
        return found

    def level(self, width: int, rows: int = 1) -> float:
        """A further level of drafts, of so many nodes a row. A head's forward grows with rows as the target's does."""
        return interpolate(self.level_ms, width) * self._growth(rows) if self.level_ms else 0.0

    def draft(self, levels: int, width: int, rows: int = 1) -> float:
        """Drafting so many levels for every row."""
        return self.first_ms * self._growth(rows) + (levels - 1) * self.level(width, rows) if levels > 0 else 0.0

    def step(self, rows: int, nodes: float, levels: int = 0, width: int = 1) -> float:
        """Drafting and verifying `nodes` nodes of every row."""
        return self.forward(rows * nodes) + self.draft(levels, width, rows)

    def _growth(self, rows: int) -> float:
        return self.forward(rows) / self.forward(1)

    @classmethod
    def of_calibration(cls, found: Calibration) -> Latency:
        """What a calibration has measured, of batches too."""
        points = dict(found.forward_ms)
        for rows, batch in found.batches.items():
            points.update({rows * n: ms for n, ms in batch.forward_ms.items() if rows * n > max(found.forward_ms)})
        return cls(smoothed(points), found.first_ms, dict(found.level_ms))


def smoothed(points: dict[int, float]) -> dict[int, float]:
    """More nodes never cost less, nor more than one after the other: what says so was disturbed."""
    found, most = dict[int, float](), 0.0
    for nodes in sorted(points):
        most = found[nodes] = max(most, min(points[nodes], nodes * points[1]))
    return found


def target_identity(target: Target) -> dict[str, Any]:
    """What measurements of a target are good for: this machine, models of these sizes, these settings."""
    config = target.config
    return {
        "cpu": cpu_name(),
        "cpu_features": native.features(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": thread_count(),  # the same inside and outside of a decode step
        "torch": str(torch.__version__),
        "haast": _version("haast"),
        "device": str(target.device),
        "class": type(target.model).__name__,
        "layers": target.layers,
        "hidden": target.hidden_size,
        "vocabulary": target.vocab_size,
        "inner": int(getattr(config, "intermediate_size", 0) or 0),
        "dtype": str(target.dtype).removeprefix("torch."),
        "packing": target.packing,
        **({} if target.compiled is None else {"compile": "on"}),
        **({"spread": target.spread} if target.spread else {}),
    }


def file_for(known: dict[str, Any], kind: str) -> Path:
    """Where what was measured ("calibration" or "latency") for this identity is kept between runs."""
    key = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()[:16]
    folder: Path = cached_assets_path(library_name="haast", namespace=kind, subfolder="default")
    return folder / f"{key}.json"


_measured: dict[str, Latency] = {}  # by file name: a decoder for any model makes a Target anew for every call


def measurable(target: Target) -> bool:
    """Whether a few seconds are enough: not where layers are compiled for every size, or ranks had to take part."""
    return target.compiled is None and target.ranks is None


def latency_of(
    target: Target, drafts: Callable[[], DraftCost] | None = None, known: dict[str, Any] | None = None
) -> Latency | None:
    """What steps cost here: measured once for this machine and model, then kept in memory and on disk.

    `drafts` measures `first_ms` and `level_ms` (None where drafts cost nothing to speak of), and `known` is what they
    are good for, beside the target, whose own keys and values are left alone. None where it is not `measurable`.
    """
    if not measurable(target):
        return None
    identity = {**target_identity(target), **(known or {})}
    path = file_for(identity, "latency")
    with target.lock:  # of two threads the second finds what the first has measured
        found = _measured.get(path.name) or _read(path)
        if found is None:
            forward_ms = measure_forwards(target)
            found = Latency(forward_ms) if drafts is None else Latency(forward_ms, *drafts())
            try:
                _write(found, identity, path)
            except (OSError, ValueError) as error:
                _LOG.info("what forwards cost is not kept: %s", error)
        return _measured.setdefault(path.name, found)


def keep(target: Target, found: Latency) -> Path:
    """Let `latency_of` find this for the target from now on, as measured with more patience; returns the file."""
    identity = target_identity(target)
    path = file_for(identity, "latency")
    _write(found, identity, path)
    _measured[path.name] = found
    return path


def measure_forwards(
    target: Target, seconds: float = _SECONDS, clock: Callable[[], float] = perf_counter, rounds: int = _ROUNDS
) -> dict[int, float]:
    """Nodes -> ms of a forward after a short text, the least of a few rounds; as many as fit into `seconds`."""
    points = _POINTS if target.device.type == "cpu" else _DEVICE_POINTS
    committed = _COMMITTED
    if target.context_length is not None:
        points = tuple(n for n in points if n <= max(target.context_length // 2, 2))
        committed = min(committed, max(target.context_length - max(points), 1))
    least: dict[int, float] = {}
    with target.lock, torch.inference_mode(), target.step_threads():
        cache = target.new_cache(1, committed + max(points))
        target.forward(_chain(target, committed), cache, last_only=True)
        cache.advance([committed])
        begun = clock()
        for _ in range(rounds):
            for nodes in points:
                if len(least) >= min(_LEAST, len(points)) and clock() - begun > seconds:
                    return smoothed(least)
                tree = _chain(target, nodes)
                ms = timed(target, lambda tree=tree: target.forward(tree, cache), clock)  # type: ignore[misc]
                least[nodes] = min(least.get(nodes, math.inf), ms)
    return smoothed(least)


def timed(target: Target, run: Callable[[], object], clock: Callable[[], float] = perf_counter) -> float:
    """Ms that `run` takes on the target's device; above 0."""
    if target.device.type != "cuda":
        begun = clock()
        run()
        return max(1e3 * (clock() - begun), 1e-6)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(target.device)
    before.record()
    run()
    after.record()
    after.synchronize()
    return max(float(before.elapsed_time(after)), 1e-6)


def _chain(target: Target, nodes: int) -> DraftTree:
    return DraftTree.chain((torch.arange(nodes, device=target.device) % target.vocab_size).unsqueeze(0))


def _write(found: Latency, identity: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    costs = {"forward_ms": found.forward_ms, "first_ms": found.first_ms, "level_ms": found.level_ms}
    write_json({"format": FORMAT, "identity": identity, **costs}, path, indent=1)


def _read(path: Path) -> Latency | None:
    """What is kept; None where nothing is, or something else: then it is measured anew."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        forward, level = (milliseconds(values[name]) for name in ("forward_ms", "level_ms"))
        return Latency(forward, float(values["first_ms"]), level) if values["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
