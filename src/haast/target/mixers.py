"""Recurrent mixers of a model (linear attention, convolutions, state-space): found, and called from given states.

Owns what differs between transformers' modules with a recurrent state: which modules they are, what state they keep in
the cache, and whether they take several tokens from a given state. All of it is measured with a few tokens when a model
is loaded. Knows nothing of trees.

A mixer is the innermost module that writes a recurrent state of the cache. It is called with a small cache of its own,
of transformers' classes, that holds the states to start from, so that a call's rows may be any nodes of any texts.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, DynamicLayer

from haast.errors import UnsupportedModelError
from haast.target.projections import Ends, SharedEnds, find_ends

Name = tuple[str, int]  # kind of a state ("conv", "recurrent", "linear"), and its number within the layer
States = dict[Name, Tensor]  # (rows, ...) each; empty: the zero state
_TOKENS, _BEGUN = 8, 4  # of the trial's text, and of its beginning, after which it continues
# Difference of two states that should be equal up to rounding, relative to the norm. Mixers compute in float32 in part,
# whatever their dtype.
_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4}
_ALLOWED_16_BITS = 2e-2
# The class of a layer with recurrent states; None in a transformers that has a cache class per model instead.
_LAYER: Any = vars(cache_utils).get("LinearAttentionLayer") if "get_conv_state" in vars(Cache) else None
# What a module raises for inputs that it does not expect.
_FAILURES = (TypeError, LookupError, AttributeError, RuntimeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Mixer:
    """A recurrent mixer of a model.

    Attributes:
        name: of the module within the model.
        layer: index of its layer in the cache.
        hidden: name of its argument (rows, nodes, width).
        ends: linear layers that can run for all nodes at once.
        shapes, dtypes: of its states, for one text.
        continues: whether it takes several tokens from a given state; others take several from the zero state only.
        consistent: whether it gives the same for several tokens at once as for one after the other, up to rounding.
            Some limit a time step in the former only (Nemotron-H, Zamba2).
    """

    name: str
    layer: int
    hidden: str
    ends: Ends
    shapes: Mapping[Name, torch.Size]
    dtypes: Mapping[Name, torch.dtype]
    continues: bool
    consistent: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the states of one text."""
        return sum(shape.numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items())


@dataclass(frozen=True)
class Layout:
    """What a model with recurrent layers keeps of a text.

    Attributes:
        mixers: in the order in which the model calls them.
        attention_layers: layers that store keys and values.
        cache_class: the class of cache that the model makes for itself.
    """

    mixers: tuple[Mixer, ...]
    attention_layers: tuple[int, ...]
    cache_class: type[Cache]

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent states of one text."""
        return sum(mixer.nbytes for mixer in self.mixers)

    @property
    def consistent(self) -> bool:
        """Whether all mixers are; otherwise a state depends on which tokens were computed together."""
        return all(mixer.consistent for mixer in self.mixers)


class _LayerStates:
    """States in the layers of transformers' `DynamicCache`."""

    def read(self, cache: Cache, layer: int) -> States:
        """The states of a layer of `cache`."""
        own: Any = cache.layers[layer] if layer < len(cache.layers) else None
        if not isinstance(own, _LAYER):
            return {}
        kinds = {"conv": own.conv_states, "recurrent": own.recurrent_states}
        return {(kind, i): each for kind, held in kinds.items() for i, each in held.items() if each is not None}

    def cache(self, cache_class: type[Cache], layer: int, states: States, count: int) -> Cache:
        """A cache with copies of `states` at `layer`, which has `count` states of each kind."""
        own: Any = _LAYER(number_of_states=count)
        cache: Any = Cache(layers=[own] * (layer + 1))
        for (kind, index), state in states.items():
            if kind == "conv":
                cache.update_conv_state(state, layer, state_idx=index, conv_kernel_size=state.shape[-1])
            else:
                cache.update_recurrent_state(state, layer, state_idx=index)
        made: Cache = cache
        return made


