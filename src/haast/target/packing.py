"""Linear layers with packed weights (fp16, 8 bits, or the blocks of a GGUF file), and an embedding with such weights.

Owns `PackedLinear`, `PackedEmbedding`, the operator `haast::linear` and `pack_linears`. Knows nothing of trees or
decoding, nor of files.

On a CPU the time of a forward over a few rows is the time to read the weights, so half the bytes take up to half the
time, and the panel layout makes several rows nearly free. With fp16 weights, activations and sums stay fp32. With block
weights (also "int8", which rounds to Q8_0) each row of activations is rounded to 8 bits per 32 inputs, so that products
are integers: such a model generates other text than the unrounded one, and counts as a target of its own.

Rows are independent: a row's result has the same bits whatever other rows are in the batch (except with
`reference=True`, where PyTorch chooses the order of sums).
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from haast import native
from haast.compat import buffers_of
from haast.native.library import LANES, check_tensor
from haast.target.memory import release_freed_memory

__all__ = ["PackedEmbedding", "PackedLinear", "is_linear", "is_packed", "linear_sizes", "pack_linears"]

# The operator that compiled graphs call. A 32 x 16 layer on the development CPU, microseconds per call on a
# busy machine: bare ctypes 1.6, native.linear 9, PackedLinear 10, nn.Linear 10, this Library operator 15, a
# torch.library.custom_op 32. A forward has 211 linear layers, so eager code calls the kernel directly and only a graph
# that is being compiled uses the operator.
_LIBRARY = torch.library.Library("haast", "DEF")  # type: ignore[no-untyped-call]
_SCHEMA = "linear(Tensor x, Tensor packed, Tensor? bias, int in_features, int out_features, str form) -> Tensor"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, in_features: int, out_features: int, form: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_LIBRARY.impl("linear", native.linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("haast::linear", _linear_fake, lib=_LIBRARY)

FORMS = ("f16", "int8")  # what `pack_linears` makes
_ROUNDED = "Q8_0"  # the block format of "int8"
_BLOCK = 32  # inputs that share a scale when a row of activations is rounded


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` with a packed weight: y = x W^T + bias, fp32 in and out.

    Attributes:
        form: "f16", or the format of its blocks, one of `native.BLOCK_FORMS`.
        packing: how the weight was packed: "f16", "int8" (rounded to 8 bits) or "gguf" (the blocks of a file).
        packed: (panels of 16 outputs, ...): int16 with fp16 bits, see `native.pack_f16`, or uint8 with blocks, see
            `native.pack_blocks`; empty in the reference form.
        dense: (out_features, in_features) fp32 with the same rounded values in the reference form; empty otherwise.
        bias: (out_features) fp32, or None.
        rest: a layer for further outputs of the same inputs in another form, or None. `out_features` counts them.
    """

    packed: Tensor
    dense: Tensor
    bias: Tensor | None
    rest: PackedLinear | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, form: str = "f16", reference: bool = False
    ) -> None:
        """Pack a weight matrix, for example the LM head's rows of a draft vocabulary.

        Args:
            weight: (out_features, in_features) fp32 on the CPU; it is copied.
            bias: (out_features) fp32, or None.
            form: "f16", or "int8" for Q8_0: one fp16 scale per 32 inputs of an output.
            reference: keep the same rounded weights as plain PyTorch fp32: slow, for comparison. Always on if the
                native library is missing.

        Raises:
            ValueError: another dtype or device, shapes that do not fit, or values beyond fp16's range.
        """
        _check_weight(weight, bias)
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown: give one of {', '.join(FORMS)}")
        values, rounded = weight.detach(), form == "int8"
        if reference or not native.available():
            self._set(torch.empty(0), _rounded(values, form), bias, form, _ROUNDED if rounded else form, *weight.shape)
        else:
            packed = native.pack_q8(values) if rounded else native.pack_f16(values)
            self._set(packed, torch.empty(0), bias, form, _ROUNDED if rounded else form, *weight.shape)

    def _set(
        self,
        packed: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        packing: str,
        form: str,
        outputs: int,
        inputs: int,
        rest: PackedLinear | None = None,
    ) -> None:
        super().__init__()
        self.packing, self.form, self.in_features, self.outputs = packing, form, inputs, outputs
        self.out_features: int = outputs + (0 if rest is None else rest.out_features)
        self.reference = len(dense) > 0
        self.register_buffer("packed", packed)
        self.register_buffer("dense", dense)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.rest = rest

    @classmethod
    def of_blocks(cls, blocks: Tensor, form: str, in_features: int, bias: Tensor | None = None) -> PackedLinear:
        """Pack the blocks of a GGUF tensor, whose weights keep their values.

        Args:
            blocks: (out_features, bytes of a row) uint8, as in the file; not needed afterwards.
            form: one of `native.BLOCK_FORMS`.
            in_features: inputs.
            bias: (out_features) fp32, or None.

        Raises:
            ValueError: as `native.pack_blocks`. RuntimeError: the native library is missing.
        """
        made = cls.__new__(cls)
        packed = native.pack_blocks(blocks, form, in_features)
        made._set(packed, torch.empty(0), bias, "gguf", form, blocks.size(0), in_features)
        return made

    @classmethod
    def joined(cls, linears: Sequence[PackedLinear]) -> PackedLinear:
        """One layer with the outputs of several layers of the same inputs, one after the other.

        Biases: all have one, or none has. Layers of one form become one matrix if their outputs fill their panels, or
        if they are in fp16.
        """
        parts, rest = [part for linear in linears for part in linear.parts()], None
        for part in reversed(parts):
            rest = cls._before(part, rest)
        assert rest is not None, "there are layers"
        return rest

    @classmethod
    def _before(cls, first: PackedLinear, rest: PackedLinear | None) -> PackedLinear:
        """A layer with the own outputs of `first`, then all of `rest`."""
        packed, dense, bias, outputs = first.packed, first.dense, first.bias, first.outputs
        if rest is not None and first.form == rest.form and first.reference == rest.reference:
            fills = first.reference or outputs % LANES == 0
            if fills or first.form == "f16":
                if fills:
                    packed, dense = torch.cat([packed, rest.packed]), torch.cat([dense, rest.dense])
                else:  # packed again, which changes no value
                    packed = native.pack_f16(torch.cat([first.unpack_own(), rest.unpack_own()]))
                bias = None if bias is None or rest.bias is None else torch.cat([bias, rest.bias])
                outputs, rest = outputs + rest.outputs, rest.rest
        made = cls.__new__(cls)
        made._set(packed, dense, bias, first.packing, first.form, outputs, first.in_features, rest)
        return made

    def followed_by(self, rest: PackedLinear) -> PackedLinear:
        """A layer with the outputs of this one, whose memory it shares, then those of `rest`."""
        made = type(self).__new__(type(self))
        made._set(self.packed, self.dense, self.bias, self.packing, self.form, self.outputs, self.in_features, rest)
        return made

    def parts(self) -> list[PackedLinear]:
        """This layer and those for its further outputs, in order."""
        return [self, *([] if self.rest is None else self.rest.parts())]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) fp32 on the CPU to (..., out_features) fp32.

        Raises:
            ValueError: another dtype, device or width, or `x` requires a gradient.
        """
        if self.rest is not None:
            return torch.cat([self.forward_own(x), self.rest(x)], -1)
        return self.forward_own(x)

    def forward_own(self, x: Tensor) -> Tensor:
        """As `forward`, without the outputs of `rest`."""
        buffers = buffers_of(self)  # three attribute look-ups in an nn.Module take a microsecond
        packed, bias = buffers["packed"], buffers["bias"]
        assert packed is not None, "registered as a tensor"
        if self.reference:
            return self._reference_forward(x)
        if torch.compiler.is_compiling():
            sizes = (self.in_features, self.outputs)
            result: Tensor = torch.ops.haast.linear(x, packed, bias, *sizes, self.form)
            return result
        return native.linear(x, packed, bias, self.in_features, self.outputs, self.form)

    def _reference_forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or x.device != self.dense.device:
            raise ValueError(
                f"PackedLinear needs float32 on {self.dense.device}, not {x.dtype} on {x.device}; "
                "load the model with dtype=torch.float32 there, or do not pack it"
            )
        return functional.linear(x if self.form == "f16" else rounded_activations(x), self.dense, self.bias)

    @property
    def weight(self) -> Tensor:
        """The rounded weight, unpacked on each access: for model code that reads weights directly (e.g. routers)."""
        return self.unpack()

    def unpack(self, rows: Tensor | None = None) -> Tensor:
        """Return the rounded weight, (out_features, in_features) fp32, or its `rows` (n,) int64 only, (n, ...)."""
        if self.rest is not None:
            whole = torch.cat([self.unpack_own(), self.rest.unpack()])
            return whole if rows is None else whole[rows]
        return self.unpack_own(rows)

    def unpack_own(self, rows: Tensor | None = None) -> Tensor:
        """As `unpack`, without the outputs of `rest`."""
        if self.reference:
            return self.dense.clone() if rows is None else self.dense[rows]
        return native.unpack_rows(self.packed, self.form, self.in_features, self.outputs, rows)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them."""
        path = "reference" if self.reference else "native"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.form}, {path}"


