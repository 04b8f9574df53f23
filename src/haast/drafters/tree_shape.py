"""What a draft looks like: chain, static tree or dynamic tree, as index plans that the EAGLE loop follows.

Owns only shapes. Each level expands `width` frontier nodes into `top_k` children; a plan says which of those candidates
are expanded next and which enter the tree. A dynamic plan (EAGLE-2, arXiv 2406.16858, section 4) leaves both to the
scores; a static one fixes them beforehand.

    candidates are numbered level by level:   level 1: ranks 0..k-1 under the root
                                              level l: frontier position * k + rank, after all earlier levels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haast.errors import check_at_least

# Assumed chance that the child of each rank is right, by which a static tree spends its nodes; ranks beyond the list
# fall off geometrically. Only the order of the products matters. Chosen once, not tuned on any evaluation prompt.
_RANK_CHANCE = (0.5, 0.14, 0.07, 0.045, 0.03, 0.022, 0.017, 0.013, 0.01, 0.008)


@dataclass(frozen=True)
class DraftShape:
    """How far and how wide to draft.

    Attributes:
        kind: "dynamic", "static" or "chain".
        depth: levels below the root, so the draft runs `depth` forwards a step (one of them over accepted tokens).
        top_k: children per expanded node.
        width: nodes expanded per level (dynamic trees).
        nodes: nodes of the tree, root included: the target's forward size. A chain has depth + 1 whatever is given.
    """

    kind: str = "dynamic"
    depth: int = 5
    top_k: int = 8
    width: int = 8
    nodes: int = 60

    def __post_init__(self) -> None:
        if self.kind not in ("dynamic", "static", "chain"):
            raise ValueError(f"kind={self.kind!r} is no draft shape: choose dynamic, static or chain")
        for name in ("depth", "top_k", "width"):
            check_at_least(name, getattr(self, name))
        check_at_least("nodes", self.nodes, 2, " (a drafted tree has a root and a draft)")


# Per node budget (the first row that holds it): depth, and children per node = nodes expanded per level. Chosen on
# validation prompts with the shipped head: a small budget is spent on the likeliest few, a large one also goes deep.
_BY_BUDGET = ((4, 2, 3), (6, 3, 3), (8, 3, 4), (16, 4, 6), (32, 5, 8))
# Large trees get many children per node, so that the best of all candidates decide how wide the tree is near its root:
# where sampling is hot, wide (24 children instead of 10: tau 2.15 -> 2.20 on 24 validation prompts at temperature 1).
_LARGEST_DEPTH, _LARGEST_CHILDREN, _LARGEST_WIDTH = 6, 24, 10
CPU_NODES, DEVICE_NODES = 6, 60  # budgets where none is given: on few cores every node costs, on a GPU few do


def shape_for(
    nodes: int, kind: str = "dynamic", depth: int | None = None, top_k: int | None = None, width: int | None = None
) -> DraftShape:
    """A shape that spends `nodes` well; what is given stays as given. Raises ValueError as `DraftShape` does."""
    largest = (_LARGEST_DEPTH, _LARGEST_CHILDREN)
    deep, children = next(((d, k) for most, d, k in _BY_BUDGET if nodes <= most), largest)
    children = children if top_k is None else top_k
    expanded = min(children, _LARGEST_WIDTH) if width is None else width
    return DraftShape(kind, deep if depth is None else depth, children, expanded, nodes)


def usual_nodes(device: str) -> int:
    """The budget where none is given, by the device ("cpu", "cuda:0", ...)."""
    return CPU_NODES if device.startswith("cpu") else DEVICE_NODES


@dataclass(frozen=True)
class Plan:
    """A shape resolved: children per node, frontier size per level, and for a fixed tree the indices to take."""

    top_k: int
    widths: tuple[int, ...]  # frontier size before level 2, 3, ...
    nodes: int
    frontier: tuple[tuple[int, ...], ...] | None = None  # per level, candidate indices within the level
    keep: tuple[int, ...] | None = None  # indices into all candidates


def plan(shape: DraftShape, vocab: int) -> Plan:
    """Resolve `shape` for a draft vocabulary of `vocab` tokens; counts that can't be reached are lowered."""
    if shape.kind == "chain":
        more = shape.depth - 1
        return Plan(1, (1,) * more, shape.depth + 1, ((0,),) * more, tuple(range(shape.depth)))
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
    """The `count` likeliest paths of ranks, best first; a path's parent always comes before it.

    Args:
        chances: [depth][rank]: that the child of this rank is right, whatever stands above.
        count: paths wanted; fewer come back where there are not so many.
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
        inside = {path: parents.index(path[:-1]) * top_k + path[-1] for path in layer}
        keep.extend(offset + inside[path] for path in layer)
        offset += len(parents) * top_k
        parents = [path for path in layer if any(other[:-1] == path for other in chosen)]
        if parents:
            frontier.append(tuple(inside[path] for path in parents))
    return Plan(top_k, tuple(len(f) for f in frontier), len(chosen) + 1, tuple(frontier), tuple(keep))
