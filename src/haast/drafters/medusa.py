"""Medusa drafting: each head predicts one depth, a static tree combines their best predictions (arXiv 2401.10774).

Owns the choice of the combinations and the drafting itself. Node (r_1, ..., r_d) is the r_d-th best token of head d
under the r_{d-1}-th best of head d - 1, whatever token that is, since the heads are independent of each other.

    feature f_{p-1}    of the last committed position; the target's LM head on it gave the root, token p
    head i             predicts token p + 1 + i, all from that one feature: one pass drafts the whole tree
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from haast import native
from haast.core import Accepted
from haast.device import without_autograd
from haast.drafters.base import Drafter, last_kept, last_tokens, stacked
from haast.drafters.draft_lm import DRAFT_LM_FORM, checked_vocab, draft_form
from haast.drafters.head_check import HeadWatch, causes
from haast.drafters.tree_shape import DraftShape, likeliest_paths
from haast.drafters.vanilla import RootState
from haast.errors import HeadMismatchError, check_at_least
from haast.heads.checkpoint import Head, check_fits, check_weights
from haast.heads.medusa import MedusaHeads
from haast.heads.precision import warn_of_precision
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.memory import release_freed_memory
from haast.target.packing import PackedLinear, is_packed, pack_linears
from haast.target.target import Target
from haast.tree import DraftTree

RANKS = 10  # tokens per head that may enter a tree
# Accuracies if a head's files state none: a curve like those that Medusa's authors publish for their heads.
_ASSUMED = tuple(tuple(first * 0.4 ** min(r, 1) * 0.6 ** max(r - 1, 0) for r in range(RANKS)) for first in (0.5, 0.3))
_DECAY = 0.7  # factor of the assumed accuracies from the second head on, per head


@dataclass
class MedusaState(RootState):
    """The root and the feature that the next tree is drafted from; set by the first `observe`."""

    feature: Tensor | None = None  # (hidden,) at the position before the root


@dataclass(frozen=True)
class _Combined:
    """The structure of a tree with a given number of nodes."""

    tree: DraftTree  # one row; its tokens are placeholders
    widths: tuple[int, ...]  # tokens needed from each head
    picked: Tensor  # (nodes - 1,) int64: each node's index into the concatenated tokens of all heads


class MedusaDrafter(Drafter):
    """Drafts with `MedusaHeads`.

    Args:
        target: the model that it drafts for.
        head: heads trained for this target. The module is modified: moved to the target's device and dtype, and packed
            if the target is packed.
        nodes: nodes of the tree, root included, 2 or more.

    Raises HeadMismatchError for another kind of head or another target, ValueError for too few nodes or invalid
    accuracies.
    """

    name = "medusa"
    pace = None  # all trees have the same size
    window = None  # the heads read one position

    def __init__(self, target: Target, head: Head, nodes: int = 6) -> None:
        module = head.module
        if not isinstance(module, MedusaHeads):
            raise HeadMismatchError(f"a {type(module).__name__} does not draft as Medusa: give Medusa heads")
        check_weights(module)
        check_fits(module.config, target.hidden_size, target.vocab_size, type(target.model).__name__)
        warn_of_precision(head.about, target.precision)
        self._vocab = None if head.draft_vocab is None else checked_vocab(head.draft_vocab, target)
        self.accuracies = _accuracies(head)
        self._target, self._built = target, (target.device, target.dtype)
        self._module = module.to(device=target.device, dtype=target.dtype)
        packed = is_packed(target.lm_head)
        if packed:  # the blocks like the target; the LM heads in 8 bits, since drafts need not be exact
            for each in self._module:
                assert isinstance(each, nn.Sequential) and isinstance(each[-1], nn.Linear), "blocks and an LM head"
                each[-1] = PackedLinear(each[-1].weight.detach(), None, form=DRAFT_LM_FORM)
            pack_linears(self._module, form=draft_form(target))
            release_freed_memory()
        self._native = packed and native.available()
        self._watch = HeadWatch(head.about, partial(causes, target, module.config, head.about))
        check_at_least("nodes", nodes, 2, " (a drafted tree has a root and a draft)")
        self._combined: dict[int, _Combined] = {}
        self._nodes = self._tree_of(nodes).tree.nodes

    @property
    def nodes(self) -> int:
        """Nodes of a tree without a budget; fewer than requested if the heads give fewer combinations."""
        return self._nodes

    @property
    def shape(self) -> DraftShape:
        """The tree as a `DraftShape`."""
        widths = self._tree_of(self._nodes).widths
        return DraftShape("static", len(widths), max(widths), max(widths), self._nodes)

    @property
    def expected(self) -> list[float]:
        """[n]: expected accepted drafts per step of a tree with n + 2 nodes, by the heads' accuracies."""
        paths = likeliest_paths(self.accuracies, 63)
        gains = (math.prod(self.accuracies[depth][rank] for depth, rank in enumerate(path)) for path in paths)
        return list(accumulate(gains))

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> MedusaState:
        self._target.check_device(self._built)
        return MedusaState()

    def observe(self, states: Sequence[MedusaState], accepted: Accepted) -> None:
        self._watch.observed(accepted)
        features, roots = last_kept(accepted.features, accepted.counts), last_tokens(accepted)
        for state, feature, root in zip(states, features.unbind(), roots.unbind(), strict=True):
            state.feature, state.root = feature, root

    @without_autograd
    def propose(self, states: Sequence[MedusaState], budget: int | None = None) -> DraftTree:
        roots = stacked(states, "root")
        if budget is not None and budget < 2:
            self._watch.proposed(1)
            return DraftTree.roots(roots)
        combined = self._tree_of(self._nodes if budget is None else min(budget, self._nodes))
        features, tree = stacked(states, "feature"), combined.tree
        guesses = torch.cat([self._best(i, features, width) for i, width in enumerate(combined.widths)], dim=1)
        tokens = torch.cat([roots.unsqueeze(1), guesses[:, combined.picked]], dim=1)  # (rows, nodes)
        self._watch.proposed(tree.nodes)
        return replace(tree.select_rows(torch.zeros_like(roots)), tokens=tokens)

    def _tree_of(self, nodes: int) -> _Combined:
        """The tree of the most likely combinations, with `nodes` nodes (2 or more)."""
        if nodes in self._combined:
            return self._combined[nodes]
        drafts = self._target.vocab_size if self._vocab is None else len(self._vocab)
        accuracies = [ranks[:drafts] for ranks in self.accuracies]
        paths = sorted(likeliest_paths(accuracies, nodes - 1), key=lambda path: (len(path), path))
        node_of = {(): 0, **{path: node for node, path in enumerate(paths, start=1)}}
        parents = torch.tensor([[-1, *(node_of[path[:-1]] for path in paths)]], device=self._target.device)
        depth = max(map(len, paths))
        widths = tuple(1 + max(path[-1] for path in paths if len(path) == level) for level in range(1, depth + 1))
        picked = [sum(widths[: len(path) - 1]) + path[-1] for path in paths]
        tree = DraftTree.from_parents(torch.zeros_like(parents), parents, height=depth, checked=True)
        combined = self._combined[nodes] = _Combined(tree, widths, torch.tensor(picked, device=self._target.device))
        return combined

    def _best(self, number: int, feature: Tensor, width: int) -> Tensor:
        """The `width` most likely tokens of a head, best first: (rows, width) target ids."""
        logits = self._module[number](feature).float()  # (rows, draft vocabulary)
        if self._native and width <= native.MOST_TOP:
            ids = native.top(logits.unsqueeze(1), width)[1].squeeze(1)
        else:
            ids = logits.topk(width, dim=-1).indices
        return ids if self._vocab is None else self._vocab[ids]


def _accuracies(head: Head) -> tuple[tuple[float, ...], ...]:
    """[i][r]: accuracy of the r-th best token of head i: measured in training if the head's files have it."""
    assert isinstance(head.module, MedusaHeads), "checked by the drafter"
    stored, count = head.about.get("rank_accuracies"), head.module.config.heads
    if stored is None:
        return tuple(tuple(chance * _DECAY ** max(i - 1, 0) for chance in _ASSUMED[min(i, 1)]) for i in range(count))
    rows = isinstance(stored, list) and len(stored) == count and all(isinstance(row, list) and row for row in stored)
    if not rows or not all(isinstance(c, float | int) and 0 <= c <= 1 for row in stored for c in row):
        raise ValueError(
            f"rank_accuracies={stored!r} in the head's config.json must be {count} lists of probabilities, one per "
            f"head: train the heads again, or take the entry out"
        )
    return tuple(tuple(map(float, row[:RANKS])) for row in stored)
