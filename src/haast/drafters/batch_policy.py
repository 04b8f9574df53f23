"""Draft configuration per batch size: how to draft by how many rows are decoded together.

On a machine that computes no faster than it reads, a second row's nodes cost as much as another row's tokens: the more
rows, the smaller the tree that pays, until none does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from haast.drafters.tree_shape import DraftShape, shape_for
from haast.tuning.latency import Latency
from haast.tuning.policy import CostModel

# Nodes of all rows together, root included, where nothing was measured: a CPU has no more to give than this, a GPU
# answers a few hundred positions in about the time of one.
_CPU_TOTAL, _DEVICE_TOTAL = 12, 256
_ROWS = (1, 2, 4, 8, 16, 32, 64)
# Trees to choose from where forwards were measured, and what they gain a step: nodes, depth, width, drafts kept. With
# the shipped head on validation prompts (results/calibration.json); better heads gain more of each, worse ones less.
_KNOWN = (
    (2, 1, 1, 0.55), (3, 2, 1, 0.88), (4, 3, 1, 1.08), (5, 3, 1, 1.27), (6, 4, 2, 1.4), (8, 4, 2, 1.53),
    (12, 5, 3, 1.75), (16, 5, 4, 1.89), (24, 5, 8, 2.11), (32, 5, 8, 2.23), (48, 6, 8, 2.43), (60, 6, 10, 2.52),
)  # fmt: skip
_FOLLOW = 0.8  # chance that a right node that is expanded has a right child
_MOST_PACED = 16  # nodes that a step may have where it draws in its horns by itself


@dataclass(frozen=True)
class DraftConfig:
    """What is drafted for a number of rows; without a shape nothing is."""

    shape: DraftShape | None
    pace: CostModel | None = None  # its `forward_ms` are of all rows together, its `rate` is one row's
    nodes: float | None = None  # of a tree on average, where a pace makes it smaller than the shape
    gain: float | None = None  # drafts that a step is expected to keep, where somebody knows

    @property
    def usual_nodes(self) -> float:
        """Of a tree on average, the root included; 1 where nothing is drafted."""
        return 1.0 if self.shape is None else float(self.nodes or self.shape.nodes)

    @property
    def usual_gain(self) -> float:
        """Drafts that a step is expected to keep."""
        return self.gain if self.gain is not None else gain_of(self.usual_nodes)


DraftConfigs = Mapping[int, DraftConfig]  # most rows -> what is drafted for so many


def config_for(configs: DraftConfigs, rows: int) -> DraftConfig:
    """The config of the least row count that holds `rows`; of the largest where none does."""
    return configs[min((most for most in configs if most >= rows), default=max(configs))]


def default_configs(shape: DraftShape, device: str) -> DraftConfigs:
    """Where nothing was measured: trees share a number of nodes, and end where they have no drafts left."""
    total = _CPU_TOTAL if device == "cpu" else _DEVICE_TOTAL
    nodes = {rows: min(shape.nodes, total // rows) for rows in _ROWS[1:]}
    return {
        1: DraftConfig(shape),
        **{rows: DraftConfig(shape_for(n, shape.kind) if n > 2 else None) for rows, n in nodes.items()},
    }


def gain_of(nodes: float) -> float:
    """Drafts that a tree of so many nodes gains a step, by what is known of the shipped head's."""
    return max((gain for most, _, _, gain in _KNOWN if most <= nodes), default=0.0)


def nodes_for(gain: float) -> float:
    """Nodes of a tree that gains so much a step, by the same."""
    return float(next((nodes for nodes, _, _, most in _KNOWN if most >= gain), _KNOWN[-1][0]))


def measured_configs(latency: Latency, paced: bool, most_gain: float | None = None) -> DraftConfigs:
    """By what forwards and drafts cost here: for every number of rows the tree with the most tokens per ms.

    With `paced`, on the CPU, each step is as deep and large as pays, up to more nodes than the best number. `most_gain`
    is how many drafts a step keeps at most, where that is known of the head.
    """
    configs = {rows: _measured(latency, rows, paced) for rows in _ROWS}
    if most_gain is None:
        return configs
    return {rows: replace(config, gain=min(config.usual_gain, most_gain)) for rows, config in configs.items()}


def _measured(latency: Latency, rows: int, paced: bool) -> DraftConfig:
    def rate(known: tuple[int, int, int, float]) -> float:
        nodes, depth, width, gain = known
        return (1 + gain) / latency.step(rows, nodes, depth, width)

    best = max(_KNOWN, key=rate)
    nodes, depth, width, gain = best
    children = max(width, shape_for(nodes).top_k)
    if not paced:
        return DraftConfig(DraftShape("dynamic", depth, children, width, nodes), gain=gain)
    most = max(nodes, min(2 * nodes, _MOST_PACED))
    # A row that drafts nothing has a rate too: nodes that do not even reach that are never worth it.
    pace = latency.cost_model(width, max(rate(best), 1 / latency.step(rows, 1)), most, rows, follow=_FOLLOW)
    return DraftConfig(DraftShape("dynamic", depth, children, width, most), pace, float(nodes), gain)
