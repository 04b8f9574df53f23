"""Model-free drafting: copies the tokens that followed an earlier occurrence of the text's last tokens.

`PromptLookupDrafter` finds the latest earlier occurrence of the last few tokens (prompt lookup decoding, Saxena 2023),
`SuffixDrafter` the longest suffix of the whole text that occurred before (`suffix_index`). With measured costs, they
propose as many tokens as are expected to pay, by the accuracy of earlier matches in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from haast.core import Accepted
from haast.drafters.base import Drafter
from haast.drafters.candidates import Candidates
from haast.drafters.corpus import Corpus, CorpusIndex
from haast.drafters.suffix_index import SuffixIndex
from haast.drafters.text_index import NgramIndex, TextIndex
from haast.errors import check_at_least
from haast.path_tree import pack_rows
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree
from haast.tuning.latency import Latency
from haast.tuning.online import best_chain, least_first_chance

LatencySource = Callable[[], Latency | None]  # None if costs were not measured


class HistoryDrafter(Drafter):
    """Base of the drafters that read only a request's text.

    Args:
        index: creates the index of an empty text.
        nodes: maximum nodes of a tree, root included, 2 or more; a tree has only as many as there are drafts.
        latency: returns measured costs, called at the first match; a tree then has only nodes that are expected to pay.
    """

    def __init__(self, index: Callable[[], TextIndex], nodes: int, latency: LatencySource | None = None) -> None:
        check_at_least("nodes", nodes, 2, " (root and a draft)")
        self._index, self._nodes, self._latency = index, nodes, latency

    @property
    def nodes(self) -> int:
        return self._nodes

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> Any:
        index = self._index()
        index.extend(prompt[: reused + 1])  # `observe` gets all later tokens, the rest of the prompt included
        return index

    def add_prediction(self, state: TextIndex, text: Sequence[int]) -> None:
        state.extend(text)

    def observe(self, states: Sequence[TextIndex], accepted: Accepted) -> None:
        for index, tokens in zip(states, accepted.host_tokens(), strict=True):
            index.extend(tokens, answer=accepted.verdict is not None)
            index.device = accepted.tokens.device

    def propose(self, states: Sequence[TextIndex], budget: int | None = None) -> DraftTree:
        most = self._nodes if budget is None else min(budget, self._nodes)
        if self._latency is not None:
            most = 1 + self.paying_drafts(states, most - 1)[0]
        drafted = [index.candidates(most - 1) if most > 1 else Candidates() for index in states]
        rows = [each.tree(index.text[-1], most) for index, each in zip(states, drafted, strict=True)]
        return pack_rows(rows, states[0].device)

    def paying_drafts(self, states: Sequence[TextIndex], most: int) -> tuple[int, float]:
        """The number of drafts per row that pays, at most `most`, and the expected tokens per row with them."""
        first = [index.first_chance() for index in states] if most else []
        if not any(first):
            return 0, 1.0
        latency = None if self._latency is None else self._latency()
        if latency is None:
            return most, 1.0
        rows = len(states)
        if sum(first) < rows * least_first_chance(rows, most, latency):  # a quick bound: no number of drafts can pay
            return 0, 1.0
        return best_chain([index.candidates(most).chances() for index in states], latency)


class PromptLookupDrafter(HistoryDrafter):
    """Copies the tokens after the latest earlier occurrence of the last `ngram` tokens, or of fewer."""

    name = "lookup"

    def __init__(self, nodes: int = 11, ngram: int = 3, latency: LatencySource | None = None) -> None:
        check_at_least("ngram", ngram)
        super().__init__(lambda: NgramIndex(ngram), nodes, latency)


class SuffixDrafter(HistoryDrafter):
    """Copies what followed the longest suffix of the text that occurred before, weighted by how often it did.

    Args:
        nodes: see `HistoryDrafter`.
        least: minimum length of a suffix, in tokens.
        branches: maximum number of continuations of a node.
        latency: see `HistoryDrafter`.
        corpus: earlier answers to copy from too; every answer is added to it when its request ends.
    """

    name = "suffix"

    def __init__(
        self,
        nodes: int = 11,
        least: int = 1,
        branches: int = 4,
        latency: LatencySource | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        check_at_least("least", least)
        check_at_least("branches", branches)

        def index() -> TextIndex:
            return SuffixIndex(least, branches) if corpus is None else CorpusIndex(corpus, least, branches)

        super().__init__(index, nodes, latency)

    def end(self, state: TextIndex) -> None:
        if isinstance(state, CorpusIndex):
            state.save()
