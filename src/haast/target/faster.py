"""Two faster ways to the numbers of a model's own modules: one native call, and compiled layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haast.target.compiled import CompiledLayers, nodes_for, slots_for, wrapped
from haast.target.hf import ModuleForward, TargetOutput, TreeForward
from haast.target.kv_cache import KVCache
from haast.target.native_cpu import NativeStack
from haast.target.probe import tolerance
from haast.tree import DraftTree, padded_row_index


class NativeForward(TreeForward):
    """A target's forward in one native call, without transformers' own loop over layers."""

    def __init__(self, stack: NativeStack, modules: ModuleForward) -> None:
        self._stack, self._modules = stack, modules
        self._embedding: nn.Module = modules.model.get_input_embeddings()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is None, as a copy of a `NativeStack` is: the target then goes by modules."""
        return type(None), ()

    def run(
        self, tree: DraftTree, cache: KVCache, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput | None:
        """`Target.forward`; None where the cache has another layout."""
        store = cache.stores.together(self._stack.kv_heads, self._stack.head_dim, self._modules.dtype)
        if store is None:
            return None
        states = self._embedding(tree.tokens)  # a new tensor, which the stack may overwrite
        positions = self._modules.positions(tree, cache)
        where = (tree.ancestors, cache.lengths, store, cache.tables)
        features, hidden = self._stack.run(states, positions, *where, hidden_layers)
        read = features
        if last_only:
            last = tree.live.sum(1) - 1  # (rows,)
            read = features[torch.arange(tree.rows), last].unsqueeze(1)
        return TargetOutput(features, self._modules.head_logits(read), hidden)

    def current(self) -> bool:
        """Whether the model is still as it was when the call was built: else its own modules answer."""
        model = self._modules.model
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        own = model.get_input_embeddings() is self._embedding and self._modules.dtype is torch.float32
        return own and self._stack.current(list(decoder.layers), decoder.norm)


class CompiledForward(TreeForward):
    """A target's forward with compiled layers, at static shapes.

    The first time that a shape is met, the modules answer as well, and what is compiled is used only if it agrees.
    """

    def __init__(self, compiled: CompiledLayers, modules: ModuleForward) -> None:
        self.compiled, self._modules = compiled, modules

    def run(
        self, tree: DraftTree, cache: KVCache, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput | None:
        """`Target.forward`; None for prompts, long trees, and a cache that is still unused."""
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
        slots, kept = slots_for(cache.longest + nodes), tree.rows
        rows = compiled.rows_for(kept, nodes, slots)
        expected = None
        if not compiled.knows(rows, nodes, slots):
            expected = self._modules.run(tree, cache, False, hidden_layers)
        padded = tree.padded(nodes).select_rows(padded_row_index(kept, rows, tree.tokens.device))
        with cache.repeated(rows):
            cache.begin(nodes, slots)
            run = functools.partial(self._modules.run, padded, cache, False, hidden_layers)
            output: TargetOutput | None = compiled.run(layers, cache, tensors, *cache.all_slots(), run)
        cache.begin(tree.nodes)  # what is kept is said of the rows that there are
        if output is None:
            return expected
        output = output.cut(kept, tree.nodes, own=compiled.graphs)
        if expected is not None and not _agree(output.logits[tree.live], expected.logits[tree.live]):
            compiled.refuse("its compiled layers give other logits than its modules")
            return expected
        return output


def _agree(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max().clamp_min(1e-6))
    return bool((found.double() - expected.double()).abs().max() <= tolerance(expected.dtype) * scale)
