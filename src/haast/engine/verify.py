"""Acceptance: sample-and-match.

Owns which nodes are kept: choose the target's own token at a node, descend if a child carries it, else emit it and
stop. It is exactly lossless for every tree that depends on the prefix only, and the best lossless rule for such trees:
P(node accepted) equals the target's probability of the node's path, which no lossless rule can exceed. Knows no model.
Source: the target-walk rule; equal in distribution to EAGLE-2's recursive rejection with one-hot drafts (arXiv
2406.16858).

Requests whose choices depend on logits and position alone are judged together, as tensors, for every node at once:

    choices   the target's token at every node                     (rows, nodes)
    match     token == choices[parent], and no earlier twin        (rows, nodes)
    kept      match at a node and at all of its ancestors; the deepest such node ends the path

Requests with processors that look at the history walk along the path, one call per emitted token, in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haast import native
from haast.core import RowVerdict, TokenChooser, Verdict
from haast.sampling import Sampler, choose_nodes, draws, impossible
from haast.tree import DraftTree

Failures = dict[int, Exception]  # row -> what its own processor raised


class _Rows(NamedTuple):
    """Rows that are judged in one way."""

    tree: DraftTree
    logits: Tensor  # (rows, nodes, vocab)
    choosers: Sequence[Any]
    histories: Sequence[Sequence[int]]

    def of(self, places: Sequence[int]) -> _Rows:
        """Those at `places`."""
        if len(places) == len(self.choosers):
            return self
        index = torch.tensor(places, device=self.logits.device)
        choosers, histories = [self.choosers[row] for row in places], [self.histories[row] for row in places]
        return _Rows(self.tree.taken(index), self.logits[index], choosers, histories)


def verify(
    tree: DraftTree,
    logits: Tensor,
    choosers: Sequence[TokenChooser],
    histories: Sequence[Sequence[int]],
    failures: Failures | None = None,
) -> Verdict:
    """Judge every row's tree by the target's own choices.

    Args:
        tree: the drafted tree, (rows, nodes).
        logits: the target's raw logits at every node, (rows, nodes, vocab).
        choosers: per row, who chooses its tokens.
        histories: per row all tokens up to and including the root.
        failures: filled with the rows whose own processors raised; such a row keeps nothing. None raises at once.

    Raises:
        ValueError: logits of other nodes than the tree's.
    """
    check_nodes(tree, logits)
    every, ways = _Rows(tree, logits, choosers, histories), dict[Callable[[_Rows], Verdict], list[int]]()
    for row, chooser in enumerate(choosers):
        ways.setdefault(_way_of(chooser, logits), []).append(row)
    rows: list[RowVerdict | None] = [None] * len(choosers)
    for way, places in ways.items():
        if way is not _walk:  # a processor is called once for each token, so such a row is never judged again
            try:
                verdict = way(every.of(places))
            except Exception:  # somebody's warper: each row by itself shows whose
                if failures is None:
                    raise
            else:
                if len(places) == len(choosers):
                    return verdict
                for row, kept in zip(places, verdict.rows, strict=True):
                    rows[row] = kept
                continue
        each_alone(places, functools.partial(_by_itself, every, way), rows, failures)
    return Verdict.of_rows(rows, tree.tokens.device)


def check_nodes(tree: DraftTree, logits: Tensor) -> None:
    """Raises ValueError for logits of other nodes than the tree's."""
    if logits.shape[:2] != tree.tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and tree {tuple(tree.tokens.shape)} cover different nodes")


def check_root(token: int, history: Sequence[int]) -> None:
    """Raises RuntimeError for a tree of another text."""
    if token != history[-1]:
        raise RuntimeError(f"the root is token {token}, the last emitted one {history[-1]}: the drafter lost its text")


def each_alone(
    places: Iterable[int],
    judge: Callable[[int], RowVerdict | None],
    rows: list[RowVerdict | None],
    failures: Failures | None,
) -> None:
    """Judge rows one by one into `rows`; what one raises is its own failure, or raised where `failures` is None."""
    for row in places:
        try:
            rows[row] = judge(row)
        except Exception as error:
            if failures is None:
                raise
            failures[row] = error


def _by_itself(every: _Rows, way: Callable[[_Rows], Verdict], row: int) -> RowVerdict | None:
    return way(every.of([row])).rows[0]


