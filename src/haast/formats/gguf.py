"""EAGLE-3 heads as GGUF files (llama.cpp's architecture "eagle3"): one decoder layer that reads three target layers.

Query and key rows are in llama.cpp's order, for which RoPE rotates neighbouring pairs; `d2t` holds absolute ids.
Quantised tensors are dequantised. The `gguf` package reads and writes the files.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from haast.errors import HeadMismatchError
from haast.files import replacing
from haast.formats.base import Format, HeadFiles, Question, Reading, ServingEngine, TargetFacts, WrittenHead
from haast.formats.conventions import interleaved
from haast.formats.files import CONFIG
from haast.formats.keys import check_keys
from haast.formats.layout import eagle3_config, eagle3_reading
from haast.formats.official import Official
from haast.heads.config import HeadConfig, HeadSizes
from haast.heads.eagle3 import Eagle3Config

ARCHITECTURE, GGUF_FILE = "eagle3", "head.gguf"
_NAMES = {
    "fc.weight": "fc.weight",
    "enc.output_norm.weight": "input_norm.weight",
    "blk.0.attn_norm.weight": "layers.0.input_layernorm.weight",
    "blk.0.attn_norm_2.weight": "layers.0.hidden_norm.weight",
    "blk.0.attn_q.weight": "layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "layers.0.self_attn.k_proj.weight",
    "blk.0.attn_v.weight": "layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "layers.0.self_attn.o_proj.weight",
    "blk.0.ffn_norm.weight": "layers.0.post_attention_layernorm.weight",
    "blk.0.ffn_gate.weight": "layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "layers.0.mlp.down_proj.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
    "token_embd.weight": "embed_tokens.weight",
    "d2t": "d2t",
}
_STRING, _ARRAY = 8, 9  # GGUF value types; the others have a fixed length in bytes
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ROPE = "rope_freqs.weight"  # factors of a scaled RoPE, which the target has too


class Gguf(Format):
    """See the module docstring."""

    name = "GGUF"
    kinds = ("eagle3",)

    def read_files(self, path: Path, source: str) -> HeadFiles | None:
        found = [path] if path.suffix == ".gguf" and path.is_file() else [*path.glob("*.gguf")]
        return None if len(found) != 1 or (path / CONFIG).is_file() else read_gguf(found[0], source)

    def write_files(self, folder: Path, written: WrittenHead, dtype: torch.dtype) -> bool:
        write_gguf(folder / GGUF_FILE, written, dtype)
        return True

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return kind in self.kinds and files.document.get("general.architecture") == ARCHITECTURE

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        metadata = {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in files.document.items()}
        document: dict[str, Any] = {
            "num_attention_heads": metadata.get("attention.head_count"),
            "head_dim": metadata.get("attention.key_length") or metadata.get("rope.dimension_count"),
            "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon", 1e-6),
            "max_position_embeddings": metadata.get("context_length"),
            "target_hidden_size": metadata.get("target_hidden_size"),
        }
        if "rope.freq_base" in metadata and not metadata.get("rope.scaled"):
            document["rope_theta"] = metadata["rope.freq_base"]
        conventions = {key: metadata.get(key) for key in ("norm_before_residual", "target_layers")}
        check_keys(files, {**document, **conventions}, f"{ARCHITECTURE}.")
        residual = bool(conventions["norm_before_residual"])
        return eagle3_config(files, document, facts, conventions["target_layers"], norm_before_residual=residual)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, Eagle3Config), "read_config returns one"
        reading, questions = eagle3_reading(_with_offsets(files), config, facts)
        return interleaved(reading), [question for question in questions if question.name != "d2t"]

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        """Tensors under the names of `_NAMES`; the document holds the file's metadata keys."""
        config = reading.config
        if not isinstance(config, Eagle3Config):
            raise ValueError("GGUF files can only hold EAGLE-3 heads: train one (haast train --head eagle3)")
        plain = Official().write(reading, ServingEngine("llama.cpp", engine.target, engine.config))
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "default") not in ("default", "llama3"):
            raise ValueError(f"Haast can't write rope_type {rope['rope_type']!r} to GGUF: use --to llama.cpp")
        gguf_names = {official: name for name, official in _NAMES.items()}
        tensors = {}
        for name, tensor in _as_pairs(plain.tensors, config).items():
            if name == "d2t":
                assert reading.draft_vocab is not None, "d2t lists the draft vocabulary"
                tensors["d2t"] = reading.draft_vocab.long()
            elif name != "t2d":
                tensors[gguf_names[name]] = tensor
        if rope.get("rope_type") == "llama3":
            tensors[_ROPE] = _llama3_factors(config)
        document = {
            "general.architecture": ARCHITECTURE,
            "general.name": f"EAGLE-3 head of {engine.target}",
            f"{ARCHITECTURE}.block_count": 1,
            f"{ARCHITECTURE}.context_length": config.max_position_embeddings,
            f"{ARCHITECTURE}.embedding_length": config.hidden_size,
            f"{ARCHITECTURE}.feed_forward_length": config.intermediate_size,
            f"{ARCHITECTURE}.attention.head_count": config.num_attention_heads,
            f"{ARCHITECTURE}.attention.head_count_kv": config.num_key_value_heads,
            f"{ARCHITECTURE}.attention.key_length": config.head_dim,
            f"{ARCHITECTURE}.attention.value_length": config.head_dim,
            f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            f"{ARCHITECTURE}.rope.dimension_count": config.head_dim,
            f"{ARCHITECTURE}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
            f"{ARCHITECTURE}.vocab_size": config.vocab_size,
            f"{ARCHITECTURE}.target_layers": list(config.layer_ids),
            f"{ARCHITECTURE}.target_hidden_size": config.read_size,
            f"{ARCHITECTURE}.norm_before_residual": config.norm_before_residual,
            f"{ARCHITECTURE}.norm_before_fc": config.input_norm,
        }
        return WrittenHead(document, tensors)

    def check(self, written: WrittenHead, reading: Reading, facts: TargetFacts) -> None:
        tensors = {_NAMES[name]: tensor for name, tensor in written.tensors.items() if name != _ROPE}
        scaled = {f"{ARCHITECTURE}.rope.scaled": True} if _ROPE in written.tensors else {}
        super().check(WrittenHead({**written.document, **scaled}, tensors), reading, facts)


