"""Projects a head's speed-up to other hardware from a roofline and recorded drafts. A projection is no measurement.

A forward takes max(bytes / bandwidth, operations / peak) plus a fixed time. The vendors' peak figures are assumed to be
reachable (dense 16-bit on GPUs), so a projection is an upper bound; the projection of this machine is shown with its
measured speed-up.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import cached_assets_path

from haast.tuning.calibration import Calibration


@dataclass(frozen=True)
class Machine:
    """A roofline: bytes per second, operations per second, and the fixed microseconds of every forward."""

    name: str
    bandwidth: float
    peak: float
    fixed_us: float
    about: str = ""


@dataclass(frozen=True)
class Row:
    """One machine's projection."""

    machine: str
    vanilla_tokens_per_s: float
    tokens_per_s: float
    speedup: float = 1.0
    tau: float = 1.0
    depth: int = 0  # 0: vanilla decoding is faster
    width: int = 0
    nodes: int = 1
    v: float = 1.0
    c: float = 0.0
    measured_speedup: float | None = None  # for this machine only


def parse_machine(text: str) -> Machine:
    """Parse NAME:GB/S:TFLOPS[:FIXED_US]. Raises ValueError."""
    name, *figures = text.split(":")
    try:
        gigabytes, teraflops, fixed = [float(figure) for figure in (*figures, "100")[:3]] if len(figures) < 4 else []
        if not name or not 0 < gigabytes < math.inf or not 0 < teraflops < math.inf or not 0 <= fixed < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"hardware={text!r} is not valid: give NAME:GB/S:TFLOPS or NAME:GB/S:TFLOPS:US") from None
    return Machine(name, gigabytes * 1e9, teraflops * 1e12, fixed, "given")


def _listed_machines() -> Iterator[Machine]:
    """The vendors' figures in data/machines.csv: GB/s, TFLOP/s, microseconds."""
    table = (Path(__file__).parents[1] / "data" / "machines.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        figures = ":".join(row[key] for key in ("name", "gigabytes", "teraflops", "fixed_us"))
        yield replace(parse_machine(figures), about=row["about"])


MACHINES = {machine.name: machine for machine in _listed_machines()}


def kept_calibration(path: Path | None) -> Calibration:
    """Load a calibration from a file, or the newest that `haast calibrate` kept. Raises ValueError if there is none."""
    if path is None:
        folder: Path = cached_assets_path(library_name="haast", namespace="calibration", subfolder="default")
        path = max(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, default=None)
    if path is None:
        raise ValueError("no calibration of this machine was found: run `haast calibrate` first")
    return Calibration.load(path)


def project(
    calibration: Calibration, machines: Sequence[Machine], billions: float | None = None, bytes_per_weight: float = 2.0
) -> list[Row]:
    """The fastest recorded draft shape on each machine.

    Args:
        calibration: holds tau per recorded shape.
        machines: the machines to project to; this machine is added in front if its roofline was measured.
        billions: parameters of another model, whose head is assumed to be as accurate and of the same relative size;
            None: the calibrated model.
        bytes_per_weight: of the model on those machines.
    """
    parameters = float(calibration.parameters) if billions is None else billions * 1e9
    rows = [_row(calibration, machine, parameters * bytes_per_weight, parameters) for machine in machines]
    if calibration.bandwidth is not None and calibration.peak is not None and billions is None:
        own = Machine("this machine", calibration.bandwidth, calibration.peak, 1e3 * calibration.overhead_ms)
        row = _row(calibration, own, float(calibration.weight_bytes), parameters)
        rows.insert(0, replace(row, measured_speedup=calibration.expected["speedup"]))
    return rows


def _row(calibration: Calibration, machine: Machine, size: float, parameters: float) -> Row:
    fixed, head = machine.fixed_us / 1e6, calibration.head_parameters / calibration.parameters

    def seconds(nodes: int, share: float = 1.0) -> float:
        return share * max(size / machine.bandwidth, 2 * parameters * nodes / machine.peak)

    one = seconds(1) + fixed
    best = Row(machine.name, 1 / one, 1 / one)
    for entry in calibration.grid:
        depth, width, nodes, tau = int(entry["depth"]), int(entry["width"]), int(entry["nodes"]), entry["tau"]
        level = seconds(width, head) + fixed / 4  # a head has one layer, so fewer kernels to launch
        forward = seconds(nodes) + fixed
        rate = tau / (forward + depth * level)
        if rate > best.tokens_per_s:
            best = Row(machine.name, 1 / one, rate, rate * one, tau, depth, width, nodes, forward / one, level / one)
    return best
