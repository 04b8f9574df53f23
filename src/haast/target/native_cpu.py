"""All decoder layers of a model in one native call: `NativeStack`.

Owns the recognition of layers that it can run (Llama's pre-norm layers: Llama, Mistral, Qwen2, Qwen3, SmolLM2 and draft
heads made of such layers), their weights in one contiguous allocation, and tables of rotary angles. Knows nothing of
drafting. The model's own modules stay usable and give the same bits: a stack only saves the Python and the small
operators between them, which take as long as the arithmetic in a small model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from haast import native
from haast.compat import foreign_hooks
from haast.native import WEIGHT_FORMS
from haast.native.stack import FORMS, PLAIN, CBlockTables, CLayer, CPass, CStack, CWeight, Refusal, run_stack
from haast.target.fusing import FusedAttention, FusedRMSNorm, FusedSwiGLU
from haast.target.kv_pool import BLOCK
from haast.target.memory import release_freed_memory
from haast.target.packing import PackedEmbedding, PackedLinear

_CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # RoPE types whose angles depend on a forward's largest position
_RELEASE = 1 << 23  # bytes of moved weights after which their old memory is returned to the system
_ALIGN = 64


class NativeStack:
    """Decoder layers that run in one call over a tree of nodes, with the past's keys and values in a KV pool.

    Build with `of`, which returns None for unsupported layers.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        parts: Sequence[_Layer],
        norm: FusedRMSNorm | None,
        rotary: nn.Module,
        window: int,
    ) -> None:
        """Use `of`, which checks the layers; `parts` are the layers' modules."""
        self._modules, self._rotary = _modules(layers, norm), rotary
        attention, feed_forward, _, after = parts[0]
        self.layers, self._lanes, self.hidden = len(parts), 2 * len(parts), feed_forward.down_proj.out_features
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self._arena = _gather([linear for part in parts for linear in part.linears])
        self._weights = list[object]()  # structures that others point to
        self._structures = (CLayer * len(parts))(*(part.structure(window, self._weights) for part in parts))
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, feed_forward.down_proj.in_features)
        numbers = (after.variance_epsilon, float(attention.scaling))
        final_norm = None if norm is None else norm.weight.data_ptr()
        self._stack = CStack(self._structures, len(parts), *sizes, *numbers, final_norm)
        self._angles = torch.empty(2, 0, self.head_dim)  # cosines and sines per position
        self._memory = memory_of(self._modules)  # what the structures point to
        self._built_from = fingerprint(self._modules)

    @classmethod
    def of(
        cls, layers: Sequence[nn.Module], norm: nn.Module | None, rotary: nn.Module, window: int = 0
    ) -> NativeStack | None:
        """The stack of these packed and fused layers; None if one of them is not supported.

        Args:
            layers: modules with a `FusedAttention`, a `FusedSwiGLU` and two norms (the first may be an identity).
            norm: the norm after the last layer; None for none.
            rotary: module that returns cosines and sines for positions.
            window: sliding window of every layer in positions, overriding its configuration; 0: as configured.

        The caller must test that the layers combine their parts as Llama does: see `Target.use_one_call`.
        """
        kind = getattr(rotary, "rope_type", "default")
        if not isinstance(kind, str) or kind in LENGTH_DEPENDENT_ROPE:  # not a str: a RoPE type per kind of layer
            return None
        parts = [part for part in map(_Layer.of, layers) if part is not None]
        if not parts or len(parts) < len(layers) or not (norm is None or isinstance(norm, FusedRMSNorm)):
            return None
        norms = [norm, *(each for part in parts for each in (part.before, part.after))]
        eps = {each.variance_epsilon for each in norms if isinstance(each, FusedRMSNorm)}
        if len(eps) > 1 or len({part.sizes for part in parts}) > 1 or parts[0].attention.head_dim % 2:
            return None
        return cls(layers, parts, norm, rotary, window)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of a stack is None: its owner runs the modules until it builds its own stack."""
        return type(None), ()

    def current(self, layers: Sequence[nn.Module] | None = None, norm: nn.Module | None = None) -> bool:
        """Whether these modules (the stack's own if None) are those that the stack was built from, unchanged.

        False if a weight was replaced, moved or converted, a setting changed, or a hook added to a layer.
        """
        return fingerprint(self._modules if layers is None else _modules(layers, norm)) == self._built_from

    def run(
        self,
        states: Tensor,
        positions: Tensor,
        seen: Tensor,
        past: Sequence[int] | Tensor,
        store: Tensor,
        tables: Tensor,
        capture: Sequence[int] = (),
        flight_positions: Tensor | None = None,
        shift: int = 0,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all layers; stores keys and values of the nodes in the last slots in flight.

        Slot i of a row is slot `(i + shift) % BLOCK` of block `tables[row, (i + shift) // BLOCK]` of the store. Results
        have the same bits for any block numbers and any other rows in the batch; rows may share blocks of the past.

        Args:
            states: (rows, nodes, hidden) fp32, the embeddings; overwritten.
            positions: (rows, nodes) int64 of the nodes. Slot i of the past holds position i.
            seen: (rows, nodes, flight) bool: which of the slots in flight, after the past, a node attends to. The last
                slots in flight are the nodes.
            past: number of slots per row that all of its nodes attend to; ints, or (rows,) int64.
            store: (2 * layers, kv_heads, slots, head_dim), contiguous: key, value, key, ...; fp32, fp16 or bf16. Keys
                and values are rounded to 16 bits when stored; all arithmetic is fp32.
            tables: (rows, blocks) int32, contiguous. If every layer has a window, blocks before it may be missing.
            capture: layer indices as in HF `hidden_states` (0 the embeddings, last the normed output).
            flight_positions: (rows, flight) int64; the nodes' positions if None. Layers with a window need them if
                more slots than the nodes are in flight.
            shift: 0 for a target, 1 for a draft head.

        Returns:
            the output (rows, nodes, hidden) after the final norm, and the captured states.

        Raises:
            ValueError: tensors that do not fit together; nothing was computed.
        """
        rows, nodes, flight = seen.shape
        blocks, form = self.check_store(store, tables, rows, shift)
        self.check_states(states, rows, nodes)
        in_flight = positions if flight_positions is None else flight_positions
        self._check_flight(seen, positions, in_flight)
        positions, in_flight, seen = positions.contiguous(), in_flight.contiguous(), seen.contiguous()
        lengths, lengths_at = int64s("past", past, rows)
        output = torch.empty_like(states)
        captured = {index: torch.empty_like(states) for index in capture}
        pointers = (ctypes.c_void_p * (self.layers + 1))() if captured else None
        for index, tensor in captured.items():
            pointers[index] = tensor.data_ptr()  # type: ignore[index]
        outputs = (states.data_ptr(), output.data_ptr(), None if pointers is None else ctypes.addressof(pointers))
        inputs = (positions.data_ptr(), in_flight.data_ptr(), lengths_at, seen.data_ptr(), store.data_ptr(), blocks)
        cosine, sine, angles = self.angles()
        arguments = CPass(*outputs, cosine, sine, *inputs, rows, nodes, flight, angles, form)
        result = run_stack(self._stack, arguments)
        if result == -Refusal.FEW_ANGLES:
            arguments.cosine, arguments.sine, arguments.angles = self.angles(int(positions.max()))
            result = run_stack(self._stack, arguments)
        if result:
            refuse(result, lengths, flight, store, tables, shift)
        return output, captured

    def check_store(self, store: Tensor, tables: Tensor, rows: int, shift: int) -> tuple[CBlockTables, int]:
        """Check a store and its block tables (see `run`); returns their C structure and the store's number format.

        Raises:
            ValueError: they do not have the shapes and dtypes that these layers need.
        """
        form = FORMS.get(store.dtype)
        shape = store.shape
        fits = len(shape) == 4 and (shape[0], shape[1], shape[3]) == (self._lanes, self.kv_heads, self.head_dim)
        if not fits or form is None or not (store.is_cpu and store.is_contiguous()) or shape[2] % BLOCK:
            raise ValueError(
                f"a store of {store.dtype} and shape {tuple(shape)} on {store.device} does not fit {self.layers} "
                f"layers of {self.kv_heads} key heads of {self.head_dim}: give ({self._lanes}, {self.kv_heads}, slots, "
                f"{self.head_dim}), slots a multiple of {BLOCK}, fp32, fp16 or bf16, contiguous, on the CPU"
            )
        if (
            tables.dtype is not torch.int32
            or tables.dim() != 2
            or tables.size(0) != rows
            or not (tables.is_cpu and tables.is_contiguous())
            or shift < 0
        ):
            raise ValueError(
                f"block tables are {tables.dtype} of shape {tuple(tables.shape)} on {tables.device}, shift {shift}; "
                f"expected contiguous int32 ({rows}, blocks) on the CPU, and a shift of 0 or more"
            )
        return CBlockTables(tables.data_ptr(), tables.size(1), BLOCK, shift, shape[2]), form

    def check_states(self, states: Tensor, rows: int, *nodes: int) -> None:
        """Raise ValueError unless `states` is contiguous fp32 (rows, *nodes, hidden) on the CPU."""
        shape = (rows, *nodes, self.hidden)
        if states.dtype is not torch.float32 or states.shape != shape or not (states.is_cpu and states.is_contiguous()):
            raise ValueError(
                f"states are {states.dtype} of shape {tuple(states.shape)} on {states.device}; expected contiguous "
                f"fp32 {shape} on the CPU"
            )

    def _check_flight(self, seen: Tensor, positions: Tensor, in_flight: Tensor) -> None:
        """Raise ValueError unless the mask and positions of `run` fit together; `in_flight` may be `positions`."""
        rows, nodes, flight = seen.shape
        if in_flight is positions and flight != nodes and any(layer.window for layer in self._structures):
            raise ValueError(f"{flight} slots are in flight for {nodes} nodes: windows need flight_positions")
        valid = _integers(positions, rows, nodes) and (in_flight is positions or _integers(in_flight, rows, flight))
        if seen.dtype is not torch.bool or flight < nodes or not valid:
            raise ValueError(
                f"seen {tuple(seen.shape)} {seen.dtype}, positions {tuple(positions.shape)} {positions.dtype} and "
                f"flight_positions {tuple(in_flight.shape)} {in_flight.dtype} do not fit: give bool (rows, nodes, "
                "flight), flight at least nodes, and int64 (rows, nodes) and (rows, flight), on the CPU"
            )

    @property
    def pointer(self) -> Any:
        """A ctypes pointer to the stack, for other native structures."""
        return ctypes.pointer(self._stack)

    def angles(self, last: int = 0) -> tuple[int, int, int]:
        """Addresses of the cosines and sines of positions 0 to at least `last`, and the number of positions."""
        if self._angles.shape[1] <= last:
            positions = torch.arange(max(512, 1 << last.bit_length())).unsqueeze(0)
            self._angles = torch.cat(self._rotary(torch.empty(0), position_ids=positions))
        cosine, sine = self._angles
        return cosine.data_ptr(), sine.data_ptr(), self._angles.shape[1]


def int64s(name: str, numbers: Sequence[int] | Tensor, count: int) -> tuple[Any, int]:
    """`count` integers for native code: an object that owns them, which the caller must keep, and their address."""
    if isinstance(numbers, Tensor):
        if not _integers(numbers, count):
            raise ValueError(
                f"{name} is {numbers.dtype} of shape {tuple(numbers.shape)} on {numbers.device}; expected int64 "
                f"({count},) on the CPU"
            )
        numbers = numbers.contiguous()
        return numbers, numbers.data_ptr()
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} numbers for {count} rows: give one for each")
    array = (ctypes.c_int64 * count)(*numbers)
    return array, ctypes.addressof(array)


