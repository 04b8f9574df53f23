"""Decoder layers compiled by `torch.compile` at static shapes: `CompiledLayers`.

Keeps the number of compilations small: owns the node counts and cache lengths that forwards are padded to, a view of
one layer's cache that is written at given slots, and the one compiled function that runs every layer. The model's own
code is compiled; the layers' `forward` is replaced only during a forward of the target.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor, nn

from haast import compat

_LOG = logging.getLogger(__name__)
# What dynamo and its backends raise for code or machines that they do not support.
_UNCOMPILABLE = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, OSError, ImportError)
CHOICES = ("off", "auto", "on")
Stores = Sequence[tuple[Tensor, Tensor]]  # by layer: keys and values, (kv_heads, slots, head_dim) each
Progress = Callable[[str], AbstractContextManager[object]]  # wraps a compilation; called with a description of it

_NODES = (1, 6, 12, 18, 24, 32, 48, 64, 96, 128)
_SLOTS = 256
_VARIANTS = 1024  # compiled versions of one function: shapes times kinds of layer, of all models in the process
_CACHE_SETTING = "TORCHINDUCTOR_CACHE_DIR"  # torch has no other setting for where it stores compiled code


def nodes_for(nodes: int) -> int | None:
    """The node count that a forward over `nodes` is padded to; None if it is too long to be compiled."""
    return next((count for count in _NODES if count >= nodes), None)


def slots_for(slots: int) -> int:
    """The cache length that `slots` is padded to: 256, 512, 1024, ... so that a growing text needs few lengths."""
    return max(_SLOTS, 1 << (slots - 1).bit_length())


class LayerSlots:
    """One layer's keys and values (kv_heads, slots, head_dim), passed to the layer as its cache.

    Nodes are written to the slots `write` (rows * nodes,); attention reads the slots `read` (rows, read).
    """

    def __init__(self, keys: Tensor, values: Tensor, write: Tensor, read: Tensor) -> None:
        self.keys, self.values = keys, values
        self._write, self._read = write, read

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in a transformers cache. Ignores `layer_idx`: code that read it would be compiled once per layer."""
        return self._write_and_read(self.keys, key_states), self._write_and_read(self.values, value_states)

    def _write_and_read(self, store: Tensor, states: Tensor) -> Tensor:
        heads, dim = store.shape[0], store.shape[2]
        store.index_copy_(1, self._write, states.transpose(0, 1).reshape(heads, -1, dim))
        rows, read = self._read.shape
        return store.index_select(1, self._read.flatten()).view(heads, rows, read, dim).transpose(0, 1)


