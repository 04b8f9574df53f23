"""Producers' names of the tensors of MTP heads, and where they are in a checkpoint of safetensors.

Sources: the public checkpoints, and how vLLM (`qwen3_next_mtp.py`, `deepseek_mtp.py`, `glm4_moe_mtp.py`,
`mimo_mtp.py`) and transformers (`MtpModel`) read them. Inside the layers the names are those of the target's class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from haast.errors import HeadMismatchError
from haast.formats.files import CONFIG, read_json

_INDEX = "model.safetensors.index.json"
_ANY_MTP = re.compile(r"(^|[._])(mtp|nextn)([._]|$)")


@dataclass(frozen=True)
class MtpLayout:
    """One producer's names.

    Attributes:
        name: shown to users.
        pattern: matches names of the head's tensors; groups: the layer's number, if the name has one, and the rest.
        prefixes: before the names of parts and of layers, with the layer's number.
        parts: the names of the parts around the layers: the producer's, and Haast's for a layer's number.
        after_target: the head's layers are numbered after the target's, in whose names the pattern matches too.
        state_first: the projection reads the state, then the embedding.
    """

    name: str
    pattern: re.Pattern[str]
    prefixes: tuple[str, str]
    parts: dict[str, str]
    after_target: bool = False
    state_first: bool = False

    def names(self, tensors: Iterable[str]) -> dict[str, str]:
        """Haast's names of the head's tensors, by theirs, with layers counted from 0; empty if there is no head."""
        found = {name: match for name in tensors if (match := self.pattern.fullmatch(name))}
        projections = {f"{theirs}.weight" for theirs, ours in self.parts.items() if ours.endswith("eh_proj")}
        heads = {match["number"] for match in found.values() if match["rest"] in projections}
        if not heads:
            return {}
        kept = {name: match for name, match in found.items() if not self.after_target or match["number"] in heads}
        numbers = sorted({int(match["number"] or 0) for match in kept.values()})
        return {
            name: self._ours(numbers.index(int(match["number"] or 0)), match["rest"]) for name, match in kept.items()
        }

    def _ours(self, number: int, rest: str) -> str:
        for theirs, ours in self.parts.items():
            if rest.startswith(f"{theirs}."):
                return ours.format(number) + rest.removeprefix(theirs)
        return f"layers.{number}.{rest}"

    def theirs(self, name: str, target_layers: int) -> str:
        """The producer's name of one of Haast's, in the checkpoint of a target with this number of layers."""
        first = target_layers if self.after_target else 0
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer is not None:
            return self.prefixes[1].format(first + int(layer[1])) + layer[2]
        numbered = re.fullmatch(r"(?:inputs|norms)\.(\d+)\..+", name)
        number = 0 if numbered is None else int(numbered[1])
        for theirs, ours in self.parts.items():
            if name.startswith(f"{ours.format(number)}."):
                return self.prefixes[0].format(first + number) + theirs + name.removeprefix(ours.format(number))
        raise ValueError(f"{self.name}'s MTP heads have no place for {name}")


LAYOUTS = (
    MtpLayout(  # Qwen3-Next, Qwen3.5, EXAONE-MoE
        "Qwen",
        re.compile(r"mtp\.(?:layers\.(?P<number>\d+)\.)?(?P<rest>.+)"),
        ("mtp.", "mtp.layers.{}."),
        {
            "fc": "inputs.{}.eh_proj",
            "pre_fc_norm_embedding": "inputs.{}.enorm",
            "pre_fc_norm_hidden": "inputs.{}.hnorm",
            "norm": "norms.{}",
        },
    ),
    MtpLayout(  # DeepSeek-V3, GLM-4.5 and 4.6, and those after them
        "DeepSeek",
        re.compile(r"(?:(?!mtp\.)\w+\.)*layers\.(?P<number>\d+)\.(?P<rest>.+)"),
        ("model.layers.{}.", "model.layers.{}."),
        {
            "eh_proj": "inputs.{}.eh_proj",
            "enorm": "inputs.{}.enorm",
            "hnorm": "inputs.{}.hnorm",
            "shared_head.norm": "norms.{}",
            "shared_head.head": "lm_head",
            "embed_tokens": "embed_tokens",
        },
        after_target=True,
    ),
    MtpLayout(
        "MiMo",
        re.compile(r"model\.mtp_layers\.(?P<number>\d+)\.(?P<rest>.+)"),
        ("model.mtp_layers.{}.", "model.mtp_layers.{}."),
        {
            "input_proj": "inputs.{}.eh_proj",
            "token_layernorm": "inputs.{}.enorm",
            "hidden_layernorm": "inputs.{}.hnorm",
            "final_layernorm": "norms.{}",
        },
        state_first=True,
    ),
)


def layout_named(name: str) -> MtpLayout:
    """The layout of this name. Raises ValueError if there is none."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ValueError(f"producer={name!r} of an MTP head is unknown: {', '.join(layout.name for layout in LAYOUTS)}")


def layout_of(tensors: Iterable[str], source: str) -> tuple[MtpLayout, dict[str, str]] | None:
    """The layout of an MTP head among these tensors, and Haast's names for it; None if there is no MTP tensor.

    Raises HeadMismatchError, its message starting with `source`, for MTP tensors in an unknown layout.
    """
    names = list(tensors)
    for layout in LAYOUTS:
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


def read_named(folder: Path, where: dict[str, str], names: dict[str, str]) -> dict[str, Tensor]:
    """Only the tensors `names`, under Haast's names. Raises HeadMismatchError for a missing or corrupt file."""
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