def _integers(tensor: Tensor, *shape: int) -> bool:
    return tensor.dtype is torch.int64 and tensor.is_cpu and tensor.shape == shape


def refuse(refusal: int, past: Sequence[int], flight: int, store: Tensor, tables: Tensor, shift: int) -> NoReturn:
    """Raise ValueError for a `Refusal` of native code; `flight` is the number of slots after each row's past."""
    lengths = [int(length) for length in past]
    if refusal == -Refusal.FEW_ANGLES or min(lengths) < 0:
        raise ValueError(f"positions and past lengths ({lengths}) must not be negative")
    if refusal == -Refusal.SHORT_TABLE:
        raise ValueError(
            f"{max(lengths)} past slots, {flight} in flight and a shift of {shift} do not fit block tables of "
            f"{tables.size(1)} blocks of {BLOCK} slots"
        )
    raise ValueError(
        f"block tables contain blocks from {int(tables.min())} to {int(tables.max())}; the store has "
        f"{store.size(2) // BLOCK} blocks, from 0 on"
    )


def _modules(layers: Sequence[nn.Module], norm: nn.Module | None) -> list[nn.Module]:
    return [*layers, *([] if norm is None else [norm])]


def memory_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """What keeps the memory of all parameters and buffers alive, for those who have addresses in it.

    Without it, assigning a weight, or to its `.data`, would free the old memory.
    """
    return [tensor.detach() for tensor in _tensors(modules)]


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def fingerprint(roots: Sequence[nn.Module]) -> tuple[Any, ...]:
    """What must stay unchanged for native code to give the modules' results: objects, memory, settings, hooks."""
    modules = [inner for module in roots for inner in module.modules()]
    tensors = tuple((tensor.data_ptr(), tensor.dtype) for tensor in _tensors(roots))
    settings = tuple(
        (_window(m), float(m.scaling)) if isinstance(m, FusedAttention) else m.variance_epsilon
        for m in modules
        if isinstance(m, FusedAttention | FusedRMSNorm)
    )
    return tuple(map(id, modules)), tensors, settings, foreign_hooks(modules)


