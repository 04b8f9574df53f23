"""The target: any Hugging Face causal LM, unpatched, that answers for a tree of nodes.

Owns the one place where Haast calls a transformers model: logits and features (the LM head's input, i.e. the state
after the final norm; EAGLE, arXiv 2401.15077, section 3) for every node of a tree, in one forward. Knows nothing of
drafters or acceptance. Nothing stays on the model: hooks live for the length of a call; only the attention
implementation is chosen, through transformers' own switch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from haast import compat, native
from haast.device import without_autograd
from haast.errors import HeadMismatchError, KVPoolError
from haast.target.compiled import CompiledLayers, Progress
from haast.target.device_map import dispatched, mesh_of, read_weight, sharded, whole
from haast.target.faster import CompiledForward, NativeForward
from haast.target.hf import ModuleForward, TargetOutput, TreeForward
from haast.target.kv_budget import KVBudget
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import BLOCK, KVPool
from haast.target.native_cpu import NativeStack
from haast.target.packing import PackedLinear
from haast.target.precision import precision, quantisation, weight_rows
from haast.target.probe import Probed, probe
from haast.target.ranks import Ranks
from haast.target.support import choose_attention, refuse_unsupported
from haast.tree import DraftTree

__all__ = ["Probed", "Target", "TargetOutput", "choose_attention", "refuse_unsupported"]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def end_tokens(generation: GenerationConfig | None, config: PreTrainedConfig) -> tuple[int, ...]:
    """Tokens that end an answer, from the generation configuration, else the model's; empty where there are none."""
    ends = None if generation is None else generation.eos_token_id
    ends = config.eos_token_id if ends is None else ends
    if ends is None:
        return ()
    return tuple(int(end) for end in ends) if isinstance(ends, list | tuple) else (int(ends),)


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of a model: hooks and attention are set for the length of a forward, so one forward runs at a time."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


