"""Feature shards: files of the target's features and top tokens at each position.

Owns the shard format and its limits. Does not know heads, or how features are computed. A shard is `NAME.safetensors`
with the tensors of `Example`, concatenated, and `lengths` (sequences) int32; and `NAME.jsonl` with one answer record
per sequence in the same order. Per token: 2 * hidden * (1 + captured layers) + 6 * k + 5 bytes (for SmolLM2-135M and
k = 16 1.2 KB; with the three layers of an Eagle3Head 4.7 KB).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from haast.errors import HeadMismatchError
from haast.files import replacing
from haast.prompts import read_json_lines
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.chat import tokenizer_hash

FORMAT = "haast-features-1"
_GB = 10**9
_TENSORS = ("tokens", "features", "supervised", "topk_ids", "topk_probs")
_CAPTURED = "hidden"  # stored only if layers are captured
_PER_SHARD = 256  # sequences


@dataclass(frozen=True)
class ShardIdentity:
    """The target and the settings that the features were computed with."""

    target: str  # name or path of the model
    hidden_size: int
    vocab_size: int
    topk: int
    tokenizer: str  # hash of the vocabulary
    layer_ids: tuple[int, ...] = ()  # HF `hidden_states` indices of the captured states

    @staticmethod
    def of(target: Target, name: str, topk: int = 16, layer_ids: Sequence[int] = ()) -> ShardIdentity:
        """The identity of a target's features."""
        if not 1 <= topk <= target.vocab_size:
            raise ValueError(f"topk={topk} is not allowed: give 1 to {target.vocab_size}")
        digest = "none" if target.tokenizer is None else tokenizer_hash(target.tokenizer)
        return ShardIdentity(name, target.hidden_size, target.vocab_size, topk, digest, tuple(layer_ids))

    @property
    def token_bytes(self) -> int:
        """Bytes for each position."""
        return 2 * self.hidden_size * (1 + len(self.layer_ids)) + 6 * self.topk + 5

    def metadata(self) -> dict[str, str]:
        """The identity as safetensors metadata."""
        values = {name: str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **values, "layer_ids": ",".join(map(str, self.layer_ids)) or "none"}


def check_room(folder: Path, tokens: int, identity: ShardIdentity, max_gb: float) -> None:
    """Estimate the size of `tokens` more positions, and raise if it is too large, before anything is written.

    Raises:
        ValueError: above `max_gb` together with the existing shards, or above nine tenths of the free disk space.
    """
    if max_gb <= 0:
        raise ValueError(f"max_gb={max_gb} is not allowed: give a size above 0")
    size = tokens * identity.token_bytes / _GB
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / _GB
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free / _GB
    existing = f" in addition to {stored:.3g} GB of existing shards" if stored else ""
    needs = f"features of {tokens} tokens take {size:.3g} GB"
    remedy = "take fewer sequences, or train without shards (features in memory)"
    if size + stored > max_gb:
        raise ValueError(f"{needs}{existing}, the limit is {max_gb:g} GB: raise it with --max-gb, {remedy}")
    if size > 0.9 * free:
        raise ValueError(f"{needs}, {free:.3g} GB are free: free disk space, {remedy}")


