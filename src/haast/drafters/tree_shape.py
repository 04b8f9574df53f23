"""Draft shapes: chain, static tree or dynamic tree, and the index plans that the EAGLE drafter follows.

Owns only shapes. Each level expands `width` frontier nodes into `top_k` children; a plan defines which candidates are
expanded next and which enter the tree. In a dynamic plan (EAGLE-2, arXiv 2406.16858, section 4) scores decide both; a
static plan has fixed indices.

    candidates are indexed level by level:    level 1: ranks 0..k-1 under the root
                                              level l: frontier position * k + rank, after all earlier levels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haast.errors import check_at_least

# Assumed probability that the child of each rank is right, for static trees; it decays geometrically beyond the list.
# Only the order of the products matters. Chosen once, not tuned on any evaluation prompt.
_RANK_CHANCE = (0.5, 0.14, 0.07, 0.045, 0.03, 0.022, 0.017, 0.013, 0.01, 0.008)


@dataclass(frozen=True)
class DraftShape:
    """Depth, width and size of draft trees.

    Attributes:
        kind: "dynamic", "static" or "chain".
        depth: levels below the root; the head runs `depth` forwards per step (the first over accepted tokens).
        top_k: children per expanded node.
        width: nodes expanded per level (dynamic trees).
        nodes: nodes of the tree, root included: positions of the target's forward. Ignored for a chain: depth + 1.
    """

    kind: str = "dynamic"
    depth: int = 5
    top_k: int = 8
    width: int = 8
    nodes: int = 60

    def __post_init__(self) -> None:
        if self.kind not in ("dynamic", "static", "chain"):
            raise ValueError(f"kind={self.kind!r} is not a draft shape: choose dynamic, static or chain")
        for name in ("depth", "top_k", "width"):
            check_at_least(name, getattr(self, name))
        check_at_least("nodes", self.nodes, 2, " (a drafted tree has a root and a draft)")


# Maximum nodes, depth, and children per node = nodes expanded per level. Chosen on validation prompts with the shipped
# head: small trees take the most likely few tokens, larger ones are deeper too.
_BY_BUDGET = ((4, 2, 3), (6, 3, 3), (8, 3, 4), (16, 4, 6), (32, 5, 8))
# Large trees get many children per node, so that reranking can widen the tree near its root, which helps at high
# temperature (24 children instead of 10: tau 2.15 -> 2.20 on 24 validation prompts at temperature 1).
_LARGEST_DEPTH, _LARGEST_CHILDREN, _LARGEST_WIDTH = 6, 24, 10
CPU_NODES, DEVICE_NODES = 6, 60  # default sizes: on few CPU cores every node costs time, on a GPU most are free


def shape_for(
    nodes: int, kind: str = "dynamic", depth: int | None = None, top_k: int | None = None, width: int | None = None
) -> DraftShape:
    """A good shape with `nodes` nodes; other arguments override its defaults. Raises ValueError like `DraftShape`."""
    largest = (_LARGEST_DEPTH, _LARGEST_CHILDREN)
    default_depth, children = next(((d, k) for most, d, k in _BY_BUDGET if nodes <= most), largest)
    children = children if top_k is None else top_k
    expanded = min(children, _LARGEST_WIDTH) if width is None else width
    return DraftShape(kind, default_depth if depth is None else depth, children, expanded, nodes)


def default_nodes(device: str) -> int:
    """The default number of nodes for a device ("cpu", "cuda:0", ...)."""
    return CPU_NODES if device.startswith("cpu") else DEVICE_NODES


@dataclass(frozen=True)
class Plan:
    """A shape resolved to indices: children per node, frontier size per level, and for a static tree which to take."""

    top_k: int
    widths: tuple[int, ...]  # frontier size before level 2, 3, ...
    nodes: int
    frontier: tuple[tuple[int, ...], ...] | None = None  # per level, candidate indices within the level
    keep: tuple[int, ...] | None = None  # indices into all candidates


def plan(shape: DraftShape, vocab: int) -> Plan:
    """Resolve `shape` for a draft vocabulary of `vocab` tokens; lowers counts that can't be reached."""
    if shape.kind == "chain":
        levels = shape.depth - 1  # after the first
        return Plan(1, (1,) * levels, shape.depth + 1, ((0,),) * levels, tuple(range(shape.depth)))
    top_k = min(shape.top_k, vocab)
    if shape.kind == "static":
        return _static(shape.depth, top_k, shape.nodes)
    widths: list[int] = []
    reachable = top_k
    for _ in range(shape.depth - 1):
        widths.append(min(shape.width, top_k if not widths else widths[-1] * top_k))
        reachable += widths[-1] * top_k
    return Plan(top_k, tuple(widths), min(shape.nodes, 1 + reachable))


def likeliest_paths(chances: Sequence[Sequence[float]], count: int) -> list[tuple[int, ...]]:
    """The `count` most likely paths of ranks, best first; a path's parent always precedes it.

    Args:
        chances: [depth][rank]: probability that the child of this rank is right, independent of its ancestors.
        count: number of paths; fewer are returned if there are fewer.
    """
    chosen: list[tuple[int, ...]] = []
    open_paths: dict[tuple[int, ...], float] = {(rank,): chance for rank, chance in enumerate(chances[0])}
    while open_paths and len(chosen) < count:
        best = max(open_paths, key=lambda path: (open_paths[path], path))
        score = open_paths.pop(best)
        chosen.append(best)
        if len(best) < len(chances):
            open_paths.update({(*best, rank): score * chance for rank, chance in enumerate(chances[len(best)])})
    return chosen


def _static(depth: int, top_k: int, nodes: int) -> Plan:
    """The `nodes` most likely rank paths under `_RANK_CHANCE`, as index lists."""
    chance = [_RANK_CHANCE[min(r, 9)] * 0.8 ** max(r - 9, 0) for r in range(top_k)]
    chosen = set(likeliest_paths([chance] * depth, nodes - 1))
    frontier: list[tuple[int, ...]] = []
    keep: list[int] = []
    offset = 0
    parents: list[tuple[int, ...]] = [()]
    for level in range(1, max(len(path) for path in chosen) + 1):
        layer = sorted(path for path in chosen if len(path) == level)
        index = {path: parents.index(path[:-1]) * top_k + path[-1] for path in layer}
        keep.extend(offset + index[path] for path in layer)
        offset += len(parents) * top_k
        parents = [path for path in layer if any(other[:-1] == path for other in chosen)]
        if parents:
            frontier.append(tuple(index[path] for path in parents))
    return Plan(top_k, tuple(len(f) for f in frontier), len(chosen) + 1, tuple(frontier), tuple(keep))
