"""Collects the candidates of a dynamic tree level by level, and builds the tree from the best of them.

Owns candidate indices, their calibration, the competition with another source's drafts, and reranking. Knows no model.
Source: EAGLE-2 (arXiv 2406.16858, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from haast.device import to_device
from haast.drafters.candidates import KEY_FACTOR, CandidateRows, Candidates
from haast.heads.acceptance import Source
from haast.tree import DraftTree
from haast.tuning.policy import CostModel


class Growth:
    """Candidates under one root per row, indexed in the order in which they are added."""

    def __init__(self, root: Tensor) -> None:
        self._root = root  # (rows,)
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._count = self._height = 0
        self._own: Tensor | None = None  # the head's scores, before another source's drafts competed

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
        self._height += 1
        return index

    def calibrate(self, curves: Source, setting: Sequence[tuple[float, float]]) -> None:
        """Turn the scores of all candidates so far into log-probabilities of acceptance.

        Args:
            curves: of the head.
            setting: per row, the share of the curve of sampled texts (0 to 1), and what is added to the result.
        """
        self._scores = [calibrated(scores, curves, setting) for scores in self._scores]

    def compete(self, rows: Sequence[Candidates], only: Tensor | None = None) -> None:
        """Add another source's drafts, one list per row, after all levels. `only` are the candidates of a fixed tree.

        A path that the head has too keeps its place and gets the better of both scores.
        """
        tokens, scores, parents = self.listed()
        self._own, own = scores, scores.shape[1]
        if only is not None:
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, only.expand(len(scores), -1), True)
            scores = scores.masked_fill(~kept, -torch.inf)
        longest, device = max(map(len, rows)), scores.device
        keys = torch.tensor([each.keys() + [0] * (longest - len(each)) for each in rows])
        packed = CandidateRows.of(rows)
        more, above, their, key = (to_device(part, device) for part in (*packed.tensors(), keys))
        same = (key.unsqueeze(2) == self._path_keys().unsqueeze(1)) & their.isfinite().unsqueeze(2)
        known, place = same.any(2), same.int().argmax(2)  # (rows, others): the head's candidate of the same path
        raised = torch.where(known, their, -torch.inf)
        scores = scores.scatter_reduce(1, place, raised, "amax")
        index = torch.where(known, place, own + torch.arange(longest, device=device))
        parents_of = torch.where(above < 0, above, index.gather(1, above.clamp_min(0)))
        height = max(self._height, packed.height)
        self._tokens, self._scores, self._parents = [tokens], [scores], [parents]
        self.add(more, their.masked_fill(known, -torch.inf), parents_of)
        self._height = height

    def _path_keys(self) -> Tensor:
        """(rows, n) int64: `Candidates.keys` of all candidates; equal numbers are equal paths."""
        keys = torch.zeros(len(self._root), 1, dtype=torch.long, device=self._root.device)  # the root's is the last
        for tokens, parents in zip(self._tokens, self._parents, strict=True):
            above = torch.where(parents < 0, keys.shape[1] - 1, parents)
            new = keys.gather(1, above) * KEY_FACTOR + tokens + 1
            keys = torch.cat([keys[:, :-1], new, keys[:, -1:]], 1)
        return keys[:, :-1]

    def head_scores(self, keep: Tensor) -> Tensor:
        """(rows, n + 1): the head's own log-probabilities of the nodes of `tree(keep)`; -inf: not one of its nodes."""
        own = torch.cat(self._scores, 1) if self._own is None else self._own
        keep = keep.expand(len(own), -1)
        chosen = own.gather(1, keep.clamp_max(own.shape[1] - 1)).masked_fill(keep >= own.shape[1], -torch.inf)
        return pad(chosen, (1, 0), value=-torch.inf)

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
            height=self._height,
            checked=True,
        )


def calibrated(scores: Tensor, curves: Source, setting: Sequence[tuple[float, float]]) -> Tensor:
    """Scores (rows, n) as log-probabilities of acceptance; see `Growth.calibrate`."""
    warmth = {warm for warm, _ in setting}
    if warmth == {0.0} or curves.greedy == curves.sampled:
        found = curves.greedy.apply(scores)
    elif warmth == {1.0}:
        found = curves.sampled.apply(scores)
    else:
        share = to_device(torch.tensor([[warm] for warm, _ in setting]), scores.device)
        finite = scores.masked_fill(scores == -torch.inf, 0.0)
        found = (1 - share) * curves.greedy.apply(finite) + share * curves.sampled.apply(finite)
        found = found.masked_fill(scores == -torch.inf, -torch.inf)
    if any(shift for _, shift in setting):
        found = found + to_device(torch.tensor([[shift] for _, shift in setting]), scores.device)
    return found.clamp_max(0.0)


def best_places(scores: Tensor, count: int) -> Tensor:
    """Indices (rows, count) of the best scores, ascending; on ties the earlier index wins."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values
