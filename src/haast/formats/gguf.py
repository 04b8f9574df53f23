"""EAGLE-3 heads as GGUF files (llama.cpp's architecture "eagle3"): one layer, three layers of the target.

Query and key rows lie in llama.cpp's order, which turns neighbouring pairs; `d2t` holds ids. Quantised tensors are
unpacked. Files are read and written by the `gguf` package.
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
from haast.formats.base import Engine, Format, HeadFiles, Question, Reading, TargetFacts, Written
from haast.formats.conventions import interleaved
from haast.formats.keys import check_keys
from haast.formats.layout import eagle3_config, eagle3_reading
from haast.formats.official import Official
from haast.heads.config import HeadConfig, HeadSizes
from haast.heads.eagle3 import Eagle3Config

ARCHITECTURE = "eagle3"
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
_STRING, _ARRAY = 8, 9  # GGUF's types of values; the others have a fixed length in bytes
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ROPE = "rope_freqs.weight"  # factors of a scaled rotation, which the target has too


class Gguf(Format):
    """See the module docstring."""

    name = "GGUF"
    kinds = ("eagle3",)

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return kind in self.kinds and files.document.get("general.architecture") == ARCHITECTURE

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        said = {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in files.document.items()}
        document: dict[str, Any] = {
            "num_attention_heads": said.get("attention.head_count"),
            "head_dim": said.get("attention.key_length") or said.get("rope.dimension_count"),
            "rms_norm_eps": said.get("attention.layer_norm_rms_epsilon", 1e-6),
            "max_position_embeddings": said.get("context_length"),
            "target_hidden_size": said.get("target_hidden_size"),
        }
        if "rope.freq_base" in said and not said.get("rope.scaled"):
            document["rope_theta"] = said["rope.freq_base"]
        told = {key: said.get(key) for key in ("norm_before_residual", "target_layers")}
        check_keys(files, {**document, **told}, f"{ARCHITECTURE}.")
        residual = bool(told["norm_before_residual"])
        return eagle3_config(files, document, facts, told["target_layers"], norm_before_residual=residual)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, Eagle3Config), "read_config gives one"
        reading, questions = eagle3_reading(_with_offsets(files), config, facts)
        return interleaved(reading), [question for question in questions if question.name != "d2t"]

    def write(self, reading: Reading, engine: Engine) -> Written:
        """In the names of `_NAMES`; the keys of the document are the file's."""
        config = reading.config
        if not isinstance(config, Eagle3Config):
            raise ValueError("GGUF files hold EAGLE-3 heads alone: train one (haast train --head eagle3)")
        plain = Official().write(reading, Engine("llama.cpp", engine.target, engine.config))
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "default") not in ("default", "llama3"):
            raise ValueError(f"rope_type {rope['rope_type']!r} is not written to GGUF files: export to llama.cpp")
        ours = {theirs: name for name, theirs in _NAMES.items()}
        tensors = {}
        for name, tensor in _paired(plain.tensors, config).items():
            if name == "d2t":
                assert reading.draft_vocab is not None, "d2t names the draft vocabulary"
                tensors["d2t"] = reading.draft_vocab.long()
            elif name != "t2d":
                tensors[ours[name]] = tensor
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
        return Written(document, tensors)

    def check(self, written: Written, reading: Reading, facts: TargetFacts) -> None:
        tensors = {_NAMES[name]: tensor for name, tensor in written.tensors.items() if name != _ROPE}
        scaled = {f"{ARCHITECTURE}.rope.scaled": True} if _ROPE in written.tensors else {}
        super().check(Written({**written.document, **scaled}, tensors), reading, facts)


