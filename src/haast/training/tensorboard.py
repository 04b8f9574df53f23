"""The metrics of a training run for TensorBoard, in `OUT/tensorboard`; the step axis is views.

Owns the event files. Knows metrics lines only (see `report.Reporter`). The tensorboard package is optional and is
imported when a run starts, never on the way to `haast generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_AXES = ("step", "views")


class TensorBoard:
    """A `report.Watcher` that writes every number of a line as a scalar: `train/ce`, `valid/ce`, `tau`.

    Args:
        out_dir: folder of the run.
    """

    name = "TensorBoard"

    def __init__(self, out_dir: Path) -> None:
        self._folder = out_dir / "tensorboard"
        self._writer: SummaryWriter | None = None

    def start(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Open an event file. Readers forget what older files hold from the last kept views on, so that is repeated.

        Raises:
            ImportError: tensorboard is missing.
        """
        from torch.utils.tensorboard import SummaryWriter

        last = int(kept[-1]["views"]) if kept else 0
        self._writer = SummaryWriter(str(self._folder), purge_step=last)
        for values in kept:
            if values["views"] >= last:
                self.line(values)

    def line(self, values: Mapping[str, Any]) -> None:
        """Write a line's numbers at once: what waits in memory is lost by a kill, and a resume does not repeat it."""
        assert self._writer is not None, "a watcher is started before its first line"
        for name, value in values.items():
            if name not in _AXES and isinstance(value, int | float):
                self._writer.add_scalar(_tag(name), value, int(values["views"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            with suppress(OSError):  # an event that could not be written was told of at its line
                self._writer.close()


def _tag(name: str) -> str:
    if name == "tau":
        return name
    return name.replace("valid_", "valid/") if name.startswith("valid_") else f"train/{name}"
