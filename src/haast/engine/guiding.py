"""What requests say of their drafts, put into a step's trees: drafts that can't come go, those that must come in.

Owns which nodes are run, never which are accepted: a guide that is wrong costs time and no word of a text. Looks at
the tree's values, on a GPU one more read in steps with such a request.

    drafted   r -- a -- b          guide: a must go on c d, x can't come          guided   r -- a -- c -- d
               \\
                x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from haast.core import Request
from haast.path_tree import Path, PathTree, pack_rows
from haast.tree import DraftTree

GUIDED_NODES = 16  # that guides may add to a row's tree


def guided_nodes(requests: Sequence[Request]) -> int:
    """The most nodes by which a step's trees of these requests can outgrow their drafter's."""
    return GUIDED_NODES if any(request.hints.guide is not None for request in requests) else 0


def guided(tree: DraftTree, group: Sequence[Request]) -> DraftTree:
    """The tree by the requests' own hints, (rows, nodes as needed); as it is where none has any.

    A tree that its drafter wants to recognise afterwards (`wants_choices`), or whose drafts were drawn, is left alone.
    A guide that raises ends its request with this step.
    """
    hinted = any(request.hints.guide is not None or request.hints.max_nodes is not None for request in group)
    if not hinted or tree.draft_probs is not None or group[0].drafter.wants_choices:
        return tree
    tokens, parents, live = torch.stack([tree.tokens, tree.parents, tree.live.long()]).tolist()
    rows = [PathTree(own[0], tree.nodes + GUIDED_NODES) for own in tokens]
    drafted = []
    for row, request in enumerate(group):
        paths = _paths(tokens[row], parents[row], live[row])
        drafted.append(_grow(rows[row], request, paths))
    # A node of one row is run for all: those that guides add must be wanted by half of the rows.
    wanted = sorted((len(row.tokens) for row in rows), reverse=True)[(len(rows) - 1) // 2]
    for grown, request in zip(rows, group, strict=True):
        most = request.hints.max_nodes
        grown.cut(max(*drafted, wanted) if most is None else min(max(*drafted, wanted), most))
    return pack_rows(rows, tree.tokens.device)


def _paths(tokens: Sequence[int], parents: Sequence[int], live: Sequence[int]) -> list[list[int]]:
    """The path from the root (left out) to every live node, in the nodes' order."""
    paths: dict[int, list[int]] = {0: []}
    for node in range(1, len(tokens)):
        if live[node]:
            paths[node] = [*paths[parents[node]], tokens[node]]
    return [paths[node] for node in paths if node]


def _grow(row: PathTree, request: Request, paths: Sequence[list[int]]) -> int:
    """Fill a row's tree; returns how many of its nodes were drafted, the root included."""
    guide, most = request.hints.guide, request.hints.max_nodes
    if most is not None:
        paths = paths[: most - 1]  # parents precede their children
    added: Sequence[Path] = ()
    if guide is not None:
        inner = {tuple(path[:-1]) for path in paths}
        ends = [path for path in paths if tuple(path) not in inner]
        try:
            added = guide.paths(request.tokens, ends, GUIDED_NODES)
        except Exception as error:
            request.fail(error)
            return 1
        may = {tuple(path[:length]) for path in added for length in range(1, len(path) + 1)}
        paths = [path for path in paths if tuple(path) in may]
    for path in paths:
        row.insert(path)
    drafted = len(row.tokens)
    for more in added:
        row.insert(more)
    return drafted
