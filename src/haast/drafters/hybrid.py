"""EAGLE's tree with copies from the text as a second source: all nodes compete for the tree's places.

If the text repeats itself, a match reaches deeper than any head. Both sources give a log-probability of acceptance to
each of their nodes, calibrated on validation texts (`heads/acceptance.py`) and corrected by what was accepted, and the
tree takes the best of all, as many as pay. With measured costs, a step may skip the head and verify copies only.

    head        r -- a (0.6) -- b (0.3)        text   r -- a (0.5) -- b (0.4) -- c (0.4)
                 \\
                  x (0.1)                      5 nodes   r -- a (0.6) -- b (0.4) -- c (0.4)
                                                          \\
                                                           x (0.1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from haast.core import Accepted, Request, TokenChooser
from haast.device import without_autograd
from haast.drafters.base import Drafter
from haast.drafters.candidates import Candidates
from haast.drafters.corpus import Corpus
from haast.drafters.eagle import EagleDrafter
from haast.drafters.ngram import SuffixDrafter
from haast.drafters.text_index import TextIndex
from haast.errors import check_at_least
from haast.path_tree import pack_rows
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree
from haast.tuning.latency import Latency

MATCH_DEPTH = 4  # levels that a match is expected to add to a head's tree
_MOST_COPIES = 24  # nodes that the text offers to a tree


@dataclass
class HybridState:
    """Both drafters' states of a request."""

    eagle: Any
    text: TextIndex


class HybridDrafter(Drafter):
    """An `EagleDrafter`, and a suffix drafter whose nodes compete with the head's.

    Args:
        eagle: drafts with the head.
        corpus: earlier answers to copy from, see `SuffixDrafter`.
        latency: measured costs. With them a step that skips the head verifies copies as far as it is expected to pay.
        chain: maximum nodes of such a step, root included, 2 or more.
    """

    def __init__(
        self,
        eagle: EagleDrafter,
        corpus: Corpus | None = None,
        *,
        latency: Latency | None = None,
        chain: int = 16,
    ) -> None:
        check_at_least("chain", chain, 2, " (root and a draft)")
        self.eagle, self._latency = eagle, latency
        self.name = f"{eagle.name}+suffix"
        self._chain = 1 if latency is None else chain
        self._suffix = SuffixDrafter(chain, latency=lambda: latency, corpus=corpus)
        self.target_layers, self.prefix_key, self.reach = eagle.target_layers, eagle.prefix_key, eagle.reach

    @property
    def nodes(self) -> int:
        return max(self.eagle.nodes, self._chain)

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
        self._suffix.end(state.text)

    def filled(self, state: HybridState, length: int) -> int:
        return self.eagle.filled(state.eagle, length)

    def head_kv_from(self, state: HybridState) -> int:
        return self.eagle.head_kv_from(state.eagle)

    def observe(self, states: Sequence[HybridState], accepted: Accepted) -> None:
        self.eagle.observe([state.eagle for state in states], accepted)
        self._suffix.observe([state.text for state in states], accepted)

    @without_autograd
    def propose(self, states: Sequence[HybridState], budget: int | None = None) -> DraftTree:
        heads = [state.eagle for state in states]
        if not self.eagle.drafts(len(states), budget):
            tree = self.eagle.propose(heads, 1)
            texts = [state.text for state in states]
            drafts = 0 if self._latency is None else self._suffix.paying_drafts(texts, self._chain - 1)[0]
            if not drafts:
                return tree
            rows = [text.candidates(drafts).tree(text.text[-1], 1 + drafts) for text in texts]
            return pack_rows(rows, tree.tokens.device)
        most = min(self.eagle.nodes, budget or self.eagle.nodes, 1 + _MOST_COPIES) - 1
        return self.eagle.propose(heads, budget, [self._copies(state, most) for state in states])

    def suffix_only(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Expected tokens per row, and nodes, of the next step without the head."""
        texts = [request.draft_state.text for request in requests]
        drafts, tokens = self._suffix.paying_drafts(texts, self._chain - 1)
        return tokens, 1 + drafts

    def pending_positions(self, states: Sequence[HybridState]) -> int:
        """Positions of all rows that the head has not processed yet."""
        return self.eagle.pending_positions([state.eagle for state in states])

    def _copies(self, state: HybridState, most: int) -> Candidates:
        """What the text offers, with calibrated scores."""
        found, curves = state.text.candidates(most), self.eagle.text_curves
        found.scores = [curves.at(score, state.eagle.warmth) for score in found.scores]
        return found