class _Layer(NamedTuple):
    """The modules of a layer."""

    attention: FusedAttention
    feed_forward: FusedSwiGLU
    before: nn.Module  # a norm, or an identity
    after: FusedRMSNorm  # the norm after attention, before the feed-forward

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer | None:
        """The parts of `layer`; None if it is not supported."""
        children = dict(layer.named_children())
        modules: list[Any] = [children.get(name) for name in _CHILDREN]
        parts = cls(*modules)
        fits = set(children) == set(_CHILDREN) and (
            isinstance(parts.attention, FusedAttention)
            and isinstance(parts.feed_forward, FusedSwiGLU)
            and isinstance(parts.before, FusedRMSNorm | nn.Identity)
            and isinstance(parts.after, FusedRMSNorm)
        )
        return parts if fits and not any(linear.reference for linear in parts.linears) else None

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        """The linear layers, in the order in which a forward reads them."""
        attention, feed_forward = self.attention, self.feed_forward
        return attention.qkv_proj, attention.o_proj, feed_forward.gate_up, feed_forward.down_proj

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes that must be equal in all layers of a stack."""
        heads = (self.attention.heads, self.attention.kv_heads, self.attention.head_dim)
        return (*heads, *(each.out_features for each in self.linears))

    def structure(self, window: int, keep: list[object]) -> CLayer:
        """The layer's C structure; what it points to is appended to `keep`."""
        qkv, o, gate_up, down = (weight_of(linear, keep) for linear in self.linears)
        norms = (self.before, self.attention.q_norm, self.attention.k_norm, self.after)
        before, q_norm, k_norm, after = (
            norm.weight.data_ptr() if isinstance(norm, FusedRMSNorm) else None for norm in norms
        )
        return CLayer(before, qkv, q_norm, k_norm, o, after, gate_up, down, window or _window(self.attention))


