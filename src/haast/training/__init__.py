"""Training of draft heads on the target's own answers (EAGLE, arXiv 2401.15077, section 3.2).

    prompts -> regenerate.py -> answers -> dataset.py, features.py -> batches.py -> trainer.py -> a head

`train` does what `haast train` does. This package does not decode with a head: the trainer is given a function that
measures tau with the real engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haast.training.config import TrainConfig, TrainingData
    from haast.training.losses import Loss
    from haast.training.run import train

__all__ = ["Loss", "TrainConfig", "TrainingData", "train"]
_MODULES = {"Loss": "losses", "TrainConfig": "config", "TrainingData": "config", "train": "run"}


def __getattr__(name: str) -> Any:
    # `haast --help` reads the settings and must not wait for torch.
    if name not in _MODULES:
        raise AttributeError(f"module 'haast.training' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"haast.training.{_MODULES[name]}"), name)
