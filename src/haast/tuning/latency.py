"""Costs of the parts of a step (`Latency`): measured at first use, then saved on disk.

    v(n)   cost of a forward over n nodes of all rows, relative to one node: eight rows of two nodes cost about as much
           as one row of sixteen

`haast calibrate` measures the same more accurately (`calibration`) and saves it in the same format. Load on the machine
slows down all parts, so decisions use ratios of minimum times. No decision reads a clock, so runs are reproducible.
Knows no drafter: callers pass a function that measures the cost of drafting.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from huggingface_hub import cached_assets_path

from haast import native
from haast.device import cpu_name
from haast.files import write_json
from haast.native.library import thread_count
from haast.target.support import last_layer_config
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel, interpolate

_LOG = logging.getLogger(__name__)
_version = functools.cache(version)  # `version` reads a file
FORMAT = 1
# Numbers of nodes to measure. With a slow model there is time for the first three only.
_POINTS: tuple[int, ...] = (1, 2, 8, 4, 16, 32, 64)
_DEVICE_POINTS: tuple[int, ...] = (1, 2, 64, 8, 256, 16, 32, 128)
DraftCost = tuple[float, dict[int, float]]  # ms of the first level, and of each further one by width
_CACHE_SIZE = 4096  # entries of `Latency._steps`
_MIN_POINTS, _ROUNDS, _SECONDS, _COMMITTED = 3, 5, 2.0, 32


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the parts of a step. Keys may be strings, as in a JSON file.

    Attributes:
        forward_ms: target forward by the nodes of all rows together (must have 1).
        first_ms: one row's first draft level, `observe` included.
        level_ms: each further draft level, by its width.
        overhead_ms: acceptance, commit and stop rules, if measured.

    Raises ValueError, TypeError, AttributeError or OverflowError for invalid values.
    """

    forward_ms: dict[int, float]
    first_ms: float = 0.0
    level_ms: dict[int, float] = field(default_factory=dict)
    overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward_ms", "level_ms"):
            costs = {int(count): float(ms) for count, ms in getattr(self, name).items()}
            if not all(0 < ms < math.inf for ms in costs.values()) or (name == "forward_ms" and 1 not in costs):
                raise ValueError(f"{name}={costs}: give ms above 0, and in forward_ms that of 1 node")
            object.__setattr__(self, name, costs)
        for name in ("first_ms", "overhead_ms"):
            if not 0 <= float(getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number of 0 or more")

    def forward(self, nodes: float) -> float:
        """Ms of a target forward over `nodes` nodes of all rows together."""
        return interpolate(self.forward_ms, nodes)

    def level(self, width: int, rows: int = 1) -> float:
        """Ms of a further draft level with `width` nodes per row. Scales with rows like the target's forward."""
        return interpolate(self.level_ms, width) * self._growth(rows) if self.level_ms else 0.0

    def draft(self, levels: int, width: int, rows: int = 1) -> float:
        """Ms of drafting `levels` levels for all rows."""
        return self.first_ms * self._growth(rows) + (levels - 1) * self.level(width, rows) if levels > 0 else 0.0

    def catch_up(self, pairs: int) -> float:
        """Ms of running a head over `pairs` pending positions."""
        return self.first_ms * self.forward(pairs) / self.forward(1) if pairs else 0.0

    def step(self, rows: int, nodes: float, levels: int = 0, width: int = 1) -> float:
        """Ms of drafting and verifying `nodes` nodes of every row."""
        key = (rows, nodes, levels, width)
        ms = self._steps.get(key)
        if ms is None:
            if len(self._steps) >= _CACHE_SIZE:
                self._steps.clear()
            ms = self._steps[key] = self._step(*key)
        return ms

    @functools.cached_property
    def _steps(self) -> dict[tuple[int, float, int, int], float]:
        """Cache of `step`: all requests need the same few values. No dataclass field, so files leave it out."""
        return {}

    def _step(self, rows: int, nodes: float, levels: int, width: int) -> float:
        return self.draft(levels, width, rows) + self.forward(rows * nodes) + self.overhead_ms

    def cost_model(
        self, width: int, rate: float, most: int, rows: int = 1, *, trust: float = 1.0, follow: float = 0.7
    ) -> CostModel:
        """The `CostModel` of a drafter that expands `width` nodes per level, for trees of up to `most` nodes."""
        forwards = tuple(self.forward(rows * nodes) for nodes in range(1, most + 1))
        return CostModel(forwards, max(self.level(width, rows), 1e-6), rate, trust, follow)

    def _growth(self, rows: int) -> float:
        return self.forward(rows) / self.forward(1)


def smoothed(points: dict[int, float]) -> dict[int, float]:
    """Remove noise: more nodes never cost less, and n nodes never more than n forwards over one."""
    result, previous = dict[int, float](), 0.0
    for nodes in sorted(points):
        previous = result[nodes] = max(previous, min(points[nodes], nodes * points[1]))
    return result


def target_identity(target: Target) -> dict[str, Any]:
    """What measurements of a target are valid for: this machine, models of these sizes, these settings."""
    config = last_layer_config(target.config)
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
        "inner": getattr(config, "intermediate_size", None) or 0,  # a list where layers differ (Gemma 3n)
        "dtype": str(target.dtype).removeprefix("torch."),
        "packing": target.packing,
        **({} if target.compiled is None else {"compile": "on"}),
        **({"spread": target.spread} if target.spread else {}),
    }


