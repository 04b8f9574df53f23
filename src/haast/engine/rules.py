"""Acceptance rules beside sample-and-match: recursive rejection, block verification, typical acceptance.

Owns which nodes of a tree are kept, given the target's processed distribution at each node and the distribution that
its token was drawn from. Knows no model and no drafter. What each rule keeps:

    rule        drafts                          emitted text
    rejection   sampled (or given), any tree    follows the target's distribution (arXiv 2211.17192; trees: 2305.09781)
    block       sampled (or given), a chain     follows the target's distribution (arXiv 2403.10444, algorithm 2)
    typical     any tree                        LOSSY: follows another distribution (arXiv 2401.10774, section 3.3)

Lossless here means equal in distribution, not in text: these rules use randomness of their own, so the same seed gives
the same text again but not vanilla's. Only sample-and-match (`haast.engine.verify`) promises vanilla's text. At
temperature 0 all distributions are one-hot, and every rule keeps the target's argmax, so the text is vanilla's again.

Draws are keyed by the request (its seed and choice), the root's position and the depth under it, not by the token's own
position: a block's verdict depends on its later drafts too, so a draw that was used for a discarded draft must not
serve again in the next step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from haast.core import RowVerdict, TokenChooser, Verdict
from haast.device import exact
from haast.engine.verify import Failures, check_nodes, check_root, each_alone
from haast.sampling import ACCEPT, RESIDUAL, Sampler, inverse_cdf, keyed_uniform
from haast.tree import DraftTree

_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of a distribution's sum around 1


class Draws:
    """One row's randomness in one step, keyed by (seed, choice, tokens up to the root) and the place in the tree."""

    def __init__(self, seed: int, choice: int, position: int) -> None:
        self._keys = (seed, choice, position)

    def coin(self, chance: float, depth: int, turn: int = 0) -> bool:
        """True with `chance`; each (depth, turn) is a coin of its own."""
        return keyed_uniform(*self._keys, ACCEPT, depth, turn) < chance

    def pick(self, probs: Tensor, depth: int) -> int:
        """A token of `probs` (vocab,), for the place after a node at `depth`."""
        return inverse_cdf(probs, keyed_uniform(*self._keys, RESIDUAL, depth))


@dataclass(frozen=True)
class Candidates:
    """One row's tree as a rule sees it: who hangs on whom, and both distributions at a node."""

    tree: DraftTree
    row: int
    logits: Tensor  # (nodes, vocab)
    sampler: Sampler
    tokens: list[int]
    children: list[list[int]]

    def target_probs(self, history: Sequence[int], node: int) -> Tensor:
        """The processed distribution (vocab,) of the token that follows `node`, whose path ends `history`."""
        return self.sampler.probs(history, self.logits[node])

    def draft_probs(self, node: int) -> Tensor:
        """The distribution (vocab,) that the node's token was drawn from; a point mass where the tree does not say.

        Raises:
            ValueError: it is none, or the token can't have been drawn from it: the text would no longer follow the
                target's distribution.
        """
        token, wide = self.tokens[node], exact(self.logits.device)
        if self.tree.draft_probs is None:
            point = torch.zeros(self.logits.shape[-1], dtype=wide, device=self.logits.device)
            point[token] = 1.0
            return point
        probs = self.tree.draft_probs[self.row, node].to(wide)
        total, own = float(probs.sum()), float(probs[token])
        if not bool((probs >= 0).all()):
            raise ValueError(f"draft_probs of node {node} hold NaN or negative numbers: give probabilities")
        if abs(total - 1) >= _SUM_TOLERANCE[wide]:
            raise ValueError(f"draft_probs of node {node} sum to {total} and must sum to 1: give probabilities")
        if not own > 0:
            raise ValueError(
                f"node {node}'s token {token} cannot have been drawn from its draft_probs, which give it {own}: give "
                f"the distribution that it was drawn from"
            )
        return probs

    def verdict(self, path: Sequence[int], bonus: int) -> RowVerdict:
        """What is kept: the nodes of `path`, and the token after them."""
        following = zip(path, [*path[1:], None], strict=True)
        preferred = tuple(self.children[node][0] == kept for node, kept in following if self.children[node])
        return RowVerdict(tuple(path), (*(self.tokens[node] for node in path[1:]), bonus), preferred)


