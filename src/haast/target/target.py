"""The target model: any Hugging Face causal LM, unpatched, run over a tree of nodes in one forward.

Owns the one place where Haast calls a transformers model: logits and features (the LM head's input, i.e. the state
after the final norm; EAGLE, arXiv 2401.15077, section 3) for every node of a tree, in one forward. Knows nothing of
drafters or acceptance. Leaves nothing on the model: hooks are removed after each call, and only the attention
implementation is changed, through transformers' own switch.
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
from haast.target.device_map import dispatched, mesh_of, read_weight, sharded, unsharded_copy
from haast.target.faster import CompiledForward, NativeForward
from haast.target.hf import BEFORE_NORM, ModuleForward, TargetOutput, TreeForward
from haast.target.kv_budget import KVBudget
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import BLOCK, KVPool
from haast.target.native_cpu import NativeStack
from haast.target.packing import PackedLinear
from haast.target.precision import precision, quantisation, weight_rows
from haast.target.probe import ProbeResult, probe
from haast.target.prompt_inputs import PromptInputs
from haast.target.ranks import Ranks
from haast.target.support import choose_attention, refuse_unsupported
from haast.tree import DraftTree

__all__ = ["ProbeResult", "PromptInputs", "Target", "TargetOutput", "choose_attention", "refuse_unsupported"]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def end_tokens(generation: GenerationConfig | None, config: PreTrainedConfig) -> tuple[int, ...]:
    """End-of-sequence token ids, from the generation configuration, else the model's; empty if neither has any."""
    ends = None if generation is None else generation.eos_token_id
    ends = config.eos_token_id if ends is None else ends
    if ends is None:
        return ()
    return tuple(int(end) for end in ends) if isinstance(ends, list | tuple) else (int(ends),)


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of a model. A forward sets hooks and attention on the model, so only one may run at a time."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


