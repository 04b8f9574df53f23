"""Acceptance rules other than sample-and-match: recursive rejection, block verification, typical acceptance.

Owns which nodes of a tree are accepted, given the target's processed distribution at each node and the distribution
that the node's token was sampled from. Knows no model and no drafter. What each rule guarantees:

    rule        drafts                              emitted text
    rejection   sampled or point mass, any tree     target's distribution (arXiv 2211.17192; trees: 2305.09781)
    block       sampled or point mass, a chain      target's distribution (arXiv 2403.10444, algorithm 2)
    typical     any tree                            LOSSY: another distribution (arXiv 2401.10774, section 3.3)

Lossless here means equal in distribution, not in text: these rules use random draws of their own, so a seed reproduces
its text, but not vanilla's. Only sample-and-match (`haast.engine.verify`) guarantees vanilla's text. At temperature 0
all distributions are one-hot and every rule accepts the target's argmax, so the text is vanilla's.

Draws are keyed by the request (its seed and choice), the root's position and the depth below it, not by the token's own
position: a block's verdict depends on its later drafts too, so a draw that was used for a rejected draft must not be
used again in the next step.
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
from haast.engine.verify import Failures, check_nodes, check_root, verify_each
from haast.sampling import ACCEPT, RESIDUAL, Sampler, inverse_cdf, keyed_uniform
from haast.tree import DraftTree

_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # |sum of a distribution - 1|


class Draws:
    """Random draws of one row in one step, keyed by (seed, choice, root position) and the position in the tree."""

    def __init__(self, seed: int, choice: int, position: int) -> None:
        self._keys = (seed, choice, position)

    def coin(self, chance: float, depth: int, turn: int = 0) -> bool:
        """True with probability `chance`; independent for each (depth, turn)."""
        return keyed_uniform(*self._keys, ACCEPT, depth, turn) < chance

    def pick(self, probs: Tensor, depth: int) -> int:
        """Sample a token from `probs` (vocab,), for the position after a node at `depth`."""
        return inverse_cdf(probs, keyed_uniform(*self._keys, RESIDUAL, depth))


@dataclass(frozen=True)
class Candidates:
    """One row's tree as an acceptance rule reads it: children, and both distributions at a node."""

    tree: DraftTree
    row: int
    logits: Tensor  # (nodes, vocab)
    sampler: Sampler
    tokens: list[int]
    children: list[list[int]]

    def target_probs(self, history: Sequence[int], node: int) -> Tensor:
        """The processed distribution (vocab,) of the token after `node`; `history` ends with the path to it."""
        return self.sampler.probs(history, self.logits[node])

    def draft_probs(self, node: int) -> Tensor:
        """The distribution (vocab,) that the node's token was sampled from; a point mass without `tree.draft_probs`.

        Raises:
            ValueError: it is no distribution, or gives the token no probability: then the text would not follow the
                target's distribution.
        """
        token, dtype = self.tokens[node], exact(self.logits.device)
        if self.tree.draft_probs is None:
            point = torch.zeros(self.logits.shape[-1], dtype=dtype, device=self.logits.device)
            point[token] = 1.0
            return point
        probs = self.tree.draft_probs[self.row, node].to(dtype)
        total, token_prob = float(probs.sum()), float(probs[token])
        if not bool((probs >= 0).all()):
            raise ValueError(f"draft_probs of node {node} hold NaN or negative numbers: give probabilities")
        if abs(total - 1) >= _SUM_TOLERANCE[dtype]:
            raise ValueError(f"draft_probs of node {node} sum to {total} and must sum to 1: give probabilities")
        if not token_prob > 0:
            raise ValueError(
                f"node {node}'s token {token} cannot have been drawn from its draft_probs, which give it {token_prob}: "
                f"give the distribution that it was drawn from"
            )
        return probs

    def verdict(self, path: Sequence[int], bonus: int) -> RowVerdict:
        """The verdict that accepts the nodes of `path` and emits `bonus` after them."""
        following = zip(path, [*path[1:], None], strict=True)
        preferred = tuple(self.children[node][0] == accepted for node, accepted in following if self.children[node])
        return RowVerdict(tuple(path), (*(self.tokens[node] for node in path[1:]), bonus), preferred)


