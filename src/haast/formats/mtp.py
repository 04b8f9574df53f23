"""MTP heads in the checkpoint of the target itself, or in a folder that holds only them.

Owns the checks that head and target belong together, and writing a head under its producer's names. Only the head's
tensors are read; `mtp_layouts` has their names. Engines read such heads from the target's own checkpoint only.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from haast.errors import HeadMismatchError
from haast.formats.base import Format, HeadFiles, Question, Reading, ServingEngine, TargetFacts, WrittenHead
from haast.formats.conventions import mtp_conventions, swapped_inputs
from haast.formats.files import CONFIG, read_json, refuse_quantised
from haast.formats.keys import SIZE_ERRORS
from haast.formats.layout import Names
from haast.formats.mtp_layouts import layout_named, layout_of, read_named, weight_files
from haast.heads.config import HeadSizes
from haast.heads.mtp import MtpConfig
from haast.heads.stock import checkpoint_layers, load_layers
from haast.target.load import resolve

MTP = "mtp"  # as a head's name: the one in the target's own checkpoint
_LAYOUT_KEY = "mtp_layout"  # added to config.json when it is read
_SAME = ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
_BASE_NORM = re.compile(r"(?:(?!mtp\.)\w+\.)*norm\.weight")  # the final norm of the target that the files are of
_BASE = "base_norm.weight"  # its name here
_MAX_NORM_CHANGE = 0.25  # of the base's final norm, relative; a fine-tune changes it less


class Mtp(Format):
    """See the module docstring."""

    name = "MTP"
    kinds = ("mtp",)

    def read_files(self, path: Path, source: str) -> HeadFiles | None:
        where = weight_files(path)
        found = layout_of(where, source)
        if found is None:
            return None
        layout, names = found
        base = [name for name in where if name not in names and _BASE_NORM.fullmatch(name)]
        if len(base) == 1:
            names = {**names, base[0]: _BASE}
        document = {**read_json(path / CONFIG), _LAYOUT_KEY: layout.name}
        files = HeadFiles(path, document, read_named(path, where, names), source, (f"{layout.name}'s names",))
        refuse_quantised(files)
        return files

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return kind in self.kinds

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        _check_base_config(files, facts)
        layers = {name.split(".")[1] for name in files.tensors if name.startswith("layers.")}
        dense = not any(".mlp.experts." in name for name in files.tensors)
        options = {
            "own_lm_head": "lm_head.weight" in files.tensors,
            "own_embedding": "embed_tokens.weight" in files.tensors,
            "producer": files.document[_LAYOUT_KEY],
            "norm_output": True,  # as engines do, though some only since 2026
        }
        try:
            return MtpConfig.of_layers(facts.config, len(layers), dense, **options)
        except SIZE_ERRORS as error:
            raise files.error(f"the head can't be built ({error})", "use a head that Haast knows") from error

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, MtpConfig), "read_config returns one"
        names, hidden = Names(files, dict(files.tensors), {}), config.hidden_size
        _check_base_norm(files, names.remaining.pop(_BASE, None), facts)
        for number in range(config.num_hidden_layers):
            projection = f"inputs.{number}.eh_proj.weight"
            names.take(projection, projection, (hidden, 2 * hidden))
            for norm in (f"inputs.{number}.enorm", f"inputs.{number}.hnorm", f"norms.{number}"):
                names.take(f"{norm}.weight", f"{norm}.weight", (hidden,))
        if config.own_lm_head:
            names.pad("lm_head.weight", config.vocab_size)
            names.take("lm_head.weight", "lm_head.weight", (config.vocab_size, hidden))
        names.embedding(config)
        names.weights |= _layers(files, names, config)
        reading = Reading(config, names.finish())
        swapped = layout_named(config.producer).state_first
        return swapped_inputs(reading) if swapped else reading, mtp_conventions(config)

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        config = reading.config
        assert isinstance(config, MtpConfig), "other heads have other formats"
        if engine.name != "official":
            raise ValueError(
                f"{engine.name} reads an MTP head from the target's own checkpoint only: --to official writes the "
                f"tensors under the names that they have there, to replace them"
            )
        if not config.reads_normed:
            raise ValueError("engines give an MTP head the state after the final norm; this one reads that before it")
        layout, notes = layout_named(config.producer), ["these tensors replace those of the target's checkpoint"]
        if not config.norm_output:
            notes.append("engines feed back the normed state, and this head drafts best with the state before its norm")
        if reading.draft_vocab is not None and config.own_lm_head:
            raise ValueError("the layout has no draft vocabulary, for which this head has an LM head of its own")
        if reading.draft_vocab is not None:
            notes.append("the draft vocabulary is lost: other engines draft over all tokens")
        reading = swapped_inputs(reading) if layout.state_first else reading
        inside = {name.removeprefix("layers."): each for name, each in reading.weights.items() if _in_layer(name)}
        tensors = {name: each for name, each in reading.weights.items() if not _in_layer(name)}
        tensors |= {f"layers.{name}": each for name, each in checkpoint_layers(config.layer, inside).items()}
        depth = int(engine.config["num_hidden_layers"])
        named = {layout.theirs(name, depth): tensor for name, tensor in tensors.items()}
        return WrittenHead(dict(engine.config), named, tuple(notes))

    def check(self, written: WrittenHead, reading: Reading, facts: TargetFacts) -> None:
        found = layout_of(written.tensors, "the MTP export")
        if found is None:
            raise ValueError("the MTP export has no head in it")
        layout, names = found
        tensors = {ours: written.tensors[name] for name, ours in names.items()}
        document = {**written.document, _LAYOUT_KEY: layout.name}
        super().check(replace(written, document=document, tensors=tensors), reading, facts)


def _in_layer(name: str) -> bool:
    return name.startswith("layers.")


def mtp_folder(model: str | None) -> Path:
    """The folder of a target's checkpoint, which holds an MTP head; `model` is the target's name.

    Raises HeadMismatchError if it has none, or can't have one.
    """
    if model is None:
        raise HeadMismatchError(
            "head='mtp' is the one in the model's own checkpoint, but the model has no name: give its folder as head"
        )
    source = resolve(model)
    if source.gguf is not None:
        raise HeadMismatchError(
            f"head='mtp' is read from safetensors, and {model} is a .gguf file: give the folder or hub id of the "
            f"checkpoint that it was made from as the head"
        )
    path = Path(source.location)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(source.location, allow_patterns=["*.json", "*.safetensors"]))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise HeadMismatchError(f"head='mtp': {model} can't be downloaded ({reason}); give its folder") from error
    if layout_of(weight_files(path), model) is None:
        raise HeadMismatchError(
            f"head='mtp': the checkpoint of {model} holds no MTP head in safetensors; use another head, or "
            f"--drafter suffix"
        )
    return path


def described(model: str) -> str | None:
    """The MTP head in the checkpoint of a model that is on this machine, in words; None if there is none."""
    source = resolve(model)
    if source.gguf is not None:
        return None
    path = Path(source.location)
    try:
        path = path if path.is_dir() else Path(snapshot_download(source.location, local_files_only=True))
        found = layout_of(weight_files(path), model)
    except LocalEntryNotFoundError:
        return None
    except HeadMismatchError as error:
        return str(error)
    if found is None:
        return None
    layout, names = found
    layers = len({ours.split(".")[1] for ours in names.values() if ours.startswith("layers.")})
    return f"{layers} layer{'s' * (layers > 1)}, {layout.name}'s names; --head {MTP} drafts with it"


def _layers(files: HeadFiles, names: Names, config: MtpConfig) -> dict[str, Tensor]:
    """Take the layers' tensors, in the names of the target's modules."""
    inside = [name for name in names.remaining if name.startswith("layers.")]
    tensors = {name.removeprefix("layers."): names.remaining.pop(name) for name in inside}
    try:
        state, problems = load_layers(config.layer, tensors)
    except SIZE_ERRORS as error:
        raise files.error(f"its layer can't be loaded ({error})", "fetch the head again") from error
    if problems:
        raise files.error(
            f"its layer is not one of a {config.layer['model_type']} model like this target: {'; '.join(problems)}",
            "use the MTP head of this target's own checkpoint",
        )
    return {f"layers.{name}": tensor for name, tensor in state.items()}


def _check_base_config(files: HeadFiles, facts: TargetFacts) -> None:
    """Raise HeadMismatchError if config.json is another model's."""
    text = files.document.get("text_config")
    stated = text if isinstance(text, dict) else files.document
    for key in _SAME:
        theirs, ours = stated.get(key), getattr(facts.config, key, None)
        if theirs is not None and ours is not None and theirs != ours:
            raise files.error(
                f"the head was made for another model: its {key} is {theirs}, the target has {ours}",
                "use the MTP head of this target's own checkpoint",
            )


def _check_base_norm(files: HeadFiles, norm: Tensor | None, facts: TargetFacts) -> None:
    """Raise HeadMismatchError if the checkpoint's own final norm is not the target's."""
    if norm is None or facts.final_norm is None:
        return
    base, own = norm.double().cpu(), facts.final_norm.double().cpu()
    same = base.shape == own.shape
    change = float((base - own).norm() / base.norm().clamp_min(1e-9)) if same else float("inf")
    if change > _MAX_NORM_CHANGE:
        raise files.error(
            f"the head was made for another model: its checkpoint's final norm is {change:.0%} off the target's",
            "use the MTP head of this target's own checkpoint",
        )
