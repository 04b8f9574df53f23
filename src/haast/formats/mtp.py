"""MTP heads in the checkpoint of the target itself, or in a folder that holds only them.

Only the head's tensors are read, found by name in the safetensors. Each producer has its own names for the same parts;
inside the layer they are those of the target's class. Sources: the public checkpoints, and how vLLM
(`qwen3_next_mtp.py`, `deepseek_mtp.py`, `glm4_moe_mtp.py`, `mimo_mtp.py`) and transformers (`MtpModel`) read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from haast.errors import HeadMismatchError
from haast.formats.base import Format, HeadFiles, Question, Reading, TargetFacts
from haast.formats.conventions import mtp_conventions, swapped_inputs
from haast.formats.files import CONFIG, read_json, refuse_quantised
from haast.formats.keys import SIZE_ERRORS
from haast.formats.layout import Names
from haast.heads.config import HeadSizes
from haast.heads.mtp import MtpConfig
from haast.heads.stock import load_layers
from haast.target.load import resolve

MTP = "mtp"  # as a head's name: the one in the target's own checkpoint
_INDEX = "model.safetensors.index.json"
_LAYOUT_KEY = "mtp_layout"  # added to config.json when it is read
_SAME = ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
_BASE_NORM = re.compile(r"(?:(?!mtp\.)\w+\.)*norm\.weight")  # the final norm of the target that the files are of
_BASE = "base_norm.weight"  # its name here
_MAX_NORM_CHANGE = 0.25  # of the base's final norm, relative; a fine-tune changes it less
_ANY_MTP = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")


@dataclass(frozen=True)
class _Layout:
    """One producer's names.

    Attributes:
        name: shown to users.
        pattern: matches names of the head's tensors; groups: the layer's number, if the name has one, and the rest.
        parts: the names of the parts around the layer: the producer's, and Haast's for a layer's number.
        among_layers: the pattern also matches the target's own layers; those of the head have the projection.
        state_first: the projection reads the state, then the embedding.
        norm_output: the normed state is fed back in vLLM.
    """

    name: str
    pattern: re.Pattern[str]
    parts: dict[str, str]
    among_layers: bool = False
    state_first: bool = False
    norm_output: bool = False

    def names(self, tensors: Iterable[str]) -> dict[str, str]:
        """Haast's names of the head's tensors, by theirs, with layers counted from 0; empty if there is no head."""
        found = {name: match for name in tensors if (match := self.pattern.fullmatch(name))}
        rests = {f"{theirs}.weight" for theirs, ours in self.parts.items() if ours.endswith("eh_proj")}
        heads = {match["number"] for match in found.values() if match["rest"] in rests}
        if not heads:
            return {}
        kept = {name: match for name, match in found.items() if not self.among_layers or match["number"] in heads}
        numbers = sorted({int(match["number"] or 0) for match in kept.values()})
        return {
            name: self._renamed(numbers.index(int(match["number"] or 0)), match["rest"]) for name, match in kept.items()
        }

    def _renamed(self, number: int, rest: str) -> str:
        for theirs, ours in self.parts.items():
            if rest.startswith(f"{theirs}."):
                return ours.format(number) + rest.removeprefix(theirs)
        return f"layers.{number}.{rest}"


_LAYOUTS = (
    _Layout(  # Qwen3-Next, Qwen3.5, Mellum, EXAONE-MoE
        "Qwen",
        re.compile(r"mtp\.(?:layers\.(?P<number>\d+)\.)?(?P<rest>.+)"),
        {
            "fc": "inputs.{}.eh_proj",
            "pre_fc_norm_embedding": "inputs.{}.enorm",
            "pre_fc_norm_hidden": "inputs.{}.hnorm",
            "norm": "norms.{}",
        },
        norm_output=True,
    ),
    _Layout(  # DeepSeek-V3, GLM-4.5 and 4.6, and those after them: layers after the target's last
        "DeepSeek",
        re.compile(r"(?:(?!mtp\.)\w+\.)*layers\.(?P<number>\d+)\.(?P<rest>.+)"),
        {
            "eh_proj": "inputs.{}.eh_proj",
            "enorm": "inputs.{}.enorm",
            "hnorm": "inputs.{}.hnorm",
            "shared_head.norm": "norms.{}",
            "shared_head.head": "lm_head",
            "embed_tokens": "embed_tokens",
        },
        among_layers=True,
    ),
    _Layout(
        "MiMo",
        re.compile(r"model\.mtp_layers\.(?P<number>\d+)\.(?P<rest>.+)"),
        {
            "input_proj": "inputs.{}.eh_proj",
            "token_layernorm": "inputs.{}.enorm",
            "hidden_layernorm": "inputs.{}.hnorm",
            "final_layernorm": "norms.{}",
        },
        state_first=True,
        norm_output=True,
    ),
)


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
        files = HeadFiles(path, document, _read(path, where, names), source, (f"{layout.name}'s names",))
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
            "norm_output": _by_name(files).norm_output,
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
        return swapped_inputs(reading) if _by_name(files).state_first else reading, mtp_conventions(config)


def layout_of(tensors: Iterable[str], source: str) -> tuple[_Layout, dict[str, str]] | None:
    """The layout of an MTP head among these tensors, and Haast's names for it; None if there is no MTP tensor.

    Raises HeadMismatchError for MTP tensors in an unknown layout.
    """
    names = list(tensors)
    for layout in _LAYOUTS:
        if renamed := layout.names(names):
            return layout, renamed
    unknown = sorted(name for name in names if _ANY_MTP.search(name))
    if unknown:
        raise HeadMismatchError(
            f"{source}: its MTP tensors ({', '.join(unknown[:3])}, ...) are in a layout that Haast does not know: use "
            f"another head, or --drafter suffix"
        )
    return None


def weight_files(folder: Path) -> dict[str, str]:
    """The file of each tensor in a checkpoint's folder of safetensors, by name; empty if it is none.

    Files that the index does not list are looked into: some producers keep the head in one. Damaged files are left to
    those who read them.
    """
    if not (folder / CONFIG).is_file():
        return {}
    index = read_json(folder / _INDEX).get("weight_map") if (folder / _INDEX).is_file() else None
    where = {str(name): str(file) for name, file in index.items()} if isinstance(index, dict) else {}
    listed = set(where.values())
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            try:
                with safe_open(path, framework="pt") as opened:
                    where |= dict.fromkeys(opened.keys(), path.name)
            except (SafetensorError, OSError):
                continue
    return where


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


def _by_name(files: HeadFiles) -> _Layout:
    return next(layout for layout in _LAYOUTS if layout.name == files.document[_LAYOUT_KEY])


def _read(folder: Path, where: dict[str, str], names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors `names`, under Haast's names. Raises HeadMismatchError for a missing or corrupt file."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({where[name] for name in names}):
        if Path(file).name != file:
            raise HeadMismatchError(f"{folder / _INDEX} names {file!r}, which is outside the folder; fetch it again")
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name, ours in names.items():
                    if where[name] == file:
                        tensors[ours] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise HeadMismatchError(f"{folder / file} is missing or corrupt ({error}); fetch it again") from error
    return tensors


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
            f"the head was made for another model: the final norm beside it differs from the target's by {change:.0%}",
            "use the MTP head of this target's own checkpoint",
        )
