"""Checks of what the user gave `generate`, before transformers has touched it.

Owns the checks that have to come first, since transformers itself would stumble over such input without saying why.
What passes them is checked further in `arguments`, once `generate` has prepared it. Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from haast.errors import PromptError
from haast.target.kv_cache import CACHE_NAMES

_TOKENS = (torch.int64, torch.int32)


def validate_inputs(given: Mapping[str, Any]) -> None:
    """Refuse prompts, masks and stop strings that are none.

    Args:
        given: arguments of `generate` by name, as far as they were given.

    Raises:
        PromptError: ids or a mask of another kind, shape or place. ValueError: stop strings that are none.
    """
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    if ids is not None:
        _check_ids(ids)
    if given.get("attention_mask") is not None:
        # After a cache the mask is longer, and the cache is refused by its name.
        continued = any(given.get(name) is not None for name in CACHE_NAMES)
        _check_mask(given["attention_mask"], None if continued else ids)
    if given.get("stop_strings") is not None:
        check_stop_strings(given["stop_strings"])


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise PromptError(
            f"input_ids is a {type(ids).__name__}: give a tensor (rows, tokens), as a tokenizer makes with "
            f"return_tensors='pt'; what it returns is passed on as generate(**inputs)"
        )
    if ids.ndim != 2:
        raise PromptError(f"input_ids has shape {tuple(ids.shape)}: give (rows, tokens), at least one of each")
    if ids.dtype not in _TOKENS:
        raise PromptError(f"input_ids is of {ids.dtype}: give token ids as torch.int64")
    _check_place("input_ids", ids)


def _check_mask(mask: Any, ids: Any) -> None:
    if not isinstance(mask, Tensor):
        raise PromptError(
            f"attention_mask is a {type(mask).__name__}: give a tensor (rows, tokens), as the tokenizer's"
        )
    if mask.ndim != 2:
        raise PromptError(
            f"attention_mask has shape {tuple(mask.shape)}: give (rows, tokens), one entry a token; Haast makes the "
            f"masks of its trees by itself"
        )
    _check_place("attention_mask", mask)
    if isinstance(ids, Tensor) and (mask.shape[1] != ids.shape[1] or mask.shape[0] not in (1, ids.shape[0])):
        raise PromptError(
            f"attention_mask does not fit the prompt: {tuple(mask.shape)} beside input_ids of {tuple(ids.shape)}: give "
            f"one entry a token"
        )
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise PromptError(
            f"attention_mask holds {odd[0].item()}: give 1 for a token and 0 for padding; biases of attention scores "
            f"are no mask"
        )


def _check_place(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise PromptError(f"{name} is on the meta device, where tensors hold nothing: move it to the model's")


def check_stop_strings(stops: Any) -> None:
    """Refuse what is no stop string.

    Raises:
        ValueError: neither text nor a list of texts, or an empty one.
    """
    several: Sequence[Any] = [stops] if isinstance(stops, str) else stops
    if not isinstance(several, Sequence) or isinstance(several, bytes):
        raise ValueError(f"stop_strings={stops!r} is not allowed: give a string, or a list of strings")
    if not several:
        raise ValueError("stop_strings is an empty list: leave it out, or give at least one string")
    for stop in several:
        if not isinstance(stop, str) or not stop:
            raise ValueError(
                f"stop_strings holds {stop!r}: give strings of one character or more (an empty one would end every "
                f"text at once)"
            )
