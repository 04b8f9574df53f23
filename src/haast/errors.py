"""What can go wrong at Haast's boundary: errors that name the value and the remedy, all `ValueError`s, and warnings."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path, complaint: str) -> Path:
    """The path with `~` resolved. Raises ValueError, beginning with `complaint`, where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{complaint} {path} ({error}): give the folder in full") from error


def check_at_least(name: str, value: int, least: int = 1, meaning: str = "") -> None:
    """Refuse a setting below `least`, and say what the least value means. Raises ValueError."""
    if value < least:
        raise ValueError(f"{name}={value} is not allowed: give {least} or more{meaning}")


class UnsupportedModelError(ValueError):
    """The target model cannot be drafted for; the message names its class and why."""


class HeadMismatchError(ValueError):
    """A head's files are corrupt or incomplete, or belong to another target."""


class PromptError(ValueError):
    """A prompt cannot be answered: it is empty, or longer than the context."""


class HaastWarning(UserWarning):
    """Base class of Haast's warnings; the command line prints them on one line."""


class LongContextWarning(HaastWarning):
    """A text is longer than anything that its head was trained on; only the number of accepted drafts can suffer."""


class PrecisionWarning(HaastWarning):
    """The target is held in another precision than its head was trained on; only accepted drafts can become fewer."""


class HeadWarning(HaastWarning):
    """A head's drafts are accepted far below what its files say; only speed can suffer."""


class UnsupportedArgumentError(ValueError):
    """An argument of `generate` that Haast does not honour; `argument` is its name."""

    def __init__(self, argument: str, why: str) -> None:
        super().__init__(f"{argument} is not supported by Haast: {why}")
        self.argument = argument


class KVPoolError(ValueError):
    """A KV pool's budget is impossible, or a request can never fit it; the message says both sizes."""


class QueueFullError(ValueError):
    """The engine's queue holds as many waiting requests as it may: try again later, or allow more."""


class CancelledError(ValueError):
    """A request that was cancelled, or whose deadline has passed, is read again: what it emitted before was all."""
