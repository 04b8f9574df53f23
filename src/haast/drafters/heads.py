"""The drafter that belongs to a head of either kind. Owns only the choice."""

from __future__ import annotations

from haast.drafters.eagle import EagleDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.shape import DraftShape
from haast.heads.checkpoint import Head
from haast.heads.medusa import MedusaHeads
from haast.target import Target


def drafter_with(target: Target, head: Head, shape: DraftShape) -> EagleDrafter | MedusaDrafter:
    """Draft with `head`; Medusa heads take only the shape's `nodes`, their tree follows from their accuracies."""
    if isinstance(head.module, MedusaHeads):
        return MedusaDrafter(target, head, shape.nodes)
    return EagleDrafter(target, head, shape)
