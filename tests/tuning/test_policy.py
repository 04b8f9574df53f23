"""When drafting further stops paying: the arithmetic, and that the native proposal and the tensor one decide alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_stack import KINDS, made

from haast import native
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, Step, StopParams
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel, interpolate


def test_another_level_pays_while_it_brings_more_than_its_time() -> None:
    pace = CostModel(forward_ms=(5.0, 6.0), level_ms=1.0, rate=0.2, trust=1.0, follow=0.5)
    frontier = torch.tensor([[math.log(0.3), math.log(0.2)]])
    assert pace.deeper(frontier)  # 0.5 * (0.3 + 0.2) tokens against 0.2
    assert not pace.deeper(frontier[:, :1])
    assert not CostModel((5.0, 6.0), 1.0, 0.2, trust=0.7, follow=0.5).deeper(frontier)
    rows = torch.tensor([[math.log(0.9)], [math.log(1e-6)]])  # rows share a step: their mean counts
    assert pace.deeper(rows) and not pace.deeper(rows[1:])


def test_nodes_are_added_while_they_pay() -> None:
    pace = CostModel(forward_ms=(5.0, 5.1, 5.2, 9.0, 9.1), level_ms=1.0, rate=0.2)
    sure = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1]]).log()
    assert pace.nodes(sure) == 3  # the fourth costs 3.8 ms, 0.76 tokens
    assert pace.nodes(torch.tensor([[0.9, 0.85, 0.84, 0.8, 0.8]]).log()) == 5  # with the fifth it pays after all
    assert pace.nodes(torch.tensor([[1e-9]]).log()) == 1  # the draft is not worth its 0.1 ms
    assert pace.nodes(torch.tensor([[0.021]]).log()) == 2 and pace.nodes(torch.tensor([[0.019]]).log()) == 1
    assert pace.nodes(torch.empty(3, 0)) == 1


@pytest.mark.parametrize("wrong", [{"level_ms": 0.0}, {"rate": -1.0}, {"trust": 0.0}, {"follow": math.nan}])
def test_impossible_paces_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CostModel(**{"forward_ms": (1.0, 2.0), "level_ms": 1.0, "rate": 1.0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forward_ms"):
        CostModel((1.0,), 1.0, 1.0)


def test_interpolation() -> None:
    points = {1: 10.0, 4: 16.0, 8: 20.0}
    assert [interpolate(points, n) for n in (1, 2, 4, 6, 8, 12)] == [10.0, 12.0, 16.0, 18.0, 20.0, 24.0]
    assert interpolate({3: 7.0}, 9) == 7.0
    with pytest.raises(ValueError, match="no measured point"):
        interpolate({}, 1)


PACES = [
    CostModel(tuple(8 + 0.4 * n for n in range(1, 25)), 0.3, 0.2, 1.0, 0.9),
    CostModel(tuple(8 + 0.05 * n for n in range(1, 13)), 0.02, 0.1, 1.2, 0.8),
    CostModel(tuple(8 + 2.0 * n for n in range(1, 25)), 3.0, 0.3, 0.9, 0.5),
]


def drafter(target: Target, pace: CostModel | None, shape: DraftShape | None = None) -> EagleDrafter:
    torch.manual_seed(7)
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    with torch.no_grad():
        module.fc.weight.mul_(8)  # a surer head than a random one
    made_one = EagleDrafter(target, Head(module, torch.arange(0, 61, 2), {}))
    made_one.reshape(shape or DraftShape(depth=5, top_k=6, width=4, nodes=24), pace)
    return made_one


def watched(target: Target, by_tensors: bool, pace: CostModel | None) -> list[DraftTree]:
    own = drafter(target, pace)
    growing = own._prepared(own.configs[1], None)
    assert growing is not None and growing.one_call is not None
    if by_tensors:
        own._shapes = {key: replace(each, one_call=None) for key, each in own._shapes.items()}
    trees: list[DraftTree] = []
    law, stop = SamplingParams(temperature=1.0, seed=2), StopParams(24)
    for _ in Engine(target, own).run([[1, 2, 3, 4], [7, 8]], law, stop, watch=lambda step: trees.append(step.tree)):
        continue
    used = {each.one_call is None for each in own._shapes.values()}
    assert used == {by_tensors}
    return trees


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize("pace", [None, *PACES])
def test_the_native_proposal_is_the_tensor_one(pace: CostModel | None) -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    one_call, slow = watched(target, False, pace), watched(target, True, pace)
    assert len(one_call) == len(slow) > 4
    for one, other in zip(one_call, slow, strict=True):
        for name in ("tokens", "parents", "depths", "ancestors", "live"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_a_pace_changes_trees_and_not_the_text() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()

    def text(own: EagleDrafter | VanillaDrafter) -> list[int]:
        tokens: list[int] = []
        for emission in Engine(target, own).run([[5, 6, 7]], SamplingParams(), StopParams(40), Stats()):
            tokens.extend(emission.tokens)
        return tokens

    expected = text(VanillaDrafter())
    sizes = set()
    for pace in PACES:
        assert text(drafter(target, pace)) == expected
        sizes |= {tree.nodes for tree in watched(target, False, pace)}
    assert len(sizes) > 3


def test_a_fixed_tree_ignores_the_pace() -> None:
    target = made(KINDS["llama"])
    own = drafter(target, PACES[2], DraftShape("static", depth=3, top_k=3, width=3, nodes=8))
    seen: list[Step] = []
    for _ in Engine(target, own).run([[5, 6, 7]], SamplingParams(), StopParams(12), watch=seen.append):
        continue
    assert {step.tree.nodes for step in seen} == {8}


def test_shapes_stay_static_without_a_pace() -> None:
    """What compiled graphs and CUDA graphs need: over 200 steps the target sees trees of one size only."""
    target = made(KINDS["llama"])
    own = drafter(target, None)
    seen: list[tuple[int, ...]] = []
    forward = target.forward

    def watch(tree: DraftTree, *rest: object, **more: object) -> object:
        seen.append(tuple(tree.tokens.shape))
        return forward(tree, *rest, **more)  # type: ignore[arg-type]

    target.forward = watch  # type: ignore[assignment, method-assign]
    stats = Stats()
    for _ in Engine(target, own).run([[5, 6, 7]], SamplingParams(temperature=1.0), StopParams(400), stats):
        continue
    assert stats.target_forwards >= 200
    assert set(seen[1:]) == {(1, 24)}