class PackedEmbedding(nn.Module):
    """A frozen token embedding whose rows are unpacked as they are looked up; it can share a tied LM head's weight."""

    def __init__(self, table: PackedLinear) -> None:
        """Use the weight of `table`, (tokens, hidden), without a copy."""
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features

    @property
    def weight(self) -> Tensor:
        """The table, (tokens, hidden) fp32, unpacked on each access."""
        return self.table.unpack()

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 token ids -> (..., hidden) fp32."""
        return self.table.unpack(tokens)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Embedding` shows them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.table.form}"


def rounded_activations(x: Tensor) -> Tensor:
    """x (..., inputs) fp32 as integer kernels read it: rounded to 8 bits with one scale per 32 inputs."""
    blocks = _in_blocks(x)
    largest = blocks.abs().amax(-1, keepdim=True)
    tiny = largest < 1e-30
    inverse = torch.where(tiny, 0.0, torch.tensor(127.0) / largest)  # a plain number would be 127 * (1 / largest)
    rounded = (blocks * inverse).round() * torch.where(tiny, 0.0, largest / 127.0)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def _in_blocks(x: Tensor) -> Tensor:
    """x (..., n) as (..., blocks, 32), with zeros after its end."""
    padded = functional.pad(x, (0, -x.shape[-1] % _BLOCK))
    return padded.view(*x.shape[:-1], -1, _BLOCK)


def is_packed(module: nn.Module | None) -> TypeGuard[PackedLinear]:
    """Whether it is a packed linear layer. A target's layers and its draft heads are packed if its LM head is."""
    return isinstance(module, PackedLinear)


