"""The draft tree: tokens with parents, as tensors.

Owns the tree's structure (parents, depths, attention mask). Knows nothing of models, caches or probabilities. A chain
is a tree, a prompt is a chain, and vanilla decoding is a tree of one node, so one forward function serves them all.
Source: token trees as in SpecInfer (arXiv 2305.09781) and EAGLE (arXiv 2401.15077, section 3.3).

    node      0    1    2    3         0
    token     A    B    C    D        / \\
    parent   -1    0    0    1       1   2
    depth     0    1    1    2       |
                                     3
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class DraftTree:
    """One tree per row, all with the same number of nodes. Build with `from_parents`, `chain` or `roots`.

    Node 0 is the root: the last emitted token, not yet in the target's KV cache. Parents precede their children.
    Siblings are in the drafter's order of preference. Dead nodes pad ragged rows to one shape: the forward computes
    them, no other node sees them, and they can neither be accepted nor have live children. Placeholder nodes are
    computed but never accepted.
    """

    tokens: Tensor  # (rows, nodes) int64
    parents: Tensor  # (rows, nodes) int64; -1 at the root and at dead nodes
    depths: Tensor  # (rows, nodes) int64; edges up to the root, 0 for dead nodes
    ancestors: Tensor  # (rows, nodes, nodes) bool; [r, i, j]: node i sees node j (itself included)
    live: Tensor  # (rows, nodes) bool
    height: int  # upper bound of all depths, on the host: needs no read from the device
    placeholder: Tensor | None = None  # (rows, nodes) bool
    # (rows, nodes, vocab) float64: the distribution that each node's token was sampled from, given the tokens sampled
    # before it in this tree (the root's is not read). None: a point mass on each token.
    draft_probs: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of sequences in the batch."""
        return int(self.tokens.shape[0])

    @property
    def nodes(self) -> int:
        """Nodes per row, dead ones included."""
        return int(self.tokens.shape[1])

    @staticmethod
    def from_parents(
        tokens: Tensor,
        parents: Tensor,
        live: Tensor | None = None,
        placeholder: Tensor | None = None,
        *,
        height: int | None = None,
        checked: bool = False,
    ) -> DraftTree:
        """Build a tree from `tokens` and `parents`, both (rows, nodes) int64.

        Args:
            tokens: node tokens.
            parents: node parents, -1 for none.
            live: (rows, nodes) bool; all if None.
            placeholder: (rows, nodes) bool; none if None.
            height: an upper bound of all depths; nodes - 1 if None.
            checked: the parents are valid, so do not check them: a check reads from the device.

        Raises:
            ValueError: shapes differ, a parent does not precede its child, or a live node has a dead parent.
        """
        if tokens.ndim != 2 or tokens.shape != parents.shape or tokens.shape[1] == 0:
            raise ValueError(
                f"a tree needs tokens and parents of one shape (rows, nodes >= 1), got "
                f"{tuple(tokens.shape)} and {tuple(parents.shape)}"
            )
        rows, nodes = tokens.shape
        if live is None:
            live = torch.ones_like(tokens, dtype=torch.bool)
        parents = parents.masked_fill(~live, -1)
        if not checked:
            _check_parents(parents, live)
        max_depth = nodes - 1 if height is None else min(height, nodes - 1)
        edges = torch.zeros(rows, nodes, nodes + 1, device=tokens.device)
        edges.scatter_(2, (parents + 1).unsqueeze(2), 1.0)  # column 0 collects the parents of roots and dead nodes
        reach = edges[:, :, 1:] + torch.eye(nodes, device=tokens.device)
        for _ in range(max(max_depth - 1, 0).bit_length()):  # reach doubles: 2^k edges after k products
            reach = (reach @ reach).clamp_(max=1.0)
        depths = reach.sum(-1).long() - 1
        return DraftTree(tokens, parents, depths, reach > 0.5, live, max_depth, placeholder)

    @staticmethod
    def chain(tokens: Tensor, live: Tensor | None = None) -> DraftTree:
        """A chain: `tokens` (rows, nodes), each the child of the one before; `live` (rows, nodes) bool, None is all."""
        rows, nodes = tokens.shape
        index = torch.arange(nodes, device=tokens.device)
        lower = torch.ones(nodes, nodes, dtype=torch.bool, device=tokens.device).tril()
        parents, depths = (index - 1).expand(rows, nodes), index.expand(rows, nodes)
        if live is None:
            live = torch.ones_like(tokens, dtype=torch.bool)
            return DraftTree(tokens, parents, depths, lower.expand(rows, nodes, nodes), live, nodes - 1)
        eye = torch.eye(nodes, dtype=torch.bool, device=tokens.device)
        ancestors = torch.where(live.unsqueeze(2), lower, eye)
        return DraftTree(tokens, parents.masked_fill(~live, -1), depths * live, ancestors, live, nodes - 1)

    @staticmethod
    def roots(tokens: Tensor) -> DraftTree:
        """Only a root in every row: vanilla decoding. `tokens` is (rows,)."""
        return DraftTree.chain(tokens.unsqueeze(1))

    def padded(self, nodes: int) -> DraftTree:
        """This tree padded with dead nodes to `nodes` nodes: one static shape for trees of many sizes."""
        added = nodes - self.nodes
        if added < 0:
            raise ValueError(f"the tree has {self.nodes} nodes and can't be padded to {nodes}")
        if added == 0:
            return self
        ancestors = pad(self.ancestors, (0, added, 0, added))
        own = torch.arange(self.nodes, nodes, device=ancestors.device)
        ancestors[:, own, own] = True
        return DraftTree(
            pad(self.tokens, (0, added)),
            pad(self.parents, (0, added), value=-1),
            pad(self.depths, (0, added)),
            ancestors,
            pad(self.live, (0, added)),
            self.height,
            None if self.placeholder is None else pad(self.placeholder, (0, added)),
            None if self.draft_probs is None else pad(self.draft_probs, (0, 0, 0, added)),
        )

    def select_rows(self, index: Tensor) -> DraftTree:
        """A tree of the rows `index` (n,)."""
        fields: dict[str, Any] = {name: part[index] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **fields)

    def children(self, row: int) -> list[list[int]]:
        """For every node of `row`, its live children that may be accepted, in the drafter's order of preference."""
        children: list[list[int]] = [[] for _ in range(self.nodes)]
        excluded = ~self.live[row] if self.placeholder is None else self.placeholder[row] | ~self.live[row]
        for node, (parent, out) in enumerate(zip(self.parents[row].tolist(), excluded.tolist(), strict=True)):
            if parent >= 0 and not out:
                children[parent].append(node)
        return children


def padded_row_index(rows: int, padded_rows: int, device: torch.device) -> Tensor:
    """(padded_rows,) int64 that pads a batch of `rows` rows: 0 .. rows - 1, then 0 repeated."""
    index = torch.arange(padded_rows, device=device)
    return torch.where(index < rows, index, 0)


def _check_parents(parents: Tensor, live: Tensor) -> None:
    index = torch.arange(parents.shape[1], device=parents.device)
    if bool((parents >= index).any()) or bool((parents[:, 1:] < 0).logical_and(live[:, 1:]).any()):
        raise ValueError("every node but the root needs a parent with a smaller index than its own")
    if not bool(live.gather(1, parents.clamp_min(0)).logical_or(parents < 0).all()):
        raise ValueError("a live node has a dead parent: mark it dead too")
