"""Checks types and ranges of the config.json keys that Haast reads, before anything uses them.

A null value counts as absent.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

from haast.formats.base import HeadFiles

# What transformers and torch raise for impossible sizes: strings, zero, negative numbers, missing or unknown names.
SIZE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)

_MAX_INT = 2**31 - 1
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
    "target_layers",  # in a GGUF file
)


def check_keys(files: HeadFiles, document: dict[str, Any], place: str = "") -> None:
    """Raise HeadMismatchError if a key of the document has a value of the wrong type or range."""
    for key, value in document.items():
        expected = None if value is None else _expected(key, value)
        if expected is not None:
            shown = repr(value)
            shown = shown if len(shown) < 60 else f"{shown[:60]}..."
            raise files.error(f"{place}{key}={shown} in its configuration is not {expected}", "correct it")
        if key in _OBJECTS[:2] and value:
            check_keys(files, value, f"{key}.")


def _expected(key: str, value: Any) -> str | None:
    """A description of the values that the key takes, or None if this value is one of them."""
    if key in _OBJECTS:
        return None if isinstance(value, dict) else "an object"
    if key in _COUNTS:
        return None if _is_int(value) and value >= 1 else "an integer of 1 or more"
    if key in _IDS:
        return None if _is_int(value) else "a token id"
    if key in _NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and 0 < value < 1e30 else "a number above 0"
    if key in _SWITCHES:
        return None if isinstance(value, int) and value in (0, 1) else "true or false"
    if key in _LAYERS:
        return None if isinstance(value, list) and all(_is_int(each, -1) for each in value) else "a list of layers"
    if key == "architectures":
        return None if isinstance(value, list) and all(isinstance(each, str) for each in value) else "a list of names"
    if key == "hidden_act":
        return None if isinstance(value, str) and value in ACT2FN else "an activation that transformers knows"
    return None


def _is_int(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _MAX_INT
