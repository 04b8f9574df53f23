"""Positions of models that count them from the length of the cache, as BART and its kind do.

Their forward takes no `position_ids`: an embedding of positions is told where the new tokens begin. The nodes of a tree
are at their depths instead, and rows differ in length. So hooks, which are removed after the forward, make the
embedding return the entries of all positions, and select those of the nodes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ARGUMENTS = {"past_key_values_length", "position_ids"}  # by which such an embedding is known


def counting_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The embeddings of a model that count positions from the cache's length; none if its forward takes positions."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        return []
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return [each for each in embeddings if inspect.signature(each.forward).parameters.keys() >= _ARGUMENTS]


@contextmanager
def placed(embeddings: Sequence[nn.Embedding], positions: Tensor, count: int) -> Iterator[None]:
    """Inside the block, `embeddings` return the entries at `positions` (rows, nodes), which are below `count`."""
    this_thread = threading.get_ident()

    def ask_for_all(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != this_thread:  # the user may run the same modules in another thread
            return args, kwargs
        return args, {**kwargs, "position_ids": torch.arange(count, device=positions.device)}

    def select(_module: nn.Module, _inputs: Any, entries: Tensor) -> Tensor:
        if threading.get_ident() != this_thread:
            return entries
        return entries.reshape(count, -1)[positions.to(entries.device)]  # (rows, nodes, hidden)

    hooks = [each.register_forward_pre_hook(ask_for_all, with_kwargs=True) for each in embeddings]
    hooks += [each.register_forward_hook(select) for each in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
