"""One forward of the target's own modules over a tree of nodes.

Owns the call of the transformers model: positions, masks, and the hooks that capture features (the LM head's input,
i.e. the state after the final norm; EAGLE, arXiv 2401.15077, section 3) and hidden states. The hooks are removed after
each call. `TreeForward` is the interface that the faster forwards (`faster`) implement too.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from haast.device import to_device
from haast.errors import UnsupportedModelError
from haast.target import attention
from haast.target.compiled import layers_of
from haast.target.device_map import execution_device, layer_devices
from haast.target.kv_cache import KVCache, cache_name
from haast.target.kv_pool import KVPool
from haast.target.mixers import Layout
from haast.target.positions import counting_embeddings, placed
from haast.target.prompt_inputs import PromptInputs
from haast.target.recurrent import Recurrence
from haast.tree import DraftTree

BEFORE_NORM = -1  # among `hidden_layers`: the output of the last layer, before the final norm; no index of transformers
_MOST_NODES = 1024  # more than a forward's nodes
_WINDOWED = ("sliding_attention", "hybrid_sliding")  # kinds of layers with a sliding window
_MASKS = ("full_attention", "sliding_attention", "linear_attention", "conv")  # names of masks


@dataclass(frozen=True)
class TargetOutput:
    """The result of a forward over a tree."""

    features: Tensor  # (rows, nodes, hidden): the LM head's input at every node
    logits: Tensor  # (rows, nodes or 1, vocab), raw; 1 when only the last live node was asked for
    hidden: dict[int, Tensor]  # HF hidden_states index -> (rows, nodes, hidden)

    def cut(self, rows: int, nodes: int, copy: bool) -> TargetOutput:
        """The first `rows` rows and `nodes` nodes. `copy` copies them, for memory that the next forward overwrites."""
        parts = [part[:rows, :nodes] for part in (self.features, self.logits, *self.hidden.values())]
        parts = [part.clone() if copy else part for part in parts]
        return TargetOutput(parts[0], parts[1], dict(zip(self.hidden, parts[2:], strict=True)))


class TreeForward(ABC):
    """One way to run a model over trees."""

    @abstractmethod
    def run(
        self, tree: DraftTree, cache: KVCache, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput | None:
        """`Target.forward` after `cache.begin`. Returns None, without side effects, if it does not support the call."""


class ModuleForward(TreeForward):
    """A model's own modules, called for a tree.

    `decoder_gives_features`: the decoder's output is what the LM head reads. `logit_scale`: factor of the LM head's
    output. The owner sets both from the result of `probe`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.depth = int(self.config.num_hidden_layers)
        self.decoder_gives_features = False
        self.logit_scale = 1.0
        self._softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._cache_name = cache_name(model.forward)
        self._counting = counting_embeddings(model)
        self.context_length = _context_length(self.config)  # tokens; None if the configuration has none
        self.recurrence: Recurrence | None = None
        self._cache_class: type[KVCache] = KVCache
        self.refresh()

    def use_layout(self, layout: Layout | None) -> None:
        """Run the recurrent layers of `layout` over trees, and pass the model a cache of the class that it expects."""
        if layout is None:
            return
        self.recurrence = Recurrence(self.model, layout)
        if not issubclass(KVCache, layout.cache_class) and layout.cache_class is not DynamicCache:
            self._cache_class = type("KVCache", (KVCache, layout.cache_class), {})

    def refresh(self) -> None:
        """Read `lm_head`, `dtype` (of activations) and `device` (the LM head's) from the model again.

        Tokens must be on this device, and features and logits are returned on it.
        """
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert head is not None, "refuse_unsupported rejects models without an LM head"
        embedding: nn.Module = self.model.get_input_embeddings()
        plain = next(embedding.parameters(), None)  # None: a packed embedding, which returns fp32
        self.lm_head, self.dtype = head, torch.float32 if plain is None else plain.dtype
        self.device = execution_device(head) or execution_device(embedding) or self.model.device

    @property
    def window(self) -> int | None:
        """Size of the sliding window in positions, the node's own included; None if the model has none."""
        window = getattr(self.config, "sliding_window", None)
        return window if getattr(self.config, "use_sliding_window", True) else None

    @property
    def chunk(self) -> int | None:
        """Size of the chunks in positions that chunked attention can't look out of; None if the model has none."""
        chunk: int | None = getattr(self.config, "attention_chunk_size", None)
        return chunk

    @property
    def storing_layers(self) -> int:
        """Number of layers with keys and values of their own text.

        The others reuse those of an earlier layer (Gemma 3n), or attend to images, and none is passed (Mllama).
        """
        if self.recurrence is not None:
            return len(self.recurrence.layout.attention_layers)
        shared = int(getattr(self.config, "num_kv_shared_layers", None) or 0)
        crossed = getattr(self.config, "cross_attention_layers", None) or ()
        return self.depth - shared - len([layer for layer in crossed if layer < self.depth])

    def run(
        self,
        tree: DraftTree,
        cache: KVCache,
        last_only: bool = False,
        hidden_layers: Sequence[int] = (),
        inputs: PromptInputs | None = None,
    ) -> TargetOutput:
        captured: dict[str | int, Tensor] = {}
        arguments = self.arguments(tree, cache) if inputs is None else dict(inputs.arguments)
        layers = self.layers() if self.decoder_gives_features else None
        arguments["output_hidden_states"] = layers is None and any(index != BEFORE_NORM for index in hidden_layers)
        last = tree.live.sum(1) - 1  # (rows,)
        if last_only and self.decoder_gives_features and tree.rows != tree.nodes:
            arguments["logits_to_keep"] = last  # gives each row the logits at all rows' last nodes; it reads its own
        with self.capture(captured, layers, hidden_layers), cache.recurring(tree, last_only):
            output = self.call(tree, cache, arguments)
        features = captured["decoder"] if self.decoder_gives_features else captured["head"]
        device = tree.tokens.device  # modules of a model on several devices return results on their own device
        logits: Tensor = output.logits.to(device)
        if last_only:
            rows = torch.arange(tree.rows, device=device)
            kept = "logits_to_keep" in arguments and logits.shape[1] == tree.rows  # some models ignore it
            logits = logits[rows, rows if kept else last].unsqueeze(1)
        states: dict[str | int, Tensor] = {**captured, **dict(enumerate(output.hidden_states or ()))}
        states[self.depth] = features
        hidden = {index: states[index].to(device) for index in hidden_layers}
        return TargetOutput(features.to(device), logits, hidden)

    def call(self, tree: DraftTree, cache: KVCache, arguments: dict[str, Any]) -> Any:
        """The model's own forward with `arguments`; stores keys and values in `cache`. Call `cache.begin` before."""
        stored = {"use_cache": True, self._cache_name: cache}
        if "inputs_embeds" not in arguments:
            stored["input_ids"] = tree.tokens
        if not self._counting or "position_ids" not in arguments:
            return self.model(**arguments, **stored)
        end = cache.longest + tree.nodes
        with placed(self._counting, arguments["position_ids"], min(end, self.context_length or end)):
            return self.model(**arguments, **stored)

    def head_logits(self, features: Tensor) -> Tensor:
        """Logits (..., vocab) of the LM head for features (..., hidden), scaled and capped as the model does."""
        output: Tensor = self.lm_head(features).to(features.device)
        if self.logit_scale != 1.0:
            output = output * self.logit_scale
        return output if self._softcap is None else self._softcap * torch.tanh(output / self._softcap)

    def layers(self) -> list[nn.Module] | None:
        """The decoder layers; None if they can't be identified among the decoder's modules."""
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        return layers_of(decoder, self.depth)

    def _last_layer(self) -> nn.Module:
        layers = self.layers()
        if layers is None:
            raise UnsupportedModelError(
                f"the decoder layers of {type(self.model).__name__} can't be identified, so the state before its final "
                f"norm can't be read: use a head that reads the one after it"
            )
        return layers[-1]

    def new_cache(self, pool: KVPool, dtype: torch.dtype | None = None) -> KVCache:
        """A KV cache for all layers in `pool`; each layer's keys and values are on the layer's device."""
        devices = layer_devices(self.layers())
        return self._cache_class(
            pool, self.depth, self.device, dtype=dtype, devices=devices, recurrence=self.recurrence
        )

    def positions(self, tree: DraftTree, cache: KVCache) -> Tensor:
        """Each node's position in its row (rows, nodes): the row's committed length plus the node's depth."""
        positions = cache.lengths_tensor.unsqueeze(1) + tree.depths
        shifts = [sequence.position_shift for sequence in cache.sequences]
        if any(shifts):
            positions = positions + to_device(torch.tensor(shifts), positions.device).unsqueeze(1)
        if self.context_length is not None:  # learned positions end there; drafts beyond the context are never emitted
            positions = positions.clamp_max(self.context_length - 1)
        return positions

    def arguments(self, tree: DraftTree, cache: KVCache) -> dict[str, Any]:
        """The model's arguments except tokens and cache: positions, and masks over the slots that attention reads."""
        positions = self.positions(tree, cache)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if self.recurrence is not None:  # these name their masks otherwise than their layers, if they need several
            kinds = kinds.union(_MASKS) if not kinds.isdisjoint(_WINDOWED) else set()
        limits = {kind: self._limit_of(kind, cache.reads) for kind in kinds}
        lengths = cache.lengths_tensor
        unclamped = lengths.unsqueeze(1) + tree.depths
        mask_arguments = (tree.ancestors, lengths, cache.reads, self.dtype)
        masks = {
            limit: attention.tree_mask(
                *mask_arguments, positions=unclamped, flight_positions=unclamped, window=limit[0], chunk=limit[1]
            )
            for limit in {*limits.values()} or {self._limit_of("sliding_attention", cache.reads)}
        }
        by_kind = {kind: masks[limit] for kind, limit in limits.items()}  # models with layer types take a mask per type
        [mask, *_] = masks.values()
        return {"position_ids": positions, "attention_mask": by_kind or mask}

    def _limit_of(self, kind: str, slots: int) -> tuple[int | None, int | None]:
        """Window and chunk of layers of a kind, in positions; None where they limit nothing within `slots`."""
        window = self.window if kind in _WINDOWED and slots > (self.window or 0) else None
        chunk = self.chunk if kind == "chunked_attention" else None
        return window, chunk if slots > (chunk or 0) else None

    @contextmanager
    def capture(
        self,
        captured: dict[str | int, Tensor],
        layers: Sequence[nn.Module] | None = None,
        hidden_layers: Sequence[int] = (),
    ) -> Iterator[None]:
        """Capture the LM head's input ("head"), the decoder's output ("decoder") and, by index, inputs of `layers`.

        Raises UnsupportedModelError for BEFORE_NORM if the decoder layers can't be identified.

        transformers can collect hidden states too, but by permanent hooks inside the layers, which break compilation.
        """
        this_thread = threading.get_ident()

        def note(key: str | int, states: Tensor) -> None:
            if threading.get_ident() == this_thread:  # the user may run the same modules in another thread
                captured[key] = states

        def before_layer(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(index, args[0] if args else kwargs["hidden_states"])

        def after_last(_module: nn.Module, _inputs: Any, output: Any) -> None:
            note(BEFORE_NORM, output[0] if isinstance(output, tuple) else output)

        def before_head(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            note("head", inputs[0])

        def after_decoder(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, ModelOutput) and "last_hidden_state" in output:  # else it has an LM head, or is one
                note("decoder", output["last_hidden_state"])

        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        hooks = [
            self.lm_head.register_forward_pre_hook(before_head),
            decoder.register_forward_hook(after_decoder),
        ]
        if BEFORE_NORM in hidden_layers:
            hooks.append(self._last_layer().register_forward_hook(after_last))
        for index, layer in enumerate(layers or ()):  # the states after the last layer are the features
            if index in hidden_layers:
                before = functools.partial(before_layer, index)
                hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _context_length(config: PreTrainedConfig) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # transformers chooses the angles of a forward by its largest position: nodes would influence each other.
        original = getattr(config, "original_max_position_embeddings", limit)
        limit = rope.get("original_max_position_embeddings") or original
    if getattr(config, "attn_temperature_tuning", False) and "chunked_attention" in (config.layer_types or ()):
        # Llama 4 scales queries by their slots' numbers, but not those before this one.
        limit = min(limit or config.floor_scale, config.floor_scale - _MOST_NODES)
    return None if limit is None else int(limit)
