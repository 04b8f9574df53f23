"""Linear layers with packed 16-bit or int8 weights, and the replacement of a model's linear layers by them.

Owns: `PackedLinear`, the operator `haast::linear` and `pack_linears`. Knows nothing of trees or decoding.

Weights are rounded once, to fp16 or to int8 with one scale per output; activations and sums stay fp32. On a CPU the
time of a forward over a few rows is the time to read the weights, so half the bytes take up to half the time, and the
panel layout makes several rows nearly free. A model packed to int8 generates other text than the original, so it counts
as another target. Rows are independent: a row's result has the same bits whatever other rows are in the batch (except
with `reference=True`, where PyTorch chooses the order of sums).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from haast import native
from haast.compat import buffers_of
from haast.native.library import check_tensor
from haast.target.memory import release_freed_memory

__all__ = ["PackedLinear", "is_linear", "is_packed", "linear_sizes", "pack_linears"]

# The operator that compiled graphs call. A 32 x 16 layer on the development CPU, microseconds per call on a
# busy machine: bare ctypes 1.6, native.linear 9, PackedLinear 10, nn.Linear 10, this Library operator 15, a
# torch.library.custom_op 32. A forward has 211 linear layers, so eager code calls the kernel directly and only a graph
# that is being compiled uses the operator.
_LIBRARY = torch.library.Library("haast", "DEF")  # type: ignore[no-untyped-call]
_SCHEMA = "linear(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int out_features) -> Tensor"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def _linear_fake(x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_LIBRARY.impl("linear", native.linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("haast::linear", _linear_fake, lib=_LIBRARY)

FORMS = ("f16", "int8")


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` with its weight stored in panels of fp16 or int8: y = x W^T + bias, fp32 in and out.

    Attributes:
        packed: (panels, in_features, 16) int16 with fp16 bits, see `native.pack_f16`, or int8, see `native.pack_i8`;
            empty in the reference form.
        scale: (out_features) fp32, the scale of each output of int8 weights; None with fp16.
        dense: (out_features, in_features) fp32 with the same rounded values in the reference form; empty otherwise.
        bias: (out_features) fp32, or None.
    """

    packed: Tensor
    scale: Tensor | None
    dense: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, form: str = "f16", reference: bool = False
    ) -> None:
        """Pack a weight matrix, for example the LM head's rows of a draft vocabulary.

        Args:
            weight: (out_features, in_features) fp32 on the CPU; it is copied.
            bias: (out_features) fp32, or None.
            form: "f16", or "int8" with one scale per output.
            reference: keep the same rounded weights as plain PyTorch fp32: slow, for comparison. Always on if the
                native library is missing.

        Raises:
            ValueError: another dtype or device, shapes that do not fit, or values beyond fp16's range.
        """
        super().__init__()
        _check_weight(weight, bias)
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown: give one of {', '.join(FORMS)}")
        self.form = form
        self.out_features, self.in_features = weight.shape
        self.reference = reference or not native.available()
        values = weight.detach()
        packed, scale = torch.empty(0, dtype=torch.int16), None
        if not self.reference:
            packed, scale = (native.pack_f16(values), None) if form == "f16" else native.pack_i8(values)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("dense", _rounded(values, form) if self.reference else torch.empty(0))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) fp32 on the CPU to (..., out_features) fp32.

        Raises:
            ValueError: another dtype, device or width, or `x` requires a gradient.
        """
        buffers = buffers_of(self)  # three attribute look-ups in an nn.Module take a microsecond
        packed, scale, bias = buffers["packed"], buffers["scale"], buffers["bias"]
        assert packed is not None, "registered as a tensor"
        if self.reference:
            return self._reference_forward(x)
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.haast.linear(x, packed, self.scale, bias, self.out_features)
            return result
        return native.linear(x, packed, scale, bias, self.out_features)

    def _reference_forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or x.device != self.dense.device:
            raise ValueError(
                f"PackedLinear needs float32 on {self.dense.device}, not {x.dtype} on {x.device}; "
                "load the model with dtype=torch.float32 there, or do not pack it"
            )
        return functional.linear(x, self.dense, self.bias)

    @property
    def weight(self) -> Tensor:
        """The rounded weight, unpacked on each access: for model code that reads weights directly (e.g. routers)."""
        return self.unpack()

    def unpack(self) -> Tensor:
        """Return the rounded weight, (out_features, in_features) fp32."""
        if self.reference:
            return self.dense.clone()
        values = self.packed.view(torch.float16) if self.scale is None else self.packed
        rows = values.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features].float()
        return rows if self.scale is None else rows * self.scale.unsqueeze(1)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them."""
        path = "reference" if self.reference else "native"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.form}, {path}"


def is_packed(module: nn.Module | None) -> TypeGuard[PackedLinear]:
    """Whether it is a packed linear layer. A target's layers and its draft heads are packed if its LM head is."""
    return isinstance(module, PackedLinear)


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear | PackedLinear]:
    """Whether it is a linear layer, packed or not, i.e. has `in_features` and `out_features`."""
    return isinstance(module, nn.Linear | PackedLinear)


def linear_sizes(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Bytes and number of parameters of the linear layers among `modules`, packed or not, without biases."""
    size = parameters = 0
    for module in modules:
        if is_linear(module):
            tensors = (module.packed, module.dense) if isinstance(module, PackedLinear) else (module.weight,)
            size += sum(tensor.nbytes for tensor in tensors)
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
        scale = weight.abs().amax(1, keepdim=True) / 127
        scale[scale == 0] = 1
        return (weight / scale).round() * scale
    result = weight.half().float()
    if not bool(result.isfinite().all()):
        raise ValueError("weight has values that fp16 cannot hold (limit 65504); leave this layer unpacked")
    return result


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
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if id(child) in shared:
                setattr(parent, name, shared[id(child)])
                continue
            if not isinstance(child, nn.Linear | Conv1D):
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