class AcceptanceRule(ABC):
    """Decides which drafts are accepted. `lossy`: whether the text follows another distribution than the target's."""

    name: str
    lossy: bool = False
    chains_only: bool = False

    @property
    def label(self) -> str:
        """The name for tables and plots; marks a lossy rule."""
        return f"{self.name}, lossy" if self.lossy else self.name

    def verify(
        self,
        tree: DraftTree,
        logits: Tensor,
        choosers: Sequence[TokenChooser],
        histories: Sequence[Sequence[int]],
        failures: Failures | None = None,
    ) -> Verdict:
        """Verify every row's tree; arguments and result as in `haast.engine.verify.verify`.

        Processors of a request must be functions of the history: rules may call them for nodes that are not accepted.

        Raises:
            ValueError: logits and tree cover different nodes, a chooser has no distribution, `draft_probs` are no
                distributions, or the rule takes only chains and a node has several children.
        """
        check_nodes(tree, logits)
        rows: list[RowVerdict | None] = [None] * len(choosers)

        def verify_row(row: int) -> RowVerdict:
            return self._row(tree, row, logits[row], choosers[row], list(histories[row]))

        verify_each(range(len(choosers)), verify_row, rows, failures)
        return Verdict.of_rows(rows, tree.tokens.device)

    def _row(self, tree: DraftTree, row: int, logits: Tensor, chooser: TokenChooser, history: list[int]) -> RowVerdict:
        if not isinstance(chooser, Sampler):
            raise ValueError(
                f"acceptance rule {self.name!r} needs the target's distribution, and a {type(chooser).__name__} only "
                f"chooses: give sampling parameters, or use sample-and-match (rule=None)"
            )
        candidates = Candidates(tree, row, logits, chooser, tree.tokens[row].tolist(), tree.children(row))
        check_root(candidates.tokens[0], history)
        widest = max(len(children) for children in candidates.children)
        if self.chains_only and widest > 1:
            raise ValueError(
                f"acceptance rule {self.name!r} takes chains, and this tree has a node with {widest} children: draft "
                "with a small model, or choose another rule"
            )
        return self.walk(candidates, history, self.draws(chooser, history))

    def draws(self, sampler: Sampler, history: Sequence[int]) -> Draws:
        """The random draws of one request's step."""
        return Draws(sampler.params.seed, sampler.choice, len(history))

    @abstractmethod
    def walk(self, candidates: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        """Verify one row. `history` holds all tokens up to and including the root."""


class RejectionRule(AcceptanceRule):
    """Recursive rejection sampling: lossless in distribution if children are in the order in which they were sampled.

    A child x is accepted with probability min(1, target(x) / draft(x)). If it is rejected, the target's distribution is
    replaced by the residual, the normalised max(target - draft, 0), and the next child is tried; the bonus token is
    sampled from the last residual.
    """

    name = "rejection"

    def walk(self, candidates: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        path = [0]
        while True:
            target = candidates.target_probs(history, path[-1])
            accepted = None
            for turn, child in enumerate(candidates.children[path[-1]]):
                draft = candidates.draft_probs(child)
                if draws.coin(accept_chance(target, draft, candidates.tokens[child]), len(path), turn):
                    accepted = child
                    break
                target = residual(target, draft)
            if accepted is None:
                return candidates.verdict(path, draws.pick(target, len(path)))
            path.append(accepted)
            history = [*history, candidates.tokens[accepted]]


class BlockRule(AcceptanceRule):
    """Block verification of a chain: lossless in distribution; accepts at least as many tokens as rejection on average.

    The chain is verified as a whole: a token that rejection sampling would reject may be accepted if later drafts are
    more likely.
    """

    name = "block"
    chains_only = True

    def walk(self, candidates: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        path, targets, drafts = [0], [candidates.target_probs(history, 0)], list[Tensor]()
        while candidates.children[path[-1]]:
            path.append(candidates.children[path[-1]][0])
            history = [*history, candidates.tokens[path[-1]]]
            drafts.append(candidates.draft_probs(path[-1]))
            targets.append(candidates.target_probs(history, path[-1]))
        weights = block_weights(targets, drafts, [candidates.tokens[node] for node in path[1:]])
        kept = len(drafts)
        while kept and not draws.coin(block_chance(weights, targets, drafts, kept), kept):
            kept -= 1
        bonus = targets[kept] if kept == len(drafts) else residual(targets[kept], drafts[kept], weights[kept])
        return candidates.verdict(path[: kept + 1], draws.pick(bonus, kept + 1))


class TypicalRule(AcceptanceRule):
    """Medusa's typical acceptance. LOSSY: the text does not follow the target's distribution at temperatures above 0.

    A node with token x is accepted if its parent is and target(x) > min(epsilon, delta * exp(-entropy)), with the
    target's processed distribution at the parent. The longest accepted path wins; on ties the most likely one. The
    token after it is the target's argmax: the paper decodes the first token of every step greedily, and this is the
    next step's first. Only the token after the prompt is sampled. At temperature 0 the distribution is one-hot, so only
    the argmax is accepted: vanilla's text.

    Args:
        epsilon: hard threshold, above 0 and below 1.
        delta: entropy-dependent factor, above 0. The defaults are Medusa's (delta = sqrt(epsilon)).
    """

    name = "typical"
    lossy = True

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon} is not allowed: give a value above 0 and below 1")
        if not 0 < delta < math.inf:
            raise ValueError(f"delta={delta} is not allowed: give a finite value above 0")
        self.epsilon, self.delta = epsilon, delta

    def walk(self, candidates: Candidates, history: list[int], draws: Draws) -> RowVerdict:
        best: tuple[tuple[int, float], list[int], int] = ((0, 0.0), [0], 0)  # every path is longer, the root's too
        open_paths = [([0], 0.0)]
        while open_paths:
            path, likelihood = open_paths.pop()
            target = candidates.target_probs([*history, *(candidates.tokens[node] for node in path[1:])], path[-1])
            rank = (len(path), likelihood)
            if rank > best[0]:
                best = (rank, path, int(target.argmax()))
            for child in candidates.children[path[-1]]:
                if is_typical(target, candidates.tokens[child], self.epsilon, self.delta):
                    open_paths.append(([*path, child], likelihood + math.log(float(target[candidates.tokens[child]]))))
        return candidates.verdict(best[1], best[2])


_RULES: dict[str, type[AcceptanceRule]] = {each.name: each for each in (RejectionRule, BlockRule, TypicalRule)}
RULES = ("match", *_RULES)


def rule_named(name: str) -> AcceptanceRule | None:
    """The acceptance rule with a name in `RULES`; None for sample-and-match, the engine's default.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"unknown acceptance rule {name!r}: choose one of {', '.join(RULES)}")
    return _RULES[name]() if name in _RULES else None


def accept_chance(target_probs: Tensor, draft_probs: Tensor, token: int) -> float:
    """min(1, target / draft) at `token`, which was sampled from `draft_probs`."""
    return min(1.0, float(target_probs[token]) / float(draft_probs[token]))


def residual(target_probs: Tensor, draft_probs: Tensor, weight: float = 1.0) -> Tensor:
    """The residual distribution: normalised max(weight * target - draft, 0) (vocab,).

    Returns the target's argmax, one-hot, if rounding makes it 0 everywhere (which has a probability of about 0).
    """
    excess = (weight * target_probs - draft_probs).clamp_min(0.0)
    total = float(excess.sum())
    if total > 0:
        return excess / total
    return torch.nn.functional.one_hot(target_probs.argmax(-1), target_probs.shape[-1]).to(target_probs.dtype)


def block_weights(targets: Sequence[Tensor], drafts: Sequence[Tensor], tokens: Sequence[int]) -> list[float]:
    """Probability, given the drafts, that at least i of them are accepted, for i = 0 .. len(drafts); [0] is 1.

    Args:
        targets: the target's distribution after the root and after every draft, (vocab,) each.
        drafts: the distribution that each draft was sampled from, (vocab,) each.
        tokens: the drafts.
    """
    weights = [1.0]
    for target, draft, token in zip(targets[:-1], drafts, tokens, strict=True):
        weights.append(min(1.0, weights[-1] * float(target[token]) / float(draft[token])))
    return weights


def block_chance(weights: Sequence[float], targets: Sequence[Tensor], drafts: Sequence[Tensor], kept: int) -> float:
    """Probability that `kept` drafts are accepted, given that no more are."""
    weight = weights[kept]
    if kept == len(drafts):
        return weight
    excess = float((weight * targets[kept] - drafts[kept]).clamp_min(0.0).sum())
    total = excess + (1.0 - weight)
    return excess / total if total > 0 else 1.0  # 0 / 0: equal distributions, where the next draft is always accepted


def is_typical(target_probs: Tensor, token: int, epsilon: float, delta: float) -> bool:
    """Whether target(token) > min(epsilon, delta * exp(-entropy of target)); the entropy is in nats."""
    entropy = float(torch.special.entr(target_probs).sum())
    return float(target_probs[token]) > min(epsilon, delta * math.exp(-entropy))
