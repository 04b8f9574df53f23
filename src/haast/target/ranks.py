"""Tensor parallelism: the processes that one model is sharded over. The first sends its decisions to the others.

All processes run the same program over the same texts and communicate inside the model's forwards. Decisions that
depend on floats or clocks could differ between processes, and one would then wait forever in the next forward. So the
first process decides and broadcasts the result as a list of integers (`haast.engine.tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_MESSAGE = 512  # integers in the first broadcast of a message, its length included
_FAILED = -1


class Ranks:
    """The processes of `mesh`; of its dimension "tp" if it has several. `leads` is true in the first process."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        self._device = torch.device(mesh.device_type)
        self._first = dist.get_process_group_ranks(self._group)[0]
        self.leads: bool = dist.get_rank() == self._first

    def share(self, values: Sequence[int] = ()) -> list[int]:
        """Broadcast the first process's `values` to all processes; the other processes' `values` are ignored.

        Raises RuntimeError if the first process has failed inside `leading`.
        """
        count = len(values)
        message = torch.zeros(_MESSAGE, dtype=torch.int64)
        if self.leads:
            message[0] = count
            message[1 : 1 + min(count, _MESSAGE - 1)] = torch.tensor(values[: _MESSAGE - 1], dtype=torch.int64)
        count, *received = self._broadcast(message)
        if count == _FAILED:
            raise RuntimeError("the first process of this tensor-parallel model has failed; see its own error")
        if count >= _MESSAGE:
            rest = torch.tensor(
                values[_MESSAGE - 1 :] if self.leads else [0] * (count + 1 - _MESSAGE), dtype=torch.int64
            )
            received += self._broadcast(rest)
        return received[:count]

    @contextmanager
    def leading(self) -> Iterator[None]:
        """If the first process fails inside the block, make the others, which wait in `share`, raise an error too."""
        try:
            yield
        except BaseException:
            if self.leads:
                message = torch.zeros(_MESSAGE, dtype=torch.int64)
                message[0] = _FAILED
                self._broadcast(message)
            raise

    def same(self, value: int) -> bool:
        """Whether all processes have the same value (below 2**62)."""
        both = torch.tensor([value, -value], device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX, self._group)
        largest, smallest = both.tolist()
        return bool(largest == -smallest)

    def _broadcast(self, message: torch.Tensor) -> list[int]:
        message = message.to(self._device)
        dist.broadcast(message, self._first, self._group)
        received: list[int] = message.tolist()
        return received
