"""The reader of GGUF files: agrees with the gguf package's, and refuses every malformed header without harm."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import K_TYPES, LEGACY, TOKENS, write_model

from haast.target import gguf_file, load
from haast.target.gguf_file import GGUFFile, open_gguf
from haast.target.gguf_model import read_config

STRING, ARRAY, UINT8, UINT32, UINT64, BOOL = 8, 9, 0, 4, 10, 7
HUGE = 2**64 - 1


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def written(
    folder: Path,
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (),
    data: int = 0,
    *,
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
    name: str = "a.gguf",
) -> Path:
    """A file of these parts, with `data` zero bytes; `counts` are of tensors and keys."""
    counted = (len(tensors), len(keys)) if counts is None else counts
    content = start + struct.pack("<QQ", *counted) + b"".join((*keys, *tensors))
    content += bytes(-len(content) % 32 + data)
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", [*LEGACY, *K_TYPES, "F16", "BF16", "F32"])
def test_the_reader_agrees_with_the_gguf_package(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "a.gguf", kind=kind, tied=False)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields) and ours.architecture == "llama"
    for name, field in fields.items():
        value = ours.metadata[name]
        assert (list(value) if isinstance(value, tuple | np.ndarray) else value) == field.contents()
    assert list(ours.tensors) == [each.name for each in theirs.tensors]
    for each in theirs.tensors:
        found = ours.tensors[each.name]
        assert found.type_name == each.tensor_type.name and found.shape == tuple(map(int, reversed(each.shape)))
        assert found.data.ndim == 2 and len(found.data) == int(np.prod(found.shape[:-1]))
        assert np.array_equal(found.data.reshape(-1), each.data.view(np.uint8).reshape(-1))


def test_an_open_file_can_not_be_changed(tmp_path: Path) -> None:
    file: Any = open_gguf(write_model(tmp_path / "a.gguf"))
    with pytest.raises(ValueError, match="read-only"):
        file.tensors["token_embd.weight"].data[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        file.metadata["tokenizer.ggml.token_type"][0] = 1
    with pytest.raises(TypeError):
        file.metadata["general.architecture"] = "other"
    with pytest.raises(AttributeError):
        file.path = tmp_path


def test_types_by_layer(tmp_path: Path) -> None:
    kinds = {"ffn_down.weight": "Q6_K", "token_embd.weight": "Q8_0", "": "Q4_K"}
    file = open_gguf(write_model(tmp_path / "a.gguf", kind=kinds))
    by_layer = file.quantisation_by_layer()
    assert [(kind, len(names)) for kind, names in by_layer.items()] == [("Q4_K", 12), ("Q6_K", 2), ("Q8_0", 1)]
    assert file.quantisation() == "Q4_K: 12 tensors, Q6_K: blk.0.ffn_down, blk.1.ffn_down, Q8_0: token_embd"


def test_every_type_of_value(tmp_path: Path) -> None:
    forms = dict(zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True))
    keys = [ARCHITECTURE, key("bool", BOOL, b"\1"), key("string", STRING, text("日本"))]
    keys += [key(f"n{kind}", kind, struct.pack(f"<{form}", 7)) for kind, form in forms.items()]
    keys += [key(f"a{kind}", ARRAY, struct.pack(f"<IQ3{form}", kind, 3, 1, 2, 3)) for kind, form in forms.items()]
    keys += [
        key("bools", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\0\2"),
        key("nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + 2 * (struct.pack("<IQ", STRING, 1) + text("x"))),
        key("none", ARRAY, struct.pack("<IQ", STRING, 0)),
        key("not utf-8", STRING, text(b"a\xffb")),
    ]
    for version in (2, 3):
        metadata = open_gguf(written(tmp_path, tuple(keys), start=b"GGUF" + struct.pack("<I", version))).metadata
        assert metadata["bool"] is True and metadata["string"] == "日本" and metadata["not utf-8"] == "a\ufffdb"
        assert [metadata[f"n{kind}"] for kind in forms] == [7] * len(forms)
        assert [list(metadata[f"a{kind}"]) for kind in forms] == [[1, 2, 3]] * len(forms)
        assert metadata["bools"].tolist() == [False, True] and metadata["none"] == ()
        assert metadata["nested"] == (("x",), ("x",))


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", UINT8, 1) + b"\0" if depth == 1 else struct.pack("<IQ", ARRAY, 1) + nested(depth - 1)


END = r"the tensor 't' ends at byte"
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"start": b"GGML\3\0\0\0"}, r"begins with b'GGML', not with b'GGUF': give a GGUF file"),
    "big-endian": ({"start": b"GGUF\0\0\0\3"}, r"is big-endian: convert it to little-endian"),
    "version 1": ({"start": b"GGUF\1\0\0\0"}, r"has GGUF version 1: convert the model again to version 3"),
    "version 4": ({"start": b"GGUF\4\0\0\0"}, r"has GGUF version 4"),
    "no architecture": ({"keys": ()}, r"has no general.architecture"),
    "architecture of another type": (
        {"keys": (key("general.architecture", UINT8, b"\1"),)}, r"has no general.architecture"
    ),
    "keys": ({"counts": (0, HUGE)}, rf"{HUGE} keys at byte 24 can't fit into"),
    "tensors": ({"counts": (2**40, 1)}, r"1099511627776 tensors"),
    "one key too many": ({"counts": (0, 2)}, r"an empty key at byte"),
    "a key's length": ({"keys": (ARCHITECTURE, struct.pack("<Q", HUGE) + bytes(30))}, r"bytes of a key"),
    "a string's length": ({"keys": (key("s", STRING, struct.pack("<Q", 2**63) + bytes(9)),)}, r"a string ends at"),
    "an array's length": ({"keys": (key("a", ARRAY, struct.pack("<IQ", UINT64, 2**61) + bytes(9)),)}, r"numbers at"),
    "strings": ({"keys": (key("a", ARRAY, struct.pack("<IQ", STRING, 2**60) + bytes(9)),)}, r"strings at byte"),
    "arrays": ({"keys": (key("a", ARRAY, struct.pack("<IQ", ARRAY, 2**60) + bytes(9)),)}, r"arrays at byte"),
    "a type": ({"keys": (key("a", 13, bytes(8)),)}, r"a value of the unknown type 13 at 'a'"),
    "an array's type": ({"keys": (key("a", ARRAY, struct.pack("<IQ", 77, 1) + bytes(8)),)}, r"unknown type 77"),
    "depth": ({"keys": (key("a", ARRAY, nested(5)),)}, r"arrays in arrays, 5 deep, at 'a': use at most 4"),
    "a key twice": ({"keys": (ARCHITECTURE, ARCHITECTURE)}, r"the key 'general.architecture' twice"),
    "a key that is not UTF-8": ({"keys": (key(b"a\xff", UINT8, b"\1"),)}, r"a key that is not UTF-8"),
    "alignment 0": ({"keys": (ARCHITECTURE, key("general.alignment", UINT32, bytes(4)))}, r"general.alignment 0"),
    "alignment 24": (
        {"keys": (ARCHITECTURE, key("general.alignment", UINT32, struct.pack("<I", 24)))}, r"alignment 24, not a power"
    ),
    "alignment of text": ({"keys": (key("general.alignment", STRING, text("32")),)}, r"general.alignment '32'"),
    "no dimensions": ({"tensors": (tensor("t", ()),), "data": 128}, r"'t' with 0 dimensions"),
    "five dimensions": ({"tensors": (tensor("t", (1,) * 5),), "data": 128}, r"'t' with 5 dimensions"),
    "2**32 - 1 dimensions": (
        {"tensors": (text("t") + struct.pack("<I", 2**32 - 1) + bytes(40),)}, r"4294967295 dimensions"
    ),
    "an empty tensor": ({"tensors": (tensor("t", (0, 3)),), "data": 128}, r"the shape \(3, 0\), which is empty"),
    "sizes whose product wraps round": (
        {"tensors": (tensor("t", (2**32, 2**32)),), "data": 128}, r"the tensor 't' ends at byte 73786976294838206"
    ),
    "sizes beyond the file": ({"tensors": (tensor("t", (33,)),), "data": 128}, END),
    "an unknown type": ({"tensors": (tensor("t", kind=250),), "data": 128}, r"'t' of type 250, which .*\(pip install"),
    "rows of half a block": ({"tensors": (tensor("t", (48,), 2),), "data": 128}, r"rows of 48, not a multiple of 32"),
    "an unaligned offset": ({"tensors": (tensor("t", offset=4),), "data": 256}, r"at offset 4, not a multiple of 32"),
    "an offset beyond the file": ({"tensors": (tensor("t", offset=2**63),), "data": 128}, END),
    "overlapping tensors": (
        {"tensors": (tensor("t"), tensor("u", offset=96)), "data": 256}, r"overlapping tensors \('t' and 'u'\)"
    ),
    "a tensor twice": ({"tensors": (tensor("t"), tensor("t", offset=128)), "data": 256}, r"the tensor 't' twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    parts, message = MALFORMED[name]
    path = written(tmp_path, **parts)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as raised:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(raised.value).startswith(f"{path} ") and ": " in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_not_malformed_opens(tmp_path: Path) -> None:
    path = written(tmp_path, (ARCHITECTURE, key("a", ARRAY, nested(4))), (tensor("t"), tensor("u", offset=128)), 256)
    assert [each.data.shape for each in open_gguf(path).tensors.values()] == [(1, 128), (1, 128)]


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't read .*none.gguf \(No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="can't read"):
        open_gguf(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match=r"empty.gguf is empty: fetch"):
        open_gguf(tmp_path / "empty.gguf")


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", kind="Q4_K")
    content, cut = path.read_bytes(), tmp_path / "cut.gguf"
    header = len(content) - sum(each.data.nbytes for each in open_gguf(path).tensors.values())
    for size in [*range(1, header, 61), header, len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.gguf (is truncated|begins with)"):
            open_gguf(cut)
    with pytest.raises(ValueError, match=r"cut.gguf is truncated"):
        load.load_target(str(cut))


def test_any_shard_opens_the_whole_set(tmp_path: Path) -> None:
    first = write_model(tmp_path / "many", tied=False, shards=3)
    whole = open_gguf(write_model(tmp_path / "one.gguf", tied=False))
    for number in (1, 2, 3):
        file = open_gguf(tmp_path / f"many-{number:05}-of-00003.gguf")
        assert file.path == first and file.metadata["tokenizer.ggml.tokens"] == tuple(TOKENS)
        assert file.tensors.keys() == whole.tensors.keys()
        assert all(np.array_equal(file.tensors[name].data, each.data) for name, each in whole.tensors.items())
    assert read_config(file).tie_word_embeddings is False


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    first = write_model(tmp_path / "many", shards=3)
    second, third = (tmp_path / f"many-0000{number}-of-00003.gguf" for number in (2, 3))
    content = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"00003-of-00003.gguf says shard 1 of 3, not 2 of 3: fetch the file again"):
        open_gguf(first)
    third.unlink()
    with pytest.raises(ValueError, match=r"1 shards missing \(many-00003-of-00003.gguf\): fetch all 3 shards into"):
        open_gguf(second)
    third.write_bytes(content)
    other = tmp_path / "other"
    other.mkdir()
    write_model(other / "many", shards=3, tied=False)
    third.write_bytes((other / third.name).read_bytes())
    with pytest.raises(ValueError, match=r"has the tensor .* of another shard|says .* tensors in all"):
        open_gguf(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"is one of 3 shards: give it the name that it had"):
        open_gguf(tmp_path / "renamed.gguf")


def test_a_single_file_may_be_called_a_shard(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a-00001-of-00001.gguf")
    assert "output_norm.weight" in open_gguf(path).tensors
    path.rename(tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(ValueError, match="1 shards missing"):
        open_gguf(tmp_path / "a-00001-of-00002.gguf")


def mutated(content: bytearray, header: int, chance: random.Random) -> bytes:
    """A header with one to four changes: bytes, numbers, a piece cut out, or the end cut off."""
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(header)
        change = chance.randrange(6)
        if change == 0:
            content[place] = chance.randrange(256)
        elif change == 1:
            content[place : place + 8] = struct.pack("<Q", chance.choice((0, 1, 2**31, 2**32, 2**62, 2**63, HUGE)))
        elif change == 2:
            content[place : place + 4] = struct.pack("<I", chance.choice((0, 5, 8, 9, 13, 2**31, 2**32 - 1)))
        elif change == 3:
            del content[place : place + chance.randint(1, 16)]
        elif change == 4:
            content[place:place] = chance.randbytes(chance.randint(1, 16))
        elif chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
            break
    return bytes(content)


def fuzz(folder: Path, rounds: int, seed: int) -> int:
    """Open mutated files; returns how many still open. No other error, no memory beyond the file's size, no hang."""
    path = write_model(folder / "whole.gguf", kind="Q4_0")
    content = path.read_bytes()
    header = len(content) - sum(each.data.nbytes for each in open_gguf(path).tensors.values())
    content = content[: header + 4096] if seed % 2 else content  # half of them lack most of their tensors
    chance, still, file = random.Random(seed), 0, folder / "mutated.gguf"
    tracemalloc.start()
    try:
        for _ in range(rounds):
            file.unlink(missing_ok=True)  # the former one may still be mapped
            file.write_bytes(mutated(bytearray(content), header, chance))
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.process_time()
            opened: GGUFFile | None = None
            try:
                opened = open_gguf(file)
            except ValueError as error:
                assert str(file) in str(error) and "\n" not in str(error)
            # A short string takes six times as many bytes in Python as in the file.
            assert tracemalloc.get_traced_memory()[1] - before < 8 * len(content) + (1 << 20)
            assert time.process_time() - started < 5
            if opened is not None:
                still += 1
                try:
                    read_config(opened)
                except ValueError as error:
                    assert str(file) in str(error) and "\n" not in str(error)
    finally:
        tracemalloc.stop()
    return still


def test_mutated_headers_do_no_harm(tmp_path: Path) -> None:
    assert 0 < fuzz(tmp_path, 500, 0) < 500


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_mutated_headers_do_no_harm(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, 1000, seed)


@pytest.mark.slow
def test_a_vocabulary_is_read_in_a_moment() -> None:
    source = load.resolve(load.DEFAULT_MODEL)
    if source.gguf is None:
        pytest.skip("the default model is not a GGUF file here")
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        source.open_gguf()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.15, "the gguf package takes two seconds"


def test_the_types_are_those_of_the_gguf_package() -> None:
    assert {name for name, _, _ in gguf_file._TYPES.values()} >= {"F32", "F16", "BF16", *LEGACY, *K_TYPES, "IQ4_XS"}
