"""A model's decoder layers as one native call: `NativeStack`.

Owns the recognition of stacks that it can run (Llama's pre-norm layers: Llama, Mistral, Qwen2, Qwen3, SmolLM2 and the
draft heads made of such layers), their weights in one stretch of memory, and tables of rotary angles. Knows nothing of
drafting. A model's own modules stay whole and give the same bits: a stack only spares the Python and the small
operators between them, which on a small model cost as much as the arithmetic.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from haast.compat import foreign_hooks
from haast.native.stack import FORMS, CBlockTables, CLayer, CPass, CStack, CWeight, Refusal, run_stack
from haast.target.fusing import FusedAttention, FusedRMSNorm, FusedSwiGLU
from haast.target.kv_pool import BLOCK
from haast.target.packing import PackedLinear

_CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
CHANGING_ROPE = {"dynamic", "longrope"}  # their angles depend on the longest position of a forward
_HUGE = 2 << 20  # bytes of a huge page
_ALIGN = 64


class NativeStack:
    """Decoder layers that run in one call over a tree of nodes behind keys and values in a KV pool.

    Build with `of`, which gives None for layers of another kind.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        parts: Sequence[_Layer],
        norm: FusedRMSNorm | None,
        rotary: nn.Module,
        window: int,
    ) -> None:
        """Take what `of` has checked; `parts` are those of the layers."""
        self._modules, self._rotary = _modules(layers, norm), rotary
        attention, feed_forward, _, after = parts[0]
        self.layers, self._lanes, self.hidden = len(parts), 2 * len(parts), feed_forward.down_proj.out_features
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self._arena = _gather([linear for part in parts for linear in part.linears])
        self._structures = (CLayer * len(parts))(*(part.structure(window) for part in parts))
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, feed_forward.down_proj.in_features)
        factors = (after.variance_epsilon, float(attention.scaling))
        last = None if norm is None else norm.weight.data_ptr()
        self._stack = CStack(self._structures, len(parts), *sizes, *factors, last)
        self._angles = torch.empty(2, 0, self.head_dim)  # cosines and sines, by position
        self._held = _tensors(self._modules)  # what the structures point to stays alive
        self._known = _fingerprint(self._modules)

    @classmethod
    def of(
        cls, layers: Sequence[nn.Module], norm: nn.Module | None, rotary: nn.Module, window: int = 0
    ) -> NativeStack | None:
        """The stack of these layers, packed and fused before; None where they are not all of the known kind.

        Args:
            layers: modules with a `FusedAttention`, a `FusedSwiGLU` and two norms (the first may be an identity).
            norm: the norm behind the last layer; None for none.
            rotary: module that gives cosines and sines of positions.
            window: positions that every layer looks back, whatever its own configuration says; 0 leaves it to that.

        That the layers add up their parts as Llama does is for the caller to try: see `Target`.
        """
        kind = getattr(rotary, "rope_type", "default")
        if not isinstance(kind, str) or kind in CHANGING_ROPE:  # some models have angles by kind of layer
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
        """A copy, or a pickle, of a stack is None: its owner goes by modules until it builds one of its own."""
        return type(None), ()

    def current(self, layers: Sequence[nn.Module] | None = None, norm: nn.Module | None = None) -> bool:
        """Whether these modules (its own if absent) are still those that the stack was built from, unchanged.

        Nobody replaced, moved or converted a weight, changed a setting, or hung a hook on a layer.
        """
        return _fingerprint(self._modules if layers is None else _modules(layers, norm)) == self._known

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
        """Run all layers; keys and values of the nodes go to the last slots in flight.

        Slot i of a row is slot `(i + shift) % BLOCK` of block `tables[row, (i + shift) // BLOCK]` of the store. Results
        have the same bits wherever the blocks lie and whatever other rows are there; rows may share blocks of the past.

        Args:
            states: (rows, nodes, hidden) fp32, the embeddings; overwritten.
            positions: (rows, nodes) int64 of the nodes. Slot i of the past holds position i.
            seen: (rows, nodes, flight) bool: what a node sees of the slots behind the past; the nodes are the last.
            past: slots of each row that all of its nodes see; ints, or (rows,) int64.
            store: (2 * layers, kv_heads, slots, head_dim), contiguous: keys and values in turn; fp32, fp16 or bf16. 16
                bits are rounded to when keys and values are stored; all arithmetic is fp32.
            tables: (rows, blocks) int32, contiguous. Where every layer has a window, blocks before it may be gone.
            capture: layer indices as in HF `hidden_states` (0 the embeddings, last the normed output).
            flight_positions: (rows, flight) int64; the nodes' own if None. Layers with a window need them where more
                than the nodes is in flight.
            shift: 0 for a target, 1 for a draft head.

        Returns:
            the output (rows, nodes, hidden) behind the final norm, and the captured states.

        Raises:
            ValueError: tensors that do not fit together; nothing was computed.
        """
        rows, nodes, flight = seen.shape
        blocks, form = self.placed(store, tables, rows, shift)
        self.check_states(states, rows, nodes)
        if flight_positions is None and flight != nodes and any(layer.window for layer in self._structures):
            raise ValueError(f"{flight} slots are in flight and {nodes} are the nodes': windows need flight_positions")
        flying = positions if flight_positions is None else flight_positions
        whole = _integers(positions, rows, nodes) and (flying is positions or _integers(flying, rows, flight))
        if seen.dtype is not torch.bool or flight < nodes or not whole:
            raise ValueError(
                f"seen {tuple(seen.shape)} {seen.dtype}, positions {tuple(positions.shape)} {positions.dtype} and "
                f"those in flight {tuple(flying.shape)} {flying.dtype} do not belong together: give bool (rows, nodes, "
                "flight), flight at least nodes, and int64 (rows, nodes) and (rows, flight), on the CPU"
            )
        positions, flying, seen = positions.contiguous(), flying.contiguous(), seen.contiguous()
        lengths, lengths_at = int64s("past", past, rows)
        output = torch.empty_like(states)
        captured = {index: torch.empty_like(states) for index in capture}
        pointers = (ctypes.c_void_p * (self.layers + 1))() if captured else None
        for index, tensor in captured.items():
            pointers[index] = tensor.data_ptr()  # type: ignore[index]
        ends = (states.data_ptr(), output.data_ptr(), None if pointers is None else ctypes.addressof(pointers))
        where = (positions.data_ptr(), flying.data_ptr(), lengths_at, seen.data_ptr(), store.data_ptr(), blocks)
        cosine, sine, angles = self.angles()
        each = CPass(*ends, cosine, sine, *where, rows, nodes, flight, angles, form)
        result = run_stack(self._stack, each)
        if result == -Refusal.FEW_ANGLES:
            each.cosine, each.sine, each.angles = self.angles(int(positions.max()))
            result = run_stack(self._stack, each)
        if result:
            refuse(result, lengths, flight, store, tables, shift)
        return output, captured

    def placed(self, store: Tensor, tables: Tensor, rows: int, shift: int) -> tuple[CBlockTables, int]:
        """A store and its block tables (see `run`) as native code reads them, and the form of keys and values.

        Raises:
            ValueError: they have not the shapes and dtypes that these layers need.
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
        """Refuse states of another shape than (rows, *nodes, hidden), or that native code can't read."""
        shape = (rows, *nodes, self.hidden)
        if states.dtype is not torch.float32 or states.shape != shape or not (states.is_cpu and states.is_contiguous()):
            raise ValueError(
                f"states are {states.dtype} of shape {tuple(states.shape)} on {states.device}; expected contiguous "
                f"fp32 {shape} on the CPU"
            )

    @property
    def pointer(self) -> Any:
        """The stack as other native structures hold it."""
        return ctypes.pointer(self._stack)

    def angles(self, last: int = 0) -> tuple[int, int, int]:
        """Tables of cosines and sines, for positions up to `last` at least: where they lie, and how long they are."""
        if self._angles.shape[1] <= last:
            every = torch.arange(max(512, 1 << last.bit_length())).unsqueeze(0)
            self._angles = torch.cat(self._rotary(torch.empty(0), position_ids=every))
        cosine, sine = self._angles
        return cosine.data_ptr(), sine.data_ptr(), self._angles.shape[1]


