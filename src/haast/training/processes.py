"""One process or many: what accelerate says of them, and the few collective operations a trainer needs.

Owns the accelerator. Knows no heads and no losses. `accelerate launch` (or torchrun) decides how many processes there
are; one process needs no launcher.
"""

from __future__ import annotations

import atexit
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_LAST_WORK = 0.2  # seconds
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Processes:
    """The processes of a run.

    Args:
        mixed_precision: "no" or "bf16".
        shard: FSDP instead of whole parameters in every process.
        on_cpu: whatever accelerators there are.

    Raises:
        ValueError: sharding is asked of a single process.
    """

    def __init__(self, mixed_precision: str = "no", shard: bool = False, on_cpu: bool = False) -> None:
        self._accelerator: Any = Accelerator(cpu=on_cpu)
        self._mixed = mixed_precision == "bf16"
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.main: bool = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device
        self.sharded = shard
        if shard and self.count == 1:
            raise ValueError("shard=True needs several processes: start the command with `accelerate launch`")
        if self.count > 1:
            atexit.register(_leave)

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in bf16 within, where mixed precision was asked for. Torch's own, so sharded modules have it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module on this process's device, wrapped for gradients to meet."""
        if self.sharded:  # torch's own, since accelerate shards on accelerators only
            fully_shard(module.to(self.device))
            return module
        prepared: nn.Module = self._accelerator.prepare(module)
        return prepared

    def backward(self, module: nn.Module, loss: Tensor, meet: bool) -> None:
        """Add the gradients of `loss`; with `meet` those of all processes are summed, as the last batch of a step does.

        The wrappers take the mean over processes, so the loss is multiplied by their number.
        """
        context: AbstractContextManager[Any] = nullcontext()
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(meet)
        elif not meet:
            context = self._accelerator.no_sync(module)
        with context:
            self._accelerator.backward(loss * self.count)

    def clip(self, module: nn.Module, most: float) -> float:
        """Clip the norm of all gradients; returns what it was."""
        norm: Any = torch.nn.utils.clip_grad_norm_(module.parameters(), most)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return float(norm)

    def sums(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Each value summed over processes; all must bring the same names."""
        names = sorted(values)
        every = torch.stack([values[name].detach().cpu().double() for name in names])
        if self.count > 1:
            every = self._accelerator.reduce(every.to(self.device), reduction="sum").cpu()
        return dict(zip(names, every.tolist(), strict=True))

    def agree(self, value: Any) -> Any:
        """The main process's value, on every process."""
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.sums({"flag": torch.tensor(float(flag))})["flag"] > 0

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """All parameters, whole and on the CPU, without the wrapper's prefix; on the main process only."""
        state = get_model_state_dict(module, options=_FULL)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def optimizer_state(self, module: nn.Module, parts: list[Optimizer]) -> dict[str, Any]:
        """State of the optimisers, whole and on the CPU, by parameter name."""
        return dict(get_optimizer_state_dict(module, parts, options=_FULL))

    def load(
        self, module: nn.Module, weights: dict[str, Tensor], parts: list[Optimizer], state: dict[str, Any]
    ) -> None:
        """Take over what `weights` and `optimizer_state` returned."""
        set_model_state_dict(module, dict[str, Any](weights), options=_FULL)
        set_optimizer_state_dict(module, parts, optim_state_dict=state, options=_FULL)

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()


def _leave() -> None:
    """End the process group before the interpreter ends.

    A gloo thread lets go of the last operation's Python objects after the operation has returned. Where the interpreter
    is being torn down by then, the thread is killed and takes the process with it (SIGABRT, in about one run of eight,
    all work done). Sleeping here lets it have the interpreter once more.
    """
    if torch.distributed.is_initialized():
        time.sleep(_LAST_WORK)
        torch.distributed.destroy_process_group()
