"""Decoder layers of a target's own transformers class, for heads that are made of them (MTP).

Builds a small model of that class, with only the head's layers and next to no vocabulary, and loads layers from the
names of a checkpoint: transformers itself merges experts and renames. Nothing is patched. Knows no drafting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from haast import compat
from haast.target import attention

_PARTS = ("layers", "norm", "rotary_emb")  # of the decoder: what a head takes
# Entries that say something about another model than the small one.
_FOREIGN = (
    *("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "model_type"),
    *("quantization_config", "id2label", "label2id", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("num_nextn_predict_layers", "num_mtp_layers", "per_layer_config"),
)
_EXPERTS = "experts_implementation"  # transformers' name of the argument
_VOCAB = 8  # rows of the embedding that is thrown away


def layer_document(config: PretrainedConfig, layers: int, dense: bool) -> dict[str, Any]:
    """The configuration of `layers` full-attention layers of a target's class, as JSON values.

    Args:
        config: the target's (text) configuration.
        layers: their number.
        dense: whether they have one MLP where the class also has layers with experts.

    Raises:
        ValueError: transformers has no causal LM for this configuration, or for a class that it derives from; or the
            configuration wants other attention in a head's layers.
    """
    known: Any = next((each for each in type(config).__mro__ if each in MODEL_FOR_CAUSAL_LM_MAPPING), None)
    if known is None:
        raise ValueError(f"transformers has no causal LM for {type(config).__name__}, whose layers the head needs")
    document: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    foreign = {key for key, value in document.items() if key in _FOREIGN or key.startswith("_") or value is None}
    document = {key: value for key, value in document.items() if key not in foreign}
    if any(kind != "full_attention" for kind in document.get("mtp_layer_types", ())):
        raise ValueError(f"its layers are of kind {document['mtp_layer_types']}, and Haast runs full attention there")
    kinds = {  # how transformers' classes choose the kind of a layer by its number
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "mlp_layer_types": ["dense" if dense else "sparse"] * layers,
        "first_k_dense_replace": layers if dense else 0,
        "mlp_only_layers": list(range(layers)) if dense else [],
        "decoder_sparse_step": 1,
        "vocab_size": _VOCAB,
        "tie_word_embeddings": False,
    }
    changed = {key: value for key, value in kinds.items() if key in document}
    experts = compat.experts_name(config)
    chosen = {} if experts is None else {_EXPERTS: experts}
    return {"model_type": known.model_type, **document, **changed, **chosen}


def stock_decoder(document: Mapping[str, Any]) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
    """Random layers, the norm after them and the rotary embedding. Raises ValueError for sizes that are impossible."""
    kind, config, options = _class_of(document)
    with _quiet():
        model: Any = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    parts = dict(model.get_decoder().named_children())
    missing = [name for name in _PARTS if name not in parts]
    if missing:
        raise ValueError(f"the decoder of {kind.__name__} has no {', '.join(missing)}, which the head needs")
    layers, norm, rotary = (parts[name] for name in _PARTS)
    assert isinstance(layers, nn.ModuleList), "transformers keeps layers in one"
    return layers, norm, rotary


def load_layers(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state of `stock_decoder`'s layers from tensors of a checkpoint, named `NUMBER.name`.

    Returns:
        The state, and problems in words: tensors that are missing, unknown, or of another shape.
    """
    kind, config, options = _class_of(document)
    prefix = f"{kind.base_model_prefix}.layers."
    wide = any(tensor.dtype is torch.float64 for tensor in tensors.values())
    options |= {"config": config, "state_dict": {prefix + name: tensor for name, tensor in tensors.items()}}
    options |= {"dtype": torch.float64 if wide else torch.float32}
    with _quiet():
        loaded: Any = kind.from_pretrained(None, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    model, found = loaded
    problems, kinds = [], {"missing": "missing", "unexpected": "unknown", "mismatched": "of another shape"}
    for key, words in kinds.items():
        names = sorted(name if isinstance(name, str) else name[0] for name in found[f"{key}_keys"])
        names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{words}: {', '.join(names[:4])}{more}")
    state: dict[str, Tensor] = model.get_decoder().layers.state_dict()
    return state, problems


def checkpoint_layers(document: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `NUMBER.name` of a checkpoint, as transformers saves layers with this state: `load_layers` undone."""
    kind, config, options = _class_of(document)
    prefix = f"{kind.base_model_prefix}.layers."
    with _quiet(), TemporaryDirectory() as folder:
        model: Any = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
        model.get_decoder().layers.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        model.save_pretrained(folder)
        saved: dict[str, Tensor] = {}
        for path in Path(folder).glob("*.safetensors"):
            saved |= load_file(path)
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}


def _class_of(document: Mapping[str, Any]) -> tuple[type[PreTrainedModel], PretrainedConfig, dict[str, Any]]:
    """The causal LM's class, its configuration, and options of how it computes."""
    name = str(document.get("model_type"))
    if name not in CONFIG_MAPPING:
        raise ValueError(f"model_type={name!r} is unknown to this version of transformers")
    options = {"attn_implementation": attention.NAME}
    options |= {key: value for key, value in document.items() if key == _EXPERTS}
    sizes = {key: value for key, value in document.items() if key not in ("model_type", _EXPERTS)}
    config: PretrainedConfig = CONFIG_MAPPING[name](**sizes)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind, config, options


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers reports neither progress nor the embedding that the small model has to make up."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