def _way_of(chooser: TokenChooser, logits: Tensor) -> Callable[[_Rows], Verdict]:
    """How a row is judged: by its own parameters, never by its neighbours', so that it is judged alike beside any."""
    if not (isinstance(chooser, Sampler) and chooser.stateless):
        return _walk
    native_too = logits.dtype is torch.float32 and logits.device.type == "cpu" and native.available()
    return _natively if native_too and chooser.plain is not None else _match


def _natively(rows: _Rows) -> Verdict:
    """In one call, which looks at the nodes of the accepted path alone."""
    tree = rows.tree
    points = draws(rows.choosers, list(map(len, rows.histories)), tree.height)
    temperatures = [sampler.plain for sampler in rows.choosers]
    fields = (tree.tokens, tree.parents, tree.live, tree.placeholder)
    return Verdict(native.judge(rows.logits, *fields, temperatures=temperatures, draws=points))


def _match(some: _Rows) -> Verdict:
    """As tensors, without a look at any value."""
    tree = some.tree
    choices = choose_nodes(some.logits, some.choosers, list(map(len, some.histories)), tree.depths, tree.height)
    if tree.height == 0:
        zero = torch.zeros_like(choices)
        return Verdict(torch.cat([zero[:, :1] + 1, zero, choices, zero - 1], dim=1))
    rows, nodes = choices.shape
    index = torch.arange(nodes, device=choices.device)
    may = tree.live if tree.placeholder is None else tree.live & ~tree.placeholder
    above = tree.parents.clamp_min(0)
    match = may & (tree.tokens == choices.gather(1, above)) & (tree.parents >= 0)
    # Of siblings with one token the first is taken: what follows a later one would be judged without it.
    twin = (tree.parents.unsqueeze(2) == tree.parents.unsqueeze(1)) & (
        tree.tokens.unsqueeze(2) == tree.tokens.unsqueeze(1)
    )
    match &= ~(twin & may.unsqueeze(1)).tril(-1).any(2)
    match[:, 0] = True
    kept = (match.unsqueeze(1) | ~tree.ancestors).all(2)  # (rows, nodes)
    deepest = torch.where(kept, tree.depths, -1).argmax(1, keepdim=True)  # (rows, 1)
    counts = tree.depths.gather(1, deepest) + 1  # (rows, 1)
    on_path = tree.ancestors.gather(1, deepest.unsqueeze(2).expand(-1, -1, nodes)).squeeze(1)  # (rows, nodes)
    width = tree.height + 1
    place = torch.where(on_path, tree.depths, width)  # what is not on the path goes to a column that is cut off
    path = torch.zeros(rows, width + 1, dtype=torch.long, device=choices.device)
    path = path.scatter_(1, place, index.expand(rows, nodes))[:, :width]
    # Per node the first child that may be accepted, `nodes` for none.
    child = torch.where(may & (tree.parents >= 0), index, nodes)
    first = torch.full((rows, nodes + 1), nodes, device=choices.device)
    first = first.scatter_reduce_(1, torch.where(tree.parents >= 0, above, nodes), child, "amin")[:, :nodes]
    right = tree.tokens.gather(1, first.clamp_max(nodes - 1)) == choices
    preferred = torch.where(first < nodes, right.long(), -1)
    return Verdict(torch.cat([counts, path, choices.gather(1, path), preferred.gather(1, path)], dim=1))


def _walk(alone: _Rows) -> Verdict:
    """One row, node by node."""
    tree, logits, chooser, past = alone.tree, alone.logits[0], alone.choosers[0], list(alone.histories[0])
    children, tokens = tree.children(0), tree.tokens[0].tolist()
    check_root(tokens[0], past)
    path, emitted, first_choice = [0], list[int](), list[bool]()
    while True:
        node = path[-1]
        choice = chooser.choose(past, logits[node])
        if not isinstance(choice, int) or not 0 <= choice < logits.shape[-1]:
            raise ValueError(
                f"{choice!r} was chosen as the next token, of {logits.shape[-1]} that there are: a processor has to "
                f"return a score for each of these, and a chooser the number of one"
            )
        emitted.append(choice)
        past.append(choice)
        if children[node]:
            first_choice.append(tokens[children[node][0]] == choice)
        match = next((child for child in children[node] if tokens[child] == choice), None)
        if match is None:
            kept = RowVerdict(tuple(path), tuple(emitted), tuple(first_choice))
            return Verdict.of_rows([kept], tree.tokens.device)
        path.append(match)


def check_possible(verdict: RowVerdict, length: int) -> None:
    """Raises PromptError where no token was possible after a node that is kept; `length` is up to the root."""
    for place, token in enumerate(verdict.tokens):
        if token < 0:
            raise impossible(f"after {length + place} tokens")
