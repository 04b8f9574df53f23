"""Where a model's weights are: on one device, on several, paged in from memory or disk, or cut over processes.

Owns the reading of what others have set up: accelerate's hooks (`device_map`), which move a module's inputs and page
its weights in, and torch's distributed tensors (`tp_plan`). Moves nothing by itself. A module that is borrowed from
such a model is called as a module, so that its hooks do their work; only `read_weight` looks at a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from haast import compat
from haast.errors import UnsupportedModelError


def check_placement(model: nn.Module) -> None:
    """Refuse weights that no forward could read.

    Raises:
        UnsupportedModelError: weights on the meta device without a hook that pages them in, or sharded by FSDP.
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
