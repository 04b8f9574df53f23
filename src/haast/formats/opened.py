"""Opens a foreign head, checks that it fits a target, and converts it to a Haast head.

Owns the order of the steps: the files are read and their kind is detected before the target loads; open conventions are
probed once the target is there. `open_head` opens every kind of head, Haast's own included.
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
from haast.formats.block import Block
from haast.formats.deepspec import DeepSpec
from haast.formats.detect import kind_of, plain_names
from haast.formats.files import locate, read_files
from haast.formats.gguf import Gguf
from haast.formats.keys import check_keys
from haast.formats.medusa import Medusa
from haast.formats.modelopt import ModelOpt
from haast.formats.mtp import Mtp
from haast.formats.official import Official
from haast.formats.probe import ProbeResult, Text, module_of, probe_conventions
from haast.formats.specforge import SpecForge
from haast.formats.speculators import Speculators
from haast.heads.block import BlockConfig
from haast.heads.checkpoint import Head, check_fits, head_folder, is_own, load_head, read_head_config
from haast.heads.config import HeadConfig
from haast.heads.mtp import MtpConfig
from haast.target.device_map import read_weight
from haast.target.target import Target

_LOG = logging.getLogger(__name__)
# The first format that detects the files reads them; the official layout accepts all others.
FORMATS: tuple[Format, ...] = (
    *(Gguf(), Mtp(), Medusa(), Block(), Speculators(), DeepSpec(), ModelOpt(), SpecForge(), Official()),
)
_REGISTERED: dict[str, Format] = {}  # by name


def register(form: Format) -> None:
    """Add a format of your own, for reading and for `export_head(head, form.name, ...)`.

    It is asked before Haast's own formats, so `detect` must be false for other files. It replaces a registered format
    of the same name.
    """
    _REGISTERED[form.name] = form


def registered(name: str) -> Format | None:
    """The registered format of this name; None if there is none."""
    return _REGISTERED.get(name)


@dataclass(frozen=True)
class OpenedHead:
    """A head of another trainer, whose files are read but which is not yet fitted to a target."""

    files: HeadFiles
    kind: str  # one of `formats.detect.KINDS`
    format: Format

    @property
    def drafter_kind(self) -> str:
        """The drafter that runs it: "eagle", "block" or "medusa"."""
        return {"medusa": "medusa", "dflash": "block", "dspark": "block"}.get(self.kind, "eagle")

    @property
    def summary(self) -> str:
        """One line about the files, for the user."""
        files = self.files
        details = "; ".join((f"{len(files.tensors)} tensors", *files.notes))
        return f"{files.source}: {self.kind} head, {self.format.name} layout, {details}"

    @property
    def hidden_size(self) -> int:
        """The width of the target's features, by the files alone."""
        document, tensors = self.files.document, plain_names(self.files.tensors)
        stated = document.get("target_hidden_size") or document.get("eagle3.target_hidden_size")
        if isinstance(stated, int):
            return stated
        if self.kind == "mtp":
            return len(tensors["inputs.0.eh_proj.weight"])
        if self.kind == "medusa":
            return int(next(t.shape[1] for name, t in tensors.items() if name.endswith("weight")))
        return int(tensors.get("layers.0.self_attn.o_proj.weight", tensors.get("fusion_fc.weight")).shape[0])  # type: ignore[union-attr]

    def check_hidden(self, size: int, target: str) -> None:
        """Raise HeadMismatchError unless the head is for targets of this hidden size."""
        if self.hidden_size != size:
            raise self.files.error(
                f"the head was made for another model: its hidden_size is {self.hidden_size}, {target} has {size}",
                "use a head trained for this model",
            )

    def read(self, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        """The default reading of the files for such a target, and the open questions. Raises HeadMismatchError."""
        self.check_hidden(int(facts.config.hidden_size), "this one")
        return self.format.map_names(self.files, self.format.read_config(self.files, facts), facts)

    def fitted(
        self,
        target: Target,
        texts: Sequence[Text] | None = None,
        report: Callable[[str], None] = lambda _: None,
        probe: bool = True,
    ) -> tuple[Head, ProbeResult | None]:
        """The head for this target, and the result of probing; None if nothing is open, or without `probe`.

        Args:
            target: the target, loaded.
            texts: for probing, greedy text of the target; generated if absent.
            report: called with a progress message.
            probe: whether to measure open conventions; otherwise their defaults are used.

        Raises:
            HeadMismatchError: the head is for another model.
        """
        reading, questions = self.read(facts_of(target))
        result = None
        if questions and probe:
            result = probe_conventions(target, reading, questions, texts, report)
            reading = result.reading
        reading = without_copies(target, reading)
        module = module_of(target, reading)
        if target.dtype is not torch.float64:
            module = module.float()
        return Head(module.eval().requires_grad_(False), reading.draft_vocab, self._about(reading, result)), result

    def _about(self, reading: Reading, result: ProbeResult | None) -> dict[str, Any]:
        """Metadata of the head: what its files state about its training, and what probing measured."""
        about: dict[str, Any] = {"source": self.files.source, "layout": self.format.name, "kind": self.kind}
        document = self.files.document
        config = reading.config
        positions = document.get("max_position_embeddings")
        rope = (config.rope_parameters or {}).get("rope_type") if isinstance(config, HeadConfig) else None
        if isinstance(positions, int) and positions > 0 and rope in (None, "default"):
            about["trained_length"] = positions  # later positions work, but with a lower accepted length
        card = _card_metadata(self.files.folder)
        for key, value in (
            ("target", document.get("base_model_name_or_path") or card.get("base_model")),
            ("licence", document.get("license") or card.get("license")),
        ):
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, str):
                about[key] = value
        if result is not None:
            about["probed"] = {trial.question: trial.answer for trial in result.tried if trial.kept}
            about["unsure"] = list(result.unsure)
            about["expected"] = {
                "first": round(result.agreement.first, 4),
                "chain_tau": round(result.agreement.tau, 4),
                "positions": len(result.agreement.accepted),
            }
        return about


