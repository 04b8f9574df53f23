"""EAGLE's tree with the best suffix match as one more branch: what was said before needs no head.

Owns the merge. Where the text repeats itself (code, tables, quotations) the match reaches deeper than any head; where
it does not, nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence

from haast.drafters.base import Accepted, Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.lookup import SuffixDrafter
from haast.drafters.paths import Path, PathTree, pack_rows
from haast.drafters.ways import way_for
from haast.tokens import common_length
from haast.tree import DraftTree

_PRIOR = (4, 8.0)  # matches, and tokens gained by them, that a text of several rows begins with


class HybridDrafter(Drafter):
    """An `EagleDrafter`'s tree and a suffix match.

    Args:
        eagle: drafts the tree.
        extra: nodes for the match, 1 or more.
        least: tokens that a match must share with the end of the text.
    """

    name = "eagle+suffix"

    def __init__(self, eagle: EagleDrafter, extra: int = 4, least: int = 3) -> None:
        if extra < 1:
            raise ValueError(f"extra={extra} is not allowed: give 1 or more")
        self.eagle, self._extra = eagle, extra
        self._suffix = SuffixDrafter(extra + 1, least, 1)
        self.target_layers = eagle.target_layers
        self.lock = eagle.lock  # whoever runs this one runs that one

    @property
    def owner(self) -> object:
        """The run that the EAGLE drafter follows, whether through this drafter or by itself."""
        return self.eagle.owner

    @owner.setter
    def owner(self, run: object) -> None:
        self.eagle.owner = run

    @property
    def nodes(self) -> int:
        return self.eagle.nodes + self._extra

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self.eagle.start(prompts)
        self._suffix.start(prompts)
        self._offered: list[tuple[Path, int]] = []  # per row of the last tree: the match, and how far EAGLE had it
        self._matches, self._gained = _PRIOR

    def memory(self) -> object:
        return self.eagle.memory()

    def recall(self, memory: object, following: Sequence[int]) -> None:
        self.eagle.recall(memory, following)
        self._suffix.recall(None, following)

    def keep(self, order: Sequence[int]) -> None:
        self.eagle.keep(order)
        self._suffix.keep(order)
        self._offered = []  # what it brought is counted already

    def observe(self, accepted: Accepted) -> None:
        self.eagle.observe(accepted)
        self._suffix.observe(accepted)
        for row, (path, had) in enumerate(self._offered):
            if len(path) > had:
                said = accepted.tokens[row, : accepted.counts[row]].tolist()
                self._matches += 1
                self._gained += max(common_length(path, said) - had, 0)
        self._offered = []

    def propose(self) -> DraftTree:
        tree = self.eagle.propose()
        matches = [self._suffix.paths(row, self.nodes) for row in range(tree.rows)]
        if not self._pays(matches, tree.nodes):
            return tree  # nothing to add: the step costs what EAGLE's own costs
        rows = []
        for row, paths in enumerate(matches):
            merged = PathTree.of_tree(tree, row, tree.nodes + self._extra)
            path = paths[0] if paths else ()
            had = merged.agreeing(path)
            self._offered.append((path[: had + merged.insert(path, most=self._extra)], had))
            rows.append(merged)
        return pack_rows(rows, max(len(row.tokens) for row in rows), tree.tokens.device)

    def _pays(self, matches: Sequence[Sequence[Path]], nodes: int) -> bool:
        """Whether the matches are worth the nodes that every row gets for them."""
        found = sum(map(bool, matches))
        if not found or len(matches) == 1:
            return bool(found)
        way = way_for(self.eagle.ways, len(matches))
        if way.pace is None:
            return way.shape is not None
        return way.pace.affords(nodes, self._extra, found / len(matches) * self._gained / self._matches)
