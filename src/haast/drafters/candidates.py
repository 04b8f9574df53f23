"""Drafted tokens of a source that reads text, with their scores: what competes with a head's nodes for a tree's places.

Owns the list, its merge by path, and its tensors and C arrays. Knows no model and no index.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from haast.path_tree import PathTree

KEY_FACTOR = 0x5851F42D4C957F2D  # of the 64-bit numbers of paths, Knuth's for linear congruential generators


@dataclass
class Candidates:
    """Nodes under one row's root; a parent precedes its children and its score is not below theirs.

    Attributes:
        tokens: of the nodes.
        parents: index of each node's parent in this list; -1 is the root.
        scores: log-probability of each node's path, at most 0.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, score: float) -> int:
        """Add a node; returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        return len(self.tokens) - 1

    @property
    def height(self) -> int:
        """Depth of the deepest node; 0 without nodes."""
        depths = list[int]()
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)

    def keys(self) -> list[int]:
        """A 64-bit number of every node's path, as `path_keys` computes it."""
        keys = list[int]()
        for token, parent in zip(self.tokens, self.parents, strict=True):
            key = ((keys[parent] if parent >= 0 else 0) * KEY_FACTOR + token + 1) & (2**64 - 1)
            keys.append(key - 2**64 if key >> 63 else key)
        return keys

    def chances(self) -> list[float]:
        """Probabilities of the nodes' paths."""
        return [math.exp(score) for score in self.scores]

    def merged(self, other: Candidates) -> Candidates:
        """The nodes of both by path; a path that both have gets the higher score. The best come first."""
        if not other.tokens:
            return self
        nodes = dict[tuple[int, int], int]()  # (parent, token) -> index in `joined`
        joined = Candidates()
        for source in (self, other):
            places = list[int]()
            for token, parent, score in zip(source.tokens, source.parents, source.scores, strict=True):
                key = (parent if parent < 0 else places[parent], token)
                place = nodes.get(key)
                if place is None:
                    place = nodes[key] = joined.add(token, key[0], score)
                joined.scores[place] = max(joined.scores[place], score)
                places.append(place)
        return joined.best(len(joined))

    def best(self, most: int) -> Candidates:
        """The `most` nodes of the highest scores, in descending order; of equal ones the earlier."""
        order = sorted(range(len(self)), key=lambda place: -self.scores[place])[:most]
        places, kept = {-1: -1}, Candidates()
        for place in order:
            places[place] = kept.add(self.tokens[place], places[self.parents[place]], self.scores[place])
        return kept

    def tree(self, root: int, nodes: int) -> PathTree:
        """The first `nodes` - 1 nodes under a root."""
        tree, places = PathTree(root, nodes), [0]
        for token, parent in zip(self.tokens[: nodes - 1], self.parents, strict=False):
            places.append(tree.child(places[parent + 1], token))
        return tree


@dataclass(frozen=True)
class CandidateRows:
    """Candidates of several rows, each padded to `width` nodes with nodes of score -inf under the root.

    Attributes:
        tokens, parents, scores: of all rows, one after the other; parents are indices within a row, -1 is the root.
        width: nodes per row.
        height: depth of the deepest node.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]
    width: int
    height: int

    @classmethod
    def of(cls, rows: Sequence[Candidates]) -> CandidateRows:
        """Pad and join these rows."""
        width, joined = max(map(len, rows)), Candidates()
        for row in rows:
            spare = width - len(row)
            joined.tokens += row.tokens + [0] * spare
            joined.parents += row.parents + [-1] * spare
            joined.scores += row.scores + [-math.inf] * spare
        return cls(joined.tokens, joined.parents, joined.scores, width, max(row.height for row in rows))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and parents, int64, and scores, float32, on the CPU; (rows, width) each."""
        numbers = torch.tensor([self.tokens, self.parents]).view(2, -1, self.width)
        return numbers[0], numbers[1], torch.tensor(self.scores).view(-1, self.width)

    def arrays(self) -> tuple[ctypes.Array[Any], ...]:
        """The same as C arrays, which take a twentieth of the time for a few nodes."""
        numbers = ctypes.c_int64 * len(self.tokens)
        return numbers(*self.tokens), numbers(*self.parents), (ctypes.c_float * len(self.scores))(*self.scores)
