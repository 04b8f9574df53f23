"""Builds draft trees from token paths under a root; paths share common prefixes. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from haast.device import to_device
from haast.tree import DraftTree

Path = Sequence[int]


class PathTree:
    """Builds one row's tree on the host. Node 0 is the root; the tree has at most `nodes` nodes."""

    def __init__(self, root: int, nodes: int) -> None:
        self.tokens, self.parents, self.placeholder = [root], [-1], [False]
        self._depths = [0]
        self._max_nodes = nodes
        self._children: dict[tuple[int, int], int] = {}

    @property
    def room(self) -> int:
        """Number of nodes that may still be added."""
        return self._max_nodes - len(self.tokens)

    @property
    def height(self) -> int:
        """Depth of the deepest node."""
        return max(self._depths)

    def insert(self, path: Path, most: int | None = None) -> int:
        """Add a path under the root, as far as there is room and at most `most` new nodes; returns their number."""
        room, node, new = self.room if most is None else min(self.room, most), 0, 0
        for token in path:
            known = (node, token) in self._children
            if not known and new >= room:
                break
            node = self.child(node, token)
            new += not known
        return new

    def child(self, node: int, token: int) -> int:
        """The child of a node with this token, added if there is none; there must be room for it."""
        child = self._children.get((node, token))
        if child is None:
            child = self._children[(node, token)] = self._add(node, token)
        return child

    def placeholder_under(self, parent: int, token: int) -> int:
        """Add a node that is computed and never accepted; returns its index. Raises ValueError if the tree is full."""
        if not self.room:
            raise ValueError(
                f"a tree of {self._max_nodes} nodes has no room for another placeholder: give it more nodes"
            )
        return self._add(parent, token, placeholder=True)

    def cut(self, nodes: int) -> None:
        """Keep only the first `nodes` nodes, 1 or more. Add no path afterwards."""
        for values in (self.tokens, self.parents, self.placeholder, self._depths):
            del values[nodes:]

    def _add(self, parent: int, token: int, placeholder: bool = False) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.placeholder.append(placeholder)
        self._depths.append(self._depths[parent] + 1)
        return len(self.tokens) - 1


def pack_rows(rows: Sequence[PathTree], device: torch.device) -> DraftTree:
    """One tree per row, padded with dead nodes to the largest. One copy to the device, no read from it."""
    nodes = max(len(row.tokens) for row in rows)
    packed = torch.zeros(4, len(rows), nodes, dtype=torch.long)
    for index, row in enumerate(rows):
        count = len(row.tokens)
        packed[:, index, :count] = torch.tensor([row.tokens, row.parents, [1] * count, row.placeholder])
    tokens, parents, live, placeholder = to_device(packed, device)
    if nodes == 1:
        return DraftTree.roots(tokens[:, 0])
    return DraftTree.from_parents(
        tokens,
        parents,
        live.bool(),
        placeholder.bool() if any(any(row.placeholder) for row in rows) else None,
        height=max(row.height for row in rows),
        checked=True,
    )
