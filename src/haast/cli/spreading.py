"""`--device-map` and `--tensor-parallel`, of commands whose target may be spread. Owns flags, and who speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haast.cli.settings import Loading

if TYPE_CHECKING:
    from haast.target.device_map import Spread
    from haast.target.target import Target


@dataclass(frozen=True)
class Spreading:
    """Over what the target is spread."""

    device_map: Annotated[
        str | None, typer.Option(metavar="PLAN", help="auto: over all devices, memory and disk, as transformers plans.")
    ] = None
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Under torchrun: cut the layers over its processes.")
    ] = False

    def check(self, loading: Loading) -> Spread:
        """The library's own configuration. Raises ValueError."""
        from haast.target.device_map import Spread

        spread = Spread(self.device_map, tensor_parallel=self.tensor_parallel)
        spread.check(loading.device, loading.packing, loading.compile)
        return spread


def leads(target: Target) -> bool:
    """Whether this process speaks for a target, which several may hold."""
    return target.ranks is None or target.ranks.leads


@contextmanager
def one_voice(target: Target) -> Iterator[None]:
    """Of the processes that hold a target only the first one prints."""
    if leads(target):
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