def open_head(head: str | Path) -> Head | OpenedHead:
    """Open a head by name: a Haast head's or training run's folder, a foreign head's folder, a .gguf file or a hub id.

    Raises HeadMismatchError if it is no head, has missing, corrupt or unsafe files, or is of a kind that Haast has no
    drafter for.
    """
    path, source = locate(head)
    path = path if path.is_file() else head_folder(path)
    return load_head(path) if is_own(path) else open_foreign(path, source)


def open_foreign(path: Path, source: str) -> OpenedHead:
    """Read the files of a head that is not in Haast's own layout. `source` is its name. Raises as `open_head` does."""
    formats = (*_REGISTERED.values(), *FORMATS)
    files = next((read for form in formats if (read := form.read_files(path, source)) is not None), None)
    if files is None and path.is_file():
        raise HeadMismatchError(f"{path} is a file: give the head's folder, a .gguf file or a hub id")
    files = read_files(path, source) if files is None else files
    if not files.tensors:
        raise files.error("it holds no tensors", "fetch the head again")
    check_keys(files, files.document)
    kind = kind_of(plain_names(files.tensors), files.source)
    opened = OpenedHead(files, kind, next(form for form in formats if form.detect(kind, files)))
    _LOG.info("%s", opened.summary)
    return opened


def drafter_kind(path: Path) -> str:
    """The drafter that runs the head at `path`: "eagle", "block" or "medusa". Raises as `open_head` does."""
    if path.is_dir() and is_own(path):
        config = read_head_config(path)
        return "block" if isinstance(config, BlockConfig) else "eagle" if isinstance(config, HeadConfig) else "medusa"
    head = open_head(path)
    assert isinstance(head, OpenedHead), "it is not Haast's own"
    return head.drafter_kind


def _card_metadata(folder: Path) -> dict[str, Any]:
    """The YAML metadata of a model card in the folder; empty without one."""
    try:
        metadata: dict[str, Any] = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, LookupError, AttributeError, YAMLError):  # a card may hold anything
        return {}
    return metadata


def facts_of(target: Target) -> TargetFacts:
    """The facts about a target that formats need."""
    tokens = torch.arange(min(8, target.vocab_size), device=target.device)
    table = read_weight(target.embedding, "weight")
    scale = 1.0
    if isinstance(table, Tensor) and table.is_floating_point():
        embedded, rows = target.embed(tokens).double().cpu(), table[tokens.to(table.device)].double().cpu()
        norm = float((rows * rows).sum())
        ratio = float((embedded * rows).sum()) / norm if norm and embedded.shape == rows.shape else 1.0
        if torch.allclose(embedded, ratio * rows, rtol=1e-2, atol=1e-6) and abs(ratio - 1) > 1e-2:
            scale = ratio
    decoder: nn.Module = target.model.get_decoder()  # type: ignore[no-untyped-call]
    last = dict(decoder.named_children()).get("norm")
    return TargetFacts(target.config, scale, None if last is None else read_weight(last, "weight"))


def embedding_of(target: Target) -> Tensor:
    """The embeddings of all target tokens, (vocabulary, H) in float32, with the target's embedding scale applied."""
    return target.embed(torch.arange(target.vocab_size, device=target.device)).detach().float().cpu()


def without_copies(target: Target, reading: Reading) -> Reading:
    """Drop the head's embedding table or LM head if it is a copy of the target's, as in many files."""
    options = {"embed_tokens.weight": (target.embedding, "own_embedding")}
    if isinstance(reading.config, MtpConfig):  # others compute logits with the LM head of their files
        options["lm_head.weight"] = (target.lm_head, "own_lm_head")
    for name, (module, option) in options.items():
        table = reading.weights.get(name)
        original = read_weight(module, "weight") if type(module) in (nn.Embedding, nn.Linear) else None
        if table is None or original is None or original.shape != table.shape:
            continue
        if torch.allclose(table.float(), original.float().cpu(), rtol=1e-2, atol=1e-5):
            weights = {key: tensor for key, tensor in reading.weights.items() if key != name}
            reading = replace(reading.with_config(**{option: False}), weights=weights)
    return reading


def reading_of(head: Head) -> Reading:
    """A Haast head as a reading, for export."""
    return Reading(head.module.config, dict(head.module.state_dict()), head.draft_vocab)


def check_files(path: Path, config: PretrainedConfig | None, target: str) -> None:
    """Raise HeadMismatchError for a damaged head, or one for another target, before the target loads.

    `config` is the target's text configuration, or None if it is not known yet.
    """
    if path.is_dir() and is_own(path):
        sizes = read_head_config(path)
        if config is not None:
            check_fits(sizes, int(config.hidden_size), int(config.vocab_size), target)
        return
    check_head(open_head(path), config, target)


def check_head(head: Head | OpenedHead, config: PretrainedConfig | None, target: str) -> None:
    """`check_files` for a head whose files were already read."""
    if config is None:
        return
    if isinstance(head, Head):
        check_fits(head.module.config, int(config.hidden_size), int(config.vocab_size), target)
        return
    head.check_hidden(int(config.hidden_size), target)
    head.read(TargetFacts(config))
