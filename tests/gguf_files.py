"""Writes tiny GGUF files: models of several architectures with random weights in any type of block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS: list[str] = [*bytes_to_unicode().values(), "th", "the", "<|end|>"]  # type: ignore[no-untyped-call]
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_SIZE, LAYERS = 256, 512, 4, 2, 64, 2
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
# Where a block has its fp16 factors, which random bytes would make infinite.
_FACTORS = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def data_of(shape: tuple[int, ...], kind: str, random: np.random.Generator) -> NDArray[Any]:
    """Random weights of a type, as GGUFWriter takes them."""
    values = random.normal(0, 0.1, shape).astype(np.float32)
    if kind == "F32":
        return values
    if kind not in _FACTORS:
        return np.ascontiguousarray(gguf.quants.quantize(values, Kind[kind]))
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    data = random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for place in _FACTORS[kind]:
        factors = random.uniform(0.0005, 0.002, data.shape[:-1]).astype("<f2")
        data[..., place : place + 2] = factors[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def shapes_of(architecture: str, tied: bool, head_size: int = HEAD_SIZE) -> dict[str, tuple[int, ...]]:
    """Shapes of a tiny model's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * head_size, HIDDEN),
            "attn_k.weight": (KV_HEADS * head_size, HIDDEN),
            "attn_v.weight": (KV_HEADS * head_size, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * head_size),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (FEED_FORWARD, HIDDEN),
            "ffn_up.weight": (FEED_FORWARD, HIDDEN),
            "ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
        if architecture == "qwen2":
            parts |= {f"attn_{name}.bias": parts[f"attn_{name}.weight"][:1] for name in "qkv"}
        if architecture in ("qwen3", "gemma3"):
            parts |= {"attn_q_norm.weight": (head_size,), "attn_k_norm.weight": (head_size,)}
        if architecture in ("gemma2", "gemma3"):
            parts |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def write_model(
    path: Path,
    architecture: str = "llama",
    kind: str | Mapping[str, str] = "Q4_0",
    *,
    tied: bool = True,
    name: str = "tiny",
    tokenizer: bool = True,
    head_size: int = HEAD_SIZE,
    settings: Mapping[str, int | float] | None = None,
    without: Iterable[str] = (),
    more: Mapping[str, NDArray[Any]] | None = None,
    shards: int = 0,
    seed: int = 0,
) -> Path:
    """Write a model.

    Args:
        path: the file; for shards the name without "-0000i-of-0000n.gguf".
        architecture: "llama", "qwen2", "qwen3", "gemma2" or "gemma3".
        kind: the type of all matrices, or of some by the ending of their names ("" is the rest). Vectors are F32.
        tied: without an LM head of its own.
        name: general.name.
        tokenizer: whether there is one.
        head_size: of the attention.
        settings: sizes that differ from the tensors', by key without the architecture.
        without, more: names of tensors that are left out, and F32 tensors that are added.
        shards: how many files to split the tensors into; 0 writes one.
        seed: of the weights.

    Returns:
        The file, or the first shard.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=0)
    tensors = [(each, data_of(shape, _kind(kind, each, shape), random), _kind(kind, each, shape))
               for each, shape in shapes_of(architecture, tied, head_size).items()]  # fmt: skip
    tensors = [each for each in tensors if each[0] not in set(without)]
    tensors += [(each, data, "F32") for each, data in (more or {}).items()]
    if shards:
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=-(-len(tensors) // shards))
    writer.add_name(name)
    sizes: dict[str, int | float] = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": head_size,
        "attention.value_length": head_size, "rope.dimension_count": head_size, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": len(TOKENS),
    }  # fmt: skip
    if architecture.startswith("gemma"):
        sizes["attention.sliding_window"] = 64
    for key, size in (sizes | dict(settings or {})).items():
        add = (
            writer.add_float32 if isinstance(size, float) else writer.add_uint64 if size >= 2**32 else writer.add_uint32
        )
        add(f"{architecture}.{key}", size)  # type: ignore[arg-type]
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
        writer.add_token_merges(["t h", "th e"])
        for each in ("bos", "eos", "pad", "unk"):
            getattr(writer, f"add_{each}_token_id")(len(TOKENS) - 1)
    for each, data, type_name in tensors:
        writer.add_tensor(each, data, raw_dtype=Kind[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name(f"{path.stem}-00001-of-{shards:05}.gguf") if shards else path


def _kind(kind: str | Mapping[str, str], name: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return "F32"
    if isinstance(kind, str):
        return kind
    return next((each for ending, each in kind.items() if ending and name.endswith(ending)), kind.get("", "Q4_0"))
