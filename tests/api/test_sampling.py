"""The distribution of the next token: transformers' own scores, keyed draws, and settings that are refused."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from fakes import chi_square_p, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from haast.core import SamplingParams
from haast.errors import PromptError
from haast.sampling import Sampler, argmax, choose_nodes, keyed_uniform


class Lift(LogitsProcessor):
    """Lifts one token by the history; a nonlinear step, so that its place among the others matters."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % scores.shape[-1]] += 2.5
        return torch.tanh(scores / 4) * 4


@settings(max_examples=40)
@given(
    temperature=st.sampled_from([0.4, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 6, 50]),
    top_p=st.sampled_from([1.0, 0.8, 0.3]),
    min_p=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    penalty=st.sampled_from([1.0, 1.4, 0.7]),
    custom=st.booleans(),
)
def test_scores_are_those_of_generate(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, custom: bool
) -> None:
    prompt = [3, 1, 4, 1, 5]
    model: Any = tiny_llama()
    ids, config = torch.tensor([prompt]), cast(Any, GenerationConfig)
    extra = (Lift(),) if custom else ()
    torch.manual_seed(0)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config(
            do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p or None,
            repetition_penalty=penalty, max_new_tokens=6, output_scores=True, output_logits=True,
            return_dict_in_generate=True,
        ),
        logits_processor=LogitsProcessorList(extra),
    )  # fmt: skip
    sampler = Sampler(SamplingParams(temperature, top_k, top_p, min_p, penalty, processors=extra))
    for step, (raw, expected) in enumerate(zip(output.logits, output.scores, strict=True)):
        history = output.sequences[0, : len(prompt) + step].tolist()
        mine = sampler.scores(history, raw[0])
        assert torch.equal(mine.isneginf(), expected[0].isneginf())
        assert torch.allclose(mine, expected[0].to(mine.dtype), rtol=1e-6, atol=1e-6)


def test_greedy_applies_penalty_and_processors_and_no_warper() -> None:
    logits = torch.tensor([1.0, 0.9, 0.2, -1.0], dtype=torch.float64)
    config = SamplingParams(0.0, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=2.0)
    assert Sampler(config).scores([0, 3], logits).tolist() == [0.5, 0.9, 0.2, -2.0]
    assert Sampler(config).choose([0, 3], logits) == 1
    assert Sampler(config).probs([0, 3], logits).tolist() == [0, 1, 0, 0]
    assert Sampler(SamplingParams()).stateless and not Sampler(config).stateless
    assert Sampler(SamplingParams()).choose([0, 3], logits) == 0


def test_whole_numbers_are_fine_settings() -> None:
    logits = torch.tensor([1.0, 0.9], dtype=torch.float64)
    sampler = Sampler(SamplingParams(1, top_p=1, min_p=0, repetition_penalty=2))
    assert sampler.scores([0], logits).tolist() == [0.5, 0.9]


def test_a_choice_is_the_inverse_cdf_of_its_own_draw() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    sampler = Sampler(SamplingParams(1.0, seed=9), choice=2)
    for position in range(1, 200):
        draw = keyed_uniform(9, 2, position)
        assert sampler.draw(position) == draw
        expected = 0 if draw < 0.2 else 1 if draw < 0.7 else 2
        assert sampler.choose([0] * position, logits) == expected