class _ListedStates:
    """States in the list of MiniMax's own cache class."""

    def read(self, cache: Cache, layer: int) -> States:
        """As `_LayerStates.read`."""
        own: Any = cache
        state = own.linear_cache[layer] if layer < len(own.linear_cache) else None
        return {("linear", 0): state} if isinstance(state, Tensor) else {}

    def cache(self, cache_class: type[Cache], layer: int, states: States, count: int) -> Cache:
        """As `_LayerStates.cache`. The mixer does not write to the states."""
        cache: Any = cache_class()
        for state in states.values():
            cache.set_linear_cache(layer, state)
        made: Cache = cache
        return made


_OWN_STATES = {"MiniMaxCache": _ListedStates()}  # by the name of a model's own cache class


def _states_of(cache_class: type[Cache]) -> _LayerStates | _ListedStates:
    return _OWN_STATES.get(cache_class.__name__, _LayerStates())


def caches_recurrent_states() -> bool:
    """Whether the installed transformers keeps recurrent states in the cache of all models."""
    return _LAYER is not None


class Caller:
    """A mixer's module, called for some nodes of a forward from given states.

    Args:
        module: the mixer.
        layer: index of its layer in the cache.
        names: of its states.
        cache_class: see `Layout`.
    """

    def __init__(self, module: nn.Module, layer: int, names: Mapping[Name, Any], cache_class: type[Cache]) -> None:
        self.module = module
        self._layer, self._names, self._cache_class = layer, names, cache_class
        self._count = 1 + max(index for _, index in names)
        self._states = _states_of(cache_class)
        self._signature = inspect.signature(module.forward)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        by_name: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            more = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            by_name.update(value if more else {name: value})
        return by_name

    def call(
        self, forward: Any, arguments: Mapping[str, Any], shape: tuple[int, int], index: Tensor, states: States
    ) -> tuple[Any, States]:
        """Call `forward` for some nodes.

        Args:
            forward: the module's own.
            arguments: of a call for all nodes, `shape` = (rows, nodes).
            index: (n, m) int64: n texts' next m nodes each, as row * nodes + node.
            states: (n, ...) each, of the texts before them; empty for the zero state.

        Returns:
            The module's output, of shape (n, m, ...), and the states (n, ...) after the last nodes.
        """
        cache = self._states.cache(self._cache_class, self._layer, states, self._count)
        picked = {name: _pick(name, value, shape, index, cache) for name, value in arguments.items()}
        output = forward(**picked)
        after = self._states.read(cache, self._layer)
        return output, {name: after[name] for name in self._names}


def _pick(name: str, value: Any, shape: tuple[int, int], index: Tensor, cache: Cache) -> Any:
    """An argument for the nodes `index`. There is no padding among them, so masks are left out."""
    if isinstance(value, Cache):
        return cache
    if "mask" in name:
        return None
    if isinstance(value, tuple | list):
        return type(value)(_pick(name, each, shape, index, cache) for each in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == shape[1] and value.shape[0] in (1, shape[0]):
        return value.expand(shape[0], *value.shape[1:]).flatten(0, 1)[index.to(value.device)]
    return value


@dataclass
class _Found:
    """A mixer as the trial found it: its module, its states, and one call's arguments."""

    name: str
    module: nn.Module
    layer: int
    states: States
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_layout(model: PreTrainedModel, tokens: Tensor) -> Layout:
    """Run a few `tokens` (n,) through a model with recurrent layers, as stock `generate` does, and see what it keeps.

    Raises:
        UnsupportedModelError: it keeps its states elsewhere than in transformers' cache.
    """
    name, text = type(model).__name__, tokens[:_TOKENS].unsqueeze(0)
    found, caches = list[_Found](), list[Cache]()
    try:
        with torch.inference_mode(), _searching(model, found, caches):
            model(input_ids=text, use_cache=True)
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{name} can't run a text of {text.shape[1]} tokens by itself: its own forward failed with "
            f"{type(error).__name__}: {error}; use stock generate"
        ) from error
    if not found or len({id(each.module) for each in found}) < len(found):
        raise UnsupportedModelError(
            f"{name} carries a recurrent state that it does not keep in transformers' cache, layer by layer, so the "
            f"state of rejected tokens can't be removed; use another model, or stock generate"
        )
    mixers = tuple(_measured(each, type(caches[0])) for each in found)
    for mixer in mixers:
        if not mixer.continues and not mixer.consistent:
            raise UnsupportedModelError(
                f"{name} has a recurrent layer, {mixer.name}, that takes no state for several tokens, and gives "
                f"something else for one token after the other; use stock generate"
            )
    return Layout(mixers, _attention_layers(caches[0]), type(caches[0]))


