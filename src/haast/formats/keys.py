"""The keys of a config.json that Haast reads, and what each may be: told by name before anything is made of them.

Null is silence, everywhere.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

from haast.formats.base import HeadFiles

# What transformers and torch raise at sizes that make no layer: a word, zero, a negative, a missing or unknown name.
NO_SIZES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)

_MOST = 2**31 - 1
_OBJECTS = ("eagle_config", "transformer_layer_config", "rope_parameters", "rope_scaling")
_COUNTS = (
    *("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "hidden_size"),
    *("intermediate_size", "max_position_embeddings", "target_hidden_size", "vocab_size", "draft_vocab_size"),
)
_IDS = ("mask_token_id", "ptd_token_id", "pard_token")
_NUMBERS = ("rms_norm_eps", "rope_theta", "logit_scale")
_SWITCHES = ("norm_before_residual", "norm_output", "use_aux_hidden_state", "use_input_layernorm_in_first_layer")
_LAYERS = (
    *("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids", "layer_ids"),
    "target_layers",  # of a GGUF file
)


def check_keys(files: HeadFiles, document: dict[str, Any], place: str = "") -> None:
    """Refuse a document with a key of another type or range than it has. Raises HeadMismatchError."""
    for key, value in document.items():
        wanted = None if value is None else _wanted(key, value)
        if wanted is not None:
            shown = repr(value)
            shown = shown if len(shown) < 60 else f"{shown[:60]}..."
            raise files.wrong(f"{place}{key}={shown} in its configuration is no {wanted}", "correct it")
        if key in _OBJECTS[:2] and value:
            check_keys(files, value, f"{key}.")


def _wanted(key: str, value: Any) -> str | None:
    """What a key has to be, where it isn't."""
    if key in _OBJECTS:
        return None if isinstance(value, dict) else "object"
    if key in _COUNTS:
        return None if _whole(value) and value >= 1 else "whole number from 1"
    if key in _IDS:
        return None if _whole(value) else "token id"
    if key in _NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and 0 < value < 1e30 else "number above 0"
    if key in _SWITCHES:
        return None if isinstance(value, int) and value in (0, 1) else "true or false"
    if key in _LAYERS:
        return None if isinstance(value, list) and all(_whole(each, -1) for each in value) else "list of layers"
    if key == "architectures":
        return None if isinstance(value, list) and all(isinstance(each, str) for each in value) else "list of names"
    if key == "hidden_act":
        return None if isinstance(value, str) and value in ACT2FN else "activation that transformers knows"
    return None


def _whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _MOST
