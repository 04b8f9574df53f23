"""A calibration: what a step costs on this machine with this model, and the drafting that makes the most of it.

Owns the values, their file and the check that a file is of this machine and model. Measuring is `haast.bench`'s.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from haast.files import write_json
from haast.tuning.policy import CostModel

FORMAT = 1
_KINDS, _LARGEST = ("dynamic", "static", "chain"), 4096  # of shapes; none larger is ever tried


@dataclass(frozen=True)
class Batch:
    """Costs of a step, of several rows together, and the choice made from them. Times are medians in ms."""

    forward_ms: dict[int, float]  # nodes of a row -> a target forward over all rows
    first_ms: float  # drafting one level, the head's pass over the accepted tokens included
    level_ms: dict[int, float]  # width -> every further level
    overhead_ms: float  # acceptance, commit, stop rules
    shape: dict[str, Any]  # of the fastest tree, see DraftShape; empty: vanilla decoding is faster
    pace: dict[str, Any] | None  # what trees keep to, see CostModel; None, for one row alone: trees of one size
    expected: dict[str, float]  # replayed: tau, tokens_per_s, vanilla_tokens_per_s, speedup; of one row nodes, levels
    _EXPECTED: ClassVar[tuple[str, ...]] = ("tau", "tokens_per_s", "vanilla_tokens_per_s", "speedup")

    @property
    def chosen_pace(self) -> CostModel | None:
        """The pace of the chosen shape, as drafters take it."""
        if self.pace is None:
            return None
        single = {name: float(value) for name, value in self.pace.items() if name != "forward_ms"}
        return CostModel(tuple(float(ms) for ms in self.pace["forward_ms"]), **single)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """From a file's values. Raises ValueError, TypeError, KeyError or AttributeError where they are none."""
        found = cls(**values | {name: milliseconds(values[name]) for name in ("forward_ms", "level_ms")})
        found.validate()
        return found

    def validate(self) -> None:
        """Refuse values that no measurement gives. Raises ValueError, TypeError or KeyError."""
        times = [*self.forward_ms.values(), *self.level_ms.values(), self.first_ms]
        if not self.level_ms or not self.forward_ms or not all(0 < float(ms) < math.inf for ms in times):
            raise ValueError("a cost is missing, or not a number of ms above 0")
        _check_amount("overhead_ms", self.overhead_ms)
        _check_shape(self.shape)
        _ = [float(self.expected[name]) for name in self._EXPECTED]
        if self.chosen_pace is None and type(self) is Batch:
            raise ValueError("a batch has no pace")


@dataclass(frozen=True)
class Calibration(Batch):
    """Measured costs of one row's step, behind `committed` slots, and the choice made from them."""

    identity: dict[str, Any]  # what it holds for: machine, threads, model, head, packing
    committed: int
    weight_bytes: int  # that one forward reads
    parameters: int  # multiplied in one forward and node
    head_parameters: int  # of the head and its draft LM head
    bandwidth: float | None  # bytes a second of this machine; None where it was not measured
    peak: float | None  # fp32 operations a second
    grid: list[dict[str, float]] = field(default_factory=list)  # tau of every replayed depth, width and nodes
    measured: dict[str, Any] = field(default_factory=dict)  # date, versions, commit, steps
    batches: dict[int, Batch] = field(default_factory=dict)  # rows -> what holds for so many; empty before 0.2
    _EXPECTED: ClassVar[tuple[str, ...]] = (*Batch._EXPECTED, "nodes", "levels")

    def __post_init__(self) -> None:
        if 1 not in self.forward_ms:
            raise ValueError("a calibration needs the cost of a forward over 1 node: run `haast calibrate` again")

    @property
    def pays(self) -> bool:
        """Whether drafting is faster than vanilla decoding here."""
        return bool(self.shape)

    def v(self, nodes: int) -> float:
        """Cost of a forward over `nodes` in one-node forwards; only measured counts."""
        return self.forward_ms[nodes] / self.forward_ms[1]

    def document(self) -> dict[str, Any]:
        """What a file holds; more keys beside it do no harm."""
        return {"format": FORMAT, **asdict(self)}

    def validate(self) -> None:
        """Refuse values that no measurement gives. Raises ValueError, TypeError or KeyError."""
        super().validate()
        _ = [float(entry[name]) for entry in self.grid for name in ("depth", "width", "nodes", "tau")]
        measured = [name for name in ("bandwidth", "peak") if getattr(self, name) is not None]
        for name in ("weight_bytes", "parameters", "head_parameters", "committed", *measured):
            _check_amount(name, getattr(self, name))
        if not isinstance(self.identity, dict):
            raise TypeError("identity has to be a table")
        if any(rows < 2 for rows in self.batches):
            raise ValueError(f"batches are of 2 rows and more, not of {min(self.batches)}")

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.document(), path, indent=1)

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
            values["batches"] = {int(rows): Batch.read(each) for rows, each in values["batches"].items()}
            found = cls.read({name: values[name] for name in known})
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


def _check_amount(name: str, value: Any) -> None:
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value} is no number from 0 on")


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, dict):
        raise TypeError("a shape has to be a table")
    if not shape:
        return
    sizes = ("depth", "top_k", "width", "nodes")
    sound = set(shape) == {"kind", *sizes} and shape["kind"] in _KINDS
    if not (sound and all(type(shape[name]) is int and 1 <= shape[name] <= _LARGEST for name in sizes)):
        raise ValueError(f"the shape {shape} is none")
    if shape["nodes"] < 2:
        raise ValueError(f"nodes={shape['nodes']} is no tree: it has a root and a draft")


def milliseconds(costs: dict[Any, Any]) -> dict[int, float]:
    """Costs by count, of a file: JSON knows no numbers as keys."""
    return {int(key): float(ms) for key, ms in costs.items()}
