"""Targets with experts: a batch's text under every kind of drafter is stock's, and heads are trained for them.

Experts are chosen token by token, so a tree's nodes go to experts that a plain text would never meet in one forward.
What a node answers must not depend on that.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest
import test_heads as tiny
import torch
from fakes import decode, random_head
from test_families import FAMILIES, VOCAB, stock
from transformers import AutoConfig, AutoModelForCausalLM

from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.ngram import PromptLookupDrafter
from haast.drafters.tree_shape import DraftShape
from haast.heads.checkpoint import Head
from haast.heads.module import DraftModule
from haast.target.target import Target
from haast.training.config import TrainConfig
from haast.training.features import stream_examples
from haast.training.initialise import why_not_last_layer
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe"]
SAMPLED = SamplingParams(temperature=1.0, seed=2)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_batch_of_three_says_what_stock_says_of_each_row(name: str) -> None:
    rng = random.Random(4)
    prompts = [rng.choices(range(VOCAB), k=length) for length in (8, 5, 11)]
    target, reference = Target(stock(name)), cast(Any, stock(name))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14)
        expected.append(text[0, len(prompt) :].tolist())
    eagle = EagleDrafter(target, random_head(target), DraftShape("dynamic", depth=3, top_k=12, width=6, nodes=30))
    drafters: list[Drafter] = [eagle, PromptLookupDrafter(), LookaheadDrafter(VOCAB)]
    for drafter in drafters:
        assert decode(target, drafter, prompts, 14) == expected, drafter.name
    alone = [decode(target, eagle, [prompt], 14, SAMPLED)[0] for prompt in prompts[:1]]
    assert decode(target, eagle, prompts, 14, SAMPLED)[:1] == alone


def test_all_of_them_are_families() -> None:
    assert set(EXPERTS) <= set(FAMILIES)


def test_a_head_is_trained_for_a_target_with_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1,
        initializer_range=0.3, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    target = Target(cast(Any, AutoModelForCausalLM).from_config(config))
    made = stream_examples(target, tiny.sequences(12), topk=8, layer_ids=())
    examples = [example for _, example in sorted(made, key=lambda pair: pair[0])]
    settings = TrainConfig(
        views=120, batch_tokens=60, draft_vocab=48, initialisation="random", evaluate_every=60, log_every=20
    )
    run = Trainer(
        settings,
        tiny.sizes(target, "feat"),
        TargetWeights.of(target),
        examples[:10],
        examples[10:],
        tmp_path,
        quiet=True,
    )
    run.run()
    assert "not a Llama layer" in why_not_last_layer(target, tiny.sizes(target, "feat"))
    module = run.plain_head()
    assert isinstance(module, DraftModule) and all(bool(weight.isfinite().all()) for weight in module.parameters())
    drafter = EagleDrafter(target, Head(module, run.draft_vocab, {}))
    prompts = [[2, 3, 4]]
    assert decode(target, drafter, prompts, 12) == decode(target, LookaheadDrafter(tiny.VOCAB), prompts, 12)
