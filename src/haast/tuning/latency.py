"""What the parts of a step cost (`Latency`): measured at first use, then kept on disk.

    v(n)   a forward over n nodes, of all rows together, in forwards over one: what eight rows of two nodes cost is
           about what one row of sixteen does

`haast calibrate` measures the same with more patience (`calibration`), and keeps it in the same form. A busy machine
seems slow all over; decisions rest on ratios, and the least time of several counts. No decision looks at a clock again,
so runs repeat. Knows no drafter: who drafts says how long that takes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel, interpolate

_LOG = logging.getLogger(__name__)
_version = functools.cache(version)  # it reads a file
FORMAT = 1
# The first three stand for all where a model is so slow that there is no time for more.
_POINTS: tuple[int, ...] = (1, 2, 8, 4, 16, 32, 64)
_DEVICE_POINTS: tuple[int, ...] = (1, 2, 64, 8, 256, 16, 32, 128)
DraftCost = tuple[float, dict[int, float]]  # ms of the first level, and of each further one by width
_MOST_STEPS = 4096  # that are remembered
_LEAST, _ROUNDS, _SECONDS, _COMMITTED = 3, 5, 2.0, 32


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the parts of a step. As a file holds them, with text for keys, they are understood too.

    Attributes:
        forward_ms: a target forward by the nodes of all rows together (has 1).
        first_ms: one row's first level of drafts, observing included.
        level_ms: every further level, by its width.
        overhead_ms: acceptance, commit and stop rules, where they were measured.

    Raises ValueError, TypeError, AttributeError or OverflowError for values that no measurement gives.
    """

    forward_ms: dict[int, float]
    first_ms: float = 0.0
    level_ms: dict[int, float] = field(default_factory=dict)
    overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward_ms", "level_ms"):
            costs = {int(count): float(ms) for count, ms in getattr(self, name).items()}
            if not all(0 < ms < math.inf for ms in costs.values()) or (name == "forward_ms" and 1 not in costs):
                raise ValueError(f"{name}={costs}: give ms above 0, of a forward over 1 node too")
            object.__setattr__(self, name, costs)
        for name in ("first_ms", "overhead_ms"):
            if not 0 <= float(getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is no number from 0 on")

    def forward(self, nodes: float) -> float:
        """A target forward over so many nodes of all rows."""
        return interpolate(self.forward_ms, nodes)

    def level(self, width: int, rows: int = 1) -> float:
        """A further level of drafts, of so many nodes a row. A head's forward grows with rows as the target's does."""
        return interpolate(self.level_ms, width) * self._growth(rows) if self.level_ms else 0.0

    def draft(self, levels: int, width: int, rows: int = 1) -> float:
        """Drafting so many levels for every row."""
        return self.first_ms * self._growth(rows) + (levels - 1) * self.level(width, rows) if levels > 0 else 0.0

    def catching_up(self, pairs: int) -> float:
        """Running a head over so many positions that it has left unobserved."""
        return self.first_ms * self.forward(pairs) / self.forward(1) if pairs else 0.0

    def step(self, rows: int, nodes: float, levels: int = 0, width: int = 1) -> float:
        """Drafting and verifying `nodes` nodes of every row."""
        asked = (rows, nodes, levels, width)
        found = self._steps.get(asked)
        if found is None:
            if len(self._steps) >= _MOST_STEPS:
                self._steps.clear()
            found = self._steps[asked] = self._step(*asked)
        return found

    @cached_property
    def _steps(self) -> dict[tuple[int, float, int, int], float]:
        """Every step looks up the same few costs again, for all of its requests. No field: files do not hold it."""
        return {}

    def _step(self, rows: int, nodes: float, levels: int, width: int) -> float:
        return self.draft(levels, width, rows) + self.forward(rows * nodes) + self.overhead_ms

    def cost_model(
        self, width: int, rate: float, most: int, rows: int = 1, *, trust: float = 1.0, follow: float = 0.7
    ) -> CostModel:
        """These costs as a drafter weighs them that expands `width` nodes a level, for trees of up to `most` nodes."""
        forwards = tuple(self.forward(rows * nodes) for nodes in range(1, most + 1))
        return CostModel(forwards, max(self.level(width, rows), 1e-6), rate, trust, follow)

    def _growth(self, rows: int) -> float:
        return self.forward(rows) / self.forward(1)


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
                save(found, identity, path)
            except (OSError, ValueError) as error:
                _LOG.info("what forwards cost is not kept: %s", error)
        return _measured.setdefault(path.name, found)


def keep(target: Target, found: Latency) -> Path:
    """Let `latency_of` find this for the target from now on, as measured with more patience; returns the file."""
    identity = target_identity(target)
    path = file_for(identity, "latency")
    save(found, identity, path)
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
    """Nodes of every row -> ms of forwards over them, after `committed` slots a row. Every round is over all points.

    After `seconds` it ends, but for a few points that every measurement has.
    """
    times: dict[int, list[float]] = {}
    with target.lock, torch.inference_mode(), target.step_threads():
        cache = target.new_cache(rows, committed + max(points))
        target.forward(_chain(target, committed, rows), cache, last_only=True)
        cache.advance([committed] * rows)
        begun = clock()
        for _ in range(rounds):
            for nodes in points:
                if len(times) >= min(_LEAST, len(points)) and clock() - begun > seconds:
                    return times
                run = functools.partial(target.forward, _chain(target, nodes, rows), cache)
                times.setdefault(nodes, []).append(timed(target, run, clock))
    return times


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


def _chain(target: Target, nodes: int, rows: int) -> DraftTree:
    return DraftTree.chain(torch.arange(nodes, device=target.device).expand(rows, -1) % target.vocab_size)


def save(found: Latency, identity: dict[str, Any], path: Path) -> None:
    """Write costs, and whatever else they come with, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"format": FORMAT, "identity": identity, **asdict(found)}, path, indent=1)


def _read(path: Path) -> Latency | None:
    """What is kept; None where nothing is, or something else: then it is measured anew."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Latency(values["forward_ms"], values["first_ms"], values["level_ms"])
        return found if values["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
