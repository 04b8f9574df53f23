"""How a target is to be spread over devices or processes while it is loaded, and what does not go together.

Owns the settings and their checks; transformers and accelerate do the spreading, `placement` reads what they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from haast.target.packing import FORMS
from haast.target.precision import TORCHAO

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
        if self.tensor_parallel and self.device_map is not None:
            raise ValueError("device_map and tensor_parallel are two ways to spread a model: give one of them")
        if isinstance(self.device_map, str) and self.device_map not in _PLANS:
            raise ValueError(f"device_map={self.device_map!r} is unknown: choose one of {', '.join(_PLANS)}")
        if device != "cpu":
            raise ValueError(f"device={device!r} names one device and {named} finds its own: leave one of them out")
        if packing in (*FORMS, *TORCHAO):
            raise ValueError(f"packing={packing!r} works on one device, not with {named}: use packing='off'")
        if compile == "on":
            raise ValueError(f"compile='on' works on one device, not with {named}: use compile='off'")
        if self.tensor_parallel and not (dist.is_initialized() or dist.is_torchelastic_launched()):
            raise ValueError(
                "tensor_parallel=True needs several processes: start the program with "
                "`torchrun --nproc-per-node N ...` (docs/devices.md)"
            )
        if self.tensor_parallel:
            _check_versions()

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is given."""
        if self.tensor_parallel:
            from transformers.distributed.configuration_utils import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_plan="auto")}
        if self.device_map is None:
            return {}
        given = {"max_memory": self.max_memory, "offload_folder": self.offload_folder}
        return {"device_map": self.device_map} | {name: value for name, value in given.items() if value is not None}


def _check_versions() -> None:
    """Refuse versions that cut no weights, or by means of their own. Raises ValueError."""
    from transformers import __version__

    if torch.__version__ < "2.7" or tuple(map(int, __version__.split(".")[:2])) < (5, 16):
        raise ValueError(
            f"tensor_parallel=True needs torch 2.7 and transformers 5.16 or newer, these are {torch.__version__} and "
            f"{__version__}: update them, or use device_map"
        )
