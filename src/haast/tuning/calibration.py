"""Calibration data: accurately measured costs, and the draft shape that is fastest on recorded drafts.

Owns the values, their file (costs as in `latency`, and the chosen shape) and the check that a file is of this machine
and model. `haast.bench` measures them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from haast.tuning.latency import FORMAT, Latency, save, smoothed
from haast.tuning.policy import CostModel

_KINDS, _LARGEST = ("dynamic", "static", "chain"), 4096  # valid kinds, and the maximum of sizes, of a shape


@dataclass(frozen=True, kw_only=True)
class Batch(Latency):
    """Costs of a step with several rows, and the best shape for it. Times are medians, of all rows together.

    The keys of `forward_ms` are nodes per row.
    """

    shape: dict[str, Any]  # fields of the fastest `DraftShape`; empty: vanilla decoding is faster
    pace: CostModel | None  # limits each tree's size, a JSON object in the file; None (one row only): a fixed size
    expected: dict[str, float]  # from replay: tau, tokens_per_s, vanilla_tokens_per_s, speedup, nodes, levels

    def __post_init__(self) -> None:
        """Validate. Raises ValueError, TypeError, KeyError or OverflowError."""
        super().__post_init__()
        if isinstance(self.pace, dict):
            object.__setattr__(self, "pace", CostModel(**self.pace))
        if not self.level_ms or not self.first_ms:
            raise ValueError("the cost of drafting is missing")
        _check_shape(self.shape)
        _ = [float(self.expected[name]) for name in ("tau", "tokens_per_s", "vanilla_tokens_per_s", "speedup")]
        if self.pace is None and type(self) is Batch:
            raise ValueError("a batch has no pace")


@dataclass(frozen=True, kw_only=True)
class Calibration(Batch):
    """Costs of a step with one row, after `committed` slots, and the best shape for it."""

    identity: dict[str, Any]  # what it is valid for: machine, threads, model, head, packing
    committed: int
    weight_bytes: int  # read by one forward
    parameters: int  # multiplied per node of a forward
    head_parameters: int  # of the head and its draft LM head
    bandwidth: float | None  # memory bandwidth in bytes per second; None if not measured
    peak: float | None  # peak fp32 operations per second; None if not measured
    grid: list[dict[str, float]]  # tau for every replayed depth, width and nodes
    measured: dict[str, Any]  # date, versions, commit, steps
    batches: dict[int, Batch] = field(default_factory=dict)  # by number of rows; empty in files before 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = [float(self.expected[name]) for name in ("nodes", "levels")]
        _ = [float(entry[name]) for entry in self.grid for name in ("depth", "width", "nodes", "tau")]
        for name in ("weight_bytes", "parameters", "head_parameters", "committed", "bandwidth", "peak"):
            value = getattr(self, name)
            if not ((value is None and name in ("bandwidth", "peak")) or 0 <= float(value) < math.inf):
                raise ValueError(f"{name}={value} is not a finite number of 0 or more")
        if not isinstance(self.identity, dict):
            raise TypeError("identity must be an object")
        if any(rows < 2 for rows in self.batches):
            raise ValueError(f"batches must have 2 or more rows, not {min(self.batches)}")

    @property
    def pays(self) -> bool:
        """Whether drafting is faster than vanilla decoding here."""
        return bool(self.shape)

    @property
    def latency(self) -> Latency:
        """Costs by the nodes of all rows together; those of larger forwards are taken from `batches`."""
        points = dict(self.forward_ms)
        for rows, batch in self.batches.items():
            points.update({rows * n: ms for n, ms in batch.forward_ms.items() if rows * n > max(self.forward_ms)})
        return Latency(smoothed(points), self.first_ms, self.level_ms)

    def v(self, nodes: int) -> float:
        """Cost of a forward over `nodes` nodes, relative to one node. KeyError if it was not measured."""
        return self.forward_ms[nodes] / self.forward_ms[1]

    def roofline_ms(self, nodes: int) -> float | None:
        """Roofline of the linear layers over `nodes` nodes: the larger of bytes / bandwidth and operations / peak."""
        if self.bandwidth is None or self.peak is None:
            return None
        return 1e3 * max(self.weight_bytes / self.bandwidth, 2 * self.parameters * nodes / self.peak)

    def document(self) -> dict[str, Any]:
        """The JSON document of a file. `load` ignores additional keys."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        save(self, self.identity, path)

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any] | None = None) -> Calibration:
        """Load a file that `save` wrote; `identity` must match, None skips that check.

        Raises ValueError: no such file, not a calibration, or one of another machine, model, head or setting.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no calibration at {path} ({error.strerror}): run `haast calibrate`") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a calibration ({error}): run `haast calibrate` again") from error
        names = {each.name for each in fields(cls)}
        if isinstance(values, dict):
            values.setdefault("batches", {})  # old files have costs of one row only
        if not isinstance(values, dict) or values.get("format") != FORMAT or not names <= set(values):
            raise ValueError(f"{path} is not a calibration of format {FORMAT}: run `haast calibrate` again")
        try:
            values["batches"] = {int(rows): Batch(**each) for rows, each in values["batches"].items()}
            calibration = cls(**{name: values[name] for name in names})
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged ({error}): run `haast calibrate` again") from error
        calibration.check(identity, str(path))
        return calibration

    def check(self, identity: dict[str, Any] | None, name: str) -> None:
        """Raise ValueError, with the differences, if the calibration is of another machine, model, head or setting."""
        if identity is None or identity == self.identity:
            return
        pairs = {key: (self.identity.get(key), identity.get(key)) for key in sorted({*identity, *self.identity})}
        other = "; ".join(f"{key} {saved!r}, here {here!r}" for key, (saved, here) in pairs.items() if saved != here)
        raise ValueError(f"the calibration {name} is of another setting ({other}): run `haast calibrate`")


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, dict):
        raise TypeError("a shape must be an object")
    if not shape:
        return
    least = {"depth": 1, "top_k": 1, "width": 1, "nodes": 2}  # a tree has a root and a draft
    valid = set(shape) == {"kind", *least} and shape["kind"] in _KINDS
    if not (valid and all(type(shape[name]) is int and low <= shape[name] <= _LARGEST for name, low in least.items())):
        raise ValueError(f"the shape {shape} is invalid")
