"""Trees made of whole continuations: several paths under a root, common beginnings shared.

Owns the merge and the padding to a fixed size. Knows neither where paths come from nor any model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from haast.tree import DraftTree

Path = Sequence[int]


class PathTree:
    """One row's tree in the making. Node 0 is the root; at most `nodes` nodes."""

    def __init__(self, root: int, nodes: int) -> None:
        self.tokens, self.parents, self.probe = [root], [-1], [False]
        self._most = nodes
        self._children: dict[tuple[int, int], int] = {}

    @classmethod
    def of_tree(cls, tree: DraftTree, row: int, nodes: int) -> PathTree:
        """Begin with the live nodes of a row of `tree`, which are its first ones."""
        live = int(tree.live[row].sum())
        tokens, parents = tree.tokens[row, :live].tolist(), tree.parents[row, :live].tolist()
        made = cls(tokens[0], nodes)
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            made._add(parent, token)
        return made

    def insert(self, path: Path, *, most: int | None = None) -> int:
        """Add a path under the root as far as there is room, at most `most` new nodes; returns how many were new."""
        node, depth = self._along(path)
        room = self._most - len(self.tokens)
        new = path[depth : depth + max(0, room if most is None else min(room, most))]
        for token in new:
            node = self._add(node, token)
        return len(new)

    def agreeing(self, path: Path) -> int:
        """How far the path goes along nodes that are there."""
        return self._along(path)[1]

    def _along(self, path: Path) -> tuple[int, int]:
        """The last node that is there on the path, and its depth."""
        node = 0
        for depth, token in enumerate(path):
            child = self._children.get((node, token))
            if child is None:
                return node, depth
            node = child
        return node, len(path)

    def probe_under(self, parent: int, token: int) -> int:
        """Add a node that is run and never accepted; returns its number. Raises ValueError where there is no room."""
        if len(self.tokens) >= self._most:
            raise ValueError(f"a tree of {self._most} nodes has no room for another probe: give it more nodes")
        self.tokens.append(token)
        self.parents.append(parent)
        self.probe.append(True)
        return len(self.tokens) - 1

    def _add(self, parent: int, token: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.probe.append(False)
        number = len(self.tokens) - 1
        self._children[(parent, token)] = number
        return number


def pack_rows(rows: Sequence[PathTree], nodes: int, device: torch.device) -> DraftTree:
    """One tree of `nodes` nodes per row; what a row lacks are dead nodes."""
    tokens = [[*row.tokens, *[0] * (nodes - len(row.tokens))] for row in rows]
    parents = [[*row.parents, *[-1] * (nodes - len(row.parents))] for row in rows]
    live = [[place < len(row.tokens) for place in range(nodes)] for row in rows]
    probe = [[*row.probe, *[False] * (nodes - len(row.probe))] for row in rows]
    return DraftTree.from_parents(
        torch.tensor(tokens, device=device),
        torch.tensor(parents, device=device),
        torch.tensor(live, device=device),
        torch.tensor(probe, device=device) if any(any(row) for row in probe) else None,
    )
