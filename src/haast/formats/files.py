"""A head's files: found by a folder, a file or a hub id, and read whole before anything is made of them.

Owns which files are read and how safely: safetensors, their parts, and pickles of tensors alone (`weights_only`).
Knows nothing of what the tensors mean. GGUF files are read by `formats.gguf`.
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
_WANTED = ("README.md", "*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# In this order: what is there twice is read once. Official EAGLE and Medusa heads are pickles.
_WHOLE = ("model.safetensors", "medusa_lm_head.safetensors", "pytorch_model.bin", "medusa_lm_head.pt", "model.pt")
_LONGEST = 200  # of a file's name: what file systems take
_QUANTISED = ("weight_scale", "weight_packed", "qweight", "qzeros", "scales", "weight_scale_inv", "g_idx")


def locate(head: str | Path) -> tuple[Path, str]:
    """Where a head lies, a folder or a .gguf file, and its name with a hub id's revision.

    A hub id is `owner/name` or `owner/name@revision`; what the cache has is not fetched anew, and with
    `HF_HUB_OFFLINE=1` nothing is. Raises HeadMismatchError where nothing is there.
    """
    path = expanded(head, "no head at")
    if path.exists():
        cached = _CACHED.search(path.as_posix())
        return path, f"{cached['owner']}/{cached['name']}@{cached['revision'][:12]}" if cached else str(head)
    found = _HUB_ID.fullmatch(str(head))
    if found is None:
        raise HeadMismatchError(
            f"no head at {head}: give a folder written by `haast train`, a folder or .gguf file of another trainer, or "
            f"a hub id (owner/name, or owner/name@revision)"
        )
    name, revision = found["id"], found["revision"]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(_WANTED))
    except LocalEntryNotFoundError as error:
        raise HeadMismatchError(
            f"no head at {head}: there is no such folder, the hub can't be reached (or HF_HUB_OFFLINE is set), and its "
            f"cache does not hold this head; fetch it once with a network, or give a folder"
        ) from error
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise HeadMismatchError(
            f"no head at {head}: there is no such folder, and the hub has none ({reason})"
        ) from error
    return Path(folder), f"{name}@{revision or Path(folder).name[:12]}"


def read_files(folder: Path, source: str) -> HeadFiles:
    """All of a folder's tensors and its config. Raises HeadMismatchError for what is missing, torn or unsafe."""
    document = _read_json(folder / CONFIG)
    names, notes = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_tensors(folder / name)
    if document.get("quantization_config"):
        notes.append("quantization_config is not the head's: its tensors are not quantised")
    files = HeadFiles(folder, document, tensors, source, tuple(notes))
    _refuse_quantised(files)
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises HeadMismatchError where it is torn, or holds more than tensors."""
    if not path.is_file():
        raise HeadMismatchError(f"{path} is missing; fetch the head again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _refuse_packed(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise HeadMismatchError(f"{path} is corrupt ({_short(error)}); fetch the head again") from error
    except Exception as error:  # unpickling raises what it likes
        raise HeadMismatchError(
            f"{path} is no file of tensors alone ({_short(error)}), and code in it is not run; ask its maker for "
            f"model.safetensors"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    strange = None if not isinstance(found, dict) else [key for key, each in found.items() if not _named(key, each)]
    if strange is None or strange:
        what = type(found).__name__ if strange is None else f"{strange[0]!r}"
        raise HeadMismatchError(f"{path} holds {what} where named tensors are expected; ask its maker for safetensors")
    tensors: dict[str, Tensor] = found
    for name, tensor in tensors.items():
        # Views that repeat their storage are small in a file and anything in memory.
        plain = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise HeadMismatchError(
                f"{path}: {name} is no plain tensor with all its numbers in the file; ask its maker for safetensors"
            )
    return tensors


def _refuse_packed(path: Path) -> None:
    """Torch never compresses what it saves: a small file that is large in memory is none of its own."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("compressed, or parts that overlap")


def _named(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise HeadMismatchError(
            f"no head at {path.parent}: there is no {path.name}; give a folder that holds one, a .gguf file or a hub id"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeadMismatchError(f"{path} is not JSON ({_short(error)}); fetch the head again") from error
    if not isinstance(found, dict):
        raise HeadMismatchError(f"{path} holds a {type(found).__name__}, not an object; fetch the head again")
    return found


def _weight_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files that hold the weights, and what is to be said of them."""
    for index in sorted(folder.glob("*.index.json")):
        mapping = _read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise HeadMismatchError(f"{index} is no index of weights: weight_map is missing; fetch the head again")
        names = sorted(set(map(str, mapping.values())))
        for name in names:
            if Path(name).name != name or len(name) > _LONGEST or Path(name).suffix not in (".safetensors", ".bin"):
                raise HeadMismatchError(
                    f"{index} names {name!r}, which is no file of weights in the head's folder; fetch it again"
                )
        return names, []
    for name in _WHOLE:
        if (folder / name).is_file():
            said = [] if name.endswith(".safetensors") else [f"{name} is a pickle: read for its tensors alone"]
            return [name], said
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "draft_vocab.safetensors")
    if len(others) == 1:
        return others, []
    raise HeadMismatchError(
        f"{folder} holds no weights ({', '.join(others) or 'no .safetensors, .bin or .pt'}): expected one of "
        f"{', '.join(_WHOLE)}; fetch the head again"
    )


def _refuse_quantised(files: HeadFiles) -> None:
    remedy = "use the head as it was before it was quantised"
    for name, tensor in files.tensors.items():
        small = tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool
        a_map = name.endswith("t2d") and not tensor.is_floating_point()
        if name.rsplit(".", 1)[-1] in _QUANTISED or (small and not a_map):
            raise files.wrong(f"the head is quantised: {name} is {tensor.dtype}", remedy)
    for name, tensor in files.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise files.wrong(f"{name} holds NaN or infinity", "fetch the head again")
