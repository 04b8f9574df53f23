"""Projects a head's speed-up to other hardware. A projection, never a measurement, and labelled so.

Owns the table of machines and the model of a step: every forward takes the longer of bytes / bandwidth and operations /
peak, plus a fixed part. tau comes from drafts recorded on this machine; they do not depend on hardware. The table holds
the makers' peak figures (dense 16-bit on GPUs), so a projection is an upper bound; this machine's own stands beside its
measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path
from rich.console import Console
from rich.table import Table

from haast.tuning.calibration import Calibration


@dataclass(frozen=True)
class Machine:
    """A roofline: bytes a second, operations a second, and microseconds that every forward costs whatever its size."""

    name: str
    bandwidth: float
    peak: float
    fixed_us: float
    about: str = ""


def _gpu(name: str, gigabytes: float, teraflops: float, about: str) -> Machine:
    return Machine(name, gigabytes * 1e9, teraflops * 1e12, 300.0, about)


def _cpu(name: str, gigabytes: float, teraflops: float, about: str) -> Machine:
    return Machine(name, gigabytes * 1e9, teraflops * 1e12, 100.0, about)


MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("h200", 4800, 989, "NVIDIA H200 SXM"),
        _gpu("h100", 3350, 989, "NVIDIA H100 SXM"),
        _gpu("a100", 2039, 312, "NVIDIA A100 80 GB SXM"),
        _gpu("l40s", 864, 362, "NVIDIA L40S"),
        _gpu("rtx4090", 1008, 165, "NVIDIA RTX 4090"),
        _gpu("rtx3090", 936, 71, "NVIDIA RTX 3090"),
        _gpu("l4", 300, 121, "NVIDIA L4"),
        _gpu("mi300x", 5300, 1307, "AMD MI300X"),
        _cpu("m2max", 400, 2.0, "Apple M2 Max, its CPU cores"),
        _cpu("epyc9654", 460, 5.5, "AMD EPYC 9654, 96 cores, 12 channels of DDR5-4800"),
        _cpu("xeon8480", 307, 4.5, "Intel Xeon 8480+, 56 cores, 8 channels of DDR5-4800, AVX-512 fp32"),
        _cpu("desktop-ddr5", 90, 1.0, "a desktop of 8 cores, 2 channels of DDR5-5600"),
        _cpu("laptop-lpddr5", 100, 0.7, "a laptop of 8 cores, LPDDR5X"),
        _cpu("two-vcpu-zen3", 26, 0.16, "2 virtual cores of a shared AMD Zen 3 server"),
    )
}


@dataclass(frozen=True)
class Row:
    """One machine's projection."""

    machine: str
    vanilla_tokens_per_s: float
    tokens_per_s: float
    speedup: float
    tau: float
    depth: int  # 0: drafting does not pay
    width: int
    nodes: int
    v: float
    c: float
    measured_speedup: float | None = None  # this machine only


def parse_machine(text: str) -> Machine:
    """NAME:GB/S:TFLOPS[:FIXED_US]. Raises ValueError."""
    parts = text.split(":")
    try:
        name, (gigabytes, teraflops, *fixed) = parts[0], [float(part) for part in parts[1:]]
        sound = all(math.isfinite(value) for value in (gigabytes, teraflops, *fixed))
        if len(fixed) > 1 or not sound or min(gigabytes, teraflops) <= 0 or any(us < 0 for us in fixed) or not name:
            raise ValueError
    except ValueError:
        raise ValueError(f"hardware={text!r} is not understood: give NAME:GB/S:TFLOPS or NAME:GB/S:TFLOPS:US") from None
    return Machine(name, gigabytes * 1e9, teraflops * 1e12, fixed[0] if fixed else 100.0, "given")


def kept_calibration(path: Path | None) -> Calibration:
    """The calibration of a file, or the newest that `haast calibrate` kept. Raises ValueError where there is none."""
    if path is not None:
        return Calibration.load(path)
    folder: Path = cached_assets_path(library_name="haast", namespace="calibration", subfolder="default")
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError("nothing was calibrated on this machine yet: run `haast calibrate` first")
    return Calibration.load(files[-1])


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
    rows = []
    parameters = float(found.parameters) if billions is None else billions * 1e9
    ratio = found.head_parameters / found.parameters
    if found.bandwidth is not None and found.peak is not None and billions is None:
        own = Machine("this machine", found.bandwidth, found.peak, 1e3 * found.overhead_ms)
        row = _row(found, own, float(found.weight_bytes), parameters, ratio)
        rows.append(Row(**{**row.__dict__, "measured_speedup": found.expected["speedup"]}))
    for machine in machines:
        rows.append(_row(found, machine, parameters * bytes_per_weight, parameters, ratio))
    return rows


def _row(found: Calibration, machine: Machine, size: float, parameters: float, ratio: float) -> Row:
    fixed = machine.fixed_us / 1e6

    def seconds(nodes: int, share: float = 1.0) -> float:
        return max(share * size / machine.bandwidth, 2 * share * parameters * nodes / machine.peak)

    vanilla = 1 / (seconds(1) + fixed)
    best = Row(machine.name, vanilla, vanilla, 1.0, 1.0, 0, 0, 1, 1.0, 0.0)
    for entry in found.grid:
        depth, width, nodes, tau = int(entry["depth"]), int(entry["width"]), int(entry["nodes"]), entry["tau"]
        level = seconds(width, ratio) + fixed / 4  # a head has one layer, and less to launch
        rate = tau / (seconds(nodes) + fixed + depth * level)
        if rate > best.tokens_per_s:
            v, c = (seconds(nodes) + fixed) * vanilla, level * vanilla
            best = Row(machine.name, vanilla, rate, rate / vanilla, tau, depth, width, nodes, v, c)
    return best


def show_machines(console: Console) -> None:
    """The table of machines."""
    table = Table("name", "what", "GB/s", "TFLOP/s", box=None)
    for machine in MACHINES.values():
        table.add_row(machine.name, machine.about, f"{machine.bandwidth / 1e9:.0f}", f"{machine.peak / 1e12:g}")
    console.print(table)
    console.print("the makers' peak figures; a projection takes them as reachable, so it is an upper bound")


def show_plan(found: Calibration, rows: Sequence[Row], console: Console) -> None:
    """The projections, labelled as such."""
    columns = ("machine", "vanilla tok/s", "EAGLE tok/s", "speed-up", "tau", "depth", "width", "nodes", "v(n)", "c")
    table = Table(box=None, title="PROJECTED, not measured", title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column == "machine", overflow="fold")
    for row in rows:
        shape = [str(row.depth), str(row.width), str(row.nodes)] if row.depth else ["vanilla", "", ""]
        speeds = [f"{row.vanilla_tokens_per_s:.0f}", f"{row.tokens_per_s:.0f}", f"{row.speedup:.2f}x", f"{row.tau:.2f}"]
        table.add_row(row.machine, *speeds, *shape, f"{row.v:.2f}", f"{row.c:.3f}")
    console.print(table)
    for row in rows:
        if row.measured_speedup is not None:
            console.print(
                f"this machine: {row.tokens_per_s:.0f} tokens/s, {row.speedup:.2f}x, projected; "
                f"{found.expected['tokens_per_s']:.0f}, {row.measured_speedup:.2f}x, from measured costs and a pace, "
                "which a projection leaves out"
            )
