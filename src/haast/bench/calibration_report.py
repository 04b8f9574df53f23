"""A calibration for people: costs beside the roofline, in the terminal and as a picture. Owns the drawing alone."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from haast.tuning.calibration import Calibration

_BARS = 40


def roofline_ms(found: Calibration, nodes: int) -> float | None:
    """The least time of the linear layers over `nodes` nodes: bytes over bandwidth, or operations over peak."""
    if found.bandwidth is None or found.peak is None:
        return None
    return 1e3 * max(found.weight_bytes / found.bandwidth, 2 * found.parameters * nodes / found.peak)


def show(found: Calibration, console: Console) -> None:
    """Costs as bars, and what was chosen."""
    table = Table(title="one target forward", title_justify="left", box=None)
    for column in ("nodes", "ms", "v(n)", "roofline ms", ""):
        table.add_column(column, justify="left" if not column else "right")
    longest = max(found.forward_ms.values())
    for nodes, ms in sorted(found.forward_ms.items()):
        least = roofline_ms(found, nodes)
        bar = "█" * max(round(_BARS * ms / longest), 1)
        table.add_row(str(nodes), f"{ms:.2f}", f"{found.v(nodes):.2f}", "" if least is None else f"{least:.2f}", bar)
    console.print(table)
    one = found.forward_ms[1]
    if found.bandwidth is not None and found.peak is not None:
        console.print(
            f"this machine reads {found.bandwidth / 1e9:.1f} GB/s and does {found.peak / 1e9:.0f} GFLOP/s (fp32); the "
            f"linear layers hold {found.weight_bytes / 1e6:.0f} MB"
        )
    levels = ", ".join(f"{ms:.2f} ({ms / one:.3f}) at width {w}" for w, ms in sorted(found.level_ms.items()))
    console.print(
        f"first draft level {found.first_ms:.2f} ms ({found.first_ms / one:.3f} of a forward); each more {levels}"
    )
    console.print(f"bookkeeping {found.overhead_ms:.2f} ms a step ({found.overhead_ms / one:.3f})")
    expected = found.expected
    if not found.pays:
        console.print("drafting does not pay here: vanilla decoding is chosen")
        return
    shape = found.shape
    size = "as many nodes as pay" if found.pace is not None else f"{shape['nodes']} nodes"
    speed = f"{expected['speedup']:.2f}x vanilla, {expected['tokens_per_s']:.0f} tokens/s"
    console.print(
        f"chosen: depth {shape['depth']}, width {shape['width']}, {size} ({expected['nodes']:.1f} on average)\n"
        f"expected: tau {expected['tau']:.2f}, {speed} (replayed on {found.measured['steps']} recorded steps)"
    )


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