class CompiledLayers:
    """One compiled function that runs all decoder layers of a model.

    On CUDA it runs as CUDA graphs (torch's mode "reduce-overhead"). `progress` wraps each compilation; `what` names the
    compiled forward in messages. `problem` is the reason if compilation has failed, else empty; the owner must then run
    the modules.
    """

    def __init__(
        self,
        device: torch.device,
        backend: str | Callable[..., Any] = "inductor",
        progress: Progress | None = None,
        what: str = "the forward",
    ) -> None:
        self.problem = ""
        self._settings, self._what = (device, backend, progress), what
        self.graphs = device.type == "cuda" and backend == "inductor"
        mode = "reduce-overhead" if self.graphs else None
        self._call = torch.compile(_call_layer, dynamic=False, fullgraph=True, backend=backend, mode=mode)
        self._progress: Progress = progress or (lambda what: nullcontext())
        self._lock = threading.RLock()  # only one forward at a time may replace the layers' `forward`
        self.shapes: set[tuple[int, ...]] = set()  # (rows, nodes, slots) that are compiled

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is None: its owner runs the modules."""
        return type(None), ()

    def sibling(self, what: str) -> CompiledLayers:
        """A new one with the same settings, for the layers of another model."""
        return CompiledLayers(*self._settings, what)

    def rows_for(self, rows: int, nodes: int, slots: int) -> int:
        """The batch size that a forward over `rows` rows is padded to: 1, 2, 4, 8, ..., or twice that.

        When requests have ended, a batch size that is compiled already costs less than compiling the next smaller one.
        """
        size = 1 << (rows - 1).bit_length()
        return 2 * size if not self.has_run(size, nodes, slots) and self.has_run(2 * size, nodes, slots) else size

    def has_run(self, rows: int, nodes: int, slots: int) -> bool:
        """Whether this shape has run already."""
        return (rows, nodes, slots) in self.shapes

    def run(
        self,
        layers: Sequence[nn.Module],
        cache: object,
        stores: Stores,
        write: Tensor,
        read: Tensor,
        forward: Callable[[], Any],
    ) -> Any:
        """Call `forward()`, which runs the model over a tree; each layer goes through the compiled function.

        Args:
            layers: the model's decoder layers.
            cache: the object that `forward` passes to them as their cache; they get their own store instead.
            stores: keys and values per layer.
            write, read: slots of the nodes (rows, nodes), and the slots that attention reads (rows, read).
            forward: runs the model.

        Returns what `forward` returns. Returns None and sets `problem` if a new shape can't be compiled. On CUDA the
        next run overwrites the result: clone what must live longer.
        """
        shape = (*write.shape, read.shape[1])
        with self._lock, self._layers_replaced(layers, cache, stores, write.flatten(), read):
            if shape in self.shapes:
                return self._step(forward)
            try:
                rows, nodes, slots = shape
                batch = f"{rows} rows of " if rows > 1 else ""
                what = f"{self._what} for {batch}{nodes} node{'s' * (nodes > 1)} and {slots} slots"
                with self._progress(what), _cache_on_disk(), compat.recompile_limits(_VARIANTS):
                    for _ in range(2 if self.graphs else 0):  # one run to warm up, one to record the graphs
                        self._step(forward)
                    output = self._step(forward)
            except _UNCOMPILABLE as error:
                message = " ".join(str(error).splitlines()[:2])  # what failed, and why
                self.refuse(f"{type(error).__name__}: {message}")
                return None
        self.shapes.add(shape)
        return output

    def refuse(self, reason: str) -> None:
        """Compile nothing from now on, and log the reason as a warning."""
        self.problem = reason
        _LOG.warning("%s runs uncompiled: %s", self._what, reason)

    def _step(self, forward: Any) -> Any:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return forward()

    @contextmanager
    def _layers_replaced(
        self, layers: Sequence[nn.Module], cache: object, stores: Stores, write: Tensor, read: Tensor
    ) -> Iterator[None]:
        try:
            for layer, (keys, values) in zip(layers, stores, strict=True):
                if self.graphs:  # else each replay copies the cache, and writing to the cache rules graphs out
                    compat.mark_static(keys)
                    compat.mark_static(values)
                slots = LayerSlots(keys, values, write, read)
                vars(layer)["forward"] = functools.partial(self._layer, layer, cache, slots)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _layer(self, layer: nn.Module, cache: object, slots: LayerSlots, /, *args: Any, **kwargs: Any) -> Any:
        positional = tuple(slots if each is cache else each for each in args)
        named = {name: slots if each is cache else each for name, each in kwargs.items()}
        if not any(each is slots for each in (*positional, *named.values())):
            return _call_layer(layer, args, kwargs)  # the user calls the model meanwhile, in another thread
        return self._call(layer, positional, named)


def layers_of(decoder: nn.Module, count: int) -> list[nn.Module] | None:
    """The decoder's one ModuleList of `count` layers; None if it has none, or several."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return list(lists[0]) if len(lists) == 1 else None


def wrapped(layers: Sequence[nn.Module]) -> bool:
    """Whether a layer's `forward` is replaced already (offloading does so); such layers are not compiled."""
    return any("forward" in vars(layer) for layer in layers)


def cache_folder() -> Path:
    """Where compiled code is stored between runs: TORCHINDUCTOR_CACHE_DIR if the user has set it."""
    setting = os.environ.get(_CACHE_SETTING)
    if setting and setting != compat.default_code_folder():  # torch sets it to its default, a temporary folder
        return Path(setting)
    folder: Path = cached_assets_path(library_name="haast", namespace="compiled", subfolder="inductor")
    return folder


@contextmanager
def _cache_on_disk() -> Iterator[None]:
    """Inside the block torch stores compiled code in Haast's cache folder, not in a temporary one."""
    before = os.environ.get(_CACHE_SETTING)
    os.environ[_CACHE_SETTING] = str(cache_folder())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE_SETTING]
        else:
            os.environ[_CACHE_SETTING] = before


def _call_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
