"""The walk: exact expected paths, and its law by enumeration."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from haast.sampling import Sampler, SamplingConfig
from haast.tree import DraftTree
from haast.verify import RowVerdict, verify

VOCAB = 5


def tree_of(tokens: list[int], parents: list[int], **flags: list[bool]) -> DraftTree:
    marks = {name: torch.tensor([values]) for name, values in flags.items()}
    return DraftTree.from_parents(torch.tensor([tokens]), torch.tensor([parents]), **marks)


def says(*tokens: int) -> Tensor:
    """Logits (1, nodes, vocab) of a target whose choice at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), VOCAB).double()


def walk(tree: DraftTree, logits: Tensor) -> RowVerdict:
    (verdict,) = verify(tree, logits, Sampler(SamplingConfig()), [[0]]).rows
    assert verdict is not None
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


def test_dead_nodes_and_probes_are_never_accepted() -> None:
    tokens, parents = [0, 1, 2], [-1, 0, 0]
    dead = tree_of(tokens, parents, live=[True, False, True])
    assert walk(dead, says(1, 3, 3)) == RowVerdict((0,), (1,), (False,))
    probe = tree_of(tokens, parents, probe=[False, True, False])
    assert walk(probe, says(1, 3, 3)) == RowVerdict((0,), (1,), (False,))
    assert walk(probe, says(2, 3, 3)) == RowVerdict((0, 2), (2, 3), (True,))


def test_a_lone_root_emits_the_bonus_alone() -> None:
    assert walk(tree_of([0], [-1]), says(3)) == RowVerdict((0,), (3,), ())


def test_rows_are_walked_apart_and_ended_rows_are_left_alone() -> None:
    tree = DraftTree.from_parents(torch.tensor([[0, 1], [0, 2], [0, 3]]), torch.tensor([[-1, 0]] * 3))
    logits = torch.cat([says(1, 4), says(2, 4), says(0, 4)])
    assert verify(tree, logits, Sampler(SamplingConfig()), [[0], None, [0]]).rows == (
        RowVerdict((0, 1), (1, 4), (True,)),
        None,
        RowVerdict((0,), (0,), (False,)),
    )


def test_each_node_is_judged_with_its_own_path_as_history() -> None:
    seen: list[list[int]] = []

    def spy(history: Tensor, scores: Tensor) -> Tensor:
        seen.append(history[0].tolist())
        return scores

    verify(TREE, says(2, 0, 1, 0, 0, 0, 2, 4), Sampler(SamplingConfig(processors=(spy,))), [[9, 0]])
    assert seen == [[9, 0], [9, 0, 2], [9, 0, 2, 1], [9, 0, 2, 1, 2]]


class Enumerated(Sampler):
    """A sampler whose draws are given instead of keyed: the position's point on the target's own CDF."""

    def __init__(self, config: SamplingConfig, points: list[float], root: int) -> None:
        super().__init__(config)
        self._points, self._root = points, root

    def choose(self, row: int, history: object, logits: Tensor) -> int:
        assert isinstance(history, list)
        cumulative = self.probs(history, logits).cumsum(-1)
        return int((cumulative <= self._points[len(history) - self._root]).sum())


def cuts(probs: Tensor) -> list[tuple[float, float]]:
    """The CDF's intervals as (midpoint, length), so that integrating over the draw is a finite sum."""
    edges = [0.0, *probs.cumsum(-1).tolist()]
    return [((a + b) / 2, b - a) for a, b in pairwise(edges) if b > a]


@pytest.mark.parametrize("seed", range(6))
def test_the_law_of_the_emitted_pair_is_the_targets_whatever_is_drafted(seed: int) -> None:
    # Integrates over both draws exactly. Node logits depend on the node's path alone, as a target's do.
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    at_root = 2 * torch.randn(VOCAB, dtype=torch.float64, generator=generator)
    after = 2 * torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=generator)
    children = [rng.randrange(VOCAB) for _ in range(3)]  # twins possible
    tree = tree_of([0, *children], [-1, 0, 0, 0])
    logits = torch.stack([at_root, *(after[token] for token in children)]).unsqueeze(0)
    config = SamplingConfig(0.8, top_k=4, repetition_penalty=1.2)
    law = Sampler(config)
    first: dict[int, float] = {}
    pairs: dict[tuple[int, int], float] = {}
    for point, weight in cuts(law.probs([0], at_root)):
        (row,) = verify(tree, logits, Enumerated(config, [point, 0.5], 1), [[0]]).rows
        assert row is not None
        token = row.tokens[0]
        first[token] = first.get(token, 0.0) + weight
        assert (len(row.tokens) == 2) == (token in children)
        if token in children:
            for second, length in cuts(law.probs([0, token], after[token])):
                (row,) = verify(tree, logits, Enumerated(config, [point, second], 1), [[0]]).rows
                assert row is not None
                pair = (row.tokens[0], row.tokens[1])
                pairs[pair] = pairs.get(pair, 0.0) + weight * length
    exact = law.probs([0], at_root)
    for token in range(VOCAB):
        assert abs(first.get(token, 0.0) - float(exact[token])) < 1e-12
    for (token, follower), chance in pairs.items():
        assert abs(chance - float(exact[token] * law.probs([0, token], after[token])[follower])) < 1e-12
    assert abs(sum(chance for chance in pairs.values()) - sum(float(exact[t]) for t in set(children))) < 1e-12