class AcceptanceRule(ABC):
    """How a drafted tree is judged. `lossy`: whether the text follows another distribution than the target's."""

    name: str
    lossy: bool = False
    chains_only: bool = False

    @property
    def label(self) -> str:
        """The name for tables and plots; a lossy rule says so."""
        return f"{self.name}, lossy" if self.lossy else self.name

    def verify(
        self,
        tree: DraftTree,
        logits: Tensor,
        choosers: Sequence[TokenChooser],
        histories: Sequence[Sequence[int]],
        failures: Failures | None = None,
    ) -> Verdict:
        """Judge every row's tree; arguments and result as those of `haast.engine.verify.verify`.

        Processors of a request must be functions of the history: rules may ask for nodes that are not kept.

        Raises:
            ValueError: logits of other nodes than the tree's, a chooser that has no distribution, `draft_probs` that
                are none, or the rule takes chains only and a node has several children.
        """
        check_nodes(tree, logits)
        rows: list[RowVerdict | None] = [None] * len(choosers)

        def judged(row: int) -> RowVerdict:
            return self._row(tree, row, logits[row], choosers[row], list(histories[row]))

        each_alone(range(len(choosers)), judged, rows, failures)
        return Verdict.of_rows(rows, tree.tokens.device)

    def _row(self, tree: DraftTree, row: int, logits: Tensor, chooser: TokenChooser, history: list[int]) -> RowVerdict:
        if not isinstance(chooser, Sampler):
            raise ValueError(
                f"acceptance rule {self.name!r} needs the target's distribution, and a {type(chooser).__name__} only "
                f"chooses: give sampling parameters, or judge by sample-and-match (rule=None)"
            )
        seen = Candidates(tree, row, logits, chooser, tree.tokens[row].tolist(), tree.children(row))
        check_root(seen.tokens[0], history)
        widest = max(len(children) for children in seen.children)
        if self.chains_only and widest > 1:
            raise ValueError(
                f"acceptance rule {self.name!r} takes chains, and this tree has a node with {widest} children: let a "
                "small model draft, or choose another rule"
            )
        return self.walk(seen, history, self.draws(chooser, history))

    def draws(self, sampler: Sampler, history: Sequence[int]) -> Draws:
        """The randomness of one request's step."""
        return Draws(sampler.params.seed, sampler.choice, len(history))

    @abstractmethod
    def walk(self, seen: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        """Judge one row. `history` holds all tokens up to and including the root."""


class RejectionRule(AcceptanceRule):
    """Recursive rejection sampling: lossless in distribution for children tried in the order in which they were drawn.

    A child x is kept with chance min(1, target(x) / draft(x)). If it is not, the target's distribution is replaced by
    the normalised excess max(target - draft, 0), and the next child is tried; the last excess gives the bonus.
    """

    name = "rejection"

    def walk(self, seen: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        path = [0]
        while True:
            target = seen.target_probs(history, path[-1])
            kept = None
            for turn, child in enumerate(seen.children[path[-1]]):
                draft = seen.draft_probs(child)
                if draws.coin(accept_chance(target, draft, seen.tokens[child]), len(path), turn):
                    kept = child
                    break
                target = residual(target, draft)
            if kept is None:
                return seen.verdict(path, draws.pick(target, len(path)))
            path.append(kept)
            history = [*history, seen.tokens[kept]]


class BlockRule(AcceptanceRule):
    """Block verification of a chain: lossless in distribution, and keeps at least as much as rejection on average.

    The chain is judged as a whole: a token that alone would be rejected may be kept for the sake of likelier ones
    around it.
    """

    name = "block"
    chains_only = True

    def walk(self, seen: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        path, targets, drafts = [0], [seen.target_probs(history, 0)], list[Tensor]()
        while seen.children[path[-1]]:
            path.append(seen.children[path[-1]][0])
            history = [*history, seen.tokens[path[-1]]]
            drafts.append(seen.draft_probs(path[-1]))
            targets.append(seen.target_probs(history, path[-1]))
        weights = block_weights(targets, drafts, [seen.tokens[node] for node in path[1:]])
        kept = len(drafts)
        while kept and not draws.coin(block_chance(weights, targets, drafts, kept), kept):
            kept -= 1
        left = targets[kept] if kept == len(drafts) else residual(targets[kept], drafts[kept], weights[kept])
        return seen.verdict(path[: kept + 1], draws.pick(left, kept + 1))


class TypicalRule(AcceptanceRule):
    """Medusa's typical acceptance. LOSSY: the text does not follow the target's distribution at temperatures above 0.

    A node with token x is kept if its parent is and target(x) > min(epsilon, delta * exp(-entropy)), the target's
    processed distribution taken at the parent. The longest kept path wins, of equals the likeliest. The token after it
    is the target's argmax: the paper decodes the first token of every step greedily, and this is the next step's first.
    Only the token after the prompt is drawn. At temperature 0 the distribution is one-hot, so only the argmax is kept:
    vanilla's text.

    Args:
        epsilon: the hard threshold, above 0 and below 1.
        delta: the entropy-dependent factor, above 0. The defaults are Medusa's (delta = sqrt(epsilon)).
    """

    name = "typical"
    lossy = True

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon} is not allowed: give a value above 0 and below 1")
        if not 0 < delta < math.inf:
            raise ValueError(f"delta={delta} is not allowed: give a finite value above 0")
        self.epsilon, self.delta = epsilon, delta

    def walk(self, seen: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        best: tuple[tuple[int, float], list[int], int] = ((0, 0.0), [0], 0)  # any kept path, the root's too, is longer
        open_paths = [([0], 0.0)]
        while open_paths:
            path, likelihood = open_paths.pop()
            target = seen.target_probs([*history, *(seen.tokens[node] for node in path[1:])], path[-1])
            rank = (len(path), likelihood)
            if rank > best[0]:
                best = (rank, path, int(target.argmax()))
            for child in seen.children[path[-1]]:
                if is_typical(target, seen.tokens[child], self.epsilon, self.delta):
                    open_paths.append(([*path, child], likelihood + math.log(float(target[seen.tokens[child]]))))
        return seen.verdict(best[1], best[2])


_RULES: dict[str, type[AcceptanceRule]] = {each.name: each for each in (RejectionRule, BlockRule, TypicalRule)}
RULES = ("match", *_RULES)


def rule_named(name: str) -> AcceptanceRule | None:
    """The rule of a name in `RULES`; None for sample-and-match, the engine's default.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"unknown acceptance rule {name!r}: choose one of {', '.join(RULES)}")
    return _RULES[name]() if name in _RULES else None


def accept_chance(target_probs: Tensor, draft_probs: Tensor, token: int) -> float:
    """min(1, target / draft) at `token`, which was drawn from `draft_probs`."""
    return min(1.0, float(target_probs[token]) / float(draft_probs[token]))


def residual(target_probs: Tensor, draft_probs: Tensor, weight: float = 1.0) -> Tensor:
    """The normalised excess max(weight * target - draft, 0) (vocab,).

    Where rounding leaves nothing of it (it is reached with a chance of about 0), the target's argmax.
    """
    excess = (weight * target_probs - draft_probs).clamp_min(0.0)
    total = float(excess.sum())
    if total > 0:
        return excess / total
    return torch.nn.functional.one_hot(target_probs.argmax(-1), target_probs.shape[-1]).to(target_probs.dtype)


def block_weights(targets: Sequence[Tensor], drafts: Sequence[Tensor], tokens: Sequence[int]) -> list[float]:
    """Chance, given the drafts, that at least i of them are kept, for i = 0 .. len(drafts); [0] is 1.

    Args:
        targets: the target's distribution after the root and after every draft, (vocab,) each.
        drafts: the distribution each draft was drawn from.
        tokens: the drafts.
    """
    weights = [1.0]
    for target, draft, token in zip(targets[:-1], drafts, tokens, strict=True):
        weights.append(min(1.0, weights[-1] * float(target[token]) / float(draft[token])))
    return weights


def block_chance(weights: Sequence[float], targets: Sequence[Tensor], drafts: Sequence[Tensor], kept: int) -> float:
    """Chance that `kept` drafts are kept, given that no more are."""
    weight = weights[kept]
    if kept == len(drafts):
        return weight
    excess = float((weight * targets[kept] - drafts[kept]).clamp_min(0.0).sum())
    rest = excess + (1.0 - weight)
    return excess / rest if rest > 0 else 1.0  # 0 / 0: both are one distribution, and the next draft is always kept


def is_typical(target_probs: Tensor, token: int, epsilon: float, delta: float) -> bool:
    """target(token) > min(epsilon, delta * exp(-entropy of target)), the entropy in nats."""
    entropy = float(torch.special.entr(target_probs).sum())
    return float(target_probs[token]) > min(epsilon, delta * math.exp(-entropy))