def _attention_layers(cache: Cache) -> tuple[int, ...]:
    """Layers that have stored keys."""
    layers: list[Any] = list(cache.layers)
    return tuple(i for i, layer in enumerate(layers) if isinstance(layer, DynamicLayer) and layer.keys is not None)


@contextmanager
def _searching(model: PreTrainedModel, found: list[_Found], caches: list[Cache]) -> Iterator[None]:
    """Inside the block, note each module that adds states to the cache: inner modules return before outer ones."""
    names = {module: name for name, module in model.named_modules()}
    known: set[tuple[int, Name]] = set()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
        if cache is None:
            return
        caches[:] = [cache]
        for layer in range(model.config.get_text_config().num_hidden_layers):
            held = _states_of(type(cache)).read(cache, layer)
            new = {name: state for name, state in held.items() if (layer, name) not in known}
            if new:
                known.update((layer, name) for name in new)
                found.append(_Found(names[module], module, layer, new, args, kwargs))

    hooks = [module.register_forward_hook(after, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _measured(found: _Found, cache_class: type[Cache]) -> Mixer:
    """Compare the mixer's output and states for a text in one call, in two calls, and one token after the other."""
    caller = Caller(found.module, found.layer, found.states, cache_class)
    arguments = caller.arguments(found.args, found.kwargs)
    argument = next(name for name, each in arguments.items() if isinstance(each, Tensor) and each.ndim == 3)
    hidden = arguments[argument]
    count = hidden.shape[1]
    index = torch.arange(count, device=hidden.device).unsqueeze(0)

    def run(cuts: Sequence[int], shared: SharedEnds | None = None) -> tuple[Tensor, ...]:
        """The last output and the states, of one call per pair of cuts."""
        output, states = None, States()
        for begin, end in itertools.pairwise(cuts):
            piece = index[:, begin:end]
            if shared is not None:
                shared.index = piece
            output, states = caller.call(found.module.forward, arguments, (1, count), piece, states)
        output = output if shared is None else shared.finish(output)
        outputs = output if isinstance(output, tuple) else (output,)
        return (*(each[:, -1] for each in outputs if isinstance(each, Tensor)), *states.values())

    expected = run([0, count])
    try:
        continues = _close(run([0, _BEGUN, count]), expected, hidden.dtype)
    except _FAILURES:
        continues = False
    steps = [0, *range(_BEGUN, count + 1)]
    one_by_one = run(steps)
    ends = find_ends(
        found.module, hidden, lambda: caller.call(found.module.forward, arguments, (1, count), index, {})[0]
    )
    shared = SharedEnds(found.module, ends, hidden)
    with shared.shared():
        alike = _close(run(steps, shared), one_by_one, hidden.dtype)
    return Mixer(
        found.name,
        found.layer,
        argument,
        ends if alike else Ends({}),
        {name: state.shape[1:] for name, state in found.states.items()},
        {name: state.dtype for name, state in found.states.items()},
        continues,
        _close(one_by_one, expected, hidden.dtype),
    )


def _close(mine: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether all are equal up to rounding."""
    allowed = _ALLOWED.get(dtype, _ALLOWED_16_BITS)
    for one, other in zip(mine, theirs, strict=True):
        if one.shape != other.shape or not (one - other).norm() <= allowed * other.norm().clamp_min(1e-9):
            return False
    return True
