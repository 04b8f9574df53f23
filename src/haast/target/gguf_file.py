"""Opens a GGUF file, or a set of shards, by mmap: metadata and the quantised blocks of each tensor, nothing copied.

Everything in the header is checked before it is used: no count or size of a file allocates more memory than the bytes
that are there. Knows nothing of models. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ["GGUFFile", "TensorInfo", "open_gguf"]

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _BOOL, _ARRAY = 8, 7, 9  # types of metadata values; the others are numbers
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_LENGTH = struct.Struct("<Q")  # of strings and arrays
_MAX_DIMENSIONS, _MAX_DEPTH = 4, 4  # of tensors, and of arrays within arrays
# The fewest bytes that a key with its value, a tensor's entry, and an array within an array can have.
_LEAST_KEY, _LEAST_TENSOR, _LEAST_ARRAY = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8, 4 + 8
_TYPES: dict[int, tuple[str, int, int]] = {
    int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
    for kind in gguf.GGMLQuantizationType
    if kind in gguf.GGML_QUANT_SIZES
}
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FETCH = "fetch the file again"


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """A tensor of a GGUF file.

    Attributes:
        name: as in the file, e.g. "blk.0.attn_q.weight".
        type_name: of its elements, e.g. "Q4_K" or "F32".
        shape: in numpy's order; a linear layer's weight is (out_features, in_features).
        data: (rows, bytes per row) uint8, a read-only view of the file; rows is the product of all but the last size.
        content, begin: the mapped file, and the byte at which the tensor begins.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8] = field(repr=False)
    content: mmap.mmap = field(repr=False)
    begin: int = 0

    def release(self) -> None:
        """Give back the memory of the pages that were read; they are read from the file again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.begin - self.begin % mmap.PAGESIZE
            self.content.madvise(mmap.MADV_DONTNEED, start, self.begin + self.data.nbytes - start)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file; it stays mapped as long as this object or one of its tensors exists.

    Attributes:
        path: the file, or the first shard.
        metadata: values by key: numbers, bools, str, read-only numpy arrays (of numbers), tuples (of the rest). Invalid
            UTF-8 in values is replaced by U+FFFD.
        tensors: by name, in the file's order, those of all shards.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The kind of model, e.g. "llama"; with it begin the keys of the model's sizes."""
        name: str = self.metadata["general.architecture"]
        return name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.data.nbytes for tensor in self.tensors.values())

    def quantisation_by_layer(self) -> dict[str, tuple[str, ...]]:
        """Names of the tensors with two or more dimensions, by type, the most frequent type first."""
        names: dict[str, tuple[str, ...]] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                names[tensor.type_name] = (*names.get(tensor.type_name, ()), tensor.name)
        return dict(sorted(names.items(), key=lambda item: -len(item[1])))

    def quantisation(self) -> str:
        """The same in one line: "Q4_1: 210 tensors, Q8_0: token_embd"."""
        parts = []
        for kind, names in self.quantisation_by_layer().items():
            few = ", ".join(name.removesuffix(".weight") for name in names)
            parts.append(f"{kind}: {few if len(names) <= 2 else f'{len(names)} tensors'}")
        return ", ".join(parts)


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file and check its whole header.

    Args:
        path: a file, or any shard of a set (`name-00001-of-00003.gguf`), whose other shards are in the same folder.

    Raises:
        ValueError: the file can't be read or is not GGUF of version 2 or 3, is truncated or inconsistent, or shards are
            missing or of different sets.
    """
    path = Path(path)
    opened = _open_one(path)
    match = _SHARD.fullmatch(path.name)
    count = opened.metadata.get("split.count", 0)
    if match is None:
        if count not in (0, 1):
            _fail(path, f"is one of {count} shards", "give it the name that it had: NAME-00001-of-0000N.gguf")
    elif count != 0 or int(match["count"]) != 1:
        opened = _join(path, match, opened)
    if not isinstance(opened.metadata.get("general.architecture"), str):
        _fail(path, "has no general.architecture", "convert the model again, with a current llama.cpp")
    return opened


def _join(path: Path, match: re.Match[str], opened: GGUFFile) -> GGUFFile:
    """All shards of a set as one file; `opened` is the one that was given."""
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing or not paths:
        few = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        _fail(path, f"has {len(missing)} shards missing ({few})", f"fetch all {count} shards into {path.parent}")
    shards = [opened if each == path else _open_one(each) for each in paths]
    tensors: dict[str, TensorInfo] = {}
    for number, shard in enumerate(shards):
        stated = tuple(shard.metadata.get(f"split.{key}") for key in ("no", "count"))
        if stated != (number, count):
            _fail(
                shard.path, f"says shard {stated[0]} of {stated[1]}, not {number} of {count}", f"{_FETCH}, and the rest"
            )
        twice = next((name for name in shard.tensors if name in tensors), None)
        if twice is not None:
            _fail(shard.path, f"has the tensor {twice!r} of another shard", "fetch all shards again")
        tensors.update(shard.tensors)
    totals = {shard.metadata.get("split.tensors.count") for shard in shards}
    if totals != {len(tensors)}:
        said = f"{' or '.join(map(str, totals))} tensors in all, not {len(tensors)}"
        _fail(paths[0], f"and its other shards say {said}, so they are of several sets", "fetch all of them again")
    return GGUFFile(paths[0], shards[0].metadata, MappingProxyType(tensors))


def _open_one(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"can't read {path} ({error.strerror}): give a GGUF file that this user can read") from error
    except ValueError as error:  # mmap refuses an empty file
        raise ValueError(f"{path} is empty: {_FETCH}") from error
    return _Header(path, content).read()


def _fail(path: Path, problem: str, remedy: str) -> NoReturn:
    raise ValueError(f"{path} {problem}: {remedy}")


class _Header:
    """Reads one file's header from front to back; `at` is the position."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.size, self.at = path, content, len(content), 0

    def read(self) -> GGUFFile:
        magic = self.content[:4]
        if magic != _MAGIC:
            self.fail(f"begins with {magic!r}, not with {_MAGIC!r}", "give a GGUF file")
        self.at = 4
        version = self.integer("<I")
        if version not in _VERSIONS:
            if version in (each << 24 for each in _VERSIONS):
                self.fail("is big-endian", "convert it to little-endian (gguf-convert-endian of llama.cpp)")
            self.fail(f"has GGUF version {version}", f"convert the model again to version {_VERSIONS[-1]}")
        tensors, keys = self.integer("<Q"), self.integer("<Q")
        self.check_count("keys", keys, _LEAST_KEY)
        self.check_count("tensors", tensors, _LEAST_TENSOR)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name("key")
            if key in metadata:
                self.fail(f"has the key {key!r} twice", _FETCH)
            metadata[key] = self.value(key, self.integer("<I"), 0)
        return GGUFFile(self.path, MappingProxyType(metadata), MappingProxyType(self.tensors(tensors, metadata)))

    def fail(self, problem: str, remedy: str = _FETCH) -> NoReturn:
        _fail(self.path, problem, remedy)

    def check_count(self, what: str, count: int, least: int) -> None:
        """Refuse a count of things of `least` bytes each that can't fit into the rest of the file."""
        if count * least > self.size - self.at:
            rest = self.size - self.at
            self.fail(f"is truncated or corrupt ({count} {what} at byte {self.at} can't fit into {rest} bytes)")

    def skip(self, count: int, what: str) -> int:
        """Move over `count` bytes; returns the position before."""
        self.check_count(f"bytes of {what}", count, 1)
        before, self.at = self.at, self.at + count
        return before

    def integer(self, form: str) -> int:
        value: int = struct.unpack_from(form, self.content, self.skip(struct.calcsize(form), "a number"))[0]
        return value

    def name(self, what: str) -> str:
        length = self.integer("<Q")
        if length == 0:
            self.fail(f"has an empty {what} at byte {self.at}")
        start = self.skip(length, f"a {what}")
        content = self.content[start : self.at]
        try:
            return content.decode()
        except UnicodeDecodeError:
            self.fail(f"has a {what} that is not UTF-8 ({content[:40]!r})")

    def value(self, key: str, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.strings(1)[0]
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        number = self.numbers(key, kind, 1)[0]
        return number.item()

    def array(self, key: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self.fail(f"has arrays in arrays, {depth} deep, at {key!r}", f"use at most {_MAX_DEPTH}")
        kind, count = self.integer("<I"), self.integer("<Q")
        if kind == _STRING:
            self.check_count("strings", count, _LENGTH.size)
            return self.strings(count)
        if kind == _ARRAY:
            self.check_count("arrays", count, _LEAST_ARRAY)
            return tuple(self.array(key, depth + 1) for _ in range(count))
        return self.numbers(key, kind, count)

    def strings(self, count: int) -> tuple[str, ...]:
        """A vocabulary has a hundred thousand strings, so the loop has only what it needs."""
        content, size, at = self.content, self.size, self.at
        read, found = _LENGTH.unpack_from, []
        for _ in range(count):
            start = at + 8
            if start > size:
                break
            at = start + read(content, at)[0]
            if at > size:
                break
            found.append(content[start:at].decode("utf-8", "replace"))
        if len(found) < count:
            self.fail(f"is truncated or corrupt (a string ends at byte {max(at, start)} of {size})")
        self.at = at
        return tuple(found)

    def numbers(self, key: str, kind: int, count: int) -> NDArray[Any]:
        if kind != _BOOL and kind not in _NUMBERS:
            self.fail(f"has a value of the unknown type {kind} at {key!r}", f"update haast, or {_FETCH}")
        dtype = np.dtype(_NUMBERS.get(kind, "<u1"))
        start = self.skip(count * dtype.itemsize, f"numbers at {key!r}")
        found: NDArray[Any] = np.frombuffer(self.content, dtype, count, start)
        if kind == _BOOL:
            found = found != 0
            found.flags.writeable = False
        return found

    def tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"has general.alignment {alignment!r}, not a power of two")
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.name("tensor's name")
            if name in entries:
                self.fail(f"has the tensor {name!r} twice")
            dimensions = self.integer("<I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                self.fail(f"has the tensor {name!r} with {dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
            sizes = struct.unpack_from(f"<{dimensions}Q", self.content, self.skip(8 * dimensions, "sizes"))
            entries[name] = (sizes[::-1], self.integer("<I"), self.integer("<Q"))
        start = self.at + -self.at % alignment
        places: list[tuple[int, int, str]] = []
        tensors = {}
        for name, (shape, kind, offset) in entries.items():
            rows, row_bytes, type_name = self.layout(name, shape, kind)
            begin = start + offset
            if offset % alignment:
                self.fail(f"has the tensor {name!r} at offset {offset}, not a multiple of {alignment}")
            if begin + rows * row_bytes > self.size:
                end = begin + rows * row_bytes
                self.fail(f"is truncated or corrupt (the tensor {name!r} ends at byte {end} of {self.size})")
            places.append((begin, begin + rows * row_bytes, name))
            data = np.frombuffer(self.content, np.uint8, rows * row_bytes, begin).reshape(rows, row_bytes)
            tensors[name] = TensorInfo(name, type_name, shape, data, self.content, begin)
        places.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(places):
            if begin < end:
                self.fail(f"has overlapping tensors ({first!r} and {second!r})")
        return tensors

    def layout(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[int, int, str]:
        """Rows, bytes per row, and the name of the type."""
        if kind not in _TYPES:
            self.fail(
                f"has the tensor {name!r} of type {kind}, which the gguf package here does not know",
                "update it (pip install -U gguf), or quantise the model to another type, e.g. Q4_K_M",
            )
        type_name, block, block_bytes = _TYPES[kind]
        if 0 in shape:
            self.fail(f"has the tensor {name!r} with the shape {shape}, which is empty")
        if shape[-1] % block:
            self.fail(f"has the tensor {name!r} with rows of {shape[-1]}, not a multiple of {block} as {type_name} has")
        return math.prod(shape[:-1]), shape[-1] // block * block_bytes, type_name
