"""Decoder layers compiled at static shapes: `CompiledLayers`.

Owns what `torch.compile` needs to see few shapes and compile little: the node counts and cache lengths that forwards
are padded to, a view of one layer's cache that is written at given slots, and one compiled function through which all
layers go. The model's own code runs; its layers are stood in for only while a forward lasts.
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
# What dynamo and its backends raise at code, or on machines, that they can't do.
_UNCOMPILABLE = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, OSError, ImportError)
CHOICES = ("off", "auto", "on")
Stores = Sequence[tuple[Tensor, Tensor]]  # by layer: keys and values, (kv_heads, slots, head_dim) each
Progress = Callable[[str], AbstractContextManager[object]]  # wraps a compilation, given what is compiled

_NODES = (1, 6, 12, 18, 24, 32, 48, 64, 96, 128)
_SLOTS = 256
_VARIANTS = 1024  # compiled versions of one function: shapes times kinds of layer, of all models in the process
_CACHE_SETTING = "TORCHINDUCTOR_CACHE_DIR"  # torch has no other switch for where it keeps compiled code


def nodes_for(nodes: int) -> int | None:
    """The node count that a forward over `nodes` is padded to; None for long ones, which nobody compiles."""
    return next((count for count in _NODES if count >= nodes), None)


def slots_for(slots: int) -> int:
    """The cache length that holds `slots`: 256, 512, 1024, ... so that a growing text meets few lengths."""
    return max(_SLOTS, 1 << (slots - 1).bit_length())


class LayerSlots:
    """One layer's keys and values (kv_heads, slots, head_dim), in the place of the layer's cache.

    Nodes are written to the slots `write` (rows * nodes,), and attention sees the slots `read` (rows, read).
    """

    def __init__(self, keys: Tensor, values: Tensor, write: Tensor, read: Tensor) -> None:
        self.keys, self.values = keys, values
        self._write, self._read = write, read

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As a transformers cache. `layer_idx` is not looked at: code that read it would be compiled layer by layer."""
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, store: Tensor, states: Tensor) -> Tensor:
        heads, dim = store.shape[0], store.shape[2]
        store.index_copy_(1, self._write, states.transpose(0, 1).reshape(heads, -1, dim))
        rows, read = self._read.shape
        return store.index_select(1, self._read.flatten()).view(heads, rows, read, dim).transpose(0, 1)


class CompiledLayers:
    """One compiled function that all decoder layers of a model go through.

    On CUDA it runs as CUDA graphs (torch's mode "reduce-overhead"). `progress` wraps every compilation; `what` is
    compiled, in words. `problem` says, once that has turned out, why nothing is compiled; the owner then goes by
    modules.
    """

    def __init__(
        self,
        device: torch.device,
        backend: str | Callable[..., Any] = "inductor",
        progress: Progress | None = None,
        what: str = "the forward",
    ) -> None:
        self.problem = ""
        self._given, self._what = (device, backend, progress), what
        self.graphs = device.type == "cuda" and backend == "inductor"
        mode = "reduce-overhead" if self.graphs else None
        self._call = torch.compile(_through, dynamic=False, fullgraph=True, backend=backend, mode=mode)
        self._progress: Progress = progress or (lambda what: nullcontext())
        self._lock = threading.RLock()  # the layers of one model can be stood in for by one forward at a time
        self.shapes: set[tuple[int, ...]] = set()  # (rows, nodes, slots) that are compiled

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a pickle, is None: its owner goes by modules."""
        return type(None), ()

    def sibling(self, what: str) -> CompiledLayers:
        """The same for the layers of another model."""
        return CompiledLayers(*self._given, what)

    def rows_for(self, rows: int, nodes: int, slots: int) -> int:
        """The batch size that a forward over `rows` rows is padded to: 1, 2, 4, 8, ..., or one that has run already.

        As requests end, a batch of twice its size costs less than compiling another one.
        """
        size = 1 << (rows - 1).bit_length()
        return 2 * size if not self.knows(size, nodes, slots) and self.knows(2 * size, nodes, slots) else size

    def knows(self, rows: int, nodes: int, slots: int) -> bool:
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
            stores: keys and values by layer.
            write, read: slots of the nodes (rows, nodes), and those that attention sees (rows, read).
            forward: runs the model.

        Returns what `forward` returns; None, and a `problem`, where a shape that is new can't be compiled. On CUDA the
        next run overwrites it: clone what has to live longer.
        """
        shape = (*write.shape, read.shape[1])
        with self._lock, self._stood_in(layers, cache, stores, write.flatten(), read):
            if shape in self.shapes:
                return self._step(forward)
            try:
                rows, nodes, slots = shape
                batch = f"{rows} rows of " if rows > 1 else ""
                what = f"{self._what} for {batch}{nodes} node{'s' * (nodes > 1)} and {slots} slots"
                with self._progress(what), _kept_on_disk(), compat.variants_allowed(_VARIANTS):
                    for _ in range(2 if self.graphs else 0):  # one run to warm up, one to record the graphs
                        self._step(forward)
                    output = self._step(forward)
            except _UNCOMPILABLE as error:
                said = " ".join(str(error).splitlines()[:2])  # what failed, and why
                self.refuse(f"{type(error).__name__}: {said}")
                return None
        self.shapes.add(shape)
        return output

    def refuse(self, reason: str) -> None:
        """Compile nothing any more, and say so."""
        self.problem = reason
        _LOG.warning("%s runs uncompiled: %s", self._what, reason)

    def _step(self, forward: Any) -> Any:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return forward()

    @contextmanager
    def _stood_in(
        self, layers: Sequence[nn.Module], cache: object, stores: Stores, write: Tensor, read: Tensor
    ) -> Iterator[None]:
        try:
            for layer, (keys, values) in zip(layers, stores, strict=True):
                if self.graphs:  # else every replay copies the cache, and writing to it rules graphs out
                    compat.mark_static(keys)
                    compat.mark_static(values)
                held = LayerSlots(keys, values, write, read)
                vars(layer)["forward"] = functools.partial(self._layer, layer, cache, held)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _layer(self, layer: nn.Module, cache: object, held: LayerSlots, /, *args: Any, **kwargs: Any) -> Any:
        given = tuple(held if each is cache else each for each in args)
        named = {name: held if each is cache else each for name, each in kwargs.items()}
        if not any(each is held for each in (*given, *named.values())):
            return _through(layer, args, kwargs)  # somebody else's call of the model, from another thread
        return self._call(layer, given, named)


def layers_of(decoder: nn.Module, count: int) -> list[nn.Module] | None:
    """The decoder layers of a transformers model, by their number; None where they can't be told."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return list(lists[0]) if len(lists) == 1 else None


def wrapped(layers: Sequence[nn.Module]) -> bool:
    """Whether somebody has put another forward in the place of a layer's own (offloading does), to be left alone."""
    return any("forward" in vars(layer) for layer in layers)


def cache_folder() -> Path:
    """Where compiled code is kept between runs, unless torch has been told another place."""
    told = os.environ.get(_CACHE_SETTING)
    if told and told != compat.default_code_folder():  # torch writes its own default, a temporary folder, there
        return Path(told)
    folder: Path = cached_assets_path(library_name="haast", namespace="compiled", subfolder="inductor")
    return folder


@contextmanager
def _kept_on_disk() -> Iterator[None]:
    """torch's caches of compiled code lie in Haast's cache folder meanwhile, not in a temporary one."""
    before = os.environ.get(_CACHE_SETTING)
    os.environ[_CACHE_SETTING] = str(cache_folder())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE_SETTING]
        else:
            os.environ[_CACHE_SETTING] = before


def _through(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
