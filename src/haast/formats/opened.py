"""A foreign head, opened: what it is, whether it fits a target, and the head that comes of it.

Owns the order of things: files are read and their kind is found before a target loads; what they leave open is settled
once it is there. `open_head` is the way in for every head, Haast's own among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PretrainedConfig
from yaml import YAMLError  # type: ignore[import-untyped]  # huggingface_hub brings it

from haast.errors import HeadMismatchError
from haast.formats.base import Format, HeadFiles, Question, Reading, TargetFacts
from haast.formats.deepspec import DeepSpec
from haast.formats.detect import kind_of, plain_names
from haast.formats.files import CONFIG, locate, read_files
from haast.formats.gguf import Gguf, read_gguf
from haast.formats.keys import check_keys
from haast.formats.medusa import Medusa
from haast.formats.modelopt import ModelOpt
from haast.formats.official import Official
from haast.formats.probe import Settled, Text, module_of, settle
from haast.formats.specforge import SpecForge
from haast.formats.speculators import Speculators
from haast.heads.checkpoint import Head, check_fits, head_folder, is_own, load_head, read_head_config
from haast.heads.config import HeadConfig
from haast.target.device_map import read_weight
from haast.target.target import Target

_LOG = logging.getLogger(__name__)
# The first one that knows the files takes them; the official layout is what is left.
FORMATS: tuple[Format, ...] = (Gguf(), Medusa(), Speculators(), DeepSpec(), ModelOpt(), SpecForge(), Official())


@dataclass(frozen=True)
class OpenedHead:
    """A head of another trainer, read but not yet fitted to a target."""

    files: HeadFiles
    kind: str  # one of `formats.detect.KINDS`
    format: Format

    @property
    def draws_as(self) -> str:
        """How it drafts: "eagle" or "medusa"."""
        return "medusa" if self.kind == "medusa" else "eagle"

    @property
    def summary(self) -> str:
        """One line that says what was found."""
        files = self.files
        said = "; ".join((f"{len(files.tensors)} tensors", *files.notes))
        return f"{files.source}: {self.kind} head, {self.format.name} layout, {said}"

    @property
    def hidden_size(self) -> int:
        """Of the target's features, as far as the files alone say it."""
        document, tensors = self.files.document, plain_names(self.files.tensors)
        told = document.get("target_hidden_size") or document.get("eagle3.target_hidden_size")
        if isinstance(told, int):
            return told
        if self.kind == "medusa":
            return int(next(t.shape[1] for name, t in tensors.items() if name.endswith("weight")))
        return int(tensors.get("layers.0.self_attn.o_proj.weight", tensors.get("fusion_fc.weight")).shape[0])  # type: ignore[union-attr]

    def check_hidden(self, wanted: int, target: str) -> None:
        """Refuse a head for a target of another hidden size. Raises HeadMismatchError."""
        if self.hidden_size != wanted:
            raise self.files.wrong(
                f"the head was made for another model: its hidden_size is {self.hidden_size}, {target} has {wanted}",
                "use a head trained for this model",
            )

    def read(self, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        """What the files say for such a target, and what they leave open. Raises HeadMismatchError."""
        self.check_hidden(int(facts.config.hidden_size), "this one")
        return self.format.map_names(self.files, self.format.read_config(self.files, facts), facts)

    def fitted(
        self,
        target: Target,
        texts: Sequence[Text] | None = None,
        say: Callable[[str], None] = lambda _: None,
        probe: bool = True,
    ) -> tuple[Head, Settled | None]:
        """The head for this target, and what was measured for it; nothing is where nothing is open, or not `probe`.

        Raises HeadMismatchError where it is another model's.
        """
        reading, questions = self.read(facts_of(target))
        settled = None
        if questions and probe:
            settled = settle(target, reading, questions, texts, say)
            reading = settled.reading
        reading = without_copies(target, reading)
        module = module_of(target, reading)
        if target.dtype is not torch.float64:
            module = module.float()
        return Head(module.eval().requires_grad_(False), reading.draft_vocab, self._about(reading, settled)), settled

    def _about(self, reading: Reading, settled: Settled | None) -> dict[str, Any]:
        """What the head's files say of its making, and what was found."""
        about: dict[str, Any] = {"source": self.files.source, "layout": self.format.name, "kind": self.kind}
        document = self.files.document
        config = reading.config
        told = document.get("max_position_embeddings")
        rope = (config.rope_parameters or {}).get("rope_type") if isinstance(config, HeadConfig) else None
        if isinstance(told, int) and told > 0 and rope in (None, "default"):
            about["trained_length"] = told  # heads say how long their texts were; positions beyond work, but worse
        card = _card(self.files.folder)
        for key, found in (
            ("target", document.get("base_model_name_or_path") or card.get("base_model")),
            ("licence", document.get("license") or card.get("license")),
        ):
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, str):
                about[key] = found
        if settled is not None:
            about["probed"] = {each.question: each.answer for each in settled.tried if each.kept}
            about["unsure"] = list(settled.unsure)
            about["expected"] = {
                "first": round(settled.agreement.first, 4),
                "chain_tau": round(settled.agreement.tau, 4),
                "positions": len(settled.agreement.accepted),
            }
        return about


