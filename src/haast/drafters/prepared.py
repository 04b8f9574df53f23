"""A tree shape made ready for a head: plan, index tensors and native call, and which candidates get children."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from haast.drafters.native_draft import NativeDraft
from haast.drafters.tree_builder import best_places, calibrated
from haast.drafters.tree_shape import Plan
from haast.heads.acceptance import Source
from haast.tuning.policy import CostModel


@dataclass(frozen=True)
class Prepared:
    """A shape with its index tensors and native plan, cached."""

    plan: Plan
    pace: CostModel | None
    frontier: list[Tensor]  # static trees: per level, candidate indices (1, width)
    keep: Tensor | None  # static trees: (1, nodes - 1)
    one_call: NativeDraft | None

    def expanded(
        self, level: int, scores: Tensor, curves: Source, setting: Sequence[tuple[float, float]]
    ) -> tuple[Tensor, Tensor] | None:
        """The candidates of a level that get children: places within the level and scores, (rows, width) each.

        None if another level does not pay. `curves` and `setting` are those of `Growth.calibrate`.
        """
        fixed = self.plan.frontier is not None
        chosen = self.frontier[level] if fixed else best_places(scores, self.plan.widths[level])
        chosen = chosen.expand(len(scores), -1)
        above = scores.gather(1, chosen)
        if self.pace is None or self.keep is not None or self.pace.deeper(calibrated(above, curves, setting)):
            return chosen, above
        return None
