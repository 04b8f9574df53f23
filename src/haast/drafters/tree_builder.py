"""Collects the candidates of a dynamic tree level by level, and builds the tree from the best of them.

Owns candidate indices and reranking. Knows no model. Source: EAGLE-2 (arXiv 2406.16858, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from haast.tree import DraftTree
from haast.tuning.policy import CostModel


class Growth:
    """Candidates under one root per row, indexed in the order in which they are added."""

    def __init__(self, root: Tensor) -> None:
        self._root = root  # (rows,)
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._count = 0

    def root_scores(self) -> Tensor:
        return torch.zeros(len(self._root), 1, device=self._root.device)

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor | None) -> Tensor:
        """Add candidates (rows, n) whose parents are candidate indices (None: the root); returns their indices."""
        rows, added = tokens.shape
        self._tokens.append(tokens)
        self._scores.append(scores)
        self._parents.append(torch.full_like(tokens, -1) if parents is None else parents)
        index = torch.arange(self._count, self._count + added, device=tokens.device).expand(rows, added)
        self._count += added
        return index

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities of paths, and parents' indices (-1: the root) of all candidates, (rows, n) each."""
        return torch.cat(self._tokens, 1), torch.cat(self._scores, 1), torch.cat(self._parents, 1)

    def best(self, count: int, pace: CostModel | None = None) -> Tensor:
        """Indices (rows, n), ascending, of the best candidates: at most `count`, with a `pace` as many as pay.

        A child's score never exceeds its parent's and the sort is stable, so a chosen node's parent is chosen too.
        """
        scores = torch.cat(self._scores, 1)
        count = min(count, scores.shape[1])
        if pace is None:
            return best_places(scores, count)
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return order[:, : pace.nodes(values[:, :count]) - 1].sort(dim=1).values

    def tree(self, keep: Tensor) -> DraftTree:
        """The tree of the candidates `keep` (rows or 1, n), ascending; parents must be included."""
        tokens, parents = torch.cat(self._tokens, 1), torch.cat(self._parents, 1)
        keep = keep.expand(len(tokens), -1)
        nodes = keep.shape[1] + 1
        node_of = torch.full((len(tokens), self._count + 1), -1, device=tokens.device)  # by candidate; last: the root
        node_of.scatter_(1, keep, torch.arange(1, nodes, device=tokens.device).expand_as(keep))
        node_of[:, -1] = 0
        parent_nodes = node_of.gather(1, parents.gather(1, keep) % (self._count + 1))
        root = self._root.unsqueeze(1)
        return DraftTree.from_parents(
            torch.cat([root, tokens.gather(1, keep)], 1),
            torch.cat([torch.full_like(root, -1), parent_nodes], 1),
            height=len(self._tokens),
            checked=True,
        )


def best_places(scores: Tensor, count: int) -> Tensor:
    """Indices (rows, count) of the best scores, ascending; on ties the earlier index wins."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values