def int64s(name: str, numbers: Sequence[int] | Tensor, count: int) -> tuple[Any, int]:
    """Integers for native code: what holds them, to keep and to read, and where they lie."""
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


def refuse(refusal: int, past: Sequence[int], behind: int, store: Tensor, tables: Tensor, shift: int) -> NoReturn:
    """Say what native code found wrong with the numbers that it was handed: `behind` slots behind each row's past."""
    lengths = [int(length) for length in past]
    if refusal == -Refusal.FEW_ANGLES or min(lengths) < 0:
        raise ValueError(f"positions and past lengths ({lengths}) must not be negative")
    if refusal == -Refusal.SHORT_TABLE:
        raise ValueError(
            f"{max(lengths)} past slots, {behind} in flight and a shift of {shift} do not fit block tables of "
            f"{tables.size(1)} blocks of {BLOCK} slots"
        )
    raise ValueError(
        f"block tables name blocks from {int(tables.min())} to {int(tables.max())}; the store has "
        f"{store.size(2) // BLOCK}, from 0 on"
    )


def _modules(layers: Sequence[nn.Module], norm: nn.Module | None) -> list[nn.Module]:
    return [*layers, *([] if norm is None else [norm])]


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _fingerprint(whole: Sequence[nn.Module]) -> tuple[Any, ...]:
    """What must stay the same for a stack to say what the modules say: identities, memory, settings, no hooks."""
    modules = [inner for module in whole for inner in module.modules()]
    tensors = tuple((tensor.data_ptr(), tensor.dtype) for tensor in _tensors(whole))
    settings = tuple(
        (_window(m), float(m.scaling)) if isinstance(m, FusedAttention) else m.variance_epsilon
        for m in modules
        if isinstance(m, FusedAttention | FusedRMSNorm)
    )
    return tuple(map(id, modules)), tensors, settings, foreign_hooks(modules)


