"""Verification by sample-and-match, the default acceptance rule.

Owns which nodes are accepted: sample the target's token at a node, descend if a child has this token, otherwise emit it
and stop. It is exactly lossless for every tree that depends on the prefix only, and the best lossless rule for such
trees: P(node accepted) equals the target's probability of the node's path, which no lossless rule can exceed. Knows no
model. Source: the target-walk rule; equal in distribution to EAGLE-2's recursive rejection with one-hot drafts (arXiv
2406.16858).

Requests whose choices depend on logits and position only are verified together, as tensors, for all nodes at once:

    choices   the target's token at every node                     (rows, nodes)
    match     token == choices[parent], first of equal siblings    (rows, nodes)
    accepted  match at a node and at all of its ancestors; the deepest such node ends the path

Requests with processors that read the history are verified node by node: one call per emitted token, in order.
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

Failures = dict[int, Exception]  # row -> the exception that its own processor raised


class _Rows(NamedTuple):
    """Rows that are verified by one method."""

    tree: DraftTree
    logits: Tensor  # (rows, nodes, vocab)
    choosers: Sequence[Any]
    histories: Sequence[Sequence[int]]

    def select(self, rows: Sequence[int]) -> _Rows:
        """The rows with these indices."""
        if len(rows) == len(self.choosers):
            return self
        index = torch.tensor(rows, device=self.logits.device)
        choosers, histories = [self.choosers[row] for row in rows], [self.histories[row] for row in rows]
        return _Rows(self.tree.select_rows(index), self.logits[index], choosers, histories)


def verify(
    tree: DraftTree,
    logits: Tensor,
    choosers: Sequence[TokenChooser],
    histories: Sequence[Sequence[int]],
    failures: Failures | None = None,
) -> Verdict:
    """Verify every row's tree by sample-and-match.

    Args:
        tree: the drafted tree, (rows, nodes).
        logits: the target's raw logits at every node, (rows, nodes, vocab).
        choosers: per row, samples its tokens.
        histories: per row, all tokens up to and including the root.
        failures: filled with the rows whose own processors raised; their verdict is None. Without it, the first
            exception is raised.

    Raises:
        ValueError: logits and tree cover different nodes.
    """
    check_nodes(tree, logits)
    batch, methods = _Rows(tree, logits, choosers, histories), dict[Callable[[_Rows], Verdict], list[int]]()
    for row, chooser in enumerate(choosers):
        methods.setdefault(_method_for(chooser, logits), []).append(row)
    rows: list[RowVerdict | None] = [None] * len(choosers)
    for method, members in methods.items():
        if method is not _walk:  # processors are called once per token, so a row that walks is never retried
            try:
                verdict = method(batch.select(members))
            except Exception:  # a row's warper raised: verify the rows one by one to find which
                if failures is None:
                    raise
            else:
                if len(members) == len(choosers):
                    return verdict
                for row, row_verdict in zip(members, verdict.rows, strict=True):
                    rows[row] = row_verdict
                continue
        verify_each(members, functools.partial(_verify_row, batch, method), rows, failures)
    return Verdict.of_rows(rows, tree.tokens.device)


def check_nodes(tree: DraftTree, logits: Tensor) -> None:
    """Raise ValueError if logits and tree cover different nodes."""
    if logits.shape[:2] != tree.tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and tree {tuple(tree.tokens.shape)} cover different nodes")


def check_root(token: int, history: Sequence[int]) -> None:
    """Raise RuntimeError if the root is not the last token of the history."""
    if token != history[-1]:
        raise RuntimeError(
            f"the root is token {token}, the last emitted one {history[-1]}: the drafter is out of step with its text"
        )


def verify_each(
    indices: Iterable[int],
    verify_row: Callable[[int], RowVerdict | None],
    rows: list[RowVerdict | None],
    failures: Failures | None,
) -> None:
    """Verify rows one by one into `rows`; an exception goes into `failures`, or is raised if `failures` is None."""
    for row in indices:
        try:
            rows[row] = verify_row(row)
        except Exception as error:
            if failures is None:
                raise
            failures[row] = error


def _verify_row(batch: _Rows, method: Callable[[_Rows], Verdict], row: int) -> RowVerdict | None:
    return method(batch.select([row])).rows[0]


def _method_for(chooser: TokenChooser, logits: Tensor) -> Callable[[_Rows], Verdict]:
    """How a row is verified: depends on its own parameters only, so its text does not depend on the batch."""
    if not (isinstance(chooser, Sampler) and chooser.stateless):
        return _walk
    native_ok = logits.dtype is torch.float32 and logits.device.type == "cpu" and native.available()
    return _match_native if native_ok and chooser.temperature_only is not None else _match


def _match_native(rows: _Rows) -> Verdict:
    """One native call, which samples only at the nodes of the accepted path."""
    tree = rows.tree
    points = draws(rows.choosers, list(map(len, rows.histories)), tree.height)
    temperatures = [sampler.temperature_only for sampler in rows.choosers]
    fields = (tree.tokens, tree.parents, tree.live, tree.placeholder)
    return Verdict(native.judge(rows.logits, *fields, temperatures=temperatures, draws=points))


def _match(batch: _Rows) -> Verdict:
    """Tensor operations only; reads nothing from the device."""
    tree = batch.tree
    choices = choose_nodes(batch.logits, batch.choosers, list(map(len, batch.histories)), tree.depths, tree.height)
    if tree.height == 0:
        zero = torch.zeros_like(choices)
        return Verdict(torch.cat([zero[:, :1] + 1, zero, choices, zero - 1], dim=1))
    rows, nodes = choices.shape
    index = torch.arange(nodes, device=choices.device)
    allowed = tree.live if tree.placeholder is None else tree.live & ~tree.placeholder
    parent = tree.parents.clamp_min(0)
    match = allowed & (tree.tokens == choices.gather(1, parent)) & (tree.parents >= 0)
    # Of siblings with equal tokens only the first may match, so that at most one path is accepted.
    duplicate = (tree.parents.unsqueeze(2) == tree.parents.unsqueeze(1)) & (
        tree.tokens.unsqueeze(2) == tree.tokens.unsqueeze(1)
    )
    match &= ~(duplicate & allowed.unsqueeze(1)).tril(-1).any(2)
    match[:, 0] = True
    accepted = (match.unsqueeze(1) | ~tree.ancestors).all(2)  # (rows, nodes)
    deepest = torch.where(accepted, tree.depths, -1).argmax(1, keepdim=True)  # (rows, 1)
    counts = tree.depths.gather(1, deepest) + 1  # (rows, 1)
    on_path = tree.ancestors.gather(1, deepest.unsqueeze(2).expand(-1, -1, nodes)).squeeze(1)  # (rows, nodes)
    width = tree.height + 1
    column = torch.where(on_path, tree.depths, width)  # nodes off the path go to an extra column, cut off below
    path = torch.zeros(rows, width + 1, dtype=torch.long, device=choices.device)
    path = path.scatter_(1, column, index.expand(rows, nodes))[:, :width]
    # Per node the first child that may be accepted, `nodes` if there is none.
    child = torch.where(allowed & (tree.parents >= 0), index, nodes)
    first = torch.full((rows, nodes + 1), nodes, device=choices.device)
    first = first.scatter_reduce_(1, torch.where(tree.parents >= 0, parent, nodes), child, "amin")[:, :nodes]
    right = tree.tokens.gather(1, first.clamp_max(nodes - 1)) == choices
    preferred = torch.where(first < nodes, right.long(), -1)
    return Verdict(torch.cat([counts, path, choices.gather(1, path), preferred.gather(1, path)], dim=1))


def _walk(batch: _Rows) -> Verdict:
    """Verify a batch of one row, node by node."""
    tree, logits, chooser, past = batch.tree, batch.logits[0], batch.choosers[0], list(batch.histories[0])
    children, tokens = tree.children(0), tree.tokens[0].tolist()
    check_root(tokens[0], past)
    path, emitted, first_choice = [0], list[int](), list[bool]()
    while True:
        node = path[-1]
        choice = chooser.choose(past, logits[node])
        if not isinstance(choice, int) or not 0 <= choice < logits.shape[-1]:
            raise ValueError(
                f"{choice!r} was chosen as the next token, of a vocabulary of {logits.shape[-1]}: a processor must "
                f"return one score per token, a chooser a token id"
            )
        emitted.append(choice)
        past.append(choice)
        if children[node]:
            first_choice.append(tokens[children[node][0]] == choice)
        match = next((child for child in children[node] if tokens[child] == choice), None)
        if match is None:
            verdict = RowVerdict(tuple(path), tuple(emitted), tuple(first_choice))
            return Verdict.of_rows([verdict], tree.tokens.device)
        path.append(match)


def check_possible(verdict: RowVerdict | None, length: int) -> None:
    """Raise PromptError if no token was possible after an accepted node; `length` counts tokens up to the root."""
    for depth, token in enumerate(() if verdict is None else verdict.tokens):
        if token < 0:
            raise impossible(f"after {length + depth} tokens")
