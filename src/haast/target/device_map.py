"""Where a model's weights are to be (`Spread`), and where they are: on devices, paged in, or cut over processes.

transformers and accelerate do the spreading: accelerate's hooks (`device_map`) move a module's inputs and page its
weights in, torch's distributed tensors (`tp_plan`) are cut. A module that is borrowed from such a model is called as a
module, so that its hooks do their work; only `read_weight` looks at a weight.
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
class Spread:
    """Over what a target is spread; the defaults spread nothing.

    Args:
        device_map: "auto" (or another plan of transformers), or a map from modules to devices, "cpu" and "disk".
        max_memory: for a plan: device -> bytes or "10GiB".
        offload_folder: where weights go that are kept on disk; checkpoints in safetensors are read where they are.
        tensor_parallel: cut every layer over the processes that torchrun started.
    """

    device_map: str | Mapping[str, Any] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | None = None
    tensor_parallel: bool = False

    def __bool__(self) -> bool:
        """Whether anything is spread."""
        return self.device_map is not None or self.tensor_parallel

    def check(self, device: str, packing: str, compile: str) -> None:
        """Refuse what does not go together, before anything loads. Raises ValueError."""
        if not self:
            if self.max_memory is not None or self.offload_folder is not None:
                raise ValueError("max_memory and offload_folder belong to a device_map: give device_map='auto' too")
            return
        named = "tensor_parallel=True" if self.tensor_parallel else f"device_map={self.device_map!r}"
        plan, one = self.device_map, f"works on one device, not with {named}"
        for wrong, why in (
            (self.tensor_parallel and plan is not None,
             "device_map and tensor_parallel are two ways to spread a model: give one of them"),
            (isinstance(plan, str) and plan not in _PLANS,
             f"device_map={plan!r} is unknown: choose one of {', '.join(_PLANS)}"),
            (device != "cpu", f"device={device!r} names one device and {named} finds its own: leave one of them out"),
            (packing not in ("auto", "off"), f"packing={packing!r} {one}: use packing='off'"),
            (compile == "on", f"compile='on' {one}: use compile='off'"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(why)
        if self.tensor_parallel:
            _check_processes()

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is given."""
        if self.tensor_parallel:
            from transformers.distributed.configuration_utils import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_plan="auto")}
        if self.device_map is None:
            return {}
        given = {"max_memory": self.max_memory, "offload_folder": self.offload_folder}
        return {"device_map": self.device_map} | {name: value for name, value in given.items() if value is not None}


def _check_processes() -> None:
    """Refuse one process, and versions that cut no weights or do so by means of their own. Raises ValueError."""
    if not (dist.is_initialized() or dist.is_torchelastic_launched()):
        raise ValueError(
            "tensor_parallel=True needs several processes: start the program with `torchrun --nproc-per-node N ...` "
            "(docs/devices.md)"
        )
    if torch.__version__ < "2.7" or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16):
        raise ValueError(
            f"tensor_parallel=True needs torch 2.7 and transformers 5.16 or newer, these are {torch.__version__} and "
            f"{transformers.__version__}: update them, or use device_map"
        )


def check_placement(model: nn.Module) -> None:
    """Refuse weights that no forward could read: on the meta device and not paged in, or sharded by FSDP.

    Raises UnsupportedModelError.
    """
    name = type(model).__name__
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{name} is sharded by FSDP, whose processes work on different texts; to decode with several processes "
            f"load it with tensor parallelism (docs/devices.md)"
        )
    for prefix, module in model.named_modules():
        for weight, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and not _paged(module):
                raise UnsupportedModelError(
                    f"{name} has no weights: {prefix}.{weight} is on the meta device and nothing pages it in; load "
                    f"the model with from_pretrained (device_map='auto' spreads a large one), or dispatch it first"
                )


def dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks move inputs or page weights in anywhere in the model."""
    return any(next(_hooks(module), None) is not None for module in model.modules())


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the module computes: its hook's device, else its weights'; None where it has none of both."""
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    weight = next(module.parameters(), None)
    return None if weight is None else weight.device


def read_weight(module: nn.Module, name: str) -> Tensor | None:
    """A weight of the module's own, whole: paged in, and gathered over processes (then all of them must ask)."""
    with ExitStack() as paged_in:
        if _paged(module):
            for hook in _hooks(module):
                hook.pre_forward(module)
                paged_in.callback(hook.post_forward, module, None)
        weight = getattr(module, name, None)
        if weight is None:
            return None
        assert isinstance(weight, Tensor), "weights are tensors"
        weight = weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes over which weights are cut; None where every weight is whole."""
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return next(meshes, None)


def sharded(module: nn.Module) -> bool:
    """Whether a weight of the module's own is cut over processes."""
    return any(isinstance(p, DTensor) for p in module.parameters(recurse=False))


def whole(module: nn.Module) -> nn.Module:
    """A copy of a sharded leaf module that one process can call alone. All of them must ask for it."""
    made = compat.with_own_parameters(module)
    vars(made).pop("forward", None)  # the one that gathers over processes; the class's own is left
    for name, _ in module.named_parameters(recurse=False):
        weight = read_weight(module, name)
        assert weight is not None, "it was named"
        setattr(made, name, nn.Parameter(weight, requires_grad=False))
    return made


def layer_devices(layers: Sequence[nn.Module] | None) -> list[torch.device | None] | None:
    """Where each decoder layer computes, if not all in one place."""
    devices = [execution_device(layer) for layer in layers or ()]
    return devices if len(set(devices)) > 1 else None


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook | CpuOffload]:
    hook = compat.accelerate_hook(module)
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook | CpuOffload):
            yield each


def _paged(module: nn.Module) -> bool:
    return any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in _hooks(module))
