"""One forward of the target's own modules over a tree of nodes.

Owns the call of the transformers model: positions, masks, and the hooks that catch features (the LM head's input, i.e.
the state after the final norm; EAGLE, arXiv 2401.15077, section 3) and hidden states. Hooks live for the length of a
call. Knows nothing of faster ways to the same numbers, which are `target`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haast import attention
from haast.cache import TreeCache, cache_name
from haast.placement import execution_device, layer_devices
from haast.speed.compile import layers_of
from haast.tree import DraftTree


@dataclass(frozen=True)
class TargetOutput:
    """One forward over a tree."""

    features: Tensor  # (rows, nodes, hidden): the LM head's input at every node
    logits: Tensor  # (rows, nodes or 1, vocab), raw; 1 when only the last live node was asked for
    hidden: dict[int, Tensor]  # HF hidden_states index -> (rows, nodes, hidden)

    def cut(self, nodes: int, own: bool) -> TargetOutput:
        """The first `nodes` nodes; `own` copies them out of memory that the next forward overwrites."""
        parts = [self.features, self.logits, *self.hidden.values()]
        parts = [part[:, :nodes].clone() if own else part[:, :nodes] for part in parts]
        return TargetOutput(parts[0], parts[1], dict(zip(self.hidden, parts[2:], strict=True)))


class ModuleForward:
    """A model's own modules, called for a tree.

    `decoder_gives_features` says that the decoder's output is what the LM head reads; `probe` finds out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.depth = int(self.config.num_hidden_layers)
        self.decoder_gives_features = False
        self._cache_name = cache_name(model.forward)

    @property
    def lm_head(self) -> nn.Module:
        """The module from features to logits; packed where the target is."""
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert head is not None, "refuse_unsupported lets no model without an LM head through"
        return head

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return next(embedding.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where tokens are sent, and features and logits come back: where the LM head computes."""
        return (
            execution_device(self.lm_head) or execution_device(self.model.get_input_embeddings()) or self.model.device
        )

    @property
    def context_length(self) -> int | None:
        """Positions the target was made for; None where its config does not say."""
        limit = getattr(self.config, "max_position_embeddings", None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # transformers switches all angles of a forward by its largest position: nodes would change one another.
            own = getattr(self.config, "original_max_position_embeddings", limit)
            limit = rope.get("original_max_position_embeddings") or own
        return None if limit is None else int(limit)

    def run(
        self,
        tree: DraftTree,
        cache: TreeCache,
        last_only: bool = False,
        hidden_layers: Sequence[int] = (),
        slots: int | None = None,
    ) -> TargetOutput:
        """`Target.forward`; the cache has been told of the nodes. `slots` is how many the mask covers."""
        captured: dict[str | int, Tensor] = {}
        arguments = self.arguments(tree, cache, slots)
        layers = self.layers() if self.decoder_gives_features else None
        arguments["output_hidden_states"] = bool(hidden_layers) and layers is None
        last = tree.live.sum(1) - 1  # (rows,)
        with self.capture(captured, layers, hidden_layers):
            if last_only and self.decoder_gives_features:
                arguments["logits_to_keep"] = torch.unique(last)
            output = self.model(input_ids=tree.tokens, **arguments, **self.storing(cache))
        features = captured["decoder"] if self.decoder_gives_features else captured["head"]
        device = tree.tokens.device  # a dispatched model's parts give their results where they compute
        logits: Tensor = output.logits.to(device)
        if last_only:
            if self.decoder_gives_features:
                last = torch.searchsorted(torch.unique(last), last)
            logits = logits[torch.arange(tree.rows, device=device), last].unsqueeze(1)
        states = output.hidden_states if layers is None else {**captured, self.depth: features}
        hidden = {index: states[index].to(device) for index in hidden_layers}
        return TargetOutput(features.to(device), logits, hidden)

    def layers(self) -> list[nn.Module] | None:
        """The decoder layers; None where they can't be told from the decoder's other modules."""
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        return layers_of(decoder, self.depth)

    def new_cache(self, rows: int, capacity: int = 256) -> TreeCache:
        """An empty cache for `rows` sequences, each layer's part of it where the layer computes."""
        return TreeCache(self.depth, rows, capacity, devices=layer_devices(self.layers()))

    def positions(self, tree: DraftTree, cache: TreeCache) -> Tensor:
        """Each node's position in its row (rows, nodes): the row's committed length plus the node's depth."""
        lengths = torch.tensor(cache.lengths, device=tree.tokens.device)
        positions = lengths.unsqueeze(1) + tree.depths
        if self.context_length is not None:  # drafts beyond the context are never emitted; learned positions end there
            positions = positions.clamp_max(self.context_length - 1)
        return positions

    def arguments(self, tree: DraftTree, cache: TreeCache, slots: int | None = None) -> dict[str, Any]:
        """What the model takes beside tokens and cache: positions and masks."""
        arguments: dict[str, Any] = {"position_ids": self.positions(tree, cache)}
        window = getattr(self.config, "sliding_window", None)
        if not getattr(self.config, "use_sliding_window", True):
            window = None
        types = getattr(self.config, "layer_types", None)
        if types:  # such models take one mask per kind of layer
            masks = {}
            for kind in set(types):
                cut = window if kind == "sliding_attention" else None
                masks[kind] = attention.tree_bias(tree, cache.lengths, self.dtype, cut, slots)
            arguments["attention_mask"] = masks
        else:
            arguments["attention_mask"] = attention.tree_bias(tree, cache.lengths, self.dtype, window, slots)
        return arguments

    def storing(self, cache: TreeCache) -> dict[str, Any]:
        """What the model takes to keep keys and values in `cache`, which has been told of the nodes."""
        return {"use_cache": True, self._cache_name: cache}

    @contextmanager
    def capture(
        self,
        captured: dict[str | int, Tensor],
        layers: Sequence[nn.Module] | None = None,
        hidden_layers: Sequence[int] = (),
    ) -> Iterator[None]:
        """Keep what the head reads, what the decoder gives, and by number what goes into some of `layers`.

        transformers collects hidden states by hooks of its own, but those stay, inside the layers, where nothing that
        is compiled gets past them.
        """

        def before_layer(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[index] = args[0] if args else kwargs["hidden_states"]

        def before_head(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured["head"] = inputs[0]

        def after_decoder(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured["decoder"] = output.last_hidden_state

        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        hooks = [
            self.lm_head.register_forward_pre_hook(before_head),
            decoder.register_forward_hook(after_decoder),
        ]
        for index, layer in enumerate(layers or ()):  # the states behind the last are the features
            if index in hidden_layers:
                before = functools.partial(before_layer, index)
                hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
