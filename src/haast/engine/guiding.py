"""Applies requests' draft hints to a step's trees: removes forbidden drafts, adds forced ones, limits nodes.

Owns which nodes are computed, never which are accepted: a wrong guide costs time but does not change the text. Reads
the tree's values: on a GPU one more read from the device in steps with such a request.

    drafted   r -- a -- b          guide: c d must follow a, x is forbidden       guided   r -- a -- c -- d
               \\
                x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from haast.core import Request
from haast.path_tree import Path, PathTree, pack_rows
from haast.tree import DraftTree

GUIDED_NODES = 16  # maximum nodes that guides may add to a row's tree


def guided_nodes(requests: Sequence[Request]) -> int:
    """Maximum nodes that guides may add to the drafter's trees in a step of these requests."""
    return GUIDED_NODES if any(request.hints.guide is not None for request in requests) else 0


def guided(tree: DraftTree, group: Sequence[Request]) -> DraftTree:
    """The tree after the requests' hints were applied; returned unchanged if no request has hints.

    Trees with `draft_probs`, or of a drafter with `wants_choices` (it needs its own nodes again), are not changed. A
    guide that raises ends its request with this step.
    """
    hinted = any(request.hints.guide is not None or request.hints.max_nodes is not None for request in group)
    if not hinted or tree.draft_probs is not None or group[0].drafter.wants_choices:
        return tree
    tokens, parents, live = torch.stack([tree.tokens, tree.parents, tree.live.long()]).tolist()
    rows = [PathTree(row_tokens[0], tree.nodes + GUIDED_NODES) for row_tokens in tokens]
    drafted = []
    for row, request in enumerate(group):
        paths = _paths(tokens[row], parents[row], live[row])
        drafted.append(_fill(rows[row], request, paths))
    # All rows are padded to the largest, so keep added nodes only as far as half of the rows have them.
    median = sorted((len(row.tokens) for row in rows), reverse=True)[(len(rows) - 1) // 2]
    for row_tree, request in zip(rows, group, strict=True):
        most = request.hints.max_nodes
        row_tree.cut(max(*drafted, median) if most is None else min(max(*drafted, median), most))
    return pack_rows(rows, tree.tokens.device)


def _paths(tokens: Sequence[int], parents: Sequence[int], live: Sequence[int]) -> list[list[int]]:
    """The tokens from the root (excluded) to every live node, in the nodes' order."""
    paths: dict[int, list[int]] = {0: []}
    for node in range(1, len(tokens)):
        if live[node]:
            paths[node] = [*paths[parents[node]], tokens[node]]
    return [paths[node] for node in paths if node]


def _fill(row: PathTree, request: Request, paths: Sequence[list[int]]) -> int:
    """Fill a row's tree; returns the number of its drafted nodes, the root included."""
    guide, most = request.hints.guide, request.hints.max_nodes
    if most is not None:
        paths = paths[: most - 1]  # parents precede their children
    guided_paths: Sequence[Path] = ()
    if guide is not None:
        inner = {tuple(path[:-1]) for path in paths}
        leaves = [path for path in paths if tuple(path) not in inner]
        try:
            guided_paths = guide.paths(request.tokens, leaves, GUIDED_NODES)
        except Exception as error:
            request.fail(error)
            return 1
        allowed = {tuple(path[:length]) for path in guided_paths for length in range(1, len(path) + 1)}
        paths = [path for path in paths if tuple(path) in allowed]
    for path in paths:
        row.insert(path)
    drafted = len(row.tokens)
    for extended in guided_paths:
        row.insert(extended)
    return drafted
