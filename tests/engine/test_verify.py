"""Sample-and-match: exact expected paths, both ways of judging, and the emitted distribution by enumeration."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haast.core import RowVerdict, SamplingParams, Verdict
from haast.engine.verify import Failures, check_possible, verify
from haast.errors import PromptError
from haast.sampling import Sampler
from haast.tree import DraftTree

VOCAB = 5


def tree_of(
    tokens: list[int], parents: list[int], live: list[bool] | None = None, placeholder: list[bool] | None = None
) -> DraftTree:
    marks = [None if flags is None else torch.tensor([flags]) for flags in (live, placeholder)]
    return DraftTree.from_parents(torch.tensor([tokens]), torch.tensor([parents]), *marks)


def says(*tokens: int) -> Tensor:
    """Logits (1, nodes, vocab) of a target whose choice at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), VOCAB).double()


def unchanged(_history: Tensor, scores: Tensor) -> Tensor:
    """A processor that does nothing, but for which every node has to be asked in order."""
    return scores


def walk(tree: DraftTree, logits: Tensor) -> RowVerdict:
    """What is kept of one row, judged both ways."""
    (verdict,) = verify(tree, logits, [Sampler(SamplingParams())], [[0]]).rows
    (walked,) = verify(tree, logits, [Sampler(SamplingParams(processors=(unchanged,)))], [[0]]).rows
    assert verdict is not None and verdict == walked
    return verdict


#         0:0
#       /  |  \
#     1:1 2:2 3:3
#     /|   |
#  4:4 5:0 6:1
#            \ (under 6)
#             7:2
TREE = tree_of([0, 1, 2, 3, 4, 0, 1, 2], [-1, 0, 0, 0, 1, 1, 2, 6])


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ((4, 0, 0, 0, 0, 0, 0, 0), RowVerdict((0,), (4,), (False,))),
        ((1, 2, 0, 0, 0, 0, 0, 0), RowVerdict((0, 1), (1, 2), (True, False))),
        ((1, 4, 0, 0, 3, 0, 0, 0), RowVerdict((0, 1, 4), (1, 4, 3), (True, True))),
        ((1, 0, 0, 0, 0, 2, 0, 0), RowVerdict((0, 1, 5), (1, 0, 2), (True, False))),
        ((3, 0, 0, 2, 0, 0, 0, 0), RowVerdict((0, 3), (3, 2), (False,))),
        ((2, 0, 1, 0, 0, 0, 2, 4), RowVerdict((0, 2, 6, 7), (2, 1, 2, 4), (False, True, True))),
    ],
)
def test_the_walk_follows_the_targets_own_choices(choices: tuple[int, ...], expected: RowVerdict) -> None:
    assert walk(TREE, says(*choices)) == expected


def test_of_twins_the_first_is_taken() -> None:
    tree = tree_of([0, 1, 1, 2], [-1, 0, 0, 2])
    assert walk(tree, says(1, 2, 2, 3)) == RowVerdict((0, 1), (1, 2), (True,))


def test_dead_nodes_and_placeholders_are_never_accepted() -> None:
    tokens, parents = [0, 1, 2], [-1, 0, 0]
    dead = tree_of(tokens, parents, live=[True, False, True])
    assert walk(dead, says(1, 3, 3)) == RowVerdict((0,), (1,), (False,))
    held = tree_of(tokens, parents, placeholder=[False, True, False])
    assert walk(held, says(1, 3, 3)) == RowVerdict((0,), (1,), (False,))
    assert walk(held, says(2, 3, 3)) == RowVerdict((0, 2), (2, 3), (True,))


def test_a_lone_root_emits_the_bonus_alone() -> None:
    assert walk(tree_of([0], [-1]), says(3)) == RowVerdict((0,), (3,), ())


