"""Builds a transformers model and its tokenizer from an open GGUF file, tensor by tensor, without writing anything.

transformers says how the file's metadata become a configuration and a tokenizer; `gguf_plan` which tensors fill which
weight. The caller may build its own modules of the blocks of linear layers and embeddings. Everything is compared with
the configuration before memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
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
from haast.target.gguf_file import GGUFFile
from haast.target.gguf_plan import METADATA_ERRORS, REMEDY, ROPE_FACTORS, MakeEmbedding, MakeLinear, Plan, dequantised

__all__ = ["build", "read_config", "read_tokenizer"]

# Sizes from which modules are built, so that a corrupt one could take all memory; no tensor is smaller than its size.
_SIZES = (
    "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "vocab_size",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "expert_count", "expert_used_count",
)  # fmt: skip


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
    except METADATA_ERRORS as error:
        problem = f"has no configuration that transformers can read ({_line(error)})"
        raise ValueError(f"{file.path} {problem}: {REMEDY}") from error
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
    except METADATA_ERRORS as error:
        problem = f"has no tokenizer that transformers can build ({_line(error)})"
        raise ValueError(f"{file.path} {problem}: {REMEDY}") from error
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
    except METADATA_ERRORS as error:
        raise ValueError(f"{file.path} describes no model that can be built ({_line(error)}): {REMEDY}") from error
    plan = Plan(file, model)
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


def _check_sizes(file: GGUFFile) -> None:
    """Refuse sizes that are larger than any tensor's: modules are built from them."""
    if file.architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise ValueError(f"{file.path} has the unknown architecture {file.architecture!r}: {REMEDY}")
    largest = max((size for tensor in file.tensors.values() for size in tensor.shape), default=0)
    layers = file.metadata.get(f"{file.architecture}.block_count", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(file.tensors):
        raise ValueError(f"{file.path} has {len(file.tensors)} tensors for {layers} layers: {REMEDY}")
    for key in _SIZES:
        sizes = np.atleast_1d(file.metadata.get(f"{file.architecture}.{key}", 0))
        if sizes.dtype.kind not in "iu" or bool((sizes < 0).any() or (sizes > largest).any()):
            raise ValueError(
                f"{file.path} says {key} {sizes.tolist()}, but its largest tensor has a size of {largest}: {REMEDY}"
            )


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
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None or file.architecture != "llama":
        return
    factors = dequantised(tensor.data, tensor.type_name).reshape(-1)
    theta, original, low, high = config.rope_parameters["rope_theta"], 8192, 1.0, 4.0
    factor = float(factors.max())
    turns = original / (2 * math.pi * theta ** (np.arange(len(factors)) / len(factors)))  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{ROPE_FACTORS} has factors {factors[:3]} ... {factors[-1]} that are not Llama 3's")
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