def open_head(head: str | Path) -> Head | OpenedHead:
    """A head by the user's word: a folder of Haast's or of a training run, a foreign folder, a .gguf file or a hub id.

    Raises HeadMismatchError where it is no head, or its files are missing, damaged, unsafe or of a kind without a
    drafter here.
    """
    place, source = locate(head)
    if place.is_file():
        if place.suffix != ".gguf":
            raise HeadMismatchError(f"{place} is a file: give the head's folder, a .gguf file or a hub id")
        return opened(read_gguf(place, source))
    folder = head_folder(place)
    if is_own(folder):
        return load_head(folder)
    files = [*folder.glob("*.gguf")]
    if len(files) == 1 and not (folder / CONFIG).is_file():
        return opened(read_gguf(files[0], source))
    return opened(read_files(folder, source))


def draws_as(place: Path) -> str:
    """How the head that lies there drafts, "eagle" or "medusa". Raises as `open_head` does."""
    if place.is_dir() and is_own(place):
        return "eagle" if isinstance(read_head_config(place), HeadConfig) else "medusa"
    head = open_head(place)
    assert isinstance(head, OpenedHead), "it is not Haast's own"
    return head.draws_as


def opened(files: HeadFiles) -> OpenedHead:
    """Files that were read, with their kind and family. Raises HeadMismatchError for what is no head of ours to run."""
    if not files.tensors:
        raise files.wrong("holds no tensors", "fetch the head again")
    check_keys(files, files.document)
    kind = kind_of(plain_names(files.tensors), files.source)
    found = OpenedHead(files, kind, next(each for each in FORMATS if each.detect(kind, files)))
    _LOG.info("%s", found.summary)
    return found


def _card(folder: Path) -> dict[str, Any]:
    """What a model card beside the files says at its head."""
    try:
        said: dict[str, Any] = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, LookupError, AttributeError, YAMLError):  # a card may hold anything
        return {}
    return said


def facts_of(target: Target) -> TargetFacts:
    """What a reading needs of a target."""
    tokens = torch.arange(min(8, target.vocab_size), device=target.device)
    table = read_weight(target.embedding, "weight")
    scale = 1.0
    if isinstance(table, Tensor) and table.is_floating_point():
        given, rows = target.embed(tokens).double().cpu(), table[tokens.to(table.device)].double().cpu()
        norm = float((rows * rows).sum())
        ratio = float((given * rows).sum()) / norm if norm and given.shape == rows.shape else 1.0
        if torch.allclose(given, ratio * rows, rtol=1e-2, atol=1e-6) and abs(ratio - 1) > 1e-2:
            scale = ratio
    return TargetFacts(target.config, scale)


def embedding_of(target: Target) -> Tensor:
    """What each of the target's tokens is embedded as, (vocabulary, H) in float32: with its scale, where it has one."""
    return target.embed(torch.arange(target.vocab_size, device=target.device)).detach().float().cpu()


def without_copies(target: Target, reading: Reading) -> Reading:
    """Without an embedding table that is the target's own, as many files hold one."""
    config = reading.config
    table = reading.weights.get("embed_tokens.weight")
    theirs = read_weight(target.embedding, "weight") if type(target.embedding) is nn.Embedding else None
    if table is None or theirs is None or not isinstance(config, HeadConfig) or theirs.shape != table.shape:
        return reading
    if not torch.allclose(table.float(), theirs.float().cpu(), rtol=1e-2, atol=1e-5):
        return reading
    weights = {name: tensor for name, tensor in reading.weights.items() if name != "embed_tokens.weight"}
    return replace(reading.having(own_embedding=False), weights=weights)


def reading_of(head: Head) -> Reading:
    """A head of Haast's as a reading, to be written elsewhere."""
    return Reading(head.module.config, dict(head.module.state_dict()), head.draft_vocab)


def check_files(place: Path, config: PretrainedConfig | None, target: str) -> None:
    """Refuse a damaged head, or one for another target, before that loads.

    `config` is the target's text configuration, where it is known. Raises HeadMismatchError.
    """
    if place.is_dir() and is_own(place):
        sizes = read_head_config(place)
        if config is not None:
            check_fits(sizes, int(config.hidden_size), int(config.vocab_size), target)
        return
    check_head(open_head(place), config, target)


def check_head(head: Head | OpenedHead, config: PretrainedConfig | None, target: str) -> None:
    """The same of a head whose files were read already."""
    if config is None:
        return
    if isinstance(head, Head):
        check_fits(head.module.config, int(config.hidden_size), int(config.vocab_size), target)
        return
    head.check_hidden(int(config.hidden_size), target)
    head.read(TargetFacts(config))
