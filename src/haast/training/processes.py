"""Distributed training: the accelerate wrapper and the few collective operations that a trainer needs.

Owns the accelerator. Does not know heads or losses. `accelerate launch` (or torchrun) sets the number of processes; a
single process needs no launcher.
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

from haast.device import multiplies_bf16
from haast.training.config import TrainConfig, TrainingData

_GLOO_WAIT = 0.2  # seconds
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Processes:
    """The processes of a run.

    Args:
        mixed_precision: "no", "bf16" or "auto".
        shard: use FSDP instead of a full copy of the parameters in each process.
        on_cpu: train on the CPU even if there is an accelerator.

    Raises:
        ValueError: `shard` with a single process.
    """

    def __init__(self, mixed_precision: str = "no", shard: bool = False, on_cpu: bool = False) -> None:
        self._accelerator: Any = Accelerator(cpu=on_cpu)
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.main: bool = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device
        fast = self.device.type == "cpu" and multiplies_bf16()
        chosen = ("bf16" if fast else "no") if mixed_precision == "auto" else mixed_precision
        self.mixed_precision: str = self.broadcast(chosen)  # also where the processes run on unlike CPUs
        self.sharded = shard
        if shard and self.count == 1:
            raise ValueError("shard=True needs several processes: start the command with `accelerate launch`")
        if self.count > 1:
            atexit.register(_destroy_process_group)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to bf16 if mixed precision is on. torch's own context, so it also works for sharded modules."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module on this process's device, wrapped so that gradients are synchronised."""
        if self.sharded:  # torch's FSDP, since accelerate does not shard on CPUs
            fully_shard(module.to(self.device))
            return module
        prepared: nn.Module = self._accelerator.prepare(module)
        return prepared

    def backward(self, module: nn.Module, loss: Tensor, sync: bool) -> None:
        """Accumulate the gradients of `loss`; with `sync` (the last batch of a step) sum them over processes.

        The wrappers compute the mean over processes, so the loss is multiplied by their number.
        """
        context: AbstractContextManager[Any] = nullcontext()
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync)
        elif not sync:
            context = self._accelerator.no_sync(module)
        with context:
            self._accelerator.backward(loss * self.count)

    def clip(self, module: nn.Module, max_norm: float) -> float:
        """Clip the norm of all gradients; returns the norm before."""
        norm: Any = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return float(norm)

    def sums(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Each value summed over processes; all processes must pass the same names."""
        names = sorted(values)
        stacked = torch.stack([values[name].detach().cpu().double() for name in names])
        if self.count > 1:
            stacked = self._accelerator.reduce(stacked.to(self.device), reduction="sum").cpu()
        return dict(zip(names, stacked.tolist(), strict=True))

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process."""
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.sums({"flag": torch.tensor(float(flag))})["flag"] > 0

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """All parameters, unsharded on the CPU, without the wrapper's prefix; on the main process only."""
        state = get_model_state_dict(module, options=_FULL)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def optimizer_state(self, module: nn.Module, parts: list[Optimizer]) -> dict[str, Any]:
        """State of the optimisers, unsharded on the CPU, by parameter name."""
        return dict(get_optimizer_state_dict(module, parts, options=_FULL))

    def load(
        self, module: nn.Module, weights: dict[str, Tensor], parts: list[Optimizer], state: dict[str, Any]
    ) -> None:
        """Load what `weights` and `optimizer_state` returned."""
        set_model_state_dict(module, dict[str, Any](weights), options=_FULL)
        set_optimizer_state_dict(module, parts, optim_state_dict=state, options=_FULL)

    def wait(self) -> None:
        """A barrier: wait for all processes."""
        self._accelerator.wait_for_everyone()


def _destroy_process_group() -> None:
    """Destroy the process group before the interpreter exits.

    A gloo thread releases the last operation's Python objects after the operation has returned. If the interpreter is
    shutting down by then, the thread is killed and aborts the process (SIGABRT, in about one run of eight, after all
    work is done). The sleep gives the thread time to release them.
    """
    if torch.distributed.is_initialized():
        time.sleep(_GLOO_WAIT)
        torch.distributed.destroy_process_group()


def is_main_process(data: TrainingData, settings: TrainConfig, on_cpu: bool) -> bool:
    """Whether this is the main process of a distributed run; the only process of other runs is.

    Raises:
        ValueError: several processes would extract features into the same folder; or `shard` with a single process.
    """
    processes = Processes(settings.mixed_precision, settings.shard, on_cpu=on_cpu)
    if processes.count > 1 and data.answers is not None:
        raise ValueError(
            f"{processes.count} processes cannot extract the features of --answers {data.answers} at once: make shards "
            f"with one process first (--answers ... --shards DIR --self-test), then give --shards DIR alone"
        )
    return processes.main
