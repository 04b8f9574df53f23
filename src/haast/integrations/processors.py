"""Splits a batch's logits processors into processors for single rows.

Rows differ in length here, but stock processors need rows of one length. Processors with per-row data are cut to their
row, processors with state are copied, the others are shared.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import logits_process as stock

from haast import compat
from haast.errors import UnsupportedArgumentError


def for_rows(processors: Sequence[Any], rows: int) -> list[LogitsProcessorList]:
    """The processors of each row, in the given order; each is called with (1, length) ids and (1, vocab) scores.

    Raises UnsupportedArgumentError for a processor that runs the model, or that has state and cannot be copied.
    """
    for each in processors:
        if isinstance(each, stock.UnbatchedClassifierFreeGuidanceLogitsProcessor):
            reason = "classifier-free guidance runs the model on a second text; use stock generate"
            raise UnsupportedArgumentError("guidance_scale", reason)
    # Objects shared by two processors stay shared by their copies: `copies` is the deepcopy memo of a row.
    return [
        LogitsProcessorList(_for_row(each, row, rows, copies) for each in processors)
        for row, copies in enumerate([dict[int, Any]() for _ in range(rows)])
    ]


def refuse_linked(processors: Sequence[Any], criteria: Sequence[Any], row_processors: LogitsProcessorList) -> None:
    """Refuse stopping criteria that use a logits processor: criteria are shared by all rows, processors are copied.

    `row_processors` are the processors of one row from `for_rows`. Raises UnsupportedArgumentError.
    """
    copied = {id(each): each for each, one in zip(processors, row_processors, strict=True) if one is not each}
    for criterion in criteria:
        for attribute in (criterion, *getattr(criterion, "__dict__", {}).values()):
            if id(attribute) in copied:
                pair = f"stopping_criteria {type(criterion).__name__} with logits_processor {type(attribute).__name__}"
                raise UnsupportedArgumentError(
                    f"{pair} in a batch",
                    "each row has a copy of the processor, but the criterion uses the original, which is never called; "
                    "generate row by row",
                )


def _for_row(processor: Any, row: int, rows: int, copies: dict[int, Any]) -> Any:
    if isinstance(processor, stock.PrefixConstrainedLogitsProcessor):
        return _RowPrefix(processor, row)
    if rows == 1:
        return processor
    if isinstance(processor, stock.RepetitionPenaltyLogitsProcessor):
        ignored: Any = processor.prompt_ignore_length
        if not isinstance(ignored, Tensor):
            return processor
        if len(ignored) != rows:
            raise ValueError(f"prompt_ignore_length has {len(ignored)} entries for {rows} rows: give one per row")
        return _copy_with(processor, prompt_ignore_length=ignored[row : row + 1])
    if isinstance(processor, stock.EncoderRepetitionPenaltyLogitsProcessor):
        prompts = processor.encoder_input_ids
        prompt = row // max(rows // prompts.shape[0], 1)  # `num_return_sequences` rows share a prompt
        return _copy_with(processor, encoder_input_ids=prompts[prompt : prompt + 1])
    if isinstance(processor, stock.EncoderNoRepeatNGramLogitsProcessor):
        prompt = row // max(rows // processor.batch_size, 1)
        return _copy_with(processor, batch_size=1, generated_ngrams=[processor.generated_ngrams[prompt]])
    stateless = type(processor).__module__ == stock.__name__
    if stateless and not isinstance(processor, stock.SynthIDTextWatermarkLogitsProcessor):
        return processor
    return _copy_stateful(processor, copies)


class _RowPrefix(stock.PrefixConstrainedLogitsProcessor):
    """Calls the user's function with the row's index in the batch, although the row is processed alone."""

    def __init__(self, processor: stock.PrefixConstrainedLogitsProcessor, row: int) -> None:
        allowed_tokens = compat.allowed_tokens_function(processor)
        super().__init__(lambda _, text: allowed_tokens(row, text), 1)


def _copy_with(processor: Any, **changed: Any) -> Any:
    changed_copy = copy.copy(processor)
    vars(changed_copy).update(changed)
    return changed_copy


def _copy_stateful(processor: Any, copies: dict[int, Any]) -> Any:
    """A copy with its own state; tokenizers and models stay shared, since they are large and read-only."""
    if isinstance(processor, FunctionType):
        if _assigns_outer_variables(processor):
            raise UnsupportedArgumentError(
                f"logits_processor {processor.__name__} in a batch",
                "it is a function that assigns to variables outside of it, which the rows would share; make it an "
                "object with a __call__, so that each row gets a copy, or generate row by row",
            )
        return processor
    attributes = getattr(processor, "__dict__", {}).values()
    copies.update({id(each): each for each in attributes if isinstance(each, PreTrainedTokenizerBase | nn.Module)})
    try:
        return copy.deepcopy(processor, copies)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedArgumentError(
            f"logits_processor {type(processor).__name__} in a batch",
            f"each row needs a copy with its own state, but it cannot be copied ({error}); generate row by row",
        ) from error


def _assigns_outer_variables(function: FunctionType) -> bool:
    """Whether a function assigns to `nonlocal` or `global` variables, so that it keeps state between calls."""
    code = function.__code__
    return any(
        each.opname == "STORE_GLOBAL" or (each.opname == "STORE_DEREF" and each.argval in code.co_freevars)
        for each in dis.get_instructions(code)
    )