def write_shards(
    folder: Path,
    identity: ShardIdentity,
    entries: Iterable[tuple[Example, dict[str, Any]]],
    max_gb: float | None = None,
) -> None:
    """Write sequences, 256 per shard; after an interruption (Ctrl-C) the sequences so far are written too.

    Args:
        folder: created if missing.
        identity: written into each shard.
        entries: sequences and their records.
        max_gb: checked before each shard; None: the caller has checked the size of all.

    Raises:
        ValueError: the disk is full, or the shards have reached `max_gb`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending: list[tuple[Example, dict[str, Any]]] = []

    def flush() -> None:
        full, pending[:] = list(pending), []
        if max_gb is not None:
            check_room(folder, sum(len(example.tokens) for example, _ in full), identity, max_gb)
        _write_shard(folder, identity, full)

    try:
        for entry in entries:
            pending.append(entry)
            if len(pending) == _PER_SHARD:
                flush()
    finally:
        if pending:
            flush()


def _write_shard(folder: Path, identity: ShardIdentity, entries: Sequence[tuple[Example, dict[str, Any]]]) -> None:
    """Write the next shard atomically. The records are written first, so that no shard exists without them."""
    examples = [example for example, _ in entries]
    names = (*_TENSORS, _CAPTURED) if identity.layer_ids else _TENSORS
    tensors = {name: torch.cat([getattr(e, name) for e in examples]).contiguous() for name in names}
    tensors["lengths"] = torch.tensor([len(e.tokens) for e in examples], dtype=torch.int32)
    paths = (folder / f"shard-{number:05d}.safetensors" for number in count())
    path = next(path for path in paths if not path.exists())
    try:
        path.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for _, record in entries))
        with replacing(path) as temporary:
            save_file(tensors, temporary, identity.metadata())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write shard {path} ({error}): free space; the shards before it are complete"
        ) from error


def read_shards(
    folder: Path, identity: ShardIdentity | None = None, exactly: bool = False
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Examples (views of memory-mapped files) and their records, in order of file name.

    Args:
        folder: of shards.
        identity: refuse shards of another target; None accepts all. For shards without metadata only sizes are checked.
        exactly: also refuse shards with captured layers that `identity` does not have: a folder with both kinds would
            fit no head.

    Raises:
        ValueError: no shards, or a corrupt one (the message names it).
        HeadMismatchError: a shard of another target or setting.
    """
    examples: list[Example] = []
    records: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = _read_shard(path, identity, exactly)
        lengths = tensors["lengths"].tolist()
        parts = [torch.split(tensors[name], lengths) for name in (*_TENSORS, _CAPTURED) if name in tensors]
        examples.extend(Example(*part) for part in zip(*parts, strict=True))
        shard_records = [record for _, record in read_json_lines(path.with_suffix(".jsonl"))]
        if len(shard_records) != len(lengths):
            raise ValueError(
                f"{path} has {len(lengths)} sequences, but its .jsonl file has {len(shard_records)} records: delete "
                f"both files"
            )
        records.extend(shard_records)
    if not examples:
        raise ValueError(f"{folder} has no feature shards (*.safetensors): extract some first")
    return examples, records


def _read_shard(path: Path, identity: ShardIdentity | None, exactly: bool) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            use_captured = identity is None or identity.layer_ids
            captured = [name for name in file.keys() if name == _CAPTURED and use_captured]  # noqa: SIM118 - no mapping
            tensors = {name: file.get_tensor(name) for name in (*_TENSORS, "lengths", *captured)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"feature shard {path} is corrupt ({error}): delete it and extract again") from error
    total = int(tensors["lengths"].sum())
    if any(tensors[name].shape[0] != total for name in _TENSORS):
        raise ValueError(f"feature shard {path} is corrupt: its tensors differ in length; delete it and extract again")
    if metadata and metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, not {FORMAT!r}: extract features with Haast")
    if identity is not None:
        _check_identity(path, tensors, metadata, identity, exactly)
    return tensors


def _check_identity(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], identity: ShardIdentity, exactly: bool
) -> None:
    found: dict[str, Any] = {"hidden_size": tensors["features"].shape[1]}
    if metadata:
        found |= {"vocab_size": int(metadata["vocab_size"]), "tokenizer": metadata["tokenizer"]}
    found["topk"] = tensors["topk_ids"].shape[1]
    if identity.layer_ids or exactly:
        layer_ids = metadata.get("layer_ids", "none")
        found["layer_ids"] = () if layer_ids == "none" else tuple(int(i) for i in layer_ids.split(","))
    highest = max(int(tensors["tokens"].max()), int(tensors["topk_ids"].max()))
    if highest >= identity.vocab_size:
        found.setdefault("vocab_size", f"above {highest}")
    for name, value in found.items():
        expected = getattr(identity, name)
        if value != expected:
            raise HeadMismatchError(
                f"feature shard {path} has {name} {value}, expected {expected}: extract features with this target and "
                f"these settings, or give another folder"
            )
