"""How a target's weights are held: its dtype, packed by Haast, or quantised by somebody else.

Owns the name of a precision, the weights of a quantised layer where they are needed as numbers, and quantisation by
torchao when a model is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from haast.target.device_map import read_weight
from haast.target.packing import PackedLinear

TORCHAO = ("torchao-int8", "torchao-int4")  # what `quantise` makes
_GROUP = 32  # weights that share a factor at 4 bits
_PROBED = 256  # inputs of a layer that are read at a time


def quantise(model: nn.Module, form: str) -> None:
    """Quantise the weights of a model's linears in place, the LM head's left out, as transformers leaves it out.

    `form` is "torchao-int8", one factor per output, or "torchao-int4", one per 32 weights of an output. Raises
    ValueError for 4 bits and a layer whose inputs are no multiple of 32.
    """
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config: Any = Int8WeightOnlyConfig()
    if form == "torchao-int4":
        on_cpu = next(model.parameters()).device.type == "cpu"  # torchao's 4-bit kernels are for GPUs
        four: Any = vars(torch)["int4"]  # which torch's type stubs do not know
        config = IntxWeightOnlyConfig(four, PerGroup(_GROUP)) if on_cpu else Int4WeightOnlyConfig(_GROUP)
    head = model.get_output_embeddings()  # type: ignore[operator]
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    odd = next((name for name, m in chosen.items() if form == "torchao-int4" and m.in_features % _GROUP), None)
    if odd is not None:
        raise ValueError(
            f"packing={form!r} shares factors by {_GROUP} weights, and {odd} has {chosen[odd].in_features} inputs: "
            f"use packing='torchao-int8'"
        )
    quantize_(model, config, lambda module, name: name in chosen)


def quantisation(model: nn.Module) -> str | None:
    """Who quantised the model, and to what ("torchao-int8", "gptq-4bit", ...); None where nobody did."""
    formats = (_torchao(module.weight) for module in model.modules() if isinstance(module, nn.Linear))
    found = next(filter(None, formats), None)
    if found is not None:
        return found
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    told: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    method = getattr(told["quant_method"], "value", told["quant_method"])
    bits = 8 if told.get("load_in_8bit") else 4 if told.get("load_in_4bit") else told.get("bits", told.get("w_bit"))
    return str(method) if bits is None else f"{method}-{bits}bit"


def precision(model: nn.Module, lm_head: nn.Module, dtype: torch.dtype) -> str:
    """How precisely the weights are held, in one word: a quantisation's, a packing's, or the dtype's."""
    if isinstance(lm_head, PackedLinear):
        return "float16" if lm_head.form == "f16" else lm_head.form
    return quantisation(model) or str(dtype).removeprefix("torch.")


def weight_rows(module: nn.Module, inputs: int, dtype: torch.dtype | None = None) -> Tensor:
    """A linear layer's weight (outputs, inputs) as plain numbers, whatever format it is held in.

    Where it is no plain matrix, the layer is asked: what it says of a unit vector is a column. `dtype` is what it
    takes, its weight's if absent.
    """
    if isinstance(module, PackedLinear):
        return module.unpack()
    weight = getattr(module, "weight", None)
    kind = type(weight.data) if isinstance(weight, Tensor) else None
    if isinstance(weight, Tensor) and kind in (Tensor, DTensor) and weight.dim() == 2 and weight.is_floating_point():
        plain = read_weight(module, "weight")
        assert plain is not None, "it has a weight"
        if plain.shape[1] == inputs:
            return plain
    takes = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    return _asked(module, inputs, dtype or takes)


@torch.inference_mode()
def _asked(module: nn.Module, inputs: int, dtype: torch.dtype) -> Tensor:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    constant = module(torch.zeros(1, inputs, dtype=dtype, device=device))  # the bias, where there is one
    columns = []
    for begin in range(0, inputs, _PROBED):
        units = torch.zeros(min(_PROBED, inputs - begin), inputs, dtype=dtype, device=device)
        units[:, begin:].fill_diagonal_(1)
        columns.append((module(units) - constant).T)
    return torch.cat(columns, dim=1)


def _torchao(weight: object) -> str | None:
    """Which torchao format a weight is held in; None for any other."""
    kind = type(weight.data if isinstance(weight, Tensor) else weight)
    if not kind.__module__.startswith("torchao."):
        return None
    four = "Int4" in kind.__name__ or str(getattr(weight, "target_dtype", "")).endswith("int4")
    return "torchao-int4" if four else "torchao-int8"
