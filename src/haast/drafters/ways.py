"""How to draft by how many rows are decoded together. Owns the choice per row count, and the costs behind it.

On a machine that computes no faster than it reads, a second row's nodes cost as much as another row's tokens: the more
rows, the smaller the tree that pays, until none does and vanilla decoding is the fastest there is. Every choice is a
function of how many rows run, so none touches losslessness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from haast.drafters.shape import DraftShape, shape_for
from haast.speed.policy import Pace

# Nodes of all rows together, root included, where nothing was measured: a CPU has no more to give than this, a GPU
# answers a few hundred positions in about the time of one.
_CPU_TOTAL, _DEVICE_TOTAL = 12, 256
_ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Way:
    """What is drafted for a number of rows; without a shape nothing is."""

    shape: DraftShape | None
    pace: Pace | None = None  # its `forward_ms` are of all rows together, its `rate` is one row's


Ways = Mapping[int, Way]  # most rows -> what is drafted for so many


def way_for(ways: Ways, rows: int) -> Way:
    """The way of the least row count that holds `rows`; of the largest where none does."""
    return ways[min((most for most in ways if most >= rows), default=max(ways))]


def usual_ways(shape: DraftShape, device: str) -> Ways:
    """Where nothing was measured: trees share a number of nodes, and end where they have no drafts left."""
    total = _CPU_TOTAL if device == "cpu" else _DEVICE_TOTAL
    ways = {1: Way(shape)}
    for rows in _ROWS[1:]:
        nodes = min(shape.nodes, total // rows)
        ways[rows] = Way(shape_for(nodes, shape.kind) if nodes > 2 else None)
    return ways