class Target:
    """A frozen causal LM behind one method, `forward`.

    Args:
        model: any transformers causal LM in eval mode; on one device, on several (`device_map`), or cut over processes
            (`tp_plan`), see docs/devices.md.
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
        # The embedding may be padded past the tokenizer's vocabulary; the distribution is over what the head emits.
        self.vocab_size = int(self.config.vocab_size)
        self.lock = lock_of(model)  # held while the model runs, by every Target of it
        self._native: NativeForward | None = None
        self._cache: KVCache | None = None
        self._budget = KVBudget()
        self._state: object = None
        self.scheduler: Any = None  # of all requests on this target; the engine's
        self._compiled: CompiledLayers | None = None
        choose_attention(model)
        self._forward_of = ModuleForward(model)
        mesh = mesh_of(model)
        self.ranks = None if mesh is None else Ranks(mesh)  # the processes that hold the model together
        self.probed = probe(self._forward_of) if probed is None else probed
        if self.ranks is not None:  # it decides the shape of what processes exchange, so all have the first one's word
            gives_features = self.ranks.share([self.probed.decoder_gives_features])[0]
            self.probed = replace(self.probed, decoder_gives_features=bool(gives_features))
        self._forward_of.decoder_gives_features = self.probed.decoder_gives_features
        self.logit_scale = self._forward_of.logit_scale = self.probed.logit_scale

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a KV pool and requests of its own."""
        return {**vars(self), "lock": None, "_cache": None, "scheduler": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = lock_of(self.model)

    @property
    def lm_head(self) -> nn.Module:
        """The module from features to logits; packed where the target is."""
        return self._forward_of.lm_head

    @property
    def packed(self) -> bool:
        """Whether the linear layers are packed 16-bit ones, run by the native kernels."""
        return isinstance(self.lm_head, PackedLinear) and not self.lm_head.reference

    @property
    def packing(self) -> str:
        """How the linear layers are held: "f16", "int8", a quantisation's name, or "off"."""
        return self.lm_head.form if isinstance(self.lm_head, PackedLinear) else quantisation(self.model) or "off"

    @property
    def precision(self) -> str:
        """How precisely the weights are held, in one word: see `haast.target.precision`."""
        return precision(self.model, self.lm_head, self.dtype)

    def step_threads(self) -> AbstractContextManager[None]:
        """Wrap a decode step in it: the threads go to the native kernels where they do the work."""
        return native.sole_threads() if self.packed else nullcontext()

    @property
    def device(self) -> torch.device:
        """Where trees are sent, and features and logits come back: where the LM head computes."""
        return self._forward_of.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self._forward_of.dtype

    def check_place(self, built: tuple[torch.device, torch.dtype]) -> None:
        """Raises HeadMismatchError where the model has left the device and dtype that a drafter was built for."""
        self.locate()
        if built != (self.device, self.dtype):
            raise HeadMismatchError(
                f"the model is on {self.device} in {self.dtype} now; its drafter was made for it on {built[0]} in "
                f"{built[1]}: move the model first, then make the drafter"
            )

    @property
    def context_length(self) -> int | None:
        """Positions the target was made for; None where its config does not say."""
        return self._forward_of.context_length

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens with which the model ends an answer."""
        return end_tokens(self.model.generation_config, self.config)

    @property
    def spread(self) -> str:
        """How the model is more than one module tree on one device, in words; empty where it is not."""
        if self.ranks is not None:
            return "sharded over processes"
        return "spread over devices (device_map)" if dispatched(self.model) else ""

    @property
    def one_call(self) -> bool:
        """Whether all decoder layers run in one native call."""
        return self._native is not None

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
        self.locate()
        if isinstance(self.lm_head, PackedLinear):
            raise ValueError(
                "packed linears are native code, which can't be compiled: load the model with packing='off'"
            )
        if self.spread:
            raise ValueError(f"the layers of a model that is {self.spread} can't be compiled: leave it out")
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

    def new_cache(self, rows: int = 1, capacity: int = 256) -> KVCache:
        """Empty keys and values for `rows` sequences of at most `capacity` slots, in a pool of their own."""
        self.refresh()
        cache = self._cache_of(rows * -(-capacity // BLOCK) * BLOCK, 0)
        return cache.bind([cache.pool.sequence() for _ in range(rows)])

    def _cache_of(self, tokens: int, retain: int) -> KVCache:
        return self._forward_of.new_cache(KVPool(tokens, retain), self._budget.dtype)

    @property
    def cache(self) -> KVCache:
        """Keys and values of all requests, in `pool`. Made at first use."""
        if self._cache is None:
            with self.lock:
                if self._cache is None:
                    slots = self._budget.slots(self.kv_bytes_per_token, self.device)
                    self._cache = self._cache_of(slots, self._budget.kept)
        return self._cache

    @property
    def pool(self) -> KVPool:
        """The blocks that all requests on this target share."""
        return self.cache.pool

    @contextmanager
    def scratch_pool(self, tokens: int) -> Iterator[None]:
        """Inside the block, `cache` and `pool` are small ones of their own: for measurements that leave no trace."""
        with self.lock:
            kept, self._cache = self._cache, self._cache_of(tokens, 0)
            try:
                yield
            finally:
                self._cache = kept

    def use_pool(
        self, tokens: int | None = None, *, size: int | None = None, retain: int | None = None, kv_dtype: str = "auto"
    ) -> None:
        """Set the KV pool's budget, before its first use; see `haast.target.kv_budget.KVBudget`.

        Raises:
            KVPoolError: an impossible budget, or the pool is in use already.
        """
        budget = KVBudget(tokens, size, retain, kv_dtype)
        with self.lock:
            if self._cache is not None:
                raise KVPoolError("the KV pool is in use already: set its budget before the first request")
            self._budget = budget
            budget.slots(self.kv_bytes_per_token, self.device)

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values."""
        return self.probed.kv_bytes_per_token // (2 if self._budget.dtype and self.dtype.itemsize == 4 else 1)

    def locate(self) -> None:
        """Look where the model stands now: its LM head, device and dtype."""
        self._forward_of.refresh()

    def refresh(self) -> None:
        """Notice what was changed on the model since the last request: weights, hooks, placement."""
        self.locate()
        if self._native is not None and not self._native.current():
            self._native = None  # the model was moved or changed: its own modules answer from here on
        state = (self.one_call, compat.weights_state(self.model), compat.foreign_hooks(self.model.modules()))
        if state != self._state and self._cache is not None:
            self._cache.pool.clear()
        self._state = state

    @without_autograd
    def forward(
        self, tree: DraftTree, cache: KVCache, *, last_only: bool = False, hidden_layers: Sequence[int] = ()
    ) -> TargetOutput:
        """Run every node of `tree` after each row's committed past. The cache holds the nodes until they are kept.

        Args:
            tree: (rows, nodes); positions are the row's committed length plus the node's depth.
            cache: of this target, bound to as many rows.
            last_only: logits of each row's last live node only (prefill), as (rows, 1, vocab).
            hidden_layers: HF `hidden_states` indices to return besides (0 is the embedding's output).

        Raises:
            ValueError: the tree and the cache differ in rows, or a layer index does not exist.
            PoolFullError: the pool has no room for the nodes now.
        """
        if tree.rows != cache.rows:
            raise ValueError(f"the tree has {tree.rows} rows, the cache {cache.rows}: they must be equal")
        for index in hidden_layers:
            if not 0 <= index <= self.layers:
                raise ValueError(f"hidden layer {index} does not exist: this target has 0 to {self.layers}")
        cache.begin(tree.nodes)
        for way in self._faster_ways():
            output = way.run(tree, cache, last_only, hidden_layers)
            if output is not None:
                return output
        return self._forward_of.run(tree, cache, last_only, hidden_layers)

    def _faster_ways(self) -> Iterator[TreeForward]:
        if self._native is not None:
            yield self._native
        if self.compiled is not None:
            yield CompiledForward(self.compiled, self._forward_of)

    @without_autograd
    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings of `tokens` (any shape) -> (..., hidden)."""
        output: Tensor = self.embedding(tokens).to(tokens.device)
        return output

    @without_autograd
    def head_logits(self, features: Tensor) -> Tensor:
        """The frozen LM head over features (..., hidden) -> (..., vocab), scaled and capped as the model does."""
        return self._forward_of.head_logits(features)

    def head_rows(self, tokens: Tensor) -> Tensor:
        """The LM head's weight rows for `tokens` (n,) -> (n, hidden), in the scale of the model's logits."""
        head = self.lm_head
        weight = weight_rows(head, self.hidden_size, self.dtype)
        rows = weight[tokens.to(weight.device)].to(self.device)
        return rows if self.logit_scale == 1.0 else rows * self.logit_scale

    def head_bias(self, tokens: Tensor) -> Tensor | None:
        """The LM head's bias for `tokens` (n,), in the scale of the model's logits; None where it has none."""
        bias = read_weight(self.lm_head, "bias")
        return None if bias is None else bias[tokens.to(bias.device)].to(self.device) * self.logit_scale

    def borrowed(self, module: nn.Module) -> nn.Module:
        """`embedding` or `lm_head` for a drafter, which runs in the first process only: a whole copy of a sharded one.

        All processes must ask for it; only the first one gets a copy.
        """
        if not sharded(module):
            return module
        assert self.ranks is not None, "a sharded model has ranks"
        copied = whole(module)
        return copied if self.ranks.leads else module

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
        fast = NativeForward(stack, self._forward_of)
        device, middle = self.device, self.layers // 2
        first = DraftTree.chain(torch.arange(3, device=device).expand(2, -1) % self.vocab_size)
        tree = DraftTree.from_parents(
            torch.arange(8, device=device).view(2, 4) % self.vocab_size, torch.tensor([[-1, 0, 0, 1]] * 2)
        )
        found = []
        for each in (None, fast):
            self._native = each
            cache = self.new_cache(2, 32)
            self.forward(first, cache)
            cache.advance([3, 2])
            output = self.forward(tree, cache, hidden_layers=(middle, self.layers))
            found.append((output.logits, output.features, *output.hidden.values()))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found, strict=True))
        self._native = fast if same else None
        return same
