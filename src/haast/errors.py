"""Haast's public errors, all `ValueError`s whose messages name the value and the remedy, and its warnings."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path, complaint: str) -> Path:
    """The path with `~` expanded. Raises ValueError, whose message starts with `complaint`, for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{complaint} {path} ({error}): give the full path of the folder") from error


def check_at_least(name: str, value: int, least: int = 1, meaning: str = "") -> None:
    """Raise ValueError for a setting below `least`; `meaning` explains the least value, e.g. " (0 is none)"."""
    if value < least:
        raise ValueError(f"{name}={value} is not allowed: give {least} or more{meaning}")


class UnsupportedModelError(ValueError):
    """The target model cannot be drafted for; the message has its class and the reason."""


class HeadMismatchError(ValueError):
    """A head's files are corrupt or incomplete, or belong to another target."""


class PromptError(ValueError):
    """A prompt is empty, or longer than the target's context."""


class HaastWarning(UserWarning):
    """Base class of Haast's warnings; the command line prints them on one line."""


class LongContextWarning(HaastWarning):
    """A text is longer than the sequences that its head was trained on. Only the accepted length can suffer."""


class PrecisionWarning(HaastWarning):
    """The target has another precision than the one its head was trained on. Only the accepted length can suffer."""


class HeadWarning(HaastWarning):
    """A head's accepted length is far below the one recorded in its files. Only speed can suffer."""


class UnsupportedArgumentError(ValueError):
    """An argument of `generate` that Haast does not support; `argument` is its name."""

    def __init__(self, argument: str, why: str) -> None:
        super().__init__(f"{argument} is not supported by Haast: {why}")
        self.argument = argument


class KVPoolError(ValueError):
    """A KV pool's size is not possible, or a request can never fit into it; the message has both sizes."""


class QueueFullError(ValueError):
    """The engine's queue of waiting requests is full: try again later, or raise its limit."""


class CancelledError(ValueError):
    """Raised when reading a request further that was cancelled or whose deadline has passed."""
