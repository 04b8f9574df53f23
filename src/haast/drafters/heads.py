"""The drafter that belongs to a head of either kind. Owns only the choice."""

from __future__ import annotations

from haast.drafters.eagle import EagleDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.shape import DraftShape
from haast.heads.checkpoint import Head
from haast.heads.medusa import MedusaHeads
from haast.target import Target


def drafter_with(
    target: Target, head: Head, shape: DraftShape, window: int | None = None
) -> EagleDrafter | MedusaDrafter:
    """Draft with `head`; Medusa heads take only the shape's `nodes`, their tree follows from their accuracies.

    Raises:
        ValueError: a window for Medusa heads, or below 1.
    """
    if isinstance(head.module, MedusaHeads):
        if window is not None:
            raise ValueError(
                f"draft_window={window} is for EAGLE heads; Medusa heads read one position, so leave it out"
            )
        return MedusaDrafter(target, head, shape.nodes)
    return EagleDrafter(target, head, shape, window)
