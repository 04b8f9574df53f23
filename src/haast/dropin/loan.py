"""The user's model, for the length of one call: locked, with an attention that takes trees, and given back as it was.

Owns the lock, what a probe found of the model, and its own attention implementation. Knows no decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from transformers import PreTrainedConfig, PreTrainedModel

from haast import seams
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
        before = [(config, seams.attention_name(config)) for config in _configs(model)]
        try:
            yield loan
        finally:
            for config, attention in before:
                seams.set_attention_name(config, attention)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model and of the models inside it, the outer ones first: setting one sets those below it."""
    found: dict[int, PreTrainedConfig] = {}

    def take(config: PreTrainedConfig) -> None:
        found.setdefault(id(config), config)
        for part in (getattr(config, name, None) for name in config.sub_configs):
            if part is not None:
                take(part)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            take(module.config)
    return list(found.values())
