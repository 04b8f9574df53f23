"""The tree: depth, mask and children against brute force; what is no tree is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haast.target.attention import tree_mask
from haast.tree import DraftTree

NODES = 12


@st.composite
def rows_of_parents(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    """Random parents and live flags of one to three rows; nothing live under the dead."""
    nodes, rows = draw(st.integers(1, NODES)), draw(st.integers(1, 3))
    parents, live = [], []
    for _ in range(rows):
        up = [-1] + [draw(st.integers(0, number - 1)) for number in range(1, nodes)]
        alive = [True] * nodes
        for number in range(1, nodes):
            alive[number] = alive[up[number]] and draw(st.integers(0, 4)) > 0
        parents.append(up)
        live.append(alive)
    return parents, live


def line(parents: list[int], live: list[bool], node: int) -> list[int]:
    """The node and its ancestors, by walking."""
    if not live[node]:
        return [node]
    walked = [node]
    while parents[walked[-1]] >= 0:
        walked.append(parents[walked[-1]])
    return walked


@given(rows_of_parents())
def test_depths_and_ancestors_are_what_walking_up_gives(shape: tuple[list[list[int]], list[list[bool]]]) -> None:
    parents, live = shape
    tree = DraftTree.from_parents(torch.zeros(len(parents), len(parents[0]), dtype=torch.long),
                                  torch.tensor(parents), torch.tensor(live))  # fmt: skip
    assert (tree.rows, tree.nodes) == (len(parents), len(parents[0]))
    assert tree.height == tree.nodes - 1, "where nobody says how high it is, it may be a chain"
    bound = DraftTree.from_parents(tree.tokens, tree.parents, tree.live, height=int(tree.depths.max()), checked=True)
    assert bound.height == int(tree.depths.max())
    assert torch.equal(bound.depths, tree.depths) and torch.equal(bound.ancestors, tree.ancestors)
    for row in range(tree.rows):
        for node in range(tree.nodes):
            walked = line(parents[row], live[row], node)
            assert tree.depths[row, node] == len(walked) - 1
            assert tree.ancestors[row, node].nonzero().flatten().tolist() == sorted(walked)


@given(rows_of_parents(), st.data())
def test_the_mask_is_past_and_ancestors_cut_by_the_window(
    shape: tuple[list[list[int]], list[list[bool]]], data: st.DataObject
) -> None:
    parents, live = shape
    lengths = [data.draw(st.integers(0, 9)) for _ in parents]
    window = data.draw(st.sampled_from([None, 1, 2, 3, 5, 30]))
    tree = DraftTree.from_parents(torch.zeros(len(parents), len(parents[0]), dtype=torch.long),
                                  torch.tensor(parents), torch.tensor(live))  # fmt: skip
    held, width = torch.tensor(lengths), max(lengths) + tree.nodes + data.draw(st.integers(0, 2))
    places = held.unsqueeze(1) + tree.depths
    bias = tree_mask(
        tree.ancestors, held, width, torch.float64, positions=places, flight_positions=places, window=window
    )
    assert bias.shape == (tree.rows, 1, tree.nodes, width)
    assert set(bias.flatten().tolist()) <= {0.0, torch.finfo(torch.float64).min}
    for row, length in enumerate(lengths):
        for node in range(tree.nodes):
            walked = line(parents[row], live[row], node)
            place = length + len(walked) - 1
            slots = {length + n: length + len(line(parents[row], live[row], n)) - 1 for n in walked}
            slots.update({past: past for past in range(length)})
            seen = sorted(slot for slot, position in slots.items() if window is None or place - position < window)
            assert (bias[row, 0, node] == 0).nonzero().flatten().tolist() == seen


def test_the_picture_in_the_docstring() -> None:
    tree = DraftTree.from_parents(torch.tensor([[10, 11, 12, 13]]), torch.tensor([[-1, 0, 0, 1]]))
    assert tree.depths.tolist() == [[0, 1, 1, 2]]
    assert tree.ancestors[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert tree.children(0) == [[1, 2], [3], [], []]


def test_dead_nodes_and_placeholders_are_nobodys_children() -> None:
    tokens, parents = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[-1, 0, 0, 0, 1]])
    live = torch.tensor([[True, True, False, True, True]])
    placeholder = torch.tensor([[False, False, False, True, False]])
    tree = DraftTree.from_parents(tokens, parents, live, placeholder)
    assert tree.children(0) == [[1], [4], [], [], []]
    assert tree.parents.tolist() == [[-1, 0, -1, 0, 1]]
    assert tree.ancestors[0, 3].tolist() == [True, False, False, True, False], "a placeholder still sees its past"
    assert tree.ancestors[0, 2].tolist() == [False, False, True, False, False], "a dead node sees only itself"


def test_a_chain_equals_its_parents_and_may_be_ragged() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 0, 0]])
    live = torch.tensor([[True, True, True], [True, False, False]])
    chain = DraftTree.chain(tokens, live)
    tree = DraftTree.from_parents(tokens, torch.tensor([[-1, 0, 1]] * 2), live)
    for name in ("tokens", "parents", "depths", "ancestors", "live"):
        assert torch.equal(getattr(chain, name), getattr(tree, name)), name
    assert chain.height == 2
    roots = DraftTree.roots(torch.tensor([5, 6]))
    assert roots.tokens.tolist() == [[5], [6]] and (roots.nodes, roots.height) == (1, 0)


def test_padding_adds_dead_nodes_and_keeps_all_that_the_tree_says() -> None:
    tokens, parents = torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 0, 0]])
    marks = torch.tensor([[False, False, True]])
    probs = torch.rand(1, 3, 4, dtype=torch.float64)
    tree = replace(DraftTree.from_parents(tokens, parents, placeholder=marks, height=1), draft_probs=probs)
    padded = tree.padded(5)
    again = DraftTree.from_parents(padded.tokens, padded.parents, padded.live, padded.placeholder)
    for name in ("tokens", "parents", "depths", "ancestors", "live", "placeholder"):
        assert torch.equal(getattr(padded, name), getattr(again, name)), name
    assert padded.live.tolist() == [[True, True, True, False, False]] and padded.height == 1
    assert padded.draft_probs is not None and padded.draft_probs.shape == (1, 5, 4)
    assert torch.equal(padded.draft_probs[:, :3], probs), "rules judge a padded tree by what it was drawn from"
    assert tree.padded(3) is tree
    with pytest.raises(ValueError, match="can't be padded to 2"):
        tree.padded(2)


@pytest.mark.parametrize(
    ("parents", "live", "why"),
    [
        ([[-1, 0, 2]], None, "smaller index"),  # its own parent
        ([[-1, 2, 0]], None, "smaller index"),  # the parent comes later
        ([[-1, -1, 0]], None, "smaller index"),  # two roots
        ([[0, 0, 0]], None, "smaller index"),  # no root
        ([[-1, 0, 1]], [[True, False, True]], "dead parent"),
        ([[-1, 0]], None, "one shape"),
        ([], None, "one shape"),
    ],
)
def test_what_is_no_tree_is_refused(parents: list[list[int]], live: list[list[bool]] | None, why: str) -> None:
    alive = None if live is None else torch.tensor(live)
    with pytest.raises(ValueError, match=why):
        DraftTree.from_parents(torch.zeros(1, 3, dtype=torch.long), torch.tensor(parents), alive)


def test_an_empty_tree_is_refused() -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="nodes >= 1"):
        DraftTree.from_parents(empty, empty)
