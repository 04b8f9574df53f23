"""Haast: EAGLE speculative decoding for any Hugging Face causal LM, without changing what it says."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haast.api import Haast
    from haast.core import SamplingParams
    from haast.drafters.tree_shape import DraftShape
    from haast.generation import Generation, Piece
    from haast.integrations.decoder import Decoder, custom_generate
    from haast.session import Session, Sessions
    from haast.stats import Stats

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "DraftShape",
    "Generation",
    "Haast",
    "Piece",
    "SamplingParams",
    "Session",
    "Sessions",
    "Stats",
    "__version__",
    "custom_generate",
]

_HOMES = {
    "Decoder": "haast.integrations.decoder",
    "DraftShape": "haast.drafters.tree_shape",
    "Generation": "haast.generation",
    "Haast": "haast.api",
    "Piece": "haast.generation",
    "SamplingParams": "haast.core",
    "Session": "haast.session",
    "Sessions": "haast.session",
    "Stats": "haast.stats",
    "custom_generate": "haast.integrations.decoder",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `haast --help` must not.
    if name not in _HOMES:
        raise AttributeError(f"module 'haast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def _after_import(record: logging.LogRecord) -> bool:
    """Whether a record is more than what torchao says of itself while it is imported."""
    chatter = record.funcName == "<module>" or "Enum subclass" in str(record.msg)
    return not chatter or record.levelno >= logging.ERROR


# transformers imports torchao where it is installed. That logs which of its kernels are for other machines, and torch
# its plans for enums: nothing that anybody can act on.
for _chatty in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_chatty).addFilter(_after_import)
