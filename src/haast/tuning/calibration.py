"""A calibration: costs measured with care, and the drafting that makes the most of them on recorded drafts.

Owns the values, their file (what `latency` keeps, and the choice beside it) and the check that a file is of this
machine and model. Measuring is `haast.bench`'s.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from haast.tuning.latency import FORMAT, Latency, save, smoothed
from haast.tuning.policy import CostModel

_KINDS, _LARGEST = ("dynamic", "static", "chain"), 4096  # of shapes; none larger is ever tried


@dataclass(frozen=True, kw_only=True)
class Batch(Latency):
    """What steps of several rows cost, all of them together, and the choice made from that. Times are medians.

    `forward_ms` are by the nodes of a row, and everything else is of all rows too.
    """

    shape: dict[str, Any]  # of the fastest tree, see DraftShape; empty: vanilla decoding is faster
    pace: CostModel | None  # what trees keep to, a table in a file; None, for one row alone: trees of one size
    expected: dict[str, float]  # replayed: tau, tokens_per_s, vanilla_tokens_per_s, speedup, nodes, levels

    def __post_init__(self) -> None:
        """Refuse values that no measurement gives. Raises ValueError, TypeError, KeyError or OverflowError."""
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
    """Measured costs of one row's step, behind `committed` slots, and the choice made from them."""

    identity: dict[str, Any]  # what it holds for: machine, threads, model, head, packing
    committed: int
    weight_bytes: int  # that one forward reads
    parameters: int  # multiplied in one forward and node
    head_parameters: int  # of the head and its draft LM head
    bandwidth: float | None  # bytes a second of this machine; None where it was not measured
    peak: float | None  # fp32 operations a second
    grid: list[dict[str, float]]  # tau of every replayed depth, width and nodes
    measured: dict[str, Any]  # date, versions, commit, steps
    batches: dict[int, Batch] = field(default_factory=dict)  # rows -> what holds for so many; empty before 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = [float(self.expected[name]) for name in ("nodes", "levels")]
        _ = [float(entry[name]) for entry in self.grid for name in ("depth", "width", "nodes", "tau")]
        for name in ("weight_bytes", "parameters", "head_parameters", "committed", "bandwidth", "peak"):
            value = getattr(self, name)
            if not ((value is None and name in ("bandwidth", "peak")) or 0 <= float(value) < math.inf):
                raise ValueError(f"{name}={value} is no number from 0 on")
        if not isinstance(self.identity, dict):
            raise TypeError("identity has to be a table")
        if any(rows < 2 for rows in self.batches):
            raise ValueError(f"batches are of 2 rows and more, not of {min(self.batches)}")

    @property
    def pays(self) -> bool:
        """Whether drafting is faster than vanilla decoding here."""
        return bool(self.shape)

    @property
    def latency(self) -> Latency:
        """Its costs by the nodes of all rows, those of larger forwards from its batches."""
        points = dict(self.forward_ms)
        for rows, batch in self.batches.items():
            points.update({rows * n: ms for n, ms in batch.forward_ms.items() if rows * n > max(self.forward_ms)})
        return Latency(smoothed(points), self.first_ms, self.level_ms)

    def v(self, nodes: int) -> float:
        """Cost of a forward over `nodes` in one-node forwards; only measured counts."""
        return self.forward_ms[nodes] / self.forward_ms[1]

    def roofline_ms(self, nodes: int) -> float | None:
        """The least time of the linear layers over `nodes` nodes: bytes over bandwidth, or operations over peak."""
        if self.bandwidth is None or self.peak is None:
            return None
        return 1e3 * max(self.weight_bytes / self.bandwidth, 2 * self.parameters * nodes / self.peak)

    def document(self) -> dict[str, Any]:
        """What a file holds; more keys beside it do no harm."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(self, self.identity, path)

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any] | None = None) -> Calibration:
        """Read what `save` wrote; `identity` is what it has to hold for, None takes it as it is.

        Raises ValueError: no such file, not a calibration, or one of another machine, model, head or setting.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no calibration at {path} ({error.strerror}): run `haast calibrate`") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no calibration ({error}): run `haast calibrate` again") from error
        known = {each.name for each in fields(cls)}
        if isinstance(values, dict):
            values.setdefault("batches", {})  # files that know nothing of batches are good for one text at a time
        if not isinstance(values, dict) or values.get("format") != FORMAT or not known <= set(values):
            raise ValueError(f"{path} is no calibration of format {FORMAT}: run `haast calibrate` again")
        try:
            values["batches"] = {int(rows): Batch(**each) for rows, each in values["batches"].items()}
            found = cls(**{name: values[name] for name in known})
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged ({error}): run `haast calibrate` again") from error
        found.check(identity, str(path))
        return found

    def check(self, identity: dict[str, Any] | None, name: str) -> None:
        """Refuse a calibration of something else. Raises ValueError that names what differs."""
        if identity is None or identity == self.identity:
            return
        pairs = {key: (self.identity.get(key), identity.get(key)) for key in sorted({*identity, *self.identity})}
        other = "; ".join(f"{key} {held!r}, here {here!r}" for key, (held, here) in pairs.items() if held != here)
        raise ValueError(f"the calibration {name} is of another setting ({other}): run `haast calibrate`")


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, dict):
        raise TypeError("a shape has to be a table")
    if not shape:
        return
    least = {"depth": 1, "top_k": 1, "width": 1, "nodes": 2}  # a tree has a root and a draft
    sound = set(shape) == {"kind", *least} and shape["kind"] in _KINDS
    if not (sound and all(type(shape[name]) is int and low <= shape[name] <= _LARGEST for name, low in least.items())):
        raise ValueError(f"the shape {shape} is none")
