"""Precision of a target's weights: its dtype, Haast's packing, or a quantisation.

Owns the name of a precision, reading a quantised layer's weights as plain numbers, and quantisation by torchao when a
model is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from haast.target.device_map import offloaded, read_weight
from haast.target.packing import PackedLinear

TORCHAO = ("torchao-int8", "torchao-int4")  # the forms that `quantise` takes
_GROUP = 32  # weights that share a factor at 4 bits
_CHUNK = 256  # columns of a weight that are read in one forward of the layer


def quantise(model: nn.Module, form: str) -> None:
    """Quantise a model's linear layers in place, except the LM head, which transformers does not quantise either.

    `form` is "torchao-int8" (one scale per output) or "torchao-int4" (one scale per 32 weights of an output). Raises
    ValueError for 4 bits if the number of inputs of a layer is not a multiple of 32.
    """
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config: Any = Int8WeightOnlyConfig()
    if form == "torchao-int4":
        on_cpu = next(model.parameters()).device.type == "cpu"  # torchao's 4-bit kernels are for GPUs
        int4: Any = vars(torch)["int4"]  # missing in torch's type stubs
        config = IntxWeightOnlyConfig(int4, PerGroup(_GROUP)) if on_cpu else Int4WeightOnlyConfig(_GROUP)
    head = model.get_output_embeddings()  # type: ignore[operator]
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    odd = next((name for name, m in chosen.items() if form == "torchao-int4" and m.in_features % _GROUP), None)
    if odd is not None:
        raise ValueError(
            f"packing={form!r} needs a multiple of {_GROUP} inputs, but {odd} has {chosen[odd].in_features} inputs: "
            f"use packing='torchao-int8'"
        )
    quantize_(model, config, lambda module, name: name in chosen)


def quantisation(model: nn.Module) -> str | None:
    """Method and bits of the model's quantisation ("torchao-int8", "gptq-4bit", ...); None if it has none."""
    formats = (_torchao(module.weight) for module in model.modules() if isinstance(module, nn.Linear))
    torchao_format = next(filter(None, formats), None)
    if torchao_format is not None:
        return torchao_format
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    data: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    method = getattr(data["quant_method"], "value", data["quant_method"])
    bits = 8 if data.get("load_in_8bit") else 4 if data.get("load_in_4bit") else data.get("bits", data.get("w_bit"))
    return str(method) if bits is None else f"{method}-{bits}bit"


def precision(model: nn.Module, lm_head: nn.Module, dtype: torch.dtype) -> str:
    """Precision of the weights in one word: the name of a quantisation, of a packing, or of the dtype."""
    if isinstance(lm_head, PackedLinear):
        return "float16" if lm_head.packing == "f16" else lm_head.packing
    return quantisation(model) or str(dtype).removeprefix("torch.")


def weight_rows(module: nn.Module, inputs: int, dtype: torch.dtype | None = None, rows: Tensor | None = None) -> Tensor:
    """A linear layer's weight (outputs, inputs), or its `rows` (n,) only, as plain numbers, whatever its format.

    If it is not stored as a plain matrix, it is computed from the layer's outputs for unit vectors: each is a column.
    `dtype` is that of the layer's input; the weight's if None.
    """
    if isinstance(module, PackedLinear):
        return module.unpack(rows)
    whole = _plain_weight(module, inputs, dtype)
    return whole if rows is None else whole[rows.to(whole.device)]


def reads_rows(module: nn.Module) -> bool:
    """Whether `weight_rows` reads a few rows alone: not of a sharded, an offloaded or a quantised layer."""
    if isinstance(module, PackedLinear):
        return module.rest is None
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()
    return plain and not offloaded(module)


def _plain_weight(module: nn.Module, inputs: int, dtype: torch.dtype | None) -> Tensor:
    weight = getattr(module, "weight", None)
    kind = type(weight.data) if isinstance(weight, Tensor) else None
    if isinstance(weight, Tensor) and kind in (Tensor, DTensor) and weight.dim() == 2 and weight.is_floating_point():
        plain = read_weight(module, "weight")
        assert plain is not None, "it has a weight"
        if plain.shape[1] == inputs:
            return plain
    input_dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    return _weight_from_outputs(module, inputs, dtype or input_dtype)


@torch.inference_mode()
def _weight_from_outputs(module: nn.Module, inputs: int, dtype: torch.dtype) -> Tensor:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    bias = module(torch.zeros(1, inputs, dtype=dtype, device=device))
    columns = []
    for begin in range(0, inputs, _CHUNK):
        units = torch.zeros(min(_CHUNK, inputs - begin), inputs, dtype=dtype, device=device)
        units[:, begin:].fill_diagonal_(1)
        columns.append((module(units) - bias).T)
    return torch.cat(columns, dim=1)


def _torchao(weight: object) -> str | None:
    """The weight's torchao format; None if it has none."""
    kind = type(weight.data if isinstance(weight, Tensor) else weight)
    if not kind.__module__.startswith("torchao."):
        return None
    four = "Int4" in kind.__name__ or str(getattr(weight, "target_dtype", "")).endswith("int4")
    return "torchao-int4" if four else "torchao-int8"
