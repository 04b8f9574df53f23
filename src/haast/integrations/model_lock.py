"""Switches a user's model to tree attention while `generate` calls run on it, and restores it after the last one.

The first concurrent call switches the attention implementation, the last one restores it. Calls without a target of
their own share one, so that one scheduler batches them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from transformers import PreTrainedConfig, PreTrainedModel

from haast import compat
from haast.drafters.base import Drafter
from haast.target.support import refuse_unsupported
from haast.target.target import ProbeResult, Target, choose_attention, lock_of


class LockedModel:
    """The running calls of one model. References the model only while there are any, so it can be freed."""

    def __init__(self) -> None:
        self._callers: list[int] = []  # thread id of each running call
        self._original_attention: list[tuple[PreTrainedConfig, str | None]] = []
        self._probed: ProbeResult | None = None
        self._target: Target | None = None
        self._drafters: dict[str, Drafter] = {}

    def target_and_drafter(
        self, model: PreTrainedModel, name: str, make: Callable[[str, Target], Drafter]
    ) -> tuple[Target, Drafter]:
        """The model as a target, and the drafter `name` from `make(name, target)`; all calls share both.

        Only a nested call (for example from a logits processor) gets its own: it may come in the middle of a step.
        """
        if self._callers.count(threading.get_ident()) > 1:
            target = self._make_target(model)
            return target, make(name, target)
        if self._target is None or name not in self._drafters:
            with lock_of(model):  # probing and measuring run the model
                self._target = self._target or self._make_target(model)
                if name not in self._drafters:
                    self._drafters[name] = make(name, self._target)
        return self._target, self._drafters[name]

    def _make_target(self, model: PreTrainedModel) -> Target:
        target = Target(model, probed=self._probed)
        self._probed = target.probed
        return target

    def _enter(self, model: PreTrainedModel) -> None:
        if not self._callers:
            refuse_unsupported(model)
            self._original_attention = [(config, compat.attention_name(config)) for config in _configs(model)]
            try:
                choose_attention(model)
            except BaseException:
                self._restore_attention()
                raise
        self._callers.append(threading.get_ident())

    def _leave(self) -> None:
        self._callers.remove(threading.get_ident())
        if not self._callers:
            self._restore_attention()

    def _restore_attention(self) -> None:
        for config, attention in self._original_attention:
            compat.set_attention_name(config, attention)
        if self._target is not None:
            self._target.scheduler = None  # a reference cycle: the target's memory would wait for the garbage collector
        self._original_attention, self._target = [], None
        self._drafters.clear()


_LOCKED: WeakKeyDictionary[PreTrainedModel, LockedModel] = WeakKeyDictionary()
_LOCKED_LOCK = threading.RLock()


@contextmanager
def tree_attention(model: PreTrainedModel) -> Iterator[LockedModel]:
    """Switch the model to an attention with tree masks inside the context; the last context to exit restores its own.

    Raises UnsupportedModelError, see `refuse_unsupported`.
    """
    with _LOCKED_LOCK:
        locked = _LOCKED.setdefault(model, LockedModel())
        locked._enter(model)
    try:
        yield locked
    finally:
        with _LOCKED_LOCK:
            locked._leave()


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model and of its submodels, outer ones first: setting an outer one also sets the inner ones."""
    configs: dict[int, PreTrainedConfig] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        configs.setdefault(id(config), config)
        sub_configs = (getattr(config, name, None) for name in config.sub_configs)
        waiting[:0] = [each for each in sub_configs if each is not None]
    return list(configs.values())
