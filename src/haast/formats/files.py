"""Finds a head's files by folder, file or hub id, and reads them.

Owns the list of files that are read, and the safety of reading them: safetensors, sharded or not, and pickles that hold
only tensors (`weights_only`). Does not interpret the tensors. `formats.gguf` reads GGUF files.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from haast.errors import HeadMismatchError, expanded
from haast.formats.base import HeadFiles

CONFIG = "config.json"
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")  # the hub's cache
_DOWNLOADS = ("README.md", "*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# Only the first existing file is read. Official EAGLE and Medusa heads are pickles.
_WEIGHT_FILES = (
    "model.safetensors",
    "medusa_lm_head.safetensors",
    "pytorch_model.bin",
    "medusa_lm_head.pt",
    "model.pt",
)
_MAX_FILE_NAME = 200  # characters; file systems limit the length
_QUANTISED = ("weight_scale", "weight_packed", "qweight", "qzeros", "scales", "weight_scale_inv", "g_idx")


def locate(head: str | Path) -> tuple[Path, str]:
    """The path of a head (a folder or a .gguf file), and its name, for a hub id with the revision.

    A hub id is `owner/name` or `owner/name@revision`. Files in the hub's cache are not downloaded again, and
    `HF_HUB_OFFLINE=1` forbids downloads. Raises HeadMismatchError if there is no such head.
    """
    path = expanded(head, "no head at")
    if path.exists():
        cached = _CACHED.search(path.as_posix())
        return path, f"{cached['owner']}/{cached['name']}@{cached['revision'][:12]}" if cached else str(head)
    hub_id = _HUB_ID.fullmatch(str(head))
    if hub_id is None:
        raise HeadMismatchError(
            f"no head at {head}: give a folder written by `haast train`, a folder or .gguf file of another trainer, or "
            f"a hub id (owner/name, or owner/name@revision)"
        )
    name, revision = hub_id["id"], hub_id["revision"]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADS))
    except LocalEntryNotFoundError as error:
        raise HeadMismatchError(
            f"no head at {head}: there is no such folder, the hub can't be reached (or HF_HUB_OFFLINE is set), and its "
            f"cache does not hold this head; download it once while online, or give a folder"
        ) from error
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise HeadMismatchError(
            f"no head at {head}: there is no such folder, and the hub has none ({reason})"
        ) from error
    return Path(folder), f"{name}@{revision or Path(folder).name[:12]}"


def read_files(folder: Path, source: str) -> HeadFiles:
    """All tensors of a folder, and its config. Raises HeadMismatchError for missing, corrupt or unsafe files."""
    document = read_json(folder / CONFIG)
    names, notes = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_tensors(folder / name)
    if document.get("quantization_config"):
        notes.append("quantization_config is ignored: the head's tensors are not quantised")
    files = HeadFiles(folder, document, tensors, source, tuple(notes))
    refuse_quantised(files)
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises HeadMismatchError if it is corrupt, or holds anything but tensors."""
    if not path.is_file():
        raise HeadMismatchError(f"{path} is missing; fetch the head again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _refuse_compressed(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise HeadMismatchError(f"{path} is corrupt ({_first_line(error)}); fetch the head again") from error
    except Exception as error:  # unpickling may raise anything
        raise HeadMismatchError(
            f"{path} holds more than tensors ({_first_line(error)}), and code in it is not run; ask the head's author "
            f"for model.safetensors"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    others = None
    if isinstance(loaded, dict):
        others = [key for key, value in loaded.items() if not _is_named_tensor(key, value)]
    if others is None or others:
        what = type(loaded).__name__ if others is None else f"{others[0]!r}"
        raise HeadMismatchError(
            f"{path} holds {what} where named tensors are expected; ask the head's author for safetensors"
        )
    tensors: dict[str, Tensor] = loaded
    for name, tensor in tensors.items():
        # A view that repeats its storage is small in the file but may be huge in memory.
        plain = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise HeadMismatchError(
                f"{path}: {name} is no plain tensor with all values in the file; ask the head's author for safetensors"
            )
    return tensors


def _refuse_compressed(path: Path) -> None:
    """Refuse zip files that unpack to more than their size: torch.save never compresses."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("compressed, or overlapping members")


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises HeadMismatchError if there is none."""
    if not path.is_file():
        raise HeadMismatchError(
            f"no head at {path.parent}: there is no {path.name}; give a folder with one, a .gguf file or a hub id"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeadMismatchError(f"{path} is not JSON ({_first_line(error)}); fetch the head again") from error
    if not isinstance(found, dict):
        raise HeadMismatchError(f"{path} holds a {type(found).__name__}, not an object; fetch the head again")
    return found


def _weight_files(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the files that hold the weights, and notes for the user."""
    for index in sorted(folder.glob("*.index.json")):
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise HeadMismatchError(f"{index} is no index of weights: weight_map is missing; fetch the head again")
        names = sorted(set(map(str, mapping.values())))
        for name in names:
            longest = len(name) > _MAX_FILE_NAME
            if Path(name).name != name or longest or Path(name).suffix not in (".safetensors", ".bin"):
                raise HeadMismatchError(
                    f"{index} names {name!r}, which is no file of weights in the head's folder; fetch the head again"
                )
        return names, []
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            notes = [] if name.endswith(".safetensors") else [f"{name} is a pickle: only tensors are read from it"]
            return [name], notes
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "draft_vocab.safetensors")
    if len(others) == 1:
        return others, []
    raise HeadMismatchError(
        f"{folder} holds no weights ({', '.join(others) or 'no .safetensors, .bin or .pt'}): expected one of "
        f"{', '.join(_WEIGHT_FILES)}; fetch the head again"
    )


def refuse_quantised(files: HeadFiles) -> None:
    """Raise HeadMismatchError for quantised tensors, and for values that are not finite."""
    remedy = "use the head in its unquantised form"
    for name, tensor in files.tensors.items():
        one_byte = tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool
        vocab_map = name.endswith("t2d") and not tensor.is_floating_point()
        if name.rsplit(".", 1)[-1] in _QUANTISED or (one_byte and not vocab_map):
            raise files.error(f"the head is quantised: {name} is {tensor.dtype}", remedy)
    for name, tensor in files.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise files.error(f"{name} holds NaN or infinity", "fetch the head again")
