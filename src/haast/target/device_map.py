"""Large models: spread over devices, offloaded, or sharded over processes. `Placement` holds the user's settings.

transformers and accelerate do the work: accelerate's hooks (`device_map`) move a module's inputs and load offloaded
weights, torch's distributed tensors (`tp_plan`) are sharded. Haast calls the modules of such a model as modules, so
that their hooks run; only `read_weight` reads a weight directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from haast import compat
from haast.errors import UnsupportedModelError

_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """How a target is distributed; by default it is on one device.

    Args:
        device_map: "auto" (or another plan of transformers), or a map from modules to devices, "cpu" and "disk".
        max_memory: for a plan: device -> bytes or "10GiB".
        offload_folder: folder for weights that are offloaded to disk; safetensors checkpoints are read in place.
        tensor_parallel: shard every layer over the processes that torchrun started.
    """

    device_map: str | Mapping[str, Any] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | None = None
    tensor_parallel: bool = False

    def __bool__(self) -> bool:
        """Whether anything is spread."""
        return self.device_map is not None or self.tensor_parallel

    def check(self, device: str, packing: str, compile: str) -> None:
        """Raise ValueError for settings that contradict each other, before anything is loaded."""
        if not self:
            if self.max_memory is not None or self.offload_folder is not None:
                raise ValueError("max_memory and offload_folder belong to a device_map: give device_map='auto' too")
            return
        setting = "tensor_parallel=True" if self.tensor_parallel else f"device_map={self.device_map!r}"
        plan, only_one = self.device_map, f"works on one device, not with {setting}"
        for wrong, message in (
            (self.tensor_parallel and plan is not None,
             "device_map and tensor_parallel are two ways to spread a model: give one of them"),
            (isinstance(plan, str) and plan not in _PLANS,
             f"device_map={plan!r} is unknown: choose one of {', '.join(_PLANS)}"),
            (device != "cpu", f"device={device!r} names one device, {setting} chooses them itself: give one of them"),
            (packing not in ("auto", "off"), f"packing={packing!r} {only_one}: use packing='off'"),
            (compile == "on", f"compile='on' {only_one}: use compile='off'"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)
        if self.tensor_parallel:
            _check_processes()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        if self.tensor_parallel:
            from transformers.distributed.configuration_utils import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_plan="auto")}
        if self.device_map is None:
            return {}
        options = {"max_memory": self.max_memory, "offload_folder": self.offload_folder}
        return {"device_map": self.device_map} | {name: value for name, value in options.items() if value is not None}


def _check_processes() -> None:
    """Raise ValueError without several processes, or with versions that do not shard by distributed tensors."""
    if not (dist.is_initialized() or dist.is_torchelastic_launched()):
        raise ValueError(
            "tensor_parallel=True needs several processes: start the program with `torchrun --nproc-per-node N ...` "
            "(docs/devices.md)"
        )
    if torch.__version__ < "2.7" or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16):
        raise ValueError(
            f"tensor_parallel=True needs torch 2.7 and transformers 5.16 or newer, these are {torch.__version__} and "
            f"{transformers.__version__}: update them or use device_map"
        )


def check_placement(model: nn.Module) -> None:
    """Raise UnsupportedModelError for weights that a forward can't read: sharded by FSDP, or on the meta device.

    Offloaded weights are on the meta device too, but accelerate loads them.
    """
    name = type(model).__name__
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{name} is sharded by FSDP, whose processes work on different texts: to decode with several processes, "
            f"load it with tensor parallelism (docs/devices.md)"
        )
    for prefix, module in model.named_modules():
        for weight, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and not offloaded(module):
                raise UnsupportedModelError(
                    f"{name} has no weights: {prefix}.{weight} is on the meta device and no hook loads it; load "
                    f"the model with from_pretrained (device_map='auto' for a large one), or dispatch it first"
                )


def dispatched(model: nn.Module) -> bool:
    """Whether the model has accelerate hooks that move inputs or load offloaded weights."""
    return any(next(_hooks(module), None) is not None for module in model.modules())


def execution_device(module: nn.Module) -> torch.device | None:
    """The device the module computes on: its hook's, else its weights'; None if it has neither."""
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    weight = next(module.parameters(), None)
    return None if weight is None else weight.device


def read_weight(module: nn.Module, name: str) -> Tensor | None:
    """The module's own weight of this name, unsharded; None if it has none.

    Loads an offloaded weight. Gathers a sharded one: then all processes must call this together.
    """
    with ExitStack() as loaded:
        if offloaded(module):
            for hook in _hooks(module):
                hook.pre_forward(module)
                loaded.callback(hook.post_forward, module, None)
        weight = getattr(module, name, None)
        if weight is None:
            return None
        assert isinstance(weight, Tensor), "weights are tensors"
        weight = weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The device mesh that weights are sharded over; None if no weight is sharded."""
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return next(meshes, None)


def sharded(module: nn.Module) -> bool:
    """Whether one of the module's own weights is sharded over processes."""
    return any(isinstance(p, DTensor) for p in module.parameters(recurse=False))


def unsharded_copy(module: nn.Module) -> nn.Module:
    """A copy of a sharded leaf module that one process can call alone. All processes must call this together."""
    copy = compat.with_own_parameters(module)
    vars(copy).pop("forward", None)  # removes the forward that gathers over processes; the class's own remains
    for name, _ in module.named_parameters(recurse=False):
        weight = read_weight(module, name)
        assert weight is not None, "the module has this parameter"
        setattr(copy, name, nn.Parameter(weight, requires_grad=False))
    return copy


def layer_devices(layers: Sequence[nn.Module] | None) -> list[torch.device | None] | None:
    """The device of each decoder layer; None if all are the same."""
    devices = [execution_device(layer) for layer in layers or ()]
    return devices if len(set(devices)) > 1 else None


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook | CpuOffload]:
    hook = compat.accelerate_hook(module)
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook | CpuOffload):
            yield each


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights for each forward."""
    return any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in _hooks(module))
