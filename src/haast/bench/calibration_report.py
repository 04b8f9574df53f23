"""A calibration for people: costs beside the roofline, as text and as a picture. Owns the drawing alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from haast.bench.plan import Row
from haast.bench.tables import text
from haast.tuning.calibration import Calibration


def roofline_ms(found: Calibration, nodes: int) -> float | None:
    """The least time of the linear layers over `nodes` nodes: bytes over bandwidth, or operations over peak."""
    if found.bandwidth is None or found.peak is None:
        return None
    return 1e3 * max(found.weight_bytes / found.bandwidth, 2 * found.parameters * nodes / found.peak)


def calibration_text(found: Calibration) -> str:
    """Costs as bars, and what was chosen."""
    one, longest = found.forward_ms[1], max(found.forward_ms.values())
    return text("calibration.txt", {"roofline": roofline_ms}, found=found, one=one, longest=longest)


def plan_text(found: Calibration, rows: Sequence[Row]) -> str:
    """Projections, labelled as such."""
    return text("plan.txt", found=found, rows=rows)


def draw(found: Calibration, path: Path) -> None:
    """Cost of a forward over nodes, the roofline below it, and what of a step goes where. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    nodes = sorted(found.forward_ms)
    left.plot(nodes, [found.forward_ms[n] for n in nodes], "o-", label="measured")
    if found.bandwidth is not None:
        least = [roofline_ms(found, n) or 0.0 for n in nodes]
        left.plot(nodes, least, "--", color="gray", label="roofline of the linear layers")
    left.set(xlabel="nodes of one target forward", ylabel="ms", title="what verification costs", ylim=(0, None))
    left.legend()
    level = sorted(found.level_ms.items())
    right.bar([f"level, width {w}" for w, _ in level], [ms for _, ms in level], color="tab:orange")
    right.bar(["first level", "bookkeeping"], [found.first_ms, found.overhead_ms], color="tab:blue")
    right.axhline(0.08 * found.forward_ms[1], linestyle=":", color="gray")
    right.set(ylabel="ms", title=f"what drafting costs (a one-node forward: {found.forward_ms[1]:.1f} ms)")
    right.tick_params(axis="x", rotation=30)
    figure.suptitle(f"{found.identity['cpu']}, {found.identity['threads']} threads, {found.identity['packing']}")
    figure.savefig(path, dpi=120)
