"""Checkpoint formats of heads: the interface `Format`, and the types that its methods exchange.

Owns no concrete format. A head's files leave some conventions open, or use keys that trainers understand differently. A
format therefore returns a default reading and a list of `Question`s, which `formats.probe` answers by measuring.

    files ──detect──► format ──read_config──► sizes ──map_names──► Reading, Question, ... ──probe──► Reading
                             ◄──write── a Haast head, ◄──check── reads the written files again
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
    """A head's files as read, before any conversion.

    Attributes:
        folder: the folder or .gguf file.
        document: config.json, or the metadata of a GGUF file.
        tensors: under the names in the files.
        source: the path or hub id that the user gave, a hub id with its revision.
        notes: remarks for the user.
    """

    folder: Path
    document: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str
    notes: tuple[str, ...] = ()

    def error(self, problem: str, remedy: str) -> HeadMismatchError:
        """The error for a head that can't be used."""
        return HeadMismatchError(f"{self.source}: {problem}; {remedy}")


@dataclass(frozen=True)
class TargetFacts:
    """What a format needs to know about the target.

    Attributes:
        config: the text configuration.
        embedding_scale: factor by which the embedding module multiplies the table's rows (Gemma); 1 for none.
        final_norm: (H,) weight of the decoder's last norm; None if it is not known.
    """

    config: Any
    embedding_scale: float = 1.0
    final_norm: Tensor | None = None

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """The layers that EAGLE-3 heads read if their files name none."""
        return default_layers(self.config)

    @property
    def rope(self) -> dict[str, Any]:
        return rope_of(self.config)


@dataclass(frozen=True)
class Reading:
    """One way to read a head's files.

    Attributes:
        config: sizes and conventions.
        weights: float32 or wider, under Haast's names.
        draft_vocab: (n,) int64, ascending target ids; None is the whole vocabulary.
        shares_lm_head: the files hold no LM head, so the head uses the target's rows.
    """

    config: HeadSizes
    weights: dict[str, Tensor]
    draft_vocab: Tensor | None = None
    shares_lm_head: bool = False

    def with_config(self, **changed: Any) -> Reading:
        """A copy with these fields of the configuration replaced."""
        return replace(self, config=replace(self.config, **changed))


@dataclass(frozen=True)
class Option:
    """One answer to a question: a label, and the change that it makes to a reading."""

    label: str
    change: Callable[[Reading], Reading]


@dataclass(frozen=True)
class Question:
    """A convention that the files leave open. The first option is what the files state, or what readers assume."""

    name: str
    options: tuple[Option, ...]

    @classmethod
    def of(cls, name: str, key: str, options: Sequence[tuple[str, Any]]) -> Question:
        """A question about the configuration field `key`, from (label, value) pairs; equal values make one option."""
        distinct: dict[str, Option] = {}
        for label, value in options:
            distinct.setdefault(_comparable(value), Option(label, _config_change(key, value)))
        return cls(name, tuple(distinct.values()))


def _comparable(value: Any) -> str:
    return repr(sorted(value.items()) if isinstance(value, dict) else value)


def _config_change(key: str, value: Any) -> Callable[[Reading], Reading]:
    return lambda reading: reading.with_config(**{key: value})


@dataclass(frozen=True)
class ServingEngine:
    """The engine and target that a head is written for.

    Attributes:
        name: one of `formats.ENGINES`, or the name of a registered format.
        target: the target's name or hub id.
        config: its text configuration, as a dictionary.
    """

    name: str
    target: str
    config: dict[str, Any]


@dataclass(frozen=True)
class WrittenHead:
    """A head in an engine's layout: config.json, tensors, and notes for the user (what the layout loses, say)."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = field(default=())


class Format(ABC):
    """One checkpoint format. `formats.opened.register` adds one of your own; see `examples/own_format.py`.

    Attributes:
        name: shown to users.
        kinds: the kinds of head that it can hold, from `formats.detect.KINDS`.
    """

    name: str
    kinds: tuple[str, ...]

    def read_files(self, path: Path, source: str) -> HeadFiles | None:
        """The files at `path`, a folder or a file, if only this format can read them; None leaves them to others.

        `formats.files` reads a folder with a config.json and the usual files of weights. The tensors must have names by
        which `formats.detect.kind_of` tells the kind of head. Raises HeadMismatchError for corrupt files.
        """
        return None

    def write_files(self, folder: Path, written: WrittenHead, dtype: torch.dtype) -> bool:
        """Write files that `read_files` reads, and return True; False leaves it to `formats.export`.

        The tensors of `written` are contiguous, and those of floating point are of `dtype`.
        """
        return False

    @abstractmethod
    def detect(self, kind: str, files: HeadFiles) -> bool:
        """Whether these files, which hold a head of this kind, are in this format."""

    @abstractmethod
    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        """The head's sizes and conventions. Raises HeadMismatchError if they don't fit the tensors."""

    @abstractmethod
    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        """The default reading, and the open questions. Raises HeadMismatchError for a missing or unknown tensor."""

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        """The head in this format. Raises ValueError if the format can't hold it."""
        raise ValueError(f"Haast reads {self.name} heads but can't write them: choose another --to")

    def check(self, written: WrittenHead, reading: Reading, facts: TargetFacts) -> None:
        """Read `written` again. Raises ValueError unless its tensors equal those of `reading`."""
        files = HeadFiles(Path(), dict(written.document), dict(written.tensors), f"the {self.name} export")
        reread, _ = self.map_names(files, self.read_config(files, facts), facts)
        extra = [name for name in reread.weights if name not in reading.weights and bool(reread.weights[name].any())]
        if extra or reading.weights.keys() - reread.weights.keys():
            raise ValueError(f"{files.source} has other tensors than the head: {sorted(reread.weights)}")
        for name, tensor in reading.weights.items():
            if not torch.equal(reread.weights[name].float(), tensor.float()):
                raise ValueError(f"{files.source} has other values than the head in {name}")
