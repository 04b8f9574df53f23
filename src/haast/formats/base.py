"""What a family of checkpoint formats has to say: the contract `Format`, and the values that pass between its parts.

Owns no format. Files leave things open, or say them in words that mean different things to different trainers; a
format turns such words into a first reading and `Question`s, which `formats.probe` answers by measuring.

    files ──detect──► format ──read_config──► sizes ──map_names──► Reading, Question, ... ──probe──► Reading
                             ◄──write── a head of Haast's, ◄──check── what was written, read again
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haast.errors import HeadMismatchError
from haast.heads.config import HeadSizes, rope_of
from haast.heads.eagle3 import default_layers


@dataclass(frozen=True)
class HeadFiles:
    """A head's files as they lie there.

    Attributes:
        folder: where they lie.
        document: config.json, or what a GGUF file says of itself.
        tensors: by the names of the files.
        source: the user's word for them, with a hub id's revision.
        notes: what is worth saying of them.
    """

    folder: Path
    document: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str
    notes: tuple[str, ...] = ()

    def wrong(self, what: str, remedy: str) -> HeadMismatchError:
        """The error for a head that can't be used: what is wrong with it, and what to do."""
        return HeadMismatchError(f"{self.source}: {what}; {remedy}")


@dataclass(frozen=True)
class TargetFacts:
    """What a reading needs of the target: its text configuration, and how it embeds.

    Attributes:
        config: the text configuration.
        embedding_scale: what its embedding module multiplies the table's rows by (Gemma); 1 is nothing.
    """

    config: Any
    embedding_scale: float = 1.0

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """The layers that EAGLE-3 heads read where their files name none."""
        return default_layers(self.config)

    @property
    def rope(self) -> dict[str, Any]:
        return rope_of(self.config)


@dataclass(frozen=True)
class Reading:
    """One way to read a head's files.

    Attributes:
        config: sizes and conventions.
        weights: float32 or wider, by Haast's names.
        draft_vocab: (n,) int64, ascending target ids; None is all.
        shares_lm_head: the files hold no LM head, so that the target's rows are the head's.
    """

    config: HeadSizes
    weights: dict[str, Tensor]
    draft_vocab: Tensor | None = None
    shares_lm_head: bool = False

    def having(self, **changed: Any) -> Reading:
        """With other sizes or conventions."""
        return replace(self, config=replace(self.config, **changed))


@dataclass(frozen=True)
class Option:
    """One answer to a question: in words, and what it makes of a reading."""

    label: str
    change: Callable[[Reading], Reading]


@dataclass(frozen=True)
class Question:
    """What files leave open. The first option is what they say, or what their usual readers take."""

    name: str
    options: tuple[Option, ...]

    @classmethod
    def of(cls, name: str, key: str, options: Sequence[tuple[str, Any]]) -> Question:
        """Of a field of the configuration: a label and a value each; equal values are one option."""
        distinct: dict[str, Option] = {}
        for label, value in options:
            distinct.setdefault(_key(value), Option(label, _setting(key, value)))
        return cls(name, tuple(distinct.values()))


def _key(value: Any) -> str:
    return repr(sorted(value.items()) if isinstance(value, dict) else value)


def _setting(key: str, value: Any) -> Callable[[Reading], Reading]:
    return lambda reading: reading.having(**{key: value})


@dataclass(frozen=True)
class Engine:
    """What a head is written for.

    Attributes:
        name: one of `formats.export.ENGINES`.
        target: the target's name or hub id.
        config: its text configuration, as a dictionary.
    """

    name: str
    target: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A head in an engine's layout: config.json, tensors, and what is lost or must be known."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = field(default=())


class Format(ABC):
    """One family of checkpoints.

    Attributes:
        name: for people.
        kinds: of heads that it holds, of `formats.detect.KINDS`.
    """

    name: str
    kinds: tuple[str, ...]

    @abstractmethod
    def detect(self, kind: str, files: HeadFiles) -> bool:
        """Whether these files, which hold a head of this kind, are this family's."""

    @abstractmethod
    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        """Sizes and conventions. Raises HeadMismatchError where they don't fit the tensors."""

    @abstractmethod
    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        """The first reading, and what is open. Raises HeadMismatchError for a tensor that is missing, or left over."""

    def write(self, reading: Reading, engine: Engine) -> Written:
        """The head in this family's layout. Raises ValueError where the layout can't hold it."""
        raise ValueError(f"{self.name} heads are read here, and not written: choose another --to")

    def check(self, written: Written, reading: Reading, facts: TargetFacts) -> None:
        """Raise ValueError unless what was written, read again, is this very head."""
        files = HeadFiles(Path(), dict(written.document), dict(written.tensors), f"the {self.name} export")
        again, _ = self.map_names(files, self.read_config(files, facts), facts)
        more = [name for name in again.weights if name not in reading.weights and bool(again.weights[name].any())]
        if more or reading.weights.keys() - again.weights.keys():
            raise ValueError(f"{files.source} has other tensors than the head: {sorted(again.weights)}")
        for name, tensor in reading.weights.items():
            if not torch.equal(again.weights[name].float(), tensor.float()):
                raise ValueError(f"{files.source} has other numbers than the head in {name}")
