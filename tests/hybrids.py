"""Tiny models with recurrent layers in fp64, of every family that Haast takes up."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from zoo_sizes import VOCAB

from haast.target import mixers
from haast.target.target import Target

FAST = ("qwen3_5_text", "nemotron_h", "jamba", "lfm3", "minimax")
FAMILIES = (
    *FAST, "qwen3_next", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "lfm2", "lfm2_moe", "granitemoehybrid",
    "bamba", "falcon_h1", "zamba", "zamba2", "zaya", "mamba", "mamba2", "falcon_mamba",
)  # fmt: skip
PURE = ("mamba", "mamba2", "falcon_mamba")  # recurrent layers only
INCONSISTENT = ("nemotron_h", "zamba2")  # they limit a time step in prompts only
WINDOWED = ("lfm3", "minimax")

HERE = mixers._LAYER is not None  # the installed transformers keeps recurrent states in its common cache
needs_cache = pytest.mark.skipif(not HERE, reason="an older transformers has a cache class for each of these models")
families = pytest.mark.parametrize(
    "kind", [*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES if kind not in FAST)]
)
fast = pytest.mark.parametrize("kind", FAST)


@functools.cache
def tiny_hybrid(kind: str) -> Any:
    """A tiny random model; shared, so leave it as it is."""
    return fresh_hybrid(kind)


def fresh_hybrid(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A tiny random model with other `settings` of its configuration."""
    model = zoo.build(kind, dtype=dtype)
    config = model.config.get_text_config()
    for name, value in settings.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"  # grouped products know no fp64
    for module in model.modules():
        if isinstance(vars(module).get("chunk_size"), int):
            module.chunk_size = 8  # texts are padded to it
    tiny: nn.Module = model
    return tiny


def hybrid_target(kind: str) -> Target:
    """A target with an empty pool."""
    model = tiny_hybrid(kind)
    return Target(model, probed=_probed(kind))


@functools.cache
def _probed(kind: str) -> Any:
    return Target(tiny_hybrid(kind)).probed


def some_text(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def stock_text(model: Any, prompt: list[int], new: int, **more: Any) -> list[int]:
    """What stock `generate` says, greedily."""
    ids = torch.tensor([prompt])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **more)
    text: list[int] = said[0, len(prompt) :].tolist()
    return text
