"""The verifier's judgement: ties and bugs told apart, and chi-square tests that see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from haast.checking.distribution import DistributionTest, chi_square, sampled_distribution, tiny_distribution
from haast.checking.divergence import compare, diagnose, logits_after, tolerance
from haast.core import RowVerdict, SamplingParams, Verdict
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import StopParams
from haast.engine.verify import verify
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.sampling import keyed_uniform
from haast.target.target import Target

PROMPT = [1, 2, 3, 4]
CONFIG = LlamaConfig(
    vocab_size=12,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.3,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    return Target(LlamaForCausalLM(CONFIG).double())


@pytest.fixture(scope="module")
def drafter(target: Target) -> EagleDrafter:
    torch.manual_seed(1)
    head = FeatExtrapolator(FeatExtrapolatorConfig.for_target(CONFIG)).eval().requires_grad_(False)
    return EagleDrafter(target, Head(head, None, {}), DraftShape(depth=2, top_k=3, width=2, nodes=8))


def biased(real: Any, share: float) -> Any:
    """`verify`, but at a share of the steps it takes the first draft unseen."""
    calls = iter(range(10**9))

    def wrong(tree: Any, logits: Any, choosers: Any, histories: Any, failures: Any = None) -> Verdict:
        honest = real(tree, logits, choosers, histories, failures)
        rows: list[RowVerdict | None] = []
        for row, kept in enumerate(honest.rows):
            children = tree.children(row)[0]
            if kept is None or not children or keyed_uniform(9, 9, next(calls)) >= share:
                rows.append(kept)
                continue
            token = int(tree.tokens[row, children[0]])
            bonus = choosers[row].choose([*histories[row], token], logits[row, children[0]])
            rows.append(RowVerdict((0, children[0]), (token, bonus), (True,)))
        return Verdict.of_rows(rows, logits.device)

    return wrong


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
def test_drafted_text_is_the_same(target: Target, drafter: EagleDrafter, sampling: SamplingParams) -> None:
    done = compare(target, drafter, PROMPT, sampling, StopParams(40))
    assert done.divergence is None and done.vanilla == done.drafted and len(done.vanilla) == 40
    assert done.drafted_stats.tau > 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
def test_a_wrong_acceptance_rule_is_a_bug(
    target: Target, drafter: EagleDrafter, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haast.engine.step.verify", biased(verify, 0.5))
    found = compare(target, drafter, PROMPT, sampling, StopParams(40)).divergence
    assert found is not None and found.kind == "bug" and found.gap > found.allowed


def test_a_near_tie_is_a_tie(target: Target) -> None:
    """Raise the runner-up's logit to the winner's, but for a rounding error."""
    logits = logits_after(target, PROMPT)
    (best, second), (first, other) = logits.topk(2).values.tolist(), logits.topk(2).indices.tolist()

    def nearly(short: float) -> SamplingParams:
        def lift(_history: Any, scores: torch.Tensor) -> torch.Tensor:
            lifted = scores.clone()
            lifted[:, other] += best - second - short
            return lifted

        return SamplingParams(processors=(lift,))

    tie = diagnose(target, PROMPT, [first, 1], [other, 2], nearly(1e-12))
    assert tie is not None and tie.kind == "tie" and tie.index == 0 and tie.top2_gap == pytest.approx(1e-12, rel=0.1)
    bug = diagnose(target, PROMPT, [first], [other], nearly(1e-6))
    assert bug is not None and bug.kind == "bug" and bug.gap == pytest.approx(1e-6, rel=0.1)
    third = int(logits.topk(3).indices[2])
    far = diagnose(target, PROMPT, [first], [third], nearly(1e-12))  # the top two tie, but this is neither
    assert far is not None and far.kind == "bug"


def test_a_sampled_tie_is_at_the_boundary_of_the_draw(target: Target) -> None:
    sampling = SamplingParams(temperature=1.0, seed=2)
    cumulative = logits_after(target, PROMPT).softmax(-1).cumsum(-1)
    point = keyed_uniform(2, 0, len(PROMPT))
    token = int(torch.searchsorted(cumulative, torch.tensor(point, dtype=cumulative.dtype)))
    neighbour = token + 1 if token + 1 < 12 else token - 1
    edge = float(cumulative[min(token, neighbour)])
    found = diagnose(target, PROMPT, [token], [neighbour], sampling)
    assert found is not None and found.kind == "bug" and found.gap == pytest.approx(abs(edge - point))


def test_equal_beginnings_of_unequal_length_are_a_bug(target: Target) -> None:
    found = diagnose(target, PROMPT, [1, 2, 3], [1, 2], SamplingParams())
    assert found is not None and (found.kind, found.index, found.vanilla, found.drafted) == ("bug", 2, 3, None)
    assert diagnose(target, PROMPT, [1, 2], [1, 2], SamplingParams()) is None


def test_tolerance_grows_as_precision_falls() -> None:
    order = [tolerance(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert order == sorted(order)


def test_chi_square_agrees_with_scipy() -> None:
    from scipy import stats

    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    statistic, cells, p_value = chi_square({0: 40, 1: 40, 2: 20}, probs)
    wanted = stats.chisquare([40, 40, 20], [50, 30, 20])
    assert cells == 3 and statistic == pytest.approx(wanted.statistic) and p_value == pytest.approx(wanted.pvalue)


def test_chi_square_merges_rare_cells_and_refuses_impossible_ones() -> None:
    probs = torch.tensor([0.6, 0.38, 0.01, 0.01, 0.0], dtype=torch.float64)
    statistic, cells, _ = chi_square({0: 60, 1: 38, 2: 2}, probs)
    assert statistic == pytest.approx(0.0) and cells == 3
    assert chi_square({0: 60, 4: 1}, probs)[2] == 0.0
    assert chi_square({0: 10}, torch.tensor([1.0], dtype=torch.float64))[2] == 1.0


def test_the_distribution_of_the_engine_and_its_control() -> None:
    right, control = tiny_distribution(1000)
    assert right.passed and right.p_value > 1e-4
    assert control.passed and control.p_value < 1e-4


def test_the_distribution_of_a_real_tree(
    target: Target, drafter: EagleDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = SamplingParams(temperature=1.0)
    tests = sampled_distribution(target, drafter, PROMPT, law, 800)
    assert tests[0].name == "first token" and all(test.passed for test in tests)
    for place in ("haast.engine.step.verify", "haast.checking.distribution.verify"):
        monkeypatch.setattr(place, biased(verify, 0.3))
    assert not all(test.passed for test in sampled_distribution(target, drafter, PROMPT, law, 800))
    assert not tiny_distribution(1000)[0].passed


def test_a_control_passes_by_failing() -> None:
    assert DistributionTest("control", 1, 2, 99.0, 1e-9, expected_to_fail=True).passed
    assert not DistributionTest("control", 1, 2, 0.1, 0.9, expected_to_fail=True).passed
    assert not DistributionTest("law", 1, 2, 99.0, 1e-9).passed
