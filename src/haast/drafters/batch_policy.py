"""Draft configuration per batch size.

Once a forward is compute-bound, each further node costs as much as a node of another row: the more rows are decoded
together, the smaller the tree that pays, until none does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from haast.drafters.tree_shape import DraftShape, shape_for
from haast.tuning.latency import Latency
from haast.tuning.policy import CostModel

# Nodes of all rows together, roots included, without measurements: on a CPU more nodes do not pay, a GPU computes a few
# hundred positions in about the time of one.
_CPU_TOTAL, _DEVICE_TOTAL = 12, 256
_ROWS = (1, 2, 4, 8, 16, 32, 64)
# Trees to choose from when forwards were measured: nodes, depth, width, accepted drafts per step. Measured with the
# shipped head on validation prompts (results/calibration.json); better heads accept more, worse ones fewer.
_TREES = (
    (2, 1, 1, 0.55), (3, 2, 1, 0.88), (4, 3, 1, 1.08), (5, 3, 1, 1.27), (6, 4, 2, 1.4), (8, 4, 2, 1.53),
    (12, 5, 3, 1.75), (16, 5, 4, 1.89), (24, 5, 8, 2.11), (32, 5, 8, 2.23), (48, 6, 8, 2.43), (60, 6, 10, 2.52),
)  # fmt: skip
_FOLLOW = 0.8  # probability that an expanded right node has a right child
_MAX_PACED_NODES = 16  # maximum nodes of a tree whose size a cost model limits at each step


@dataclass(frozen=True)
class DraftConfig:
    """The draft shape for a batch size; without a shape nothing is drafted."""

    shape: DraftShape | None
    pace: CostModel | None = None  # its `forward_ms` are of all rows together, its `rate` is one row's
    nodes: float | None = None  # mean nodes of a tree, if `pace` makes it smaller than the shape
    gain: float | None = None  # expected accepted drafts per step, if known

    @property
    def mean_nodes(self) -> float:
        """Mean nodes of a tree, the root included; 1 if nothing is drafted."""
        return 1.0 if self.shape is None else float(self.nodes or self.shape.nodes)

    @property
    def expected_gain(self) -> float:
        """Expected number of accepted drafts per step."""
        return self.gain if self.gain is not None else gain_of(self.mean_nodes)


DraftConfigs = Mapping[int, DraftConfig]  # maximum batch size -> configuration


def config_for(configs: DraftConfigs, rows: int) -> DraftConfig:
    """The config of the smallest batch size that is at least `rows`; otherwise that of the largest."""
    return configs[min((most for most in configs if most >= rows), default=max(configs))]


def default_configs(shape: DraftShape, device: str) -> DraftConfigs:
    """Configs without measurements: rows share a total number of nodes; no drafts where that leaves no nodes."""
    total = _CPU_TOTAL if device == "cpu" else _DEVICE_TOTAL
    nodes = {rows: min(shape.nodes, total // rows) for rows in _ROWS[1:]}
    return {
        1: DraftConfig(shape),
        **{rows: DraftConfig(shape_for(n, shape.kind) if n > 2 else None) for rows, n in nodes.items()},
    }


def gain_of(nodes: float) -> float:
    """Accepted drafts per step of a tree with `nodes` nodes, measured with the shipped head."""
    return max((gain for size, _, _, gain in _TREES if size <= nodes), default=0.0)


def nodes_for(gain: float) -> float:
    """Nodes of a tree with `gain` accepted drafts per step, measured with the shipped head."""
    return float(next((nodes for nodes, _, _, drafts in _TREES if drafts >= gain), _TREES[-1][0]))


def measured_configs(latency: Latency, paced: bool, most_gain: float | None = None) -> DraftConfigs:
    """Configs from measured costs: for every batch size the tree with the most tokens per ms.

    With `paced` (CPU only), a cost model limits each step's depth and nodes; the shape may then have more nodes than
    the best fixed tree. `most_gain` caps the expected accepted drafts per step, if known for the head.
    """
    configs = {rows: _best_config(latency, rows, paced) for rows in _ROWS}
    if most_gain is None:
        return configs
    return {rows: replace(config, gain=min(config.expected_gain, most_gain)) for rows, config in configs.items()}


def _best_config(latency: Latency, rows: int, paced: bool) -> DraftConfig:
    def rate(tree: tuple[int, int, int, float]) -> float:
        nodes, depth, width, gain = tree
        return (1 + gain) / latency.step(rows, nodes, depth, width)

    best = max(_TREES, key=rate)
    nodes, depth, width, gain = best
    children = max(width, shape_for(nodes).top_k)
    if not paced:
        return DraftConfig(DraftShape("dynamic", depth, children, width, nodes), gain=gain)
    max_nodes = max(nodes, min(2 * nodes, _MAX_PACED_NODES))
    # The rate is at least that of vanilla decoding: nodes that bring less never pay.
    pace = latency.cost_model(width, max(rate(best), 1 / latency.step(rows, 1)), max_nodes, rows, follow=_FOLLOW)
    return DraftConfig(DraftShape("dynamic", depth, children, width, max_nodes), pace, float(nodes), gain)
