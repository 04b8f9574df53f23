"""Builds a transformers model and its tokenizer from an open GGUF file, tensor by tensor, without writing anything.

transformers says how the file's metadata become a configuration and a tokenizer, and what it changes in the values of a
tensor; the gguf package says which tensor is which weight. The blocks of a linear layer stay as they are if nothing but
the order of its rows changes (Llama's queries and keys); then the caller may build its own module of them. Everything
is compared with the configuration before memory is taken.
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
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from haast import compat
from haast.errors import UnsupportedModelError
from haast.target.gguf_file import GGUFFile, TensorInfo

__all__ = ["Blocks", "build", "read_config", "read_tokenizer"]

# Elements that are dequantised at a time. They stay in a core's cache, and from 32768 elements on torch would wake all
# its threads for each copy, which on a busy machine takes ten times as long.
_CHUNK = 32767
_FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_ROPE_FACTORS = "rope_freqs.weight"
_NO_CHANGE = slice(None)
# What transformers raises for metadata of wrong types, or that do not fit together.
_WRONG = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError, OSError,
    StrictDataclassError,
)  # fmt: skip
_REMEDY = "fetch the file again, or load the original weights from their folder or hub id"
# Sizes from which modules are built, so that a corrupt one could take all memory; no tensor is smaller than its size.
_SIZES = (
    "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "vocab_size",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "expert_count", "expert_used_count",
)  # fmt: skip

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
            chunk = _dequantised(self.data[row : row + step], self.type_name)
            values[row : row + step] = torch.from_numpy(chunk)
        return values


def read_config(file: GGUFFile) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ValueError: transformers does not know the architecture, or the metadata do not describe one of its models.
    """
    _check_sizes(file)
    # The vocabulary is most of the header, and only its size is in the configuration.
    metadata = {key: value for key, value in file.metadata.items() if not _is_list(value) or _is_setting(key, file)}
    metadata.setdefault(f"{file.architecture}.vocab_size", _vocabulary(file))
    config: PretrainedConfig
    try:
        with compat.quick_gguf_reader(file.path, metadata, file.tensors):
            config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        head_size = file.metadata.get("qwen3.attention.key_length")
        if head_size is not None:  # which transformers does not read; it takes the published models' 128
            config.head_dim = head_size
        _set_rope_factors(file, config)
    except _WRONG as error:
        problem = f"has no configuration that transformers can read ({_line(error)})"
        raise ValueError(f"{file.path} {problem}: {_REMEDY}") from error
    config.name_or_path = str(file.path)
    if config.architectures is None and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def read_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """The tokenizer that is in the file.

    Raises:
        ValueError: there is none, or none that transformers can build.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise ValueError(
            f"{file.path} has no tokenizer: load its model with haast.target.gguf_model.build, and pass it to "
            f"Haast.from_pretrained(model, tokenizer=...) with the tokenizer of the original weights"
        )
    try:
        with compat.quick_gguf_reader(file.path, file.metadata, file.tensors):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                file.path.parent, gguf_file=file.path.name
            )
    except _WRONG as error:
        problem = f"has no tokenizer that transformers can build ({_line(error)})"
        raise ValueError(f"{file.path} {problem}: {_REMEDY}") from error
    return tokenizer


@torch.no_grad()
def build(
    file: GGUFFile,
    *,
    dtype: torch.dtype = torch.float32,
    make_linear: MakeLinear | None = None,
    make_embedding: MakeEmbedding | None = None,
    progress: Callable[[int], None] | None = None,
) -> PreTrainedModel:
    """Build the model on the CPU.

    Args:
        file: an open GGUF file.
        dtype: of the weights that are dequantised, and of biases.
        make_linear: called for each `nn.Linear` whose weight is a matrix of the file, with the matrix and the bias
            (out_features) in `dtype`. The module that it returns takes the layer's place; for None the layer stays an
            `nn.Linear` with dequantised weights.
        make_embedding: the same for each `nn.Embedding`. If the LM head is tied to it, both functions get the same
            object.
        progress: called after each tensor with the number of its bytes in the file.

    Returns:
        The model in evaluation mode. Tied weights that stay tensors are one parameter.

    Raises:
        ValueError: the architecture is unknown, the tensors do not fit the configuration, or one is of a type that
            can't be dequantised. Raised before memory for weights is taken.
    """
    config = read_config(file)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{file.path} ({type(config).__name__}) is an encoder-decoder; Haast drafts for decoder-only causal LMs"
        )
    try:
        with _WithoutMemory():
            model = _from_config(config, dtype)
    except _WRONG as error:
        raise ValueError(f"{file.path} describes no model that can be built ({_line(error)}): {_REMEDY}") from error
    plan = _Plan(file, model)
    for weight in plan.weights:
        weight.fill(model, dtype, make_linear, make_embedding)
        for tensor in weight.tensors:
            tensor.release()
        if progress is not None:
            progress(sum(tensor.data.nbytes for tensor in weight.tensors))
    return model.eval()  # type: ignore[no-untyped-call,no-any-return]


def _from_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.config.dtype = dtype  # which older versions of transformers leave out
    return model


class _WithoutMemory(TorchFunctionMode):
    """Inside, `torch.empty` gives tensors on the meta device: weights take no memory, computed buffers are real.

    With `torch.device("meta")` the buffers would be lost (the frequencies of RoPE); this mode is of one thread only,
    accelerate's `init_empty_weights` is of all.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


