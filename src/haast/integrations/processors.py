"""Logits processors made for a batch, for one row at a time: rows differ in length here, and stock processors want one.

Those that hold something per row are cut to it, those that keep state are copied, the others are shared.
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
    """The processors of each row, in their order; each is called with (1, length) and (1, vocab).

    Raises UnsupportedArgumentError for one that runs the model, or that keeps state and cannot be copied.
    """
    for each in processors:
        if isinstance(each, stock.UnbatchedClassifierFreeGuidanceLogitsProcessor):
            why = "classifier-free guidance runs the model on a second text; use stock generate"
            raise UnsupportedArgumentError("guidance_scale", why)
    # What one processor shares with another, its copy shares with the other's: `copies` is of a row.
    return [
        LogitsProcessorList(_for_row(each, row, rows, copies) for each in processors)
        for row, copies in enumerate([dict[int, Any]() for _ in range(rows)])
    ]


def refuse_linked(processors: Sequence[Any], criteria: Sequence[Any], own: LogitsProcessorList) -> None:
    """Refuse stopping criteria, which all rows share, that look at a processor of which each row has a copy.

    `own` is what `for_rows` made of the processors for one row. Raises UnsupportedArgumentError.
    """
    copied = {id(each): each for each, one in zip(processors, own, strict=True) if one is not each}
    for criterion in criteria:
        for held in (criterion, *getattr(criterion, "__dict__", {}).values()):
            if id(held) in copied:
                pair = f"stopping_criteria {type(criterion).__name__} with logits_processor {type(held).__name__}"
                raise UnsupportedArgumentError(
                    f"{pair} in a batch",
                    "each row has a copy of the processor, and the criterion looks at the one that is never called; "
                    "generate row by row",
                )


def _for_row(processor: Any, row: int, rows: int, copies: dict[int, Any]) -> Any:
    if isinstance(processor, stock.PrefixConstrainedLogitsProcessor):
        return _Prefix(processor, row)
    if rows == 1:
        return processor
    if isinstance(processor, stock.RepetitionPenaltyLogitsProcessor):
        ignored: Any = processor.prompt_ignore_length
        if not isinstance(ignored, Tensor):
            return processor
        if len(ignored) != rows:
            raise ValueError(f"prompt_ignore_length has {len(ignored)} entries for {rows} rows: give one a row")
        return _with(processor, prompt_ignore_length=ignored[row : row + 1])
    if isinstance(processor, stock.EncoderRepetitionPenaltyLogitsProcessor):
        prompts = processor.encoder_input_ids
        at = row // max(rows // prompts.shape[0], 1)  # `num_return_sequences` rows share a prompt
        return _with(processor, encoder_input_ids=prompts[at : at + 1])
    if isinstance(processor, stock.EncoderNoRepeatNGramLogitsProcessor):
        at = row // max(rows // processor.batch_size, 1)
        return _with(processor, batch_size=1, generated_ngrams=[processor.generated_ngrams[at]])
    stateless = type(processor).__module__ == stock.__name__
    if stateless and not isinstance(processor, stock.SynthIDTextWatermarkLogitsProcessor):
        return processor
    return _copied(processor, copies)


class _Prefix(stock.PrefixConstrainedLogitsProcessor):
    """Asks the user's function with the true number of the row, also where the row stands alone."""

    def __init__(self, whole: stock.PrefixConstrainedLogitsProcessor, row: int) -> None:
        ask = compat.allowed_tokens_function(whole)
        super().__init__(lambda _, text: ask(row, text), 1)


def _with(processor: Any, **changed: Any) -> Any:
    made = copy.copy(processor)
    vars(made).update(changed)
    return made


def _copied(processor: Any, copies: dict[int, Any]) -> Any:
    """A copy with state of its own; tokenizers and models, which are large and only read, stay shared."""
    if isinstance(processor, FunctionType):
        if _rebinds(processor):
            raise UnsupportedArgumentError(
                f"logits_processor {processor.__name__} in a batch",
                "it is a function that keeps state in variables around it, which the rows would share; make it an "
                "object with a __call__, of which each row gets a copy, or generate row by row",
            )
        return processor
    held = getattr(processor, "__dict__", {}).values()
    copies.update({id(part): part for part in held if isinstance(part, PreTrainedTokenizerBase | nn.Module)})
    try:
        return copy.deepcopy(processor, copies)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedArgumentError(
            f"logits_processor {type(processor).__name__} in a batch",
            f"each row needs a copy with state of its own, and it cannot be copied ({error}); generate row by row",
        ) from error


def _rebinds(function: FunctionType) -> bool:
    """Whether a function assigns to variables that are not its own (`nonlocal`, `global`): its next call sees them."""
    code = function.__code__
    return any(
        each.opname == "STORE_GLOBAL" or (each.opname == "STORE_DEREF" and each.argval in code.co_freevars)
        for each in dis.get_instructions(code)
    )
