"""Acceptance: sample-and-match.

Owns the walk from the root: choose the target's own token at a node, descend if a child carries it, else emit it and
stop. It is exactly lossless for every tree that depends on the prefix only, and the best lossless rule for such trees:
P(node accepted) equals the target's probability of the node's path, which no lossless rule can exceed. Knows no model.
Source: the target-walk rule; equal in law to EAGLE-2's recursive rejection with one-hot drafts (arXiv 2406.16858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from haast.sampling import Sampler
from haast.tree import DraftTree


@dataclass(frozen=True)
class RowVerdict:
    """What one row keeps. `path` starts at node 0; `tokens[i]` follows node `path[i]`; the last token is the bonus."""

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    first_choice: tuple[bool, ...]  # per visited node that has children: was its preferred child the right one?


@dataclass(frozen=True)
class Verdict:
    """One `RowVerdict` per row; None for a row that has ended."""

    rows: tuple[RowVerdict | None, ...]


def verify(
    tree: DraftTree,
    logits: Tensor,
    sampler: Sampler,
    histories: Sequence[Sequence[int] | None],
    numbers: Sequence[int] | None = None,
) -> Verdict:
    """Walk every row's tree with the target's own choices.

    Args:
        tree: the drafted tree, (rows, nodes).
        logits: the target's raw logits at every node, (rows, nodes, vocab).
        sampler: the processed law and the keyed draws.
        histories: per row all tokens up to and including the root, or None for a row that has ended.
        numbers: by which the sampler knows the rows, where some have left; 0, 1, ... if absent.
    """
    assert logits.shape[:2] == tree.tokens.shape, "logits and tree must cover the same nodes"
    return Verdict(
        tuple(
            None if history is None else _walk(tree, row, number, logits[row], sampler, history)
            for row, (number, history) in enumerate(zip(numbers or range(tree.rows), histories, strict=True))
        )
    )


def _walk(
    tree: DraftTree, row: int, number: int, logits: Tensor, sampler: Sampler, history: Sequence[int]
) -> RowVerdict:
    children = tree.children(row)
    tokens = tree.tokens[row].tolist()
    assert tokens[0] == history[-1], "the root is the last emitted token"
    past = list(history)
    path, emitted, first_choice = [0], [], []
    while True:
        node = path[-1]
        choice = sampler.choose(number, past, logits[node])
        emitted.append(choice)
        past.append(choice)
        if children[node]:
            first_choice.append(tokens[children[node][0]] == choice)
        match = next((child for child in children[node] if tokens[child] == choice), None)
        if match is None:
            return RowVerdict(tuple(path), tuple(emitted), tuple(first_choice))
        path.append(match)