def file_for(identity: dict[str, Any], kind: str) -> Path:
    """The file of the measurements ("calibration" or "latency") for an identity."""
    key = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
    folder: Path = cached_assets_path(library_name="haast", namespace=kind, subfolder="default")
    return folder / f"{key}.json"


_measured: dict[str, Latency] = {}  # by file name: transformers' generate creates a Target for every call


def measurable(target: Target) -> bool:
    """Whether costs can be measured in a few seconds: not if each size must be compiled or other ranks take part."""
    return target.compiled is None and target.ranks is None


def latency_of(
    target: Target, drafts: Callable[[], DraftCost] | None = None, drafter_identity: dict[str, Any] | None = None
) -> Latency | None:
    """Costs of a step: measured once for this machine and model, then cached in memory and on disk.

    `drafts` measures `first_ms` and `level_ms` (None: drafting takes almost no time); `drafter_identity` is what these
    are valid for, in addition to the target's identity. Does not change the target's KV cache. None if the target is
    not `measurable`.
    """
    if not measurable(target):
        return None
    identity = {**target_identity(target), **(drafter_identity or {})}
    path = file_for(identity, "latency")
    with target.lock:  # so that two threads do not both measure
        latency = _measured.get(path.name) or _read(path)
        if latency is None:
            forward_ms = measure_forwards(target)
            latency = Latency(forward_ms) if drafts is None else Latency(forward_ms, *drafts())
            try:
                save(latency, identity, path)
            except (OSError, ValueError) as error:
                _LOG.info("the measured costs could not be saved: %s", error)
        return _measured.setdefault(path.name, latency)


def keep(target: Target, found: Latency) -> Path:
    """Save more accurate costs, which `latency_of` returns for the target from now on; returns the file."""
    identity = target_identity(target)
    path = file_for(identity, "latency")
    save(found, identity, path)
    _measured[path.name] = found
    return path


def measure_forwards(
    target: Target, seconds: float = _SECONDS, clock: Callable[[], float] = perf_counter, rounds: int = _ROUNDS
) -> dict[int, float]:
    """Nodes -> ms of a forward after a short text, the minimum of a few rounds; takes about `seconds` at most."""
    points = _POINTS if target.device.type == "cpu" else _DEVICE_POINTS
    committed = _COMMITTED
    if target.context_length is not None:
        points = tuple(n for n in points if n <= max(target.context_length // 2, 2))
        committed = min(committed, max(target.context_length - max(points), 1))
    times = time_forwards(target, points, committed, rounds, seconds=seconds, clock=clock)
    return smoothed({nodes: min(each) for nodes, each in times.items()})


def time_forwards(
    target: Target,
    points: Sequence[int],
    committed: int,
    rounds: int,
    rows: int = 1,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = perf_counter,
) -> dict[int, list[float]]:
    """Nodes per row -> ms of forwards over them, after `committed` slots per row. Each round measures all points.

    Stops after `seconds`, but measures at least the first three points.
    """
    times: dict[int, list[float]] = {}
    with target.lock, torch.inference_mode(), target.step_threads():
        cache = target.new_cache(rows, committed + max(points))
        target.forward(_chain(target, committed, rows), cache, last_only=True)
        cache.advance([committed] * rows)
        start = clock()
        for _ in range(rounds):
            for nodes in points:
                if len(times) >= min(_MIN_POINTS, len(points)) and clock() - start > seconds:
                    return times
                run = functools.partial(target.forward, _chain(target, nodes, rows), cache)
                times.setdefault(nodes, []).append(timed(target, run, clock))
    return times


def timed(target: Target, run: Callable[[], object], clock: Callable[[], float] = perf_counter) -> float:
    """Ms that `run` takes on the target's device; above 0."""
    if target.device.type != "cuda":
        start = clock()
        run()
        return max(1e3 * (clock() - start), 1e-6)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(target.device)
    before.record()
    run()
    after.record()
    after.synchronize()
    return max(float(before.elapsed_time(after)), 1e-6)


def _chain(target: Target, nodes: int, rows: int) -> DraftTree:
    return DraftTree.chain(torch.arange(nodes, device=target.device).expand(rows, -1) % target.vocab_size)


def save(found: Latency, identity: dict[str, Any], path: Path) -> None:
    """Write costs and all fields of subclasses to a file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"format": FORMAT, "identity": identity, **asdict(found)}, path, indent=1)


def _read(path: Path) -> Latency | None:
    """The saved costs; None if there is no valid file: then they are measured again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        latency = Latency(values["forward_ms"], values["first_ms"], values["level_ms"])
        return latency if values["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
