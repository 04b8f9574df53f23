"""What is given as a prompt: one or several; as text, chat messages or token ids. Knows neither tokenizers nor models.

one                                           several
"Why?"                                        ["Why?", "How?"]
[{"role": "user", "content": "Why?"}]         [[{...}], [{...}]]
[1, 2, 3], a tensor or array (n,)             [[1, 2], [3]], (rows, n): no padding, every id counts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from haast.errors import PromptError

Message = dict[str, str]  # a chat message: "role" and "content"
Ids = Tensor | npt.NDArray[Any]
Prompt = str | Sequence[int] | Sequence[Message] | Ids
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Sequence[Message]] | Sequence[Ids]
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_FORMS = "give text, a list, tensor or array of token ids, a list of chat messages, or a list of several of these"


def split(given: Any) -> tuple[list[str | list[int] | list[Message]], bool]:
    """The prompts that are given, and whether it is one by itself and no list.

    Raises PromptError: what is no prompt, or a mixture of what belongs to one and what belongs to several.
    """
    plain = _plain(given)
    one = _one(plain)
    if one is not None:
        return [one], True
    several = []
    for number, item in enumerate(plain):
        found = _one(_plain(item)) if isinstance(item, str | Sequence | Tensor | np.ndarray) else None
        if found is None:
            raise PromptError(
                f"the prompt is a list that holds a {type(item).__name__} (number {number}): {_FORMS}, not a mixture"
            )
        several.append(found)
    return several, False


def _plain(given: Any) -> str | list[Any]:
    """Text, or a list whose items may be anything."""
    if isinstance(given, Tensor | np.ndarray):
        kind = given.dtype
        whole = kind.kind in "iu" if isinstance(kind, np.dtype) else kind in _WHOLE
        if not whole or given.ndim not in (1, 2):
            raise PromptError(
                f"the prompt is a {type(given).__name__} of {kind}, shape {tuple(given.shape)}: give token ids as "
                f"whole numbers, (tokens,) or (prompts, tokens)"
            )
        return list(given.tolist())
    if isinstance(given, Mapping):
        raise PromptError(
            f"the prompt is a {type(given).__name__}: give its input_ids, or a list of messages, [message]"
        )
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise PromptError(f"the prompt is a {type(given).__name__}: {_FORMS}")
    return list(given)


def _one(plain: str | list[Any]) -> str | list[int] | list[Message] | None:
    """The prompt, where it is one; an empty list is one without tokens."""
    if isinstance(plain, str):
        return plain
    if all(_is_id(item) for item in plain):
        return [int(item) for item in plain]
    return plain if all(isinstance(item, Mapping) for item in plain) else None


def _is_id(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim == 0 and item.dtype in _WHOLE
    return isinstance(item, Integral) and not isinstance(item, bool)
