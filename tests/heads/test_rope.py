"""A head turns its queries and keys as its target does, whatever scales the target's rotary angles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fakes import decode, vanilla
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Phi3Config

from haast import native
from haast.core import SamplingParams, StopParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Step
from haast.heads.checkpoint import Head
from haast.heads.config import HeadConfig, rope_of
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.target.fusing import fuse_small_modules
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.tree import DraftTree

CONTEXT = 128
SHAPE = DraftShape(depth=4, top_k=3, width=3, nodes=12)
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 24.0, "beta_slow": 2.0},
    "dynamic": {"factor": 3.0},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 64, "factor": 2.0,
    },
}  # fmt: skip
CHANGING = ("dynamic", "longrope")


def llama(kind: str, dtype: torch.dtype = torch.float64) -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.4, eos_token_id=None,
        rope_parameters={"rope_type": kind, "rope_theta": 5e3, **SCALED[kind]},
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return Target(model.to(dtype).eval())


def heads_for(target: Target) -> list[FeatExtrapolator | Eagle3Head]:
    torch.manual_seed(1)
    made: list[FeatExtrapolator | Eagle3Head] = [
        FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)),
        Eagle3Head(Eagle3Config.for_target(target.config, layer_ids=(0, 1))),
    ]
    for module in made:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        module.requires_grad_(False)
    return made


def angles(rotary: Any, positions: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    cosine, sine = rotary(torch.zeros(1, dtype=dtype), position_ids=torch.tensor([positions]))
    return torch.cat([cosine, sine])


@pytest.mark.parametrize("kind", SCALED)
def test_a_heads_angles_are_the_targets(kind: str) -> None:
    target = llama(kind)
    limit = target.context_length
    assert limit == (64 if kind == "longrope" else CONTEXT)
    theirs: Any = target.model.get_submodule("model.rotary_emb")
    plain = angles(llama("default").model.get_submodule("model.rotary_emb"), [5])
    for module in heads_for(target):
        assert module.rotary.attention_scaling == theirs.attention_scaling
        for positions in ([0, 1, 5], [limit // 2, 3], [limit - 1, 17]):
            assert torch.equal(angles(module.rotary, positions), angles(theirs, positions))
        assert kind in ("default", "dynamic") or not torch.equal(angles(module.rotary, [5]), plain)


@pytest.mark.parametrize("kind", SCALED)
def test_drafts_up_to_the_contexts_end_keep_them(kind: str) -> None:
    """A draft stands behind the context at times, where angles would change for what comes after."""
    target = llama(kind)
    limit = target.context_length
    assert limit is not None
    prompt = [(5 * i + 1) % 37 for i in range(limit - 2)]  # one step, with the root at limit - 2
    for module in heads_for(target):
        seen: list[int] = []
        module.rotary.register_forward_pre_hook(
            lambda _module, _args, given, seen=seen: seen.append(int(given["position_ids"].max())), with_kwargs=True
        )
        drafter = EagleDrafter(target, Head(module, None, {}), SHAPE)
        assert decode(target, drafter, [prompt], 40) == vanilla(target, [prompt], 40)
        assert (max(seen) < limit) == (kind in CHANGING)


def last_tree(target: Target, drafter: EagleDrafter, prompt: list[int]) -> DraftTree:
    """The tree of a decode's last step."""
    steps: list[Step] = []
    for _ in Engine(target, drafter).run([prompt], SamplingParams(), StopParams(12), watch=steps.append):
        continue
    return steps[-1].tree


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("kind", SCALED)
def test_native_code_has_the_angles_or_leaves_them_to_modules(kind: str) -> None:
    target = llama(kind, torch.float32)
    pack_linears(target.model)
    fuse_small_modules(target.model)
    assert target.use_one_call() == (kind not in CHANGING)
    head = Head(heads_for(target)[0], None, {})
    prompt = [(5 * i + 1) % 37 for i in range(40)]
    trees = []
    for by_modules in (False, True):
        drafter = EagleDrafter(target, copy.deepcopy(head), SHAPE)
        assert (drafter._forward.stack is None) == (kind in CHANGING)
        if by_modules:
            drafter._forward.stack = None
            drafter._shapes.clear()
        assert decode(target, drafter, [prompt], 12) == vanilla(target, [prompt], 12)
        trees.append(last_tree(target, drafter, prompt))
    assert torch.equal(trees[0].tokens, trees[1].tokens) and torch.equal(trees[0].parents, trees[1].parents)


def test_the_older_form_of_the_setting_is_read() -> None:
    make: Any = LlamaConfig
    found = rope_of(make(rope_theta=5e3, rope_scaling={"type": "linear", "factor": 2.0}))
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("linear", 2.0, 5e3)


def test_other_families() -> None:
    nested = Gemma3TextConfig(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    assert rope_of(nested) == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope_of(GPT2Config()) == {"rope_type": "default", "rope_theta": 1e4}
    yarn = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 64}
    half = LlamaConfig(rope_parameters={**yarn, "partial_rotary_factor": 0.5})
    assert rope_of(half) == yarn  # a head turns all of its dimensions
    factors = {"short_factor": [1.0] * 24, "long_factor": [2.0] * 24, "rope_theta": 3e4, "rope_type": "longrope"}
    part = Phi3Config(rope_parameters={**factors, "partial_rotary_factor": 0.5}, original_max_position_embeddings=64)
    assert rope_of(part) == {"rope_type": "default", "rope_theta": 3e4}
    sizes = HeadConfig.for_target(half)
    made: Any = sizes.layers().rope_parameters
    assert sizes.rope_parameters == yarn and made["rope_type"] == "yarn"