def weight_of(linear: PackedLinear, keep: list[object]) -> CWeight:
    """The C structure of a packed linear layer, which must outlive it, as must what is appended to `keep`."""
    bias = None if linear.bias is None else linear.bias.data_ptr()
    sizes = (linear.in_features, linear.outputs, WEIGHT_FORMS[linear.form])
    following = None
    if linear.rest is not None:
        rest = weight_of(linear.rest, keep)
        keep.append(rest)
        following = ctypes.addressof(rest)
    return CWeight(linear.packed.data_ptr(), bias, *sizes, following)


def embedding_weight(embedding: nn.Module) -> CWeight | None:
    """The C structure of an embedding, which must outlive it; None if native code can't read it."""
    if isinstance(embedding, PackedEmbedding):
        table = embedding.table
        return None if table.rest is not None or table.reference else weight_of(table, [])
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    weight = embedding.weight
    if weight.dtype is not torch.float32 or not weight.is_contiguous() or not weight.is_cpu:
        return None
    return CWeight(weight.data_ptr(), None, weight.size(1), weight.size(0), PLAIN)


def _window(attention: FusedAttention) -> int:
    """The layer's sliding window in positions; 0 if it has none."""
    config = attention.config
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return 0
    types = getattr(config, "layer_types", None)
    if types and types[attention.layer_idx] != "sliding_attention":
        return 0
    return int(window)


def _gather(linears: Sequence[PackedLinear]) -> Tensor:
    """Move the weights into one contiguous allocation of huge pages, in the order of reading; returns that memory.

    A forward over one row reads every weight once, so it is limited by memory bandwidth. With SmolLM2-135M on two cores
    of a shared server, separate tensors on 4 kB pages took 6 % longer (medians of interleaved runs).
    """
    offsets, size = list[int](), 0
    linears = [part for linear in linears for part in linear.parts()]
    for linear in linears:
        offsets.append(size)
        size += -(-linear.packed.nbytes // _ALIGN) * _ALIGN
    with torch.inference_mode(False):  # inference tensors could not be loaded into later
        arena = native.huge_bytes(size)
        for linear, offset in zip(linears, offsets, strict=True):
            end = offset + linear.packed.nbytes
            slot = arena[offset:end].view(linear.packed.dtype).view(linear.packed.shape)
            linear.packed = slot.copy_(linear.packed)
            if end // _RELEASE != offset // _RELEASE:
                release_freed_memory()  # otherwise the peak would hold the weights twice
    return arena
