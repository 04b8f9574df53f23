"""EAGLE's tree with the best suffix match of the text as an additional branch.

If the text repeats itself, the match reaches deeper than any head. With measured costs, a step may skip the head and
verify the match only, as far as it is expected to pay.

    EAGLE's tree   r -- a -- b          match  a b c d e     merged   r -- a -- b -- c -- d
                    \\                                                 \\
                      x                 at most 2 new nodes             x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from haast.core import Accepted, Request, TokenChooser
from haast.device import to_device, without_autograd
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.ngram import SuffixDrafter, TextIndex
from haast.errors import check_at_least
from haast.path_tree import Path
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree
from haast.tuning.latency import Latency

_PRIOR = (4, 8.0)  # initial counts of every request: matches, and tokens gained by them


@dataclass
class HybridState:
    """Both drafters' states of a request, the tokens gained by matches, and the first match node of the last tree."""

    eagle: Any
    text: TextIndex
    matches: int = _PRIOR[0]
    gained: float = _PRIOR[1]
    offered: int = 0


class HybridDrafter(Drafter):
    """An `EagleDrafter`'s tree and a suffix match.

    Args:
        eagle: drafts the tree.
        extra: maximum nodes for the match, 1 or more.
        least: minimum length of a match in tokens, to be added to a tree.
        latency: measured costs. With them a budget limits the head's tree only, and a step that skips the head verifies
            a match as far as it is expected to pay.
        chain: maximum nodes of such a match, root included.
    """

    name = "eagle+suffix"

    def __init__(
        self, eagle: EagleDrafter, extra: int = 4, least: int = 3, *, latency: Latency | None = None, chain: int = 16
    ) -> None:
        check_at_least("extra", extra)
        self.eagle, self._extra, self._least, self._latency = eagle, extra, least, latency
        self._chain = 0 if latency is None else chain
        self._suffix = SuffixDrafter(extra + 1, least if latency is None else 1, 1, latency=lambda: latency)
        self.target_layers, self.prefix_key, self.reach = eagle.target_layers, eagle.prefix_key, eagle.reach

    @property
    def nodes(self) -> int:
        return max(self.eagle.nodes + self._extra, self._chain)

    @property
    def caches(self) -> tuple[KVCache, ...]:  # type: ignore[override]  # created at first use, like EAGLE's
        return self.eagle.caches

    @property
    def room(self) -> int:  # type: ignore[override]
        return self.eagle.room

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> HybridState:
        return HybridState(self.eagle.begin(prompt, kv, reused), self._suffix.begin(prompt, kv, reused))

    def set_load(self, requests: int) -> None:
        super().set_load(requests)
        self.eagle.drafting_off = self.drafting_off

    def set_chooser(self, state: HybridState, chooser: TokenChooser) -> None:
        self.eagle.set_chooser(state.eagle, chooser)

    def add_prediction(self, state: HybridState, text: Sequence[int]) -> None:
        self._suffix.add_prediction(state.text, text)

    def end(self, state: HybridState) -> None:
        self.eagle.end(state.eagle)

    def filled(self, state: HybridState, length: int) -> int:
        return self.eagle.filled(state.eagle, length)

    def head_kv_from(self, state: HybridState) -> int:
        return self.eagle.head_kv_from(state.eagle)

    def observe(self, states: Sequence[HybridState], accepted: Accepted) -> None:
        self.eagle.observe([state.eagle for state in states], accepted)
        self._suffix.observe([state.text for state in states], accepted)
        if accepted.verdict is not None:
            for state, row in zip(states, accepted.verdict.rows, strict=True):
                if state.offered and row is not None:
                    state.matches += 1
                    state.gained += sum(node >= state.offered for node in row.path)
                state.offered = 0

    @without_autograd
    def propose(self, states: Sequence[HybridState], budget: int | None = None) -> DraftTree:
        if budget == 1 and self._latency is not None:  # the match only, as far as it pays
            tree = self.eagle.propose([state.eagle for state in states], 1)
            drafts, _ = self._suffix.paying_drafts([state.text for state in states], self._chain - 1)
            paths = [next(iter(state.text.paths(drafts)), ()) if drafts else () for state in states]
            return with_matches(tree, paths, drafts) if drafts else tree
        extra, head_budget = self._extra, budget  # with measured costs, a budget limits the head's tree only
        if budget is not None and self._latency is None:
            extra = min(extra, budget // 2)
            head_budget = budget - extra
        matches = [self._match(state.text) if extra else () for state in states]
        if not any(matches):
            return self.eagle.propose([state.eagle for state in states], budget)
        tree = self.eagle.propose([state.eagle for state in states], head_budget)
        if len(states) > 1:  # a match in one row adds nodes to all rows: check that it pays
            each = zip(states, matches, strict=True)
            gain = sum(state.gained / state.matches for state, match in each if match) / len(states)
            if not self.eagle.affords(len(states), tree.nodes, extra, gain):
                return tree
        for state, match in zip(states, matches, strict=True):
            state.offered = tree.nodes if match else 0
        return with_matches(tree, matches, extra)

    def suffix_only(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Expected tokens per row, and nodes, of the next step without the head."""
        texts = [request.draft_state.text for request in requests]
        drafts, tokens = self._suffix.paying_drafts(texts, self._chain - 1)
        return tokens, 1 + drafts

    def pending_positions(self, states: Sequence[HybridState]) -> int:
        """Positions of all rows that the head has not processed yet."""
        return self.eagle.pending_positions([state.eagle for state in states])

    def _match(self, text: TextIndex) -> Path:
        """The tokens that followed the longest match; empty if it is shorter than `least`."""
        length, place = text.match()
        return text.text[place : place + self.nodes] if length >= self._least else ()


def with_matches(tree: DraftTree, matches: Sequence[Path], extra: int) -> DraftTree:
    """Add each row's match to its tree as a path from the root; a prefix that the tree has already is shared.

    The tree is (rows, nodes), without placeholders. At most `extra` nodes are appended to every row, dead where a row
    has no token. Reads nothing from the device; on the CPU, where reading is free, unused nodes are left out.
    """
    nodes, device, longest = tree.nodes, tree.tokens.device, tree.height + extra
    padded = torch.tensor([[*match[:longest], *[-1] * (longest - len(match))] for match in matches])
    path = to_device(padded, device)  # (rows, height + extra); -1 is no token
    agrees = tree.live & (tree.tokens == path.gather(1, (tree.depths - 1).clamp_min(0)))
    agrees[:, 0] = True
    shared = (agrees.unsqueeze(1) | ~tree.ancestors).all(
        2
    )  # (rows, nodes): the node and its ancestors are on the match
    end = torch.where(shared, tree.depths, -1).argmax(1, keepdim=True)  # (rows, 1): where the new nodes begin
    added = torch.arange(extra, device=device)
    tokens = path.gather(1, tree.depths.gather(1, end) + added)  # (rows, extra)
    if device.type == "cpu":
        tokens = tokens[:, : int((tokens >= 0).sum(1).max())]
    new = tokens.shape[1]
    parents = torch.cat([end, (nodes + added[: max(new - 1, 0)]).expand(tree.rows, -1)], dim=1)[:, :new]
    return DraftTree.from_parents(
        torch.cat([tree.tokens, tokens.clamp_min(0)], dim=1),
        torch.cat([tree.parents, parents], dim=1),
        torch.cat([tree.live, tokens >= 0], dim=1),
        height=longest,
        checked=True,
    )
