"""The target: any Hugging Face causal LM, unpatched, that answers for a tree of nodes.

Owns the one place where Haast calls a transformers model: logits and features (the LM head's input, i.e. the state
after the final norm; EAGLE, arXiv 2401.15077, section 3) for every node of a tree, in one forward. Knows nothing of
drafters or acceptance. Nothing stays on the model: hooks live for the length of a call; only the attention
implementation is chosen, through transformers' own switch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haast import attention, native, seams
from haast.cache import TreeCache
from haast.errors import UnsupportedModelError
from haast.speed.compile import CompiledLayers, Progress, layers_of, nodes_for, slots_for, wrapped
from haast.speed.packing import PackedLinear
from haast.speed.stack import NativeStack
from haast.tree import DraftTree

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # of logits, relative to the largest; 16-bit: 0.2
_GATHERABLE = {"full_attention", "sliding_attention"}


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


@dataclass(frozen=True)
class Probed:
    """What a probe found of a model. It holds as long as the model lives, and spares the next `Target` the probe."""

    decoder_gives_features: bool  # the decoder's output is what the LM head reads
    logit_scale: float


class Target:
    """A frozen causal LM behind one method, `forward`.

    Args:
        model: any transformers causal LM in eval mode, on any one device.
        tokenizer: optional; needed where text goes in or comes out.
        probed: `Target.probed` of an earlier Target of this very model.

    Raises:
        UnsupportedModelError: encoder-decoder, recurrent state, no LM head, or attention that can't take a tree.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        probed: Probed | None = None,
    ) -> None:
        refuse_unsupported(model)
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config()
        self.hidden_size = int(self.config.hidden_size)
        self.layers = int(self.config.num_hidden_layers)
        self.embedding: nn.Module = model.get_input_embeddings()
        # The embedding may be padded past the tokenizer's vocabulary; the law is over what the head emits.
        self.vocab_size = int(self.config.vocab_size)
        self._stack: NativeStack | None = None
        self._compiled: CompiledLayers | None = None
        choose_attention(model)
        if probed is None:
            self._probe()
        else:
            self._decoder_gives_features, self.logit_scale = probed.decoder_gives_features, probed.logit_scale

    @property
    def probed(self) -> Probed:
        """What the probe found."""
        return Probed(self._decoder_gives_features, self.logit_scale)

    @property
    def lm_head(self) -> nn.Module:
        """The module from features to logits; packed where the target is."""
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert head is not None, "refuse_unsupported lets no model without an LM head through"
        return head

    @property
    def packed(self) -> bool:
        """Whether the linear layers are packed 16-bit ones, run by the native kernels."""
        return isinstance(self.lm_head, PackedLinear) and not self.lm_head.reference

    @property
    def packing(self) -> str:
        """How the linear layers are held: "f16", "int8" or "off"."""
        return self.lm_head.form if isinstance(self.lm_head, PackedLinear) else "off"

    def step_threads(self) -> AbstractContextManager[None]:
        """Wrap a decode step in it: the threads go to the native kernels where they do the work."""
        return native.sole_threads() if self.packed else nullcontext()

    @property
    def device(self) -> torch.device:
        """Where the embedding lives, and so where tokens are sent."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return next(self.embedding.parameters()).dtype

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

    @property
    def one_call(self) -> bool:
        """Whether all decoder layers run in one native call."""
        return self._stack is not None

    def use_compiled_layers(
        self, backend: str | Callable[..., Any] = "inductor", progress: Progress | None = None
    ) -> None:
        """Compile the decoder layers from the next forward on; prefill goes by modules as ever. Nothing stays on them.

        Args:
            backend: of torch.compile. The default needs a C++ compiler on the CPU; without one the modules go on.
            progress: wraps every compilation, given what is compiled.

        Raises:
            ValueError: the linears are packed, so that native code runs them.
        """
        if isinstance(self.lm_head, PackedLinear):
            raise ValueError(
                "packed linears are native code, which can't be compiled: load the model with packing='off'"
            )
        self._compiled = CompiledLayers(self.device, backend, progress)

    def use_modules(self) -> None:
        """Compile nothing from the next text on."""
        self._compiled = None

    @property
    def compiled(self) -> CompiledLayers | None:
        """The compiled decoder layers, where a forward uses them: asked for, and not found unusable since."""
        return None if self._compiled is None or self._compiled.problem else self._compiled

    @property
    def compiling(self) -> str:
        """Whether decoder layers are compiled, in words: "off", "on", or why not although it was asked for."""
        if self._compiled is None:
            return "off"
        return f"off ({self._compiled.problem})" if self._compiled.problem else "on"

    def new_cache(self, rows: int = 1, capacity: int = 256) -> TreeCache:
        """An empty cache for `rows` sequences."""
        if self._stack is not None and not self._unchanged(self._stack):
            self._stack = None  # the model was moved or changed: its own modules answer from here on
        if self.compiled is not None:
            return TreeCache(
                self.layers, rows, 1, slots_for
            )  # as long as the text needs: few lengths, whatever is asked
        return TreeCache(self.layers, rows, capacity)

    def _unchanged(self, stack: NativeStack) -> bool:
        decoder: Any = self.model.get_decoder()  # type: ignore[no-untyped-call]
        own = self.model.get_input_embeddings() is self.embedding and self.dtype is torch.float32
        return own and stack.current(list(decoder.layers), decoder.norm)

    @torch.inference_mode()
    def forward(
        self, tree: DraftTree, cache: TreeCache, *, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput:
        """Run every node of `tree` behind each row's committed past. The cache holds the nodes until `commit`.

        Args:
            tree: (rows, nodes); positions are the row's committed length plus the node's depth.
            cache: this target's cache of the same row count.
            last_only: logits of each row's last live node only (prefill), as (rows, 1, vocab).
            hidden_layers: HF `hidden_states` indices to return besides (0 is the embedding's output).

        Raises:
            ValueError: the tree and the cache differ in rows, or a layer index does not exist.
        """
        self._check(tree, cache, hidden_layers)
        cache.begin(tree.nodes)
        if self._stack is not None:
            output = self._one_call(self._stack, tree, cache, last_only, hidden_layers)
            if output is not None:
                return output
        compiled = self.compiled
        if compiled is not None and not last_only:
            output = self._by_compiled_layers(compiled, tree, cache, hidden_layers)
            if output is not None:
                return output
        return self._by_modules(tree, cache, last_only, hidden_layers)

    def _one_call(
        self, stack: NativeStack, tree: DraftTree, cache: TreeCache, last_only: bool, hidden_layers: Sequence[int]
    ) -> TargetOutput | None:
        """`forward` without transformers' own loop over layers; None where the cache has another layout."""
        store = cache.storage(stack.kv_heads, stack.head_dim, self.dtype)
        if store is None:
            return None
        states = self.embedding(tree.tokens)  # a new tensor, which the stack may overwrite
        features, hidden = stack.run(
            states, self._positions(tree, cache), tree.ancestors, cache.lengths, store, hidden_layers
        )
        read = features
        if last_only:
            last = tree.live.sum(1) - 1  # (rows,)
            read = features[torch.arange(tree.rows), last].unsqueeze(1)
        return TargetOutput(features, self.head_logits(read), hidden)

    def _by_compiled_layers(
        self, compiled: CompiledLayers, tree: DraftTree, cache: TreeCache, hidden_layers: Sequence[int]
    ) -> TargetOutput | None:
        """`forward` at a static shape; None where the modules have to answer: long chains, and a cache still unused.

        The first time that a shape is met, the modules answer as well, and what is compiled is used only if it agrees.
        """
        layers, lanes, nodes = self._layers(), cache.lanes(), nodes_for(tree.nodes)
        if layers is None or wrapped(layers) or lanes is None or nodes is None:
            return None
        cache.begin(nodes)
        expected = None
        if not compiled.knows(tree.rows, nodes, cache.capacity):
            cache.begin(tree.nodes)
            expected = self._by_modules(tree, cache, False, hidden_layers)
            cache.begin(nodes)
        lanes, padded = cache.lanes(), tree.padded(nodes)
        assert lanes is not None, "growing keeps the lanes"
        run = functools.partial(self._by_modules, padded, cache, False, hidden_layers, cache.capacity)
        output: TargetOutput | None = compiled.run(layers, cache, lanes, cache.lengths, nodes, run)
        if output is None:
            return expected
        output = output.cut(tree.nodes, own=compiled.graphs)
        if expected is not None and not self._agree(output.logits[tree.live], expected.logits[tree.live]):
            compiled.refuse("its compiled layers give other logits than its modules")
            return expected
        return output

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        scale = float(expected.abs().max().clamp_min(1e-6))
        return bool((found.double() - expected.double()).abs().max() <= _TOLERANCE.get(self.dtype, 0.2) * scale)

    def _by_modules(
        self,
        tree: DraftTree,
        cache: TreeCache,
        last_only: bool,
        hidden_layers: Sequence[int],
        slots: int | None = None,
    ) -> TargetOutput:
        captured: dict[str | int, Tensor] = {}
        arguments = self._arguments(tree, cache, slots)
        layers = self._layers() if self._decoder_gives_features else None
        arguments["output_hidden_states"] = bool(hidden_layers) and layers is None
        last = tree.live.sum(1) - 1  # (rows,)
        with self._capture(captured, layers, hidden_layers):
            if last_only and self._decoder_gives_features:
                arguments["logits_to_keep"] = torch.unique(last)
            output = self.model(input_ids=tree.tokens, use_cache=True, past_key_values=cache, **arguments)
        features = captured["decoder"] if self._decoder_gives_features else captured["head"]
        logits: Tensor = output.logits
        if last_only:
            if self._decoder_gives_features:
                last = torch.searchsorted(torch.unique(last), last)
            logits = logits[torch.arange(tree.rows, device=logits.device), last].unsqueeze(1)
        states = output.hidden_states if layers is None else {**captured, self.layers: features}
        return TargetOutput(features, logits, {index: states[index] for index in hidden_layers})

    def _layers(self) -> list[nn.Module] | None:
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        return layers_of(decoder, self.layers)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings of `tokens` (any shape) -> (..., hidden)."""
        output: Tensor = self.embedding(tokens)
        return output

    @torch.inference_mode()
    def head_logits(self, features: Tensor) -> Tensor:
        """The frozen LM head over features (..., hidden) -> (..., vocab), scaled and capped as the model does."""
        output: Tensor = self.lm_head(features)
        if self.logit_scale != 1.0:
            output = output * self.logit_scale
        cap = getattr(self.config, "final_logit_softcapping", None)
        return output if cap is None else cap * torch.tanh(output / cap)

    def head_rows(self, tokens: Tensor) -> Tensor:
        """The LM head's weight rows for `tokens` (n,) -> (n, hidden), in the scale of the model's logits."""
        head = self.lm_head
        weight = head.unpack() if isinstance(head, PackedLinear) else head.weight
        assert isinstance(weight, Tensor), "an LM head has a weight"
        rows = weight.detach()[tokens]
        return rows if self.logit_scale == 1.0 else rows * self.logit_scale

    def head_bias(self, tokens: Tensor) -> Tensor | None:
        """The LM head's bias for `tokens` (n,), in the scale of the model's logits; None where it has none."""
        bias = getattr(self.lm_head, "bias", None)
        return None if bias is None else bias.detach()[tokens] * self.logit_scale

    def _check(self, tree: DraftTree, cache: TreeCache, hidden_layers: Sequence[int]) -> None:
        if tree.rows != cache.rows:
            raise ValueError(f"the tree has {tree.rows} rows, the cache {cache.rows}: they must be equal")
        for index in hidden_layers:
            if not 0 <= index <= self.layers:
                raise ValueError(f"hidden layer {index} does not exist: this target has 0 to {self.layers}")

    def _positions(self, tree: DraftTree, cache: TreeCache) -> Tensor:
        lengths = torch.tensor(cache.lengths, device=tree.tokens.device)
        positions = lengths.unsqueeze(1) + tree.depths
        if self.context_length is not None:  # drafts beyond the context are never emitted; learned positions end there
            positions = positions.clamp_max(self.context_length - 1)
        return positions

    def _arguments(self, tree: DraftTree, cache: TreeCache, slots: int | None = None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"position_ids": self._positions(tree, cache)}
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

    @contextmanager
    def _capture(
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

    @torch.inference_mode()
    def _probe(self) -> None:
        """Two tokens through the model: does it use our cache, and is the decoder's output what the head reads?"""
        self._decoder_gives_features = False  # known only after the forward below
        self.logit_scale = 1.0
        cache = self.new_cache()
        captured: dict[str | int, Tensor] = {}
        tree = DraftTree.chain(torch.zeros(1, 2, dtype=torch.long, device=self.device))
        cache.begin(2)
        name = type(self.model).__name__
        try:
            with self._capture(captured):
                arguments = self._arguments(tree, cache)
                self.model(input_ids=tree.tokens, use_cache=True, past_key_values=cache, **arguments)
        except (TypeError, KeyError, AttributeError, RuntimeError, ValueError, IndexError) as error:
            raise UnsupportedModelError(
                f"{name} can't take a tree: a two-token forward with a 4-D mask, position_ids and Haast's cache "
                f"failed with {type(error).__name__}: {error}"
            ) from error
        if len(cache.updated_layers) != self.layers or "head" not in captured:
            raise UnsupportedModelError(
                f"{name} keeps state outside the KV cache (it stored {len(cache.updated_layers)} of {self.layers} "
                f"layers there), so rejected tokens can't be removed; use a model whose layers are all attention"
            )
        self._decoder_gives_features = "decoder" in captured and torch.equal(captured["decoder"], captured["head"])
        self._probe_tree()

    def use_one_call(self) -> bool:
        """Run all decoder layers in one native call from here on, if the packed and fused model allows it.

        The layers are tried on a small tree with a past: the call is used only if it gives what the modules give.
        """
        decoder: Any = self.model.get_decoder()  # type: ignore[no-untyped-call]
        names = {name for name, _ in decoder.named_children()}
        if names != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            return False
        stack = NativeStack.of(list(decoder.layers), decoder.norm, decoder.rotary_emb)
        if stack is None:
            return False
        device, middle = self.device, self.layers // 2
        first = DraftTree.chain(torch.arange(3, device=device).expand(2, -1) % self.vocab_size)
        tree = DraftTree.from_parents(
            torch.arange(8, device=device).view(2, 4) % self.vocab_size, torch.tensor([[-1, 0, 0, 1]] * 2)
        )
        found = []
        for each in (None, stack):
            self._stack = each
            cache = self.new_cache(2)
            assert self._stack is each, "nothing has changed the model since the stack was built"
            self.forward(first, cache)
            cache.commit([range(3), range(2)])
            output = self.forward(tree, cache, hidden_layers=(middle, self.layers))
            found.append((output.logits, output.features, *output.hidden.values()))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found, strict=True))
        self._stack = stack if same else None
        return same

    def _measure_scale(self, features: Tensor, logits: Tensor) -> None:
        """Some models multiply what their LM head gives (Cohere, Granite): `logit_scale` is by how much."""
        raw, logits = self.lm_head(features).double(), logits.double()
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.atanh((logits / cap).clamp(-0.999, 0.999))
        scale = float((raw * logits).sum() / raw.square().sum().clamp_min(1e-12))
        self.logit_scale = 1.0 if abs(scale - 1) < 0.01 or not scale > 0 else scale

    @torch.inference_mode()
    def _probe_tree(self) -> None:
        """Does a node of a tree answer as in a chain of its own path, whatever its slot and its row's neighbour?

        A model that takes positions from slots, or looks through the mask, fails here.
        """
        past, path, twin = [3, 1, 4, 1, 5], [2, 6, 5], [9, 2]
        past, path, twin = ([i % self.vocab_size for i in tokens] for tokens in (past, path, twin))
        both = torch.tensor([past + path, twin + [0] * 6], device=self.device)
        live = torch.tensor([[True] * 8, [True] * 2 + [False] * 6], device=self.device)
        cache = self.new_cache(2)
        chain = self.forward(DraftTree.chain(both, live), cache)
        self._measure_scale(chain.features[0], chain.logits[0])
        expected = chain.logits[0, 5:].double()  # (3, vocab)
        cache.commit([range(5), range(2)])
        # Slots 0 1 2 3 4 hold the path's nodes at 0, 3 and 4; between them stand a sibling and its child.
        tokens = torch.tensor([[path[0], 0, past[0], path[1], path[2]]] * 2, device=self.device)
        parents = torch.tensor([[-1, 0, 1, 0, 3]] * 2, device=self.device)
        found = self.forward(DraftTree.from_parents(tokens, parents), cache).logits[0, [0, 3, 4]].double()
        error, scale = float((found - expected).abs().max()), float(expected.abs().max())
        tolerance = _TOLERANCE.get(self.dtype, 0.2)
        if not error <= tolerance * max(scale, 1e-6):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} can't verify a tree: a node's logits differ by {error:.2g} (of "
                f"{scale:.2g}) from those of its path alone, so it takes positions or masks otherwise than given"
            )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse what can't be drafted for, by class name and reason, before any work."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; Haast drafts for decoder-only causal LMs")
    if seams.carries_state(model):
        raise UnsupportedModelError(
            f"{name} carries a recurrent state (SSM or linear attention): the state of rejected tokens can't be "
            f"removed, so a tree can't be verified; use an attention-only model"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UnsupportedModelError(
            f"{name} has local attention layers that measure distance in cache slots, where a tree's nodes stand "
            f"beside one another; a model with global or sliding-window attention works"
        )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _GATHERABLE
    if kinds:
        raise UnsupportedModelError(
            f"{name} has layers of kind {sorted(kinds)}, whose state can't be gathered by tree path; "
            f"supported kinds are {sorted(_GATHERABLE)}"
        )
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(f"{name} has no LM head; load it with AutoModelForCausalLM")


def choose_attention(model: PreTrainedModel) -> None:
    """Switch to the attention implementation that takes a tree, by transformers' own switch."""
    # Models whose attention is more than scores and softmax (sinks, say) support only their own eager code.
    model.set_attn_implementation(attention.NAME if seams.takes_registered_attention(model) else "eager")
