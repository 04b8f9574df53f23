"""Haast: EAGLE speculative decoding for any Hugging Face causal LM, without changing what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haast.api import Generation, Haast, Piece
    from haast.drafters.shape import DraftShape
    from haast.dropin.decoder import Decoder, custom_generate
    from haast.engine import Stats
    from haast.sampling import SamplingConfig
    from haast.session import Session, Sessions

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "DraftShape",
    "Generation",
    "Haast",
    "Piece",
    "SamplingConfig",
    "Session",
    "Sessions",
    "Stats",
    "__version__",
    "custom_generate",
]

_HOMES = {
    "Decoder": "haast.dropin.decoder",
    "DraftShape": "haast.drafters.shape",
    "Generation": "haast.api",
    "Haast": "haast.api",
    "Piece": "haast.api",
    "SamplingConfig": "haast.sampling",
    "Session": "haast.session",
    "Sessions": "haast.session",
    "Stats": "haast.engine",
    "custom_generate": "haast.dropin.decoder",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `haast --help` must not.
    if name not in _HOMES:
        raise AttributeError(f"module 'haast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
