"""Fused modules give the numbers of the modules that they replace, and leave alone what they do not understand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)

from haast import native
from haast.target.fusing import FusedRMSNorm, FusedSwiGLU, fuse_small_modules
from haast.target.packing import PackedLinear, exact_products, pack_linears

needs_kernels = pytest.mark.skipif(not native.available(), reason="no native kernels")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@needs_kernels
def test_llama_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    pack_linears(model)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        swapped = fuse_small_modules(model)
        after = model(tokens).logits
    assert swapped == (5, 2, 2)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("form", ["f16", "int8"])
def test_a_norm_of_another_law_is_left_alone(form: str) -> None:
    """Gemma scales by 1 + weight, caps scores, and uses GELU: nothing may be swapped, also where activations round."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Gemma2RMSNorm":
                nn.init.normal_(module.get_parameter("weight"))
    pack_linears(model, form=form)
    assert fuse_small_modules(model) == (0, 0, 0)


@needs_kernels
@pytest.mark.parametrize("form", ["f16", "int8"])
@pytest.mark.parametrize(
    ("kind", "fused"), [(Qwen2Config, 2), (MistralConfig, 2), (Qwen3Config, 2), (CohereConfig, 0), (OlmoConfig, 2)]
)
def test_attention_is_fused_where_it_is_llamas(kind: Any, fused: int, form: str) -> None:
    """Qwen2 has biases, Qwen3 norms its heads; Cohere interleaves the rotation and must stay."""
    torch.manual_seed(0)
    config = kind(**SIZES, head_dim=8, attn_implementation="sdpa", pad_token_id=0)
    make: Any = AutoModelForCausalLM.from_config  # untyped
    model: nn.Module = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                nn.init.normal_(parameter)
    pack_linears(model, form=form)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad(), exact_products(model):
        before = model(tokens).logits
    swapped = fuse_small_modules(model)
    with torch.no_grad(), exact_products(model):
        after = model(tokens).logits
    assert swapped[2] == fused
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 7, 24])
def test_rows_are_independent(rows: int) -> None:
    torch.manual_seed(rows)
    norm = FusedRMSNorm(torch.randn(48), 1e-5)
    gate, up, down = (nn.Linear(a, b, bias=False) for a, b in ((48, 80), (48, 80), (80, 48)))
    holder = nn.Module()
    holder.gate_proj, holder.up_proj, holder.down_proj = gate, up, down
    pack_linears(holder)
    swiglu = FusedSwiGLU(*(packed for packed in holder.children() if isinstance(packed, PackedLinear)))
    x = torch.randn(rows, 48)

    def run(batch: Tensor) -> Tensor:
        return swiglu(norm(batch))  # type: ignore[no-any-return]

    with torch.no_grad():
        together = run(x)
        alone = torch.cat([run(row.unsqueeze(0)) for row in x])
    assert torch.equal(together, alone)