def test_impossible_tokens_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    sampler = Sampler(SamplingParams(1.0))
    for draw, expected in ((0.0, 1), (1 - 2**-53, 3), (1.0, 3)):
        monkeypatch.setattr(Sampler, "draw", lambda self, position, draw=draw: draw)
        assert sampler.choose([0], logits) == expected
        nodes = logits.expand(1, 3, -1)
        assert choose_nodes(nodes, [sampler], [1], torch.tensor([[0, 1, 1]]), 1).tolist() == [[expected] * 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_processed_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = Sampler(SamplingParams(0.7)).scores([1], logits)
    assert scores.dtype is torch.float32 and torch.equal(scores, logits.float() / 0.7)


def uniform_p(draws: list[float], cells: int = 50) -> float:
    counts = Counter(int(draw * cells) for draw in draws)
    return chi_square_p([counts[cell] for cell in range(cells)], [len(draws) / cells] * cells)


@pytest.mark.parametrize("vary", ["seed", "choice", "position"])
def test_keyed_draws_are_uniform_along_every_key(vary: str) -> None:
    keys = {"seed": 0, "choice": 0, "position": 0}
    draws = [keyed_uniform(**{**keys, vary: value}) for value in range(20000)]
    assert min(draws) >= 0 and max(draws) < 1 and len(set(draws)) == len(draws)
    assert uniform_p(draws) > 1e-3
    steps = [(b - a) % 1.0 for a, b in pairwise(draws)]
    assert uniform_p(steps) > 1e-3, "neighbouring keys must be unrelated"
    assert uniform_p([draw**1.2 for draw in draws]) < 1e-6, "the test itself must see a small bias"


def test_keyed_draws_are_a_pure_function_of_all_three_keys() -> None:
    assert keyed_uniform(1, 2, 3) == keyed_uniform(1, 2, 3)
    values = {keyed_uniform(s, c, p) for s in range(12) for c in range(12) for p in range(12)}
    assert len(values) == 12**3
    assert keyed_uniform(2**63 - 1, 0, 0) != keyed_uniform(2**62 - 1, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} is not allowed: give a value "):
        SamplingParams(**{name: value})


def test_a_processor_may_write_in_place() -> None:
    def banned(_history: Tensor, scores: Tensor) -> Tensor:
        scores[:, 3] = -torch.inf
        return scores

    with torch.inference_mode():
        logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    sampler = Sampler(SamplingParams(processors=(banned,)))
    assert sampler.choose([1], logits) == 2
    assert logits.tolist() == [0.0, 1.0, 2.0, 9.0], "the target's logits stay as they were"


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_where_no_token_is_possible_it_is_said(value: float) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, processors=(lambda _, scores: scores.fill_(value),)))
    with pytest.raises(PromptError, match="no token is possible after 3 tokens"):
        sampler.choose([1, 2, 3], torch.randn(32))


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.6, 1.3]),
    top_k=st.sampled_from([0, 1, 4]),
    top_p=st.sampled_from([1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 99),
)


@settings(max_examples=60)
@given(
    rows=st.lists(params, min_size=1, max_size=4), data=st.data(), dtype=st.sampled_from([torch.float64, torch.half])
)
def test_all_nodes_at_once_are_chosen_for_as_one_by_one(
    rows: list[SamplingParams], data: st.DataObject, dtype: torch.dtype
) -> None:
    """Requests of different kinds side by side; a node's choice depends on its logits, request and position alone."""
    nodes, vocab = 5, 9
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(len(rows), nodes, vocab, generator=generator, dtype=torch.float64).to(dtype)
    samplers = [Sampler(each, choice) for choice, each in enumerate(rows)]
    lengths = [data.draw(st.integers(1, 9)) for _ in rows]
    depths = torch.tensor([[0] + [data.draw(st.integers(0, 3)) for _ in range(nodes - 1)] for _ in rows])
    chosen = choose_nodes(logits, samplers, lengths, depths, 3)
    for row, (sampler, length) in enumerate(zip(samplers, lengths, strict=True)):
        for node in range(nodes):
            history = [0] * (length + int(depths[row, node]))
            assert chosen[row, node] == sampler.choose(history, logits[row, node])


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_where_no_token_is_possible_a_node_chooses_none(value: float) -> None:
    logits = torch.zeros(1, 2, 4, dtype=torch.float64)
    logits[0, 1] = value
    chosen = choose_nodes(logits, [Sampler(SamplingParams(1.0))], [3], torch.tensor([[0, 1]]), 1)
    assert chosen[0, 0] >= 0 and chosen[0, 1] == -1


@pytest.mark.parametrize("vocab", [32, 2048 * 3, 64 * 41, 49152])
def test_the_likeliest_token_is_argmaxs_first(vocab: int) -> None:
    logits = torch.randint(0, 9, (3, 4, vocab)).float()  # ties everywhere
    logits[0, 1, vocab // 2] = torch.nan
    logits[1, 2] = -torch.inf
    assert torch.equal(argmax(logits), logits.argmax(-1))
