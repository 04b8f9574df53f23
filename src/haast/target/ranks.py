"""The processes that hold one model in shards, and how the first of them tells the others: by a list of integers.

Every process runs the same program over the same texts; forwards meet inside the model. What processes decide from
numbers or from their clocks could differ by a last bit, and one would wait for ever in the next forward: so the first
process decides, and tells (`haast.engine.tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_ROOM = 512  # integers of a message that travel in its first broadcast, its length included
_FAILED = -1


class Ranks:
    """The processes of `mesh`; of a mesh of several dimensions those of its tensor-parallel one."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        self._device = torch.device(mesh.device_type)
        self._first = dist.get_process_group_ranks(self._group)[0]
        self.leads: bool = dist.get_rank() == self._first

    def share(self, values: Sequence[int] = ()) -> list[int]:
        """The first process's `values`, on every process; what the others give is not read.

        Raises RuntimeError where the first process has failed within `leading`.
        """
        count = len(values)
        box = torch.zeros(_ROOM, dtype=torch.int64)
        if self.leads:
            box[0] = count
            box[1 : 1 + min(count, _ROOM - 1)] = torch.tensor(values[: _ROOM - 1], dtype=torch.int64)
        count, *found = self._broadcast(box)
        if count == _FAILED:
            raise RuntimeError("the first process of this tensor-parallel model has failed; its own error says why")
        if count >= _ROOM:
            rest = torch.tensor(values[_ROOM - 1 :] if self.leads else [0] * (count + 1 - _ROOM), dtype=torch.int64)
            found += self._broadcast(rest)
        return found[:count]

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Where the first process fails within it, the others, who wait in `share`, are told that nothing comes."""
        try:
            yield
        except BaseException:
            if self.leads:
                box = torch.zeros(_ROOM, dtype=torch.int64)
                box[0] = _FAILED
                self._broadcast(box)
            raise

    def same(self, value: int) -> bool:
        """Whether all processes have the same value (below 2**62)."""
        both = torch.tensor([value, -value], device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX, self._group)
        most, least = both.tolist()
        return bool(most == -least)

    def _broadcast(self, box: torch.Tensor) -> list[int]:
        box = box.to(self._device)
        dist.broadcast(box, self._first, self._group)
        found: list[int] = box.tolist()
        return found
