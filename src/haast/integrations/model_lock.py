"""The user's model while calls run on it: with an attention that takes trees, and given back as it was.

The first call that comes switches the attention, the last one that leaves gives it back. Calls without a target of
their own share one, so that one scheduler serves them together.
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
    """One model's calls in flight. Holds the model only while there are any, so that it does not keep one alive."""

    def __init__(self) -> None:
        self._callers: list[int] = []  # threads, once for each call
        self._before: list[tuple[PreTrainedConfig, str | None]] = []
        self._probed: ProbeResult | None = None
        self._target: Target | None = None
        self._drafters: dict[str, Drafter] = {}

    def parts(
        self, model: PreTrainedModel, name: str, make: Callable[[str, Target], Drafter]
    ) -> tuple[Target, Drafter]:
        """The model as a target, and the drafter `name`, which `make` makes; both are shared by all calls.

        Only a call from within another one (by a processor, say) gets its own: it may come in the middle of a step.
        """
        if self._callers.count(threading.get_ident()) > 1:
            target = self._made(model)
            return target, make(name, target)
        if self._target is None or name not in self._drafters:
            with lock_of(model):  # the model runs, to be probed and measured
                self._target = self._target or self._made(model)
                if name not in self._drafters:
                    self._drafters[name] = make(name, self._target)
        return self._target, self._drafters[name]

    def _made(self, model: PreTrainedModel) -> Target:
        target = Target(model, probed=self._probed)
        self._probed = target.probed
        return target

    def _enter(self, model: PreTrainedModel) -> None:
        if not self._callers:
            refuse_unsupported(model)
            self._before = [(config, compat.attention_name(config)) for config in _configs(model)]
            try:
                choose_attention(model)
            except BaseException:
                self._give_back()
                raise
        self._callers.append(threading.get_ident())

    def _leave(self) -> None:
        self._callers.remove(threading.get_ident())
        if not self._callers:
            self._give_back()

    def _give_back(self) -> None:
        for config, attention in self._before:
            compat.set_attention_name(config, attention)
        if self._target is not None:
            self._target.scheduler = None  # it holds the target, whose memory would wait for the garbage collector
        self._before, self._target = [], None
        self._drafters.clear()


_LOCKED: WeakKeyDictionary[PreTrainedModel, LockedModel] = WeakKeyDictionary()
_LOCKED_LOCK = threading.RLock()


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[LockedModel]:
    """The model with an attention that takes trees; its own is back after the last call that borrows it.

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
    """The configs of a model and of the models inside it, the outer ones first: setting one sets those below it."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        found.setdefault(id(config), config)
        parts = (getattr(config, name, None) for name in config.sub_configs)
        waiting[:0] = [part for part in parts if part is not None]
    return list(found.values())
