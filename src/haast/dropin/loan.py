"""The user's model, for the length of one call: locked, with an attention that takes trees, and given back as it was.

Owns the lock, what a probe found of the model, and its own attention implementation. Knows no decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedConfig, PreTrainedModel

from haast.target import Probed


class Loan:
    """One model's lock, and what its probe found. Holds no model, so that it does not keep one alive."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.probed: Probed | None = None


_LOANS: WeakKeyDictionary[PreTrainedModel, Loan] = WeakKeyDictionary()
_LOANS_LOCK = threading.Lock()


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[Loan]:
    """The model with an attention that takes trees, one call at a time; its own attention is back afterwards."""
    with _LOANS_LOCK:
        loan = _LOANS.setdefault(model, Loan())
    with loan.lock:
        before = _attention_of(model.config)
        try:
            yield loan
        finally:
            model.set_attn_implementation(before)


def _attention_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The attention of a config and its sub-configs, as `set_attn_implementation` takes it."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    below = {name: _attention_of(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **below}