def read_gguf(path: Path, source: str) -> HeadFiles:
    """A GGUF file's keys and tensors under the names of EAGLE-3. Raises HeadMismatchError for any other GGUF file."""
    try:
        _check_lengths(path)
        reader = gguf.GGUFReader(path)
        document = {name: each.contents() for name, each in reader.fields.items() if not name.startswith("tokenizer.")}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise HeadMismatchError(f"{path} is no GGUF file, or torn ({error}); fetch it again") from error
    architecture = document.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise HeadMismatchError(
            f"{path} holds a {architecture!r} model, no head: give a GGUF file of an EAGLE-3 head (architecture "
            f"{ARCHITECTURE!r}), or this file as --model"
        )
    tensors, notes = {}, []
    for each in reader.tensors:
        if each.name == _ROPE:
            document[f"{ARCHITECTURE}.rope.scaled"] = True
            notes.append("its rotation is scaled: taken from the target")
            continue
        name = _NAMES.get(each.name, each.name)
        kind = each.tensor_type.name
        if kind in ("I64", "I32", "I16", "I8"):
            tensors[name] = torch.from_numpy(np.array(each.data)).long().flatten()
            continue
        if kind not in ("F32", "F16", "BF16"):
            notes.append(f"{each.name} is unpacked from {kind}")
        try:
            values = gguf.dequantize(each.data, each.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise HeadMismatchError(
                f"{path}: {each.name} is {kind}, which is not unpacked here; convert it to F16"
            ) from error
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).reshape(*map(int, reversed(each.shape.tolist())))
    return HeadFiles(path, document, tensors, source, tuple(dict.fromkeys(notes)))


def _check_lengths(path: Path) -> None:
    """Raise ValueError or struct.error where a length in the file's head leads beyond its end.

    The reader of the `gguf` package takes such lengths at their word, and fills the memory.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def number(form: str) -> int:
            found: int = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]
            return found

        def skip(count: int) -> None:
            if count > size - file.tell():
                raise ValueError("a length leads beyond its end")
            file.seek(count, 1)

        def value(kind: int, count: int, depth: int = 0) -> None:
            if kind in _BYTES:
                skip(_BYTES[kind] * count)
                return
            if kind not in (_STRING, _ARRAY) or depth > 2:
                raise ValueError(f"a value of type {kind}")
            for _ in range(count):  # each of them takes 8 bytes at least, so this ends with the file
                if kind == _STRING:
                    skip(number("Q"))
                else:
                    value(number("I"), number("Q"), depth + 1)

        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        number("I")
        tensors, keys = number("Q"), number("Q")
        for _ in range(keys):
            skip(number("Q"))
            value(number("I"), 1)
        for _ in range(tensors):
            skip(number("Q"))
            skip(8 * number("I") + 12)


def write_gguf(path: Path, written: Written, dtype: torch.dtype = torch.float16) -> None:
    """Write a head as one file, whole or not at all. There is no tokenizer in it: llama.cpp takes the target's."""
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
            # Norms stay in float32, as llama.cpp wants them; numpy has no bfloat16, and float32 holds it as it is.
            half = dtype is torch.float16 and tensor.dim() == 2
            whole = tensor.long() if name == "d2t" else (tensor.half() if half else tensor.float())
            writer.add_tensor(name, whole.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _with_offsets(files: HeadFiles) -> HeadFiles:
    """With `d2t` as everybody else has it: small ids would make a vocabulary as offsets too."""
    ids = files.tensors.get("d2t")
    if ids is None or ids.dim() != 1 or ids.is_floating_point():
        return files
    return replace(files, tensors={**files.tensors, "d2t": ids.long() - torch.arange(len(ids))})


def _paired(tensors: dict[str, Tensor], config: HeadConfig) -> dict[str, Tensor]:
    """Query and key rows in llama.cpp's order: halves of a head become neighbouring pairs."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        found[name] = tensor
    return found


def _llama3_factors(config: HeadConfig) -> Tensor:
    """By what llama.cpp divides the frequencies of a Llama 3 rotation: the plain ones over the scaled ones."""
    plain = 1.0 / float((config.rope_parameters or {})["rope_theta"]) ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )
    scaled: Any = LlamaRotaryEmbedding(config.layers()).inv_freq
    factors: Tensor = plain / scaled
    return factors
