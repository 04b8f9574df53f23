"""Which tensors of a GGUF file each weight of a model is made of, and its values or blocks.

The gguf package says which tensor is which weight, transformers what it changes in the values. The blocks of a linear
layer stay as they are if nothing but the order of its rows changes (Llama's queries and keys). A plan compares all
tensors with the model before memory is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import gguf
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from haast import compat
from haast.target.gguf_file import GGUFFile, TensorInfo

__all__ = ["Blocks", "Plan", "dequantised"]

# Elements that are dequantised at a time. They stay in a core's cache, and from 32768 elements on torch would wake all
# its threads for each copy, which on a busy machine takes ten times as long.
_CHUNK = 32767
_FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_NO_CHANGE = slice(None)
ROPE_FACTORS = "rope_freqs.weight"
# What transformers raises for metadata of wrong types, or that do not fit together.
METADATA_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError, OSError,
    StrictDataclassError,
)  # fmt: skip
REMEDY = "fetch the file again, or load the original weights from their folder or hub id"

MakeLinear = Callable[["Blocks", Tensor | None], nn.Module | None]
MakeEmbedding = Callable[["Blocks"], nn.Module | None]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The quantised weight of a linear layer or an embedding, as it is in the file.

    Attributes:
        type_name: e.g. "Q4_K"; "F32", "F16" and "BF16" too.
        data: (out_features, bytes per row) uint8, read-only: a view of the file, or a copy with its rows reordered.
        out_features, in_features: the weight's sizes.
    """

    type_name: str
    data: NDArray[np.uint8] = field(repr=False)
    out_features: int
    in_features: int

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features), computed in fp32 a few rows at a time and rounded to `dtype`.

        Raises:
            ValueError: the gguf package can't dequantise this type.
        """
        values = torch.empty(self.out_features, self.in_features, dtype=dtype)
        step = max(1, _CHUNK // self.in_features)
        for row in range(0, self.out_features, step):
            chunk = dequantised(self.data[row : row + step], self.type_name)
            values[row : row + step] = torch.from_numpy(chunk)
        return values


class Plan:
    """Which tensors of the file each weight of a model is made of. Raises ValueError if any is missing or left over.

    Attributes:
        weights: of the model, in its order; each is filled by itself.
        replaced: paths of the modules that the caller has built instead.
    """

    def __init__(self, file: GGUFFile, model: PreTrainedModel) -> None:
        self.file = file
        self.processor = compat.gguf_processor(file.architecture, model.config)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state: dict[str, Tensor] = {name: parameters.get(name, tensor) for name, tensor in model.state_dict().items()}
        self.names = self._file_names(state, len(_layers(file)))
        groups: dict[int, list[str]] = {}
        for name, tensor in state.items():
            groups.setdefault(id(tensor), []).append(name)
        self.tensors_of = self._tensors_of_weights()
        self._check_types()
        self.replaced = set[str]()
        self.weights: list[Weight] = []
        self.linear_biases: dict[str, Weight] = {}
        for names in groups.values():
            tensors = next((self.tensors_of[name] for name in names if name in self.tensors_of), None)
            if tensors is None:
                self.fail(f"has no tensor for {names[0]} {tuple(state[names[0]].shape)}")
            weight = Weight(self, names, state[names[0]].shape, tensors)
            self.weights.append(weight)
            if names[0].endswith(".bias"):
                self.linear_biases[names[0]] = weight
        self._check_left_over({name for names in groups.values() for name in names})

    def fail(self, problem: str) -> NoReturn:
        """Raise ValueError: the file has this problem."""
        raise ValueError(f"{self.file.path} {problem}: {REMEDY}")

    def bias(self, module: nn.Linear, path: str, dtype: torch.dtype) -> Tensor | None:
        """A layer's bias, (out_features) in `dtype`."""
        if module.bias is None:
            return None
        return self.linear_biases[f"{path}.bias"].values(None, dtype)

    def _file_names(self, state: Mapping[str, Tensor], layers: int) -> dict[str, str]:
        """The model's name of each tensor that the file may have, by the file's name."""
        kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.file.architecture), None)
        if kind is None:
            self.fail(f"has the architecture {self.file.architecture!r}, which the gguf package here does not know")
        known, found = gguf.get_tensor_name_map(kind, layers), dict[str, str]()
        for name in state:
            looked_up = self.processor.preprocess_name(name)
            stem, dot, ending = looked_up.rpartition(".")
            stem, suffix = (stem, dot + ending) if ending in ("weight", "bias") else (looked_up, "")
            # Some files were made of the decoder, whose names do not begin with the decoder's own.
            theirs = known.get_name(stem) or known.get_name(stem.partition(".")[2])
            if theirs is None:
                self.processor.perform_fallback_tensor_mapping(found, suffix, "", looked_up)
            else:
                found.setdefault(theirs + suffix, looked_up)
        return found

    def _tensors_of_weights(self) -> dict[str, list[TensorInfo]]:
        found: dict[str, list[TensorInfo]] = {}
        for tensor in self.file.tensors.values():
            # Merged experts are parameters without the ending that the file's names have.
            name = self.names.get(tensor.name) or self.names.get(tensor.name.removesuffix(".weight"))
            if name is not None:
                found.setdefault(name, []).append(tensor)
        return found

    def _check_types(self) -> None:
        """Dequantise a row of each type, so that one that can't be is found before memory is taken."""
        known = set[str]()
        for tensor in self.file.tensors.values():
            if tensor.type_name in known:
                continue
            known.add(tensor.type_name)
            try:
                dequantised(tensor.data[:1], tensor.type_name)
            except ValueError as error:
                raise ValueError(f"{self.file.path} has the tensor {tensor.name!r} of a type that {error}") from error

    def _check_left_over(self, used: set[str]) -> None:
        """A tensor of a layer that no weight takes is a part of the model that would be missing."""
        layers = [f"{layer}." for layer in _layers(self.file)]
        left = [name for name, place in self._places().items() if place not in used and name != ROPE_FACTORS]
        parts = (name for name in left if name.startswith(tuple(layers)) and name.endswith((".weight", ".bias")))
        part = next(parts, None)
        if part is not None:
            self.fail(f"has the tensor {part!r}, for which transformers' {self.file.architecture} model has no place")
        if left:
            few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            logging.getLogger(__name__).warning("%s: tensors that are not used: %s", self.file.path.name, few)

    def _places(self) -> dict[str, str | None]:
        return {
            name: self.names.get(name) or self.names.get(name.removesuffix(".weight")) for name in self.file.tensors
        }

    def row_order(self, tensor: TensorInfo) -> slice | NDArray[np.int64] | None:
        """How transformers orders a matrix's rows; None if it does anything else, or it is no matrix.

        Tried out with two columns of row numbers: what comes back in another form is not an order of rows.
        """
        if len(tensor.shape) != 2:
            return None
        rows = tensor.shape[0]
        numbers = np.arange(2 * rows, dtype=np.float64).reshape(2, rows).T
        try:
            with np.errstate(all="ignore"):
                changed, name, *_ = self._process(numbers, tensor.name, {})
        except METADATA_ERRORS:
            return None
        if name != tensor.name or changed.shape != numbers.shape:
            return None
        if np.array_equal(changed, numbers):
            return _NO_CHANGE
        order = changed[:, 0]
        is_order = np.array_equal(np.sort(order), numbers[:, 0]) and np.array_equal(changed[:, 1], order + rows)
        return order.astype(np.int64) if is_order else None

    def processed(self, names: Sequence[str], tensors: Sequence[TensorInfo]) -> Tensor:
        """A weight's values in fp32 as transformers makes them of the file's."""
        merged: dict[str, Tensor] = {}
        for tensor in tensors:
            values = dequantised(tensor.data, tensor.type_name).reshape(tensor.shape)
            values, name, *_ = self._process(values, tensor.name, merged)
            if name is not None:
                return torch.from_numpy(np.array(values, order="C"))
        return next(merged[name] for name in names if name in merged)

    def _process(self, values: NDArray[Any], name: str, merged: dict[str, Tensor]) -> Any:
        parsed = {"tensors": merged}
        return self.processor.process(values, name, tensor_key_mapping=self.names, parsed_parameters=parsed)