class _Layer(NamedTuple):
    """The parts of a layer."""

    attention: FusedAttention
    feed_forward: FusedSwiGLU
    before: nn.Module  # a norm, or an identity
    after: FusedRMSNorm  # the norm before the feed-forward

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer | None:
        """None for a layer of another kind."""
        parts = dict(layer.named_children())
        known: list[Any] = [parts.get(name) for name in _CHILDREN]
        found = cls(*known)
        fits = set(parts) == set(_CHILDREN) and (
            isinstance(found.attention, FusedAttention)
            and isinstance(found.feed_forward, FusedSwiGLU)
            and isinstance(found.before, FusedRMSNorm | nn.Identity)
            and isinstance(found.after, FusedRMSNorm)
        )
        return found if fits and not any(linear.reference for linear in found.linears) else None

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        """In the order in which they are read."""
        attention, feed_forward = self.attention, self.feed_forward
        return attention.qkv_proj, attention.o_proj, feed_forward.gate_up, feed_forward.down_proj

    @property
    def sizes(self) -> tuple[int, ...]:
        """Equal for all layers of a stack."""
        heads = (self.attention.heads, self.attention.kv_heads, self.attention.head_dim)
        return (*heads, *(each.out_features for each in self.linears))

    def structure(self, window: int) -> CLayer:
        """As native code reads it."""
        qkv, o, gate_up, down = map(weight_of, self.linears)
        norms = (self.before, self.attention.q_norm, self.attention.k_norm, self.after)
        before, q_norm, k_norm, after = (
            norm.weight.data_ptr() if isinstance(norm, FusedRMSNorm) else None for norm in norms
        )
        return CLayer(before, qkv, q_norm, k_norm, o, after, gate_up, down, window or _window(self.attention))


def weight_of(linear: PackedLinear) -> CWeight:
    """A packed linear as native code reads it; it has to outlive the structure."""
    scale, bias = (None if each is None else each.data_ptr() for each in (linear.scale, linear.bias))
    return CWeight(linear.packed.data_ptr(), scale, bias, linear.in_features, linear.out_features)


def _window(attention: FusedAttention) -> int:
    """Positions that the layer looks back; 0 for all."""
    config = attention.config
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return 0
    types = getattr(config, "layer_types", None)
    if types and types[attention.layer_idx] != "sliding_attention":
        return 0
    return int(window)


def _gather(linears: Sequence[PackedLinear]) -> Tensor:
    """Move the weights, in the order in which they are read, into one stretch of huge pages; returns that memory.

    One row's forward reads every weight once, so what counts is how fast memory streams. On SmolLM2-135M and two cores
    of a shared server, separate tensors on pages of 4 kB took 6 % longer (medians of interleaved runs).
    """
    offsets, size = list[int](), 0
    for linear in linears:
        offsets.append(size)
        size += -(-linear.packed.nbytes // _ALIGN) * _ALIGN
    memory = mmap.mmap(-1, size + 2 * _HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False):  # else nobody could load weights into them afterwards
        whole = torch.frombuffer(memory, dtype=torch.int8)
        arena = whole[-whole.data_ptr() % _HUGE :]
        for linear, offset in zip(linears, offsets, strict=True):
            packed = linear.packed
            place = arena[offset : offset + packed.nbytes].view(packed.dtype).view(packed.shape)
            linear.packed = place.copy_(packed)
    return arena
