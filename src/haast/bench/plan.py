"""Projects a head's speed-up to other hardware from a roofline and recorded drafts: a projection, never a measurement.

A forward takes the longer of bytes / bandwidth and operations / peak, plus a fixed part. The makers' peak figures are
taken as reachable (dense 16-bit on GPUs), so a projection is an upper bound; this machine's own stands beside its
measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import cached_assets_path

from haast.tuning.calibration import Calibration


@dataclass(frozen=True)
class Machine:
    """A roofline: bytes a second, operations a second, and microseconds that every forward costs whatever its size."""

    name: str
    bandwidth: float
    peak: float
    fixed_us: float
    about: str = ""


_TABLE = """h200 4800 989 300 NVIDIA H200 SXM
h100 3350 989 300 NVIDIA H100 SXM
a100 2039 312 300 NVIDIA A100 80 GB SXM
l40s 864 362 300 NVIDIA L40S
rtx4090 1008 165 300 NVIDIA RTX 4090
rtx3090 936 71 300 NVIDIA RTX 3090
l4 300 121 300 NVIDIA L4
mi300x 5300 1307 300 AMD MI300X
m2max 400 2 100 Apple M2 Max, its CPU cores
epyc9654 460 5.5 100 AMD EPYC 9654, 96 cores, 12 channels of DDR5-4800
xeon8480 307 4.5 100 Intel Xeon 8480+, 56 cores, 8 channels of DDR5-4800, AVX-512 fp32
desktop-ddr5 90 1 100 a desktop of 8 cores, 2 channels of DDR5-5600
laptop-lpddr5 100 0.7 100 a laptop of 8 cores, LPDDR5X
two-vcpu-zen3 26 0.16 100 2 virtual cores of a shared AMD Zen 3 server"""  # GB/s, TFLOP/s, microseconds


@dataclass(frozen=True)
class Row:
    """One machine's projection."""

    machine: str
    vanilla_tokens_per_s: float
    tokens_per_s: float
    speedup: float = 1.0
    tau: float = 1.0
    depth: int = 0  # 0: drafting does not pay
    width: int = 0
    nodes: int = 1
    v: float = 1.0
    c: float = 0.0
    measured_speedup: float | None = None  # this machine only


def parse_machine(text: str) -> Machine:
    """NAME:GB/S:TFLOPS[:FIXED_US]. Raises ValueError."""
    name, *figures = text.split(":")
    try:
        gigabytes, teraflops, fixed = [float(figure) for figure in (*figures, "100")[:3]] if len(figures) < 4 else []
        if not name or not 0 < gigabytes < math.inf or not 0 < teraflops < math.inf or not 0 <= fixed < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"hardware={text!r} is not understood: give NAME:GB/S:TFLOPS or NAME:GB/S:TFLOPS:US") from None
    return Machine(name, gigabytes * 1e9, teraflops * 1e12, fixed, "given")


def _known(line: str) -> Machine:
    name, gigabytes, teraflops, fixed, about = line.split(" ", 4)
    return replace(parse_machine(":".join((name, gigabytes, teraflops, fixed))), about=about)


MACHINES = {machine.name: machine for machine in map(_known, _TABLE.splitlines())}


def kept_calibration(path: Path | None) -> Calibration:
    """The calibration of a file, or the newest that `haast calibrate` kept. Raises ValueError where there is none."""
    if path is None:
        folder: Path = cached_assets_path(library_name="haast", namespace="calibration", subfolder="default")
        path = max(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, default=None)
    if path is None:
        raise ValueError("nothing was calibrated on this machine yet: run `haast calibrate` first")
    return Calibration.load(path)


def project(
    found: Calibration, machines: Sequence[Machine], billions: float | None = None, bytes_per_weight: float = 2.0
) -> list[Row]:
    """The fastest recorded shape on each machine.

    Args:
        found: with the recorded drafts' tau per shape.
        machines: to project to; this machine is added in front where its roofline was measured.
        billions: parameters of another model, whose head is taken to be as good and as large beside it; None: this one.
        bytes_per_weight: of that model there.
    """
    parameters = float(found.parameters) if billions is None else billions * 1e9
    rows = [_row(found, machine, parameters * bytes_per_weight, parameters) for machine in machines]
    if found.bandwidth is not None and found.peak is not None and billions is None:
        own = Machine("this machine", found.bandwidth, found.peak, 1e3 * found.overhead_ms)
        row = _row(found, own, float(found.weight_bytes), parameters)
        rows.insert(0, replace(row, measured_speedup=found.expected["speedup"]))
    return rows


def _row(found: Calibration, machine: Machine, size: float, parameters: float) -> Row:
    fixed, head = machine.fixed_us / 1e6, found.head_parameters / found.parameters

    def seconds(nodes: int, share: float = 1.0) -> float:
        return share * max(size / machine.bandwidth, 2 * parameters * nodes / machine.peak)

    one = seconds(1) + fixed
    best = Row(machine.name, 1 / one, 1 / one)
    for entry in found.grid:
        depth, width, nodes, tau = int(entry["depth"]), int(entry["width"]), int(entry["nodes"]), entry["tau"]
        level = seconds(width, head) + fixed / 4  # a head has one layer, and less to launch
        forward = seconds(nodes) + fixed
        rate = tau / (forward + depth * level)
        if rate > best.tokens_per_s:
            best = Row(machine.name, 1 / one, rate, rate * one, tau, depth, width, nodes, forward / one, level / one)
    return best