def rounds_activations(module: nn.Module | None) -> TypeGuard[PackedLinear]:
    """Whether it is a packed layer with block weights, which rounds its input to 8 bits."""
    return isinstance(module, PackedLinear) and module.form != "f16"


@contextlib.contextmanager
def exact_products(*modules: nn.Module) -> Iterator[None]:
    """Inside, layers of `modules` with block weights do not round their input: products up to fp32, for comparisons.

    Each takes three products, of the rounded input and of what rounding left out. Not for several threads.
    """
    linears = [each for module in modules for each in module.modules() if rounds_activations(each)]
    for linear in linears:
        vars(linear)["forward"] = functools.partial(_exact_forward, linear)
    try:
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _exact_forward(linear: PackedLinear, x: Tensor) -> Tensor:
    # Each product leaves out what rounding took from its input, at most 1/254 of a block's largest number. The weight
    # is not unpacked, which would take longer than all else in loading a large model.
    rest = x - rounded_activations(x)
    return torch.cat([_sum_of_products(part, x, rest, rest - rounded_activations(rest)) for part in linear.parts()], -1)


def _sum_of_products(part: PackedLinear, x: Tensor, *more: Tensor) -> Tensor:
    bias = 0.0 if part.bias is None else part.bias
    total = part.forward_own(x)
    for each in more:
        total = total + (part.forward_own(each) - bias)
    return total


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear | PackedLinear]:
    """Whether it is a linear layer, packed or not, i.e. has `in_features` and `out_features`."""
    return isinstance(module, nn.Linear | PackedLinear)