class Target:
    """A frozen causal LM behind one method, `forward`.

    Args:
        model: any transformers causal LM; it is put in eval mode. On one device, on several (`device_map`), or sharded
            over processes (`tp_plan`), see docs/devices.md.
        tokenizer: optional; needed to encode prompts and decode tokens.
        probed: `Target.probed` of an earlier Target of the same model object; skips the probe.

    Raises:
        UnsupportedModelError: encoder-decoder, a state outside the cache, no LM head, or attention without trees.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        probed: ProbeResult | None = None,
    ) -> None:
        refuse_unsupported(model)
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config()
        self.hidden_size = int(self.config.hidden_size)
        self.layers = int(self.config.num_hidden_layers)
        self.embedding: nn.Module = model.get_input_embeddings()
        # The embedding may be padded past the tokenizer's vocabulary; the distribution is over the LM head's outputs.
        self.vocab_size = int(self.config.vocab_size)
        self.lock = lock_of(model)  # held while the model runs; shared by all Targets of this model
        self._native: NativeForward | None = None
        self._cache: KVCache | None = None
        self._budget = KVBudget()
        self._state: object = None
        self.scheduler: Any = None  # schedules all requests on this target; set by the engine
        self._compiled: CompiledLayers | None = None
        choose_attention(model)
        self._modules = ModuleForward(model)
        mesh = mesh_of(model)
        self.ranks = None if mesh is None else Ranks(mesh)  # the processes that the model is sharded over
        self.probed = probe(self._modules) if probed is None else probed
        self._modules.use_layout(self.probed.layout)
        if self.ranks is not None:  # all use the first process's result: it decides the shapes that they exchange
            gives_features = self.ranks.share([self.probed.decoder_gives_features])[0]
            self.probed = replace(self.probed, decoder_gives_features=bool(gives_features))
        self._modules.decoder_gives_features = self.probed.decoder_gives_features
        self.logit_scale = self._modules.logit_scale = self.probed.logit_scale

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not share the KV pool, the lock or the scheduler."""
        return {**vars(self), "lock": None, "_cache": None, "scheduler": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = lock_of(self.model)

    @property
    def lm_head(self) -> nn.Module:
        """The module that maps features to logits; a `PackedLinear` if the target is packed."""
        return self._modules.lm_head

    @property
    def packed(self) -> bool:
        """Whether the linear layers are `PackedLinear`s that run in the native kernels."""
        return isinstance(self.lm_head, PackedLinear) and not self.lm_head.reference

    @property
    def packing(self) -> str:
        """How the linear layers are packed: "f16", "int8", "gguf", the name of a quantisation, or "off"."""
        return self.lm_head.packing if isinstance(self.lm_head, PackedLinear) else quantisation(self.model) or "off"

    @property
    def precision(self) -> str:
        """Precision of the weights in one word, e.g. "float16" or "int8": see `haast.target.precision`."""
        return precision(self.model, self.lm_head, self.dtype)

    def step_threads(self) -> AbstractContextManager[None]:
        """Context for a decode step: gives all CPU threads to the native kernels if the target is packed."""
        return native.sole_threads() if self.packed else nullcontext()

    @property
    def device(self) -> torch.device:
        """The LM head's device: trees must be on it, and features and logits are returned on it."""
        return self._modules.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self._modules.dtype

    def check_device(self, built: tuple[torch.device, torch.dtype]) -> None:
        """Raise HeadMismatchError unless the model has the device and dtype that a drafter was `built` for."""
        self.locate()
        if built != (self.device, self.dtype):
            raise HeadMismatchError(
                f"the model is on {self.device} in {self.dtype} now; its drafter was made for {built[0]} in "
                f"{built[1]}: move the model first, then make the drafter"
            )

    @property
    def context_length(self) -> int | None:
        """Context length of the target in tokens; None if its configuration has none."""
        return self._modules.context_length

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence token ids."""
        return end_tokens(self.model.generation_config, self.config)

    @property
    def spread(self) -> str:
        """How the model is distributed, in words; empty for a model in one process on one device."""
        if self.ranks is not None:
            return "sharded over processes"
        return "spread over devices (device_map)" if dispatched(self.model) else ""

    @property
    def recurrent(self) -> bool:
        """Whether the model has recurrent layers: a text can then be taken up only where its state was kept."""
        return self._modules.recurrence is not None

    @property
    def one_call(self) -> bool:
        """Whether all decoder layers run in one native call."""
        return self._native is not None

    def use_compiled_layers(
        self, backend: str | Callable[..., Any] = "inductor", progress: Progress | None = None
    ) -> None:
        """Compile the decoder layers from the next forward on. Prefill still runs the modules, which are not changed.

        Args:
            backend: of torch.compile. The default needs a C++ compiler on the CPU; without one the layers run
                uncompiled.
            progress: wraps each compilation; called with a description of it.

        Raises:
            ValueError: the linear layers are packed, so native code runs them, or the model is distributed.
        """
        self.locate()
        if isinstance(self.lm_head, PackedLinear):
            raise ValueError(
                "packed linear layers run in native code, which can't be compiled: load the model with packing='off'"
            )
        if self.spread or self.recurrent:
            kind = f"that is {self.spread}" if self.spread else "with recurrent states"
            raise ValueError(f"the layers of a model {kind} can't be compiled: use compile='off'")
        self._compiled = CompiledLayers(self.device, backend, progress)

    def use_modules(self) -> None:
        """Stop compiling: run the decoder layers as modules from the next forward on."""
        self._compiled = None

    @property
    def compiled(self) -> CompiledLayers | None:
        """The compiled decoder layers; None if compilation was not asked for or has failed."""
        return None if self._compiled is None or self._compiled.problem else self._compiled

    @property
    def compiling(self) -> str:
        """State of compilation: "off", "on", or "off (reason)" if it was asked for and failed."""
        if self._compiled is None:
            return "off"
        return f"off ({self._compiled.problem})" if self._compiled.problem else "on"

    def new_cache(self, rows: int = 1, capacity: int = 256) -> KVCache:
        """An empty KV cache for `rows` sequences of at most `capacity` slots, in a pool of its own."""
        self.refresh()
        cache = self._make_cache(rows * -(-capacity // BLOCK) * BLOCK, 0)
        return cache.bind([cache.pool.sequence() for _ in range(rows)])

    def _make_cache(self, tokens: int, retain: int) -> KVCache:
        snapshots = self._budget.snapshots(self.probed.layout, self.kv_bytes_per_token, self.device, retain)
        return self._modules.new_cache(KVPool(tokens, retain, snapshots), self._budget.dtype)

    @property
    def cache(self) -> KVCache:
        """Keys and values of all requests, in `pool`. Created at first use."""
        if self._cache is None:
            with self.lock:
                if self._cache is None:
                    slots = self._budget.slots(self.kv_bytes_per_token, self.device, self.recurrent)
                    self._cache = self._make_cache(slots, self._budget.kept)
        return self._cache

    @property
    def pool(self) -> KVPool:
        """The blocks that all requests on this target share."""
        return self.cache.pool

    @contextmanager
    def scratch_pool(self, tokens: int) -> Iterator[None]:
        """Inside the block, replace `cache` and `pool` by small temporary ones; for measurements."""
        with self.lock:
            saved, self._cache = self._cache, self._make_cache(tokens, 0)
            try:
                yield
            finally:
                self._cache = saved

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
            budget.slots(self.kv_bytes_per_token, self.device, self.recurrent)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values."""
        return self.probed.kv_bytes_per_token // (2 if self._budget.dtype and self.dtype.itemsize == 4 else 1)

    def locate(self) -> None:
        """Read the model's LM head, device and dtype again, in case the model was moved."""
        self._modules.refresh()

    def refresh(self) -> None:
        """Check whether the model has changed since the last request (weights, hooks, device); if so clear the pool."""
        self.locate()
        if self._native is not None and not self._native.current():
            self._native = None  # the model was moved or changed: run its modules from here on
        state = (self.one_call, compat.weights_state(self.model), compat.foreign_hooks(self.model.modules()))
        if state != self._state and self._cache is not None:
            self._cache.pool.clear()
        self._state = state

    @without_autograd
    def forward(
        self,
        tree: DraftTree,
        cache: KVCache,
        *,
        last_only: bool = False,
        hidden_layers: Sequence[int] = (),
        inputs: PromptInputs | None = None,
    ) -> TargetOutput:
        """Run every node of `tree` after each row's committed past. The nodes' keys and values stay uncommitted.

        Args:
            tree: (rows, nodes); positions are the row's committed length plus the node's depth.
            cache: of this target, bound to the same number of rows. `KVCache.keep` and `advance` commit nodes.
            last_only: logits of each row's last live node only (prefill), as (rows, 1, vocab).
            hidden_layers: HF `hidden_states` indices to return in addition (0 is the embedding's output, the number of
                layers the features), and `haast.target.hf.BEFORE_NORM`.
            inputs: of a prompt that has more than tokens; then the tree is the whole prompt, and the cache empty.

        Raises:
            ValueError: the tree and the cache differ in rows, or a layer index does not exist.
            PoolFullError: the pool has no room for the nodes now.
        """
        if tree.rows != cache.rows:
            raise ValueError(f"the tree has {tree.rows} rows, the cache {cache.rows}: they must be equal")
        for index in hidden_layers:
            if not 0 <= index <= self.layers and index != BEFORE_NORM:
                raise ValueError(f"hidden layer {index} does not exist: this target has 0 to {self.layers}")
        cache.begin(tree.nodes)
        for faster in self._faster_forwards() if inputs is None else ():
            output = faster.run(tree, cache, last_only, hidden_layers)
            if output is not None:
                return output
        return self._modules.run(tree, cache, last_only, hidden_layers, inputs)

    def _faster_forwards(self) -> Iterator[TreeForward]:
        if self._native is not None:
            yield self._native
        if self.compiled is not None:
            yield CompiledForward(self.compiled, self._modules)

    @without_autograd
    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings of `tokens` (any shape) -> (..., hidden)."""
        output: Tensor = self.embedding(tokens).to(tokens.device)
        return output

    @without_autograd
    def head_logits(self, features: Tensor) -> Tensor:
        """Logits (..., vocab) of the frozen LM head for features (..., hidden), scaled and capped as the model does."""
        return self._modules.head_logits(features)

    def head_rows(self, tokens: Tensor) -> Tensor:
        """The LM head's weight rows for `tokens` (n,) -> (n, hidden), in the scale of the model's logits."""
        head = self.lm_head
        rows = weight_rows(head, self.hidden_size, self.dtype, tokens).to(self.device)
        return rows if self.logit_scale == 1.0 else rows * self.logit_scale

    def head_bias(self, tokens: Tensor) -> Tensor | None:
        """The LM head's bias for `tokens` (n,), in the scale of the model's logits; None if it has no bias."""
        bias = read_weight(self.lm_head, "bias")
        return None if bias is None else bias[tokens.to(bias.device)].to(self.device) * self.logit_scale

    def borrowed(self, module: nn.Module) -> nn.Module:
        """`embedding` or `lm_head` for a drafter. A sharded one is gathered, since drafters run in the first process.

        All processes must call this together; only the first one gets the unsharded copy.
        """
        if not sharded(module):
            return module
        assert self.ranks is not None, "a sharded model has ranks"
        gathered = unsharded_copy(module)
        return gathered if self.ranks.leads else module

    def use_one_call(self) -> bool:
        """Run all decoder layers in one native call from here on, if the packed and fused model allows it.

        Compares both forwards on a small tree with a past and uses the native call only if their outputs agree.
        Returns whether it is used.
        """
        decoder: Any = self.model.get_decoder()  # type: ignore[no-untyped-call]
        names = {name for name, _ in decoder.named_children()}
        if self.recurrent or names != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            return False
        stack = NativeStack.of(list(decoder.layers), decoder.norm, decoder.rotary_emb)
        if stack is None:
            return False
        fast = NativeForward(stack, self._modules)
        device, middle = self.device, self.layers // 2
        first = DraftTree.chain(torch.arange(3, device=device).expand(2, -1) % self.vocab_size)
        tree = DraftTree.from_parents(
            torch.arange(8, device=device).view(2, 4) % self.vocab_size, torch.tensor([[-1, 0, 0, 1]] * 2)
        )
        outputs = []
        for native_forward in (None, fast):
            self._native = native_forward
            cache = self.new_cache(2, 32)
            self.forward(first, cache)
            cache.advance([3, 2])
            output = self.forward(tree, cache, hidden_layers=(middle, self.layers))
            outputs.append((output.logits, output.features, *output.hidden.values()))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*outputs, strict=True))
        self._native = fast if same else None
        return same