def read_gguf(path: Path, source: str) -> HeadFiles:
    """Metadata and tensors of a GGUF file, tensors under EAGLE-3's names. Raises HeadMismatchError for other files."""
    try:
        _check_lengths(path)
        reader = gguf.GGUFReader(path)
        document = {name: key.contents() for name, key in reader.fields.items() if not name.startswith("tokenizer.")}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise HeadMismatchError(f"{path} is not a GGUF file, or is corrupt ({error}); fetch it again") from error
    architecture = document.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise HeadMismatchError(
            f"{path} holds a {architecture!r} model, not a head: give a GGUF file of an EAGLE-3 head (architecture "
            f"{ARCHITECTURE!r}), or this file as --model"
        )
    tensors, notes = {}, []
    for each in reader.tensors:
        if each.name == _ROPE:
            document[f"{ARCHITECTURE}.rope.scaled"] = True
            notes.append("its RoPE is scaled: the target's RoPE is used")
            continue
        name = _NAMES.get(each.name, each.name)
        kind = each.tensor_type.name
        if kind in ("I64", "I32", "I16", "I8"):
            tensors[name] = torch.from_numpy(np.array(each.data)).long().flatten()
            continue
        if kind not in ("F32", "F16", "BF16"):
            notes.append(f"{each.name} is dequantised from {kind}")
        try:
            values = gguf.dequantize(each.data, each.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise HeadMismatchError(
                f"{path}: {each.name} is {kind}, which Haast can't dequantise; convert it to F16"
            ) from error
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).reshape(*map(int, reversed(each.shape.tolist())))
    return HeadFiles(path, document, tensors, source, tuple(dict.fromkeys(notes)))


def _check_lengths(path: Path) -> None:
    """Raise ValueError or struct.error if a length in the file's header points beyond the end of the file.

    The reader of the `gguf` package trusts such lengths, and would fill the memory.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def read_number(form: str) -> int:
            number: int = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]
            return number

        def skip(count: int) -> None:
            if count > size - file.tell():
                raise ValueError("a length points beyond its end")
            file.seek(count, 1)

        def skip_values(kind: int, count: int, depth: int = 0) -> None:
            if kind in _BYTES:
                skip(_BYTES[kind] * count)
                return
            if kind not in (_STRING, _ARRAY) or depth > 2:
                raise ValueError(f"a value of type {kind}")
            for _ in range(count):  # every value takes at least 8 bytes, so this ends with the file
                if kind == _STRING:
                    skip(read_number("Q"))
                else:
                    skip_values(read_number("I"), read_number("Q"), depth + 1)

        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        read_number("I")
        tensors, keys = read_number("Q"), read_number("Q")
        for _ in range(keys):
            skip(read_number("Q"))
            skip_values(read_number("I"), 1)
        for _ in range(tensors):
            skip(read_number("Q"))
            skip(8 * read_number("I") + 12)


def write_gguf(path: Path, written: WrittenHead, dtype: torch.dtype = torch.float16) -> None:
    """Write a head as one file, atomically. It holds no tokenizer: llama.cpp uses the target's."""
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string("tokenizer.ggml.model", "none")
        for key, value in written.document.items():
            if key == "general.architecture":
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_string(key, value)
        for name, tensor in written.tensors.items():
            # llama.cpp wants norms in float32. numpy has no bfloat16, which float32 holds exactly.
            half = dtype is torch.float16 and tensor.dim() == 2
            converted = tensor.long() if name == "d2t" else (tensor.half() if half else tensor.float())
            writer.add_tensor(name, converted.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _with_offsets(files: HeadFiles) -> HeadFiles:
    """Convert `d2t` to offsets, as in safetensors formats: small ids could be mistaken for offsets."""
    ids = files.tensors.get("d2t")
    if ids is None or ids.dim() != 1 or ids.is_floating_point():
        return files
    return replace(files, tensors={**files.tensors, "d2t": ids.long() - torch.arange(len(ids))})


def _as_pairs(tensors: dict[str, Tensor], config: HeadConfig) -> dict[str, Tensor]:
    """Query and key rows in llama.cpp's order: halves of a head become neighbouring pairs."""
    reordered = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        reordered[name] = tensor
    return reordered


def _llama3_factors(config: HeadConfig) -> Tensor:
    """Divisors that llama.cpp applies to the frequencies of a Llama 3 RoPE: unscaled over scaled frequencies."""
    plain = 1.0 / float((config.rope_parameters or {})["rope_theta"]) ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )
    scaled: Any = LlamaRotaryEmbedding(config.layers()).inv_freq
    factors: Tensor = plain / scaled
    return factors