def linear_sizes(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Bytes and number of parameters of the linear layers among `modules`, packed or not, without biases."""
    size = parameters = 0
    for module in modules:
        if isinstance(module, PackedLinear):  # its `rest` is a module of its own
            size += module.packed.nbytes + module.dense.nbytes
            parameters += module.in_features * module.outputs
        elif isinstance(module, nn.Linear):
            size += module.weight.nbytes
            parameters += module.in_features * module.out_features
    return size, parameters


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight.detach(), 2)
    if bias is not None:
        check_tensor("bias", bias.detach(), 1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight has {weight.shape[0]} outputs")


def _rounded(weight: Tensor, form: str) -> Tensor:
    """Return the weight rounded to `form`, in fp32."""
    if form == "int8":
        blocks = _in_blocks(weight)
        scale = (blocks.abs().amax(2, keepdim=True) / 127).half().float()
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        rounded = (blocks * inverse).round().clamp(-127, 127) * scale
        return rounded.flatten(1)[:, : weight.shape[1]].contiguous()
    result = weight.half().float()
    if not bool(result.isfinite().all()):
        raise ValueError("weight has values that fp16 cannot hold (limit 65504); leave this layer unpacked")
    return result


_READ_BY_OTHERS = ("dt_proj",)  # small layers of which the model's own code reads the weight (Mamba)


def pack_linears(model: nn.Module, *, form: str = "f16", reference: bool = False) -> None:
    """Replace every `nn.Linear` and transformers `Conv1D` of a model by a `PackedLinear`, in place.

    The LM head is included; an embedding tied to it keeps its own fp32 weight. Freezes the whole model, since packed
    weights pass no gradients. Norms and embeddings stay as they are.

    Args:
        model: fp32, on the CPU.
        form: "f16" or "int8".
        reference: use the slow PyTorch form (see `PackedLinear`).

    Raises:
        ValueError: the model has another dtype or device, or weights beyond fp16's range. The message names the
            layer; layers before it are already packed.
    """
    shared: dict[int, PackedLinear] = {}  # a module that is used twice stays one module
    waiting = deque(model.named_modules())  # without the parents done, whose old layers are freed
    while waiting:
        parent_name, parent = waiting.popleft()
        for name, child in list(parent.named_children()):
            if id(child) in shared:
                setattr(parent, name, shared[id(child)])
                continue
            if not isinstance(child, nn.Linear | Conv1D) or name in _READ_BY_OTHERS:
                continue
            packed = _pack_child(f"{parent_name}.{name}".lstrip("."), child, form, reference)
            setattr(parent, name, packed)
            shared[id(child)] = packed
        release_freed_memory()
    model.requires_grad_(False)


def _pack_child(name: str, child: nn.Linear | Conv1D, form: str, reference: bool) -> PackedLinear:
    # Conv1D stores (in, out). The old weight is freed as soon as nothing else refers to the old module.
    weight = child.weight.t() if isinstance(child, Conv1D) else child.weight
    try:
        return PackedLinear(weight, child.bias, form=form, reference=reference)
    except ValueError as error:
        raise ValueError(f"cannot pack {name}: {error}") from error