class _Weight:
    """One weight of the model, by all its names if it is tied, and the tensors of the file that it is made of."""

    def __init__(self, plan: _Plan, names: Sequence[str], shape: torch.Size, tensors: Sequence[TensorInfo]) -> None:
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
        if blocks is not None:
            return blocks.dequantise(dtype)
        values = self.plan.processed(self.names, self.tensors)
        if values.shape != self.shape:
            shape = tuple(values.shape)
            self.plan.fail(f"has {self.tensors[0].name!r} {shape}, which does not fit {self.names[0]} {self.shape}")
        return values.to(dtype)


class _Plan:
    """Which tensors of the file each weight of a model is made of. Raises ValueError if any is missing or left over."""

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
        self.replaced = set[str]()  # paths of modules that the caller has built
        self.weights: list[_Weight] = []
        self.linear_biases: dict[str, _Weight] = {}
        for names in groups.values():
            tensors = next((self.tensors_of[name] for name in names if name in self.tensors_of), None)
            if tensors is None:
                self.fail(f"has no tensor for {names[0]} {tuple(state[names[0]].shape)}")
            weight = _Weight(self, names, state[names[0]].shape, tensors)
            self.weights.append(weight)
            if names[0].endswith(".bias"):
                self.linear_biases[names[0]] = weight
        self._check_left_over({name for names in groups.values() for name in names})

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.file.path} {problem}: {_REMEDY}")

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
                _dequantised(tensor.data[:1], tensor.type_name)
            except ValueError as error:
                raise ValueError(f"{self.file.path} has the tensor {tensor.name!r} of a type that {error}") from error

    def _check_left_over(self, used: set[str]) -> None:
        """A tensor of a layer that no weight takes is a part of the model that would be missing."""
        layers = [f"{layer}." for layer in _layers(self.file)]
        left = [name for name, place in self._places().items() if place not in used and name != _ROPE_FACTORS]
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
        except _WRONG:
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
            values = _dequantised(tensor.data, tensor.type_name).reshape(tensor.shape)
            values, name, *_ = self._process(values, tensor.name, merged)
            if name is not None:
                return torch.from_numpy(np.array(values, order="C"))
        return next(merged[name] for name in names if name in merged)

    def _process(self, values: NDArray[Any], name: str, merged: dict[str, Tensor]) -> Any:
        parsed = {"tensors": merged}
        return self.processor.process(values, name, tensor_key_mapping=self.names, parsed_parameters=parsed)


def _dequantised(data: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
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


def _check_sizes(file: GGUFFile) -> None:
    """Refuse sizes that are larger than any tensor's: modules are built from them."""
    if file.architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise ValueError(f"{file.path} has the unknown architecture {file.architecture!r}: {_REMEDY}")
    largest = max((size for tensor in file.tensors.values() for size in tensor.shape), default=0)
    layers = file.metadata.get(f"{file.architecture}.block_count", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(file.tensors):
        raise ValueError(f"{file.path} has {len(file.tensors)} tensors for {layers} layers: {_REMEDY}")
    for key in _SIZES:
        sizes = np.atleast_1d(file.metadata.get(f"{file.architecture}.{key}", 0))
        if sizes.dtype.kind not in "iu" or bool((sizes < 0).any() or (sizes > largest).any()):
            raise ValueError(
                f"{file.path} says {key} {sizes.tolist()}, but its largest tensor has a size of {largest}: {_REMEDY}"
            )


def _layers(file: GGUFFile) -> list[str]:
    """The first part of each layer's names."""
    return [f"blk.{layer}" for layer in range(file.metadata.get(f"{file.architecture}.block_count", 0))]


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | np.ndarray)


def _is_setting(key: str, file: GGUFFile) -> bool:
    return key.startswith(f"{file.architecture}.")


def _vocabulary(file: GGUFFile) -> int:
    """The number of tokens: of the tokenizer, or rows of the embedding."""
    tokens, embedding = file.metadata.get("tokenizer.ggml.tokens"), file.tensors.get("token_embd.weight")
    if isinstance(tokens, tuple):
        return len(tokens)
    return 0 if embedding is None else embedding.shape[0]


def _set_rope_factors(file: GGUFFile, config: PretrainedConfig) -> None:
    """Llama 3's scaling of RoPE: the file has the factor of each frequency, transformers ignores them.

    Meta's settings have one free number, the largest factor. Factors of any other settings are refused.
    """
    tensor = file.tensors.get(_ROPE_FACTORS)
    if tensor is None or file.architecture != "llama":
        return
    factors = _dequantised(tensor.data, tensor.type_name).reshape(-1)
    theta, original, low, high = config.rope_parameters["rope_theta"], 8192, 1.0, 4.0
    factor = float(factors.max())
    turns = original / (2 * math.pi * theta ** (np.arange(len(factors)) / len(factors)))  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{_ROPE_FACTORS} has factors {factors[:3]} ... {factors[-1]} that are not Llama 3's")
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _line(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
