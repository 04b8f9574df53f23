"""Checks of prompts, masks and stop strings: as the user gave them to `generate`, and as it has prepared them.

The first come before transformers has touched the input: it would itself stumble over it without a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from haast.errors import PromptError, UnsupportedArgumentError
from haast.target.kv_cache import CACHE_NAMES
from haast.target.support import prepared_inputs
from haast.text import stop_strings


def validate_inputs(given: Mapping[str, Any]) -> None:
    """Refuse prompts, masks and stop strings, given to `generate` by name, that are none. Raises ValueError,
    PromptError.
    """
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    mask = given.get("attention_mask")
    if ids is not None:
        source = "as a tokenizer makes with return_tensors='pt'; what it returns is passed on as generate(**inputs)"
        _check_form("input_ids", ids, source, "at least one of each")
        if ids.dtype not in (torch.int64, torch.int32):
            raise PromptError(f"input_ids is of {ids.dtype}: give token ids as torch.int64")
    if mask is not None:
        entries = "one entry a token; Haast makes the masks of its trees by itself"
        _check_form("attention_mask", mask, "as the tokenizer's", entries)
        # After a cache the mask is longer, and the cache is refused by its name.
        if ids is not None and not any(given.get(name) is not None for name in CACHE_NAMES):
            _check_fit("attention_mask", mask, ids, shared=True)
        odd = mask[(mask != 0) & (mask != 1)]
        if odd.numel():
            raise PromptError(
                f"attention_mask holds {odd[0].item()}: give 1 for a token and 0 for padding; biases of attention "
                f"scores are no mask"
            )
    if given.get("stop_strings") is not None and not stop_strings(given["stop_strings"], "stop_strings"):
        raise ValueError("stop_strings is an empty list: leave it out, or give at least one string")


def padding(input_ids: Tensor, given: Mapping[str, Any]) -> list[int]:
    """How many padding tokens stand before each row of `input_ids` (rows, width), by the masks that `generate`
    prepared.

    Raises PromptError for no tokens, a mask or positions of another shape, padding elsewhere than on the left, or an
    empty row; UnsupportedArgumentError for positions that do not count each row's tokens from 0.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise PromptError(f"input_ids has shape {tuple(input_ids.shape)}: give (rows, tokens), at least one of each")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        _check_fit("attention_mask", mask, input_ids)
        kept = mask.to(input_ids.device) != 0
    begins = [_row_begins(row, seen) for row, seen in enumerate(kept.tolist())]
    if positions is not None:
        _check_fit("position_ids", positions, input_ids, shared=True)
        usual = kept.long().cumsum(-1) - 1
        if not bool(((positions.to(input_ids.device) == usual) | ~kept).all()):
            raise UnsupportedArgumentError("position_ids", "Haast counts each row's tokens from 0; leave it out")
    return begins


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids that are no tokens, those of the padding too: processors look at them. Raises PromptError."""
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise PromptError(
            f"row {row} holds the token id {int(input_ids[row, place])}, which is outside 0..{vocab_size - 1}: is the "
            f"tokenizer another model's?"
        )


def check_own_inputs(model: PreTrainedModel, input_ids: Tensor, given: Mapping[str, Any]) -> None:
    """Refuse a model whose own `prepare_inputs_for_generation` gives its forward something else than the text's tokens.

    Adapters of virtual tokens have one, and may have come after the model was probed. Raises UnsupportedModelError.
    """
    own: Any = model.prepare_inputs_for_generation
    if getattr(own, "__func__", None) is not GenerationMixin.prepare_inputs_for_generation:
        prepared_inputs(model, input_ids, **given)


def _check_form(name: str, tensor: Any, source: str, entries: str) -> None:
    if not isinstance(tensor, Tensor):
        raise PromptError(f"{name} is a {type(tensor).__name__}: give a tensor (rows, tokens), {source}")
    if tensor.ndim != 2:
        raise PromptError(f"{name} has shape {tuple(tensor.shape)}: give (rows, tokens), {entries}")
    if tensor.device.type == "meta":
        raise PromptError(f"{name} is on the meta device, where tensors hold nothing: move it to the model's")


def _check_fit(name: str, tensor: Tensor, ids: Tensor, shared: bool = False) -> None:
    """Refuse what is not of the ids' shape; `shared`: one row may stand for all."""
    if tensor.shape[1:] != ids.shape[1:] or len(tensor) not in (len(ids), *([1] if shared else [])):
        raise PromptError(
            f"{name} does not fit the prompt: {tuple(tensor.shape)} beside input_ids of {tuple(ids.shape)}: give one "
            f"entry a token"
        )


def _row_begins(row: int, kept: Sequence[bool]) -> int:
    if not any(kept):
        raise PromptError(f"row {row} of the batch is empty: its attention_mask is 0 everywhere; leave the row out")
    first = kept.index(True)
    if not all(kept[first:]):
        raise PromptError(
            f"row {row}: attention_mask is 0 after the row's first token; pad on the left "
            f"(tokenizer.padding_side='left') and mask nothing else; where none is given, transformers masks every "
            f"token that equals pad_token_id"
        )
    return first