class Weight:
    """One weight of the model, by all its names if it is tied, and the tensors of the file that it is made of."""

    def __init__(self, plan: Plan, names: Sequence[str], shape: torch.Size, tensors: Sequence[TensorInfo]) -> None:
        self.plan, self.names, self.shape, self.tensors = plan, names, shape, tensors
        self.order = plan.row_order(tensors[0]) if len(tensors) == 1 and tensors[0].shape == tuple(shape) else None
        if math.prod(shape) != sum(math.prod(tensor.shape) for tensor in tensors):
            sizes = ", ".join(f"{tensor.name!r} {tensor.shape}" for tensor in tensors)
            plan.fail(f"has {sizes}, which does not fit {names[0]} {tuple(shape)}")

    def fill(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        make_linear: MakeLinear | None,
        make_embedding: MakeEmbedding | None,
    ) -> None:
        """Give the weight to all modules that have it."""
        values: nn.Parameter | Tensor | None = None
        blocks = self.blocks()
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            if path in self.plan.replaced:  # a bias, which has been passed on
                continue
            made: nn.Module | None = None
            if blocks is not None and attribute == "weight":
                if make_linear is not None and type(module) is nn.Linear:
                    made = make_linear(blocks, self.plan.bias(module, path, dtype))
                elif make_embedding is not None and type(module) is nn.Embedding:
                    made = make_embedding(blocks)
            if made is not None:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, made)
                self.plan.replaced.add(path)
                continue
            old = getattr(module, attribute)
            if values is None:
                values = self.values(blocks, old.dtype)
                values = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
            setattr(module, attribute, values)

    def blocks(self) -> Blocks | None:
        """The weight as a matrix of the file; None if its values are not in the file as they are."""
        if self.order is None:
            return None
        tensor = self.tensors[0]
        data = tensor.data if self.order is _NO_CHANGE else tensor.data[self.order]
        data.flags.writeable = False
        return Blocks(tensor.type_name, data, *tensor.shape)

    def values(self, blocks: Blocks | None, dtype: torch.dtype) -> Tensor:
        """The weight as a tensor, of its blocks if they are given, else as transformers changes it."""
        if blocks is not None:
            return blocks.dequantise(dtype)
        values = self.plan.processed(self.names, self.tensors)
        if values.shape != self.shape:
            shape = tuple(values.shape)
            self.plan.fail(f"has {self.tensors[0].name!r} {shape}, which does not fit {self.names[0]} {self.shape}")
        return values.to(dtype)


def dequantised(data: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """Rows of blocks as (rows, elements) fp32. Raises ValueError for a type that can't be dequantised."""
    if type_name in _FLOATS:
        return data.view(_FLOATS[type_name]).astype(np.float32)
    try:
        with np.errstate(all="ignore"):  # a corrupt scale overflows; it must not be a warning of numpy's
            values: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
    except (NotImplementedError, KeyError) as error:
        raise ValueError(
            f"the gguf package can't dequantise ({type_name}): quantise the model to another type, e.g. Q4_K_M"
        ) from error
    return values


def _layers(file: GGUFFile) -> list[str]:
    """The first part of each layer's names."""
    return [f"blk.{layer}" for layer in range(file.metadata.get(f"{file.architecture}.block_count", 0))]