def test_rows_are_judged_apart_and_one_that_raises_ends_alone() -> None:
    def raising(_history: Tensor, _scores: Tensor) -> Tensor:
        raise ZeroDivisionError("the processor's own")

    tree = DraftTree.from_parents(torch.tensor([[0, 1], [0, 2], [0, 3]]), torch.tensor([[-1, 0]] * 3))
    logits = torch.cat([says(1, 4), says(2, 4), says(0, 4)])
    plain, bad = Sampler(SamplingParams()), Sampler(SamplingParams(processors=(raising,)))
    failures: Failures = {}
    verdict = verify(tree, logits, [plain, bad, plain], [[0]] * 3, failures)
    assert verdict.rows == (RowVerdict((0, 1), (1, 4), (True,)), None, RowVerdict((0,), (0,), (False,)))
    assert verdict.counts.tolist() == [2, 0, 1]
    assert list(failures) == [1] and isinstance(failures[1], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        verify(tree, logits, [plain, bad, plain], [[0]] * 3)


def test_a_verdict_is_the_same_by_tensors_and_by_rows() -> None:
    rows = [RowVerdict((0, 2, 3), (7, 8, 9), (False, True)), None, RowVerdict((0,), (4,), ())]
    made = Verdict.of_rows(rows, torch.device("cpu"))
    assert made.rows == tuple(rows) and made.counts.tolist() == [3, 0, 1]
    assert (made.path[0].tolist(), made.tokens[0].tolist(), int(made.tokens[2, 0])) == ([0, 2, 3], [7, 8, 9], 4)
    assert made.packed[0].tolist() == [3, 0, 2, 3, 7, 8, 9, 0, 1, -1]
    assert Verdict(made.packed).rows == tuple(rows)


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Random parents, few tokens (so there are twins), dead nodes and placeholders; one to three rows."""
    nodes, rows = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    parents = [[-1] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)] for _ in range(rows)]
    tokens = [[0] + [draw(st.integers(0, 2)) for _ in range(1, nodes)] for _ in range(rows)]
    live, held = [[True] * nodes for _ in range(rows)], [[False] * nodes for _ in range(rows)]
    for row in range(rows):
        for node in range(1, nodes):
            live[row][node] = live[row][parents[row][node]] and draw(st.integers(0, 5)) > 0
            held[row][node] = draw(st.integers(0, 5)) == 0
    flags = torch.tensor(held) if draw(st.booleans()) else None
    return DraftTree.from_parents(torch.tensor(tokens), torch.tensor(parents), torch.tensor(live), flags)


@settings(max_examples=150)
@given(tree=trees(), temperature=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 20))
def test_all_nodes_at_once_are_judged_as_by_walking(tree: DraftTree, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tree.rows, tree.nodes, 3, generator=generator, dtype=torch.float64)
    params = SamplingParams(temperature, seed=seed)
    histories = [[1] * row + [0] for row in range(tree.rows)]
    at_once = verify(tree, logits, [Sampler(params, row) for row in range(tree.rows)], histories)
    walking = SamplingParams(temperature, seed=seed, processors=(unchanged,))
    walked = verify(tree, logits, [Sampler(walking, row) for row in range(tree.rows)], histories)
    assert at_once.rows == walked.rows
    assert at_once.path.shape[1] == tree.height + 1


def test_logits_of_other_nodes_and_a_drafter_that_lost_its_text_are_refused() -> None:
    with pytest.raises(ValueError, match="cover different nodes"):
        verify(TREE, says(1, 2), [Sampler(SamplingParams())], [[0]])
    with pytest.raises(RuntimeError, match="the root is token 0, the last emitted one 3"):
        verify(tree_of([0], [-1]), says(1), [Sampler(SamplingParams(processors=(unchanged,)))], [[3]])


def test_a_token_that_is_none_is_said() -> None:
    with pytest.raises(PromptError, match="no token is possible after 8 tokens"):
        check_possible(RowVerdict((0, 1), (3, -1), ()), 7)
    check_possible(RowVerdict((0, 1), (3, 0), ()), 7)


def test_each_node_is_judged_with_its_own_path_as_history() -> None:
    seen: list[list[int]] = []

    def spy(history: Tensor, scores: Tensor) -> Tensor:
        seen.append(history[0].tolist())
        return scores

    verify(TREE, says(2, 0, 1, 0, 0, 0, 2, 4), [Sampler(SamplingParams(processors=(spy,)))], [[9, 0]])
    assert seen == [[9, 0], [9, 0, 2], [9, 0, 2, 1], [9, 0, 2, 1, 2]]


class Enumerated(Sampler):
    """A sampler whose draws are given instead of keyed: the position's point on the target's own CDF."""

    def __init__(self, params: SamplingParams, points: list[float], root: int) -> None:
        super().__init__(params)
        self._points, self._root = points, root

    def draw(self, position: int) -> float:
        return self._points[position - self._root]


def cuts(probs: Tensor) -> list[tuple[float, float]]:
    """The CDF's intervals as (midpoint, length), so that integrating over the draw is a finite sum."""
    edges = [0.0, *probs.cumsum(-1).tolist()]
    return [((a + b) / 2, b - a) for a, b in pairwise(edges) if b > a]


@pytest.mark.parametrize("params", [SamplingParams(0.8, top_k=4, repetition_penalty=1.2), SamplingParams(0.8, top_k=4)])
@pytest.mark.parametrize("seed", range(6))
def test_the_emitted_pair_is_distributed_as_the_targets_whatever_is_drafted(seed: int, params: SamplingParams) -> None:
    # Integrates over both draws exactly. Node logits depend on the node's path alone, as a target's do.
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    at_root = 2 * torch.randn(VOCAB, dtype=torch.float64, generator=generator)
    after = 2 * torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=generator)
    children = [rng.randrange(VOCAB) for _ in range(3)]  # twins possible
    tree = tree_of([0, *children], [-1, 0, 0, 0])
    logits = torch.stack([at_root, *(after[token] for token in children)]).unsqueeze(0)
    own = Sampler(params)
    first: dict[int, float] = {}
    pairs: dict[tuple[int, int], float] = {}
    for point, weight in cuts(own.probs([0], at_root)):
        row = judged(tree, logits, params, [point, 0.5, 0.5, 0.5])
        token = row.tokens[0]
        first[token] = first.get(token, 0.0) + weight
        assert (len(row.tokens) == 2) == (token in children)
        if token in children:
            for second, length in cuts(own.probs([0, token], after[token])):
                row = judged(tree, logits, params, [point, second, 0.5, 0.5])
                pair = (row.tokens[0], row.tokens[1])
                pairs[pair] = pairs.get(pair, 0.0) + weight * length
    exact = own.probs([0], at_root)
    for token in range(VOCAB):
        assert abs(first.get(token, 0.0) - float(exact[token])) < 1e-12
    for (token, follower), chance in pairs.items():
        assert abs(chance - float(exact[token] * own.probs([0, token], after[token])[follower])) < 1e-12
    assert abs(sum(chance for chance in pairs.values()) - sum(float(exact[t]) for t in set(children))) < 1e-12


def judged(tree: DraftTree, logits: Tensor, params: SamplingParams, points: list[float]) -> RowVerdict:
    (row,) = verify(tree, logits, [Enumerated(params, points, 1)], [[0]]).rows
    assert row is not None
    return row
