"""Two faster forwards with the same results as the model's own modules: one native call, and compiled layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haast.target.compiled import CompiledLayers, nodes_for, slots_for, wrapped
from haast.target.hf import BEFORE_NORM, ModuleForward, TargetOutput, TreeForward
from haast.target.kv_cache import KVCache
from haast.target.native_cpu import NativeStack
from haast.target.probe import tolerance
from haast.tree import DraftTree, padded_row_index


class NativeForward(TreeForward):
    """A target's forward in one native call, without transformers' loop over layers."""

    def __init__(self, stack: NativeStack, modules: ModuleForward) -> None:
        self._stack, self._modules = stack, modules
        self._embedding: nn.Module = modules.model.get_input_embeddings()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is None, like a copy of a `NativeStack`: the target then runs the modules."""
        return type(None), ()

    def run(
        self, tree: DraftTree, cache: KVCache, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput | None:
        """As `Target.forward`; None if the cache has a layout that native code can't read, and for BEFORE_NORM."""
        if BEFORE_NORM in hidden_layers:
            return None
        store = cache.stores.together(self._stack.kv_heads, self._stack.head_dim, self._modules.dtype)
        if store is None:
            return None
        states = self._embedding(tree.tokens)  # a new tensor, which the stack may overwrite
        positions = self._modules.positions(tree, cache)
        slots = (tree.ancestors, cache.lengths, store, cache.tables)
        features, hidden = self._stack.run(states, positions, *slots, hidden_layers)
        head_input = features
        if last_only:
            last = tree.live.sum(1) - 1  # (rows,)
            head_input = features[torch.arange(tree.rows), last].unsqueeze(1)
        return TargetOutput(features, self._modules.head_logits(head_input), hidden)

    def current(self) -> bool:
        """Whether the model is unchanged since this was built; if not, the target must run its modules."""
        model = self._modules.model
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        same = model.get_input_embeddings() is self._embedding and self._modules.dtype is torch.float32
        return same and self._stack.current(list(decoder.layers), decoder.norm)


class CompiledForward(TreeForward):
    """A target's forward with compiled layers, at static shapes.

    The first forward of each shape also runs the modules; compiled layers are used only if both results agree.
    """

    def __init__(self, compiled: CompiledLayers, modules: ModuleForward) -> None:
        self.compiled, self._modules = compiled, modules

    def run(
        self, tree: DraftTree, cache: KVCache, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput | None:
        """As `Target.forward`; None for prefill, long trees, and a cache that is still unused or converts its dtype."""
        compiled, layers, nodes = self.compiled, self._modules.layers(), nodes_for(tree.nodes)
        tensors = cache.stores.by_layer()
        if (
            last_only
            or layers is None
            or wrapped(layers)
            or tensors is None
            or nodes is None
            or cache.dtype is not None
        ):
            return None
        slots, used = slots_for(cache.longest + nodes), tree.rows  # rows after `used` are padding
        rows = compiled.rows_for(used, nodes, slots)
        expected = None
        if not compiled.has_run(rows, nodes, slots):
            expected = self._modules.run(tree, cache, False, hidden_layers)
        padded = tree.padded(nodes).select_rows(padded_row_index(used, rows, tree.tokens.device))
        with cache.repeated(rows):
            cache.begin(nodes, slots)
            run = functools.partial(self._modules.run, padded, cache, False, hidden_layers)
            output: TargetOutput | None = compiled.run(layers, cache, tensors, *cache.all_slots(), run)
        cache.begin(tree.nodes)  # back to the real rows, for the `keep` that follows
        if output is None:
            return expected
        output = output.cut(used, tree.nodes, copy=compiled.graphs)
        if expected is not None and not _agree(output.logits[tree.live], expected.logits[tree.live]):
            compiled.refuse("the compiled layers give other logits than its modules")
            return expected
        return output


def _agree(logits: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max().clamp_min(1e-6))
    return bool((logits.double() - expected.double()).abs().max() <= tolerance(expected.dtype) * scale)
