"""Nodes of a head and of another source compete for a tree's places: as a set of paths with scores says."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haast.drafters.candidates import Candidates
from haast.drafters.pending_features import Drafted
from haast.drafters.tree_builder import Growth
from haast.heads.acceptance import Curve, Source
from haast.tree import DraftTree

Paths = dict[tuple[int, ...], float]


def grown(data: st.DataObject, rows: int) -> tuple[Growth, list[Paths]]:
    """Random candidates of three levels, two children per node; and the score of every path of each row."""
    growth, found = Growth(torch.full((rows,), 9)), [Paths() for _ in range(rows)]
    above: list[list[tuple[int, ...]]] = [[()] for _ in range(rows)]
    scores, index = growth.root_scores().expand(rows, 1), None
    for _ in range(3):
        width = len(above[0])
        tokens = torch.tensor([[t for _ in range(width) for t in data.draw(TWO)] for _ in range(rows)])
        down = torch.tensor([[data.draw(DOWN) for _ in range(2 * width)] for _ in range(rows)])
        scores = scores.repeat_interleave(2, 1) - down
        parents = None if index is None else index.repeat_interleave(2, 1)
        index = growth.add(tokens, scores, parents)
        for row in range(rows):
            paths = [(*above[row][i // 2], token) for i, token in enumerate(tokens[row].tolist())]
            found[row].update(zip(paths, scores[row].tolist(), strict=True))
            above[row] = paths
    return growth, found


TWO = st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True)
DOWN = st.floats(0.0625, 3.0, width=32)


def copies(data: st.DataObject) -> Candidates:
    """Random candidates of a text: up to six nodes with ever lower scores."""
    found, keys = Candidates(), set[tuple[int, int]]()
    for _ in range(data.draw(st.integers(0, 6))):
        parent, token = data.draw(st.integers(-1, len(found) - 1)), data.draw(st.integers(0, 3))
        if (parent, token) not in keys:
            keys.add((parent, token))
            least = min([0.0, *found.scores])
            found.add(token, parent, least - data.draw(DOWN))
    return found


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths = list[tuple[int, ...]]()
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def paths_in(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, tree.nodes):
        found[node] = (*found[int(tree.parents[row, node])], int(tree.tokens[row, node]))
    return [found[node] for node in range(tree.nodes)]


@settings(max_examples=80)
@given(data=st.data())
def test_the_best_paths_of_both_sources_win(data: st.DataObject) -> None:
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    growth, heads = grown(data, rows)
    others = [copies(data) for _ in range(rows)]
    if not any(map(len, others)):
        return
    growth.compete(others)
    keep = growth.best(count)
    tree, scores = growth.tree(keep), growth.head_scores(keep)
    for row, (head, other) in enumerate(zip(heads, others, strict=True)):
        joined = dict(head)
        for path, score in zip(paths_of(other.tokens, other.parents), other.scores, strict=True):
            joined[path] = max(joined.get(path, -math.inf), score)
        paths = paths_in(tree, row)
        assert len(set(paths)) == count + 1, "no path twice"
        expected = sorted(joined.values(), reverse=True)[:count]
        torch.testing.assert_close(sorted((joined[path] for path in paths[1:]), reverse=True), expected)
        for path, score in zip(paths, scores[row].tolist(), strict=True):
            assert math.isclose(score, head[path], abs_tol=1e-6) if path in head else score == -math.inf
    assert int(tree.depths.max()) <= tree.height


@settings(max_examples=40)
@given(data=st.data())
def test_a_fixed_tree_competes_with_its_own_nodes_only(data: st.DataObject) -> None:
    growth, heads = grown(data, 1)
    others = Candidates([3, 3], [-1, 0], [-0.001, -0.002])
    growth.compete([others], torch.tensor([[0, 1, 2]]))
    keep = growth.best(3)
    paths = set(paths_in(growth.tree(keep), 0)[1:])
    fixed = list(heads[0])[:3]
    assert {(3,), (3, 3)} <= paths and paths <= {(3,), (3, 3), *fixed}


def test_scores_are_calibrated_per_row() -> None:
    curves = Source(Curve((-3.0, -1.0), (-2.0, -0.5)), Curve((-3.0, -1.0), (-4.0, -1.0)))
    growth = Growth(torch.tensor([1, 2, 3]))
    growth.add(torch.zeros(3, 2, dtype=torch.long), torch.tensor([[-1.0, -3.0]] * 3), None)
    growth.calibrate(curves, [(0.0, 0.0), (1.0, 0.0), (0.5, 0.25)])
    _, scores, _ = growth.listed()
    torch.testing.assert_close(scores, torch.tensor([[-0.5, -2.0], [-1.0, -4.0], [-0.5, -2.75]]))
    growth.calibrate(Source(), [(0.0, 9.0)] * 3)
    assert growth.listed()[1].max() == 0, "no probability is above 1"


def test_equal_paths_merge_and_the_best_come_first() -> None:
    one = Candidates([1, 2, 3], [-1, 0, 1], [-0.1, -0.5, -2.0])
    two = Candidates([1, 5, 2], [-1, 0, 0], [-0.3, -0.4, -0.45])
    joined = one.merged(two)
    assert paths_of(joined.tokens, joined.parents) == [(1,), (1, 5), (1, 2), (1, 2, 3)]
    assert joined.scores == [-0.1, -0.4, -0.45, -2.0] and joined.height == 3
    assert one.merged(Candidates()) is one
    tree = joined.best(2).tree(7, 9)
    assert (tree.tokens, tree.parents) == ([7, 1, 5], [-1, 0, 1])


def test_the_heads_nodes_are_found_again_by_their_tokens() -> None:
    drafted = Drafted([9, 1, 2, 3], [-1, 0, 1, 0], [0.0, 0.5, 0.25, 0.0])
    assert drafted.expected == 0.75
    assert [drafted.accepted(tokens) for tokens in ([1, 2, 7], [1, 3], [3, 1], [])] == [2, 1, 0, 0]


def test_sources_compete_where_nothing_can_be_read() -> None:
    growth = Growth(torch.zeros(2, dtype=torch.long, device="meta"))
    growth.add(torch.zeros(2, 4, dtype=torch.long, device="meta"), torch.zeros(2, 4, device="meta"), None)
    curves = Source(Curve((-3.0, -1.0), (-2.0, -0.5)), Curve())
    growth.calibrate(curves, [(0.0, 0.0), (0.5, 0.0)])
    growth.compete([Candidates([1, 2], [-1, 0], [-0.1, -0.2]), Candidates()])
    tree = growth.tree(growth.best(3))
    assert tree.tokens.shape == (2, 4) and tree.height == 2
