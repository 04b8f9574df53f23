"""A GGUF file answers as the weights that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from fakes import tiny_llama
from gguf import GGUFWriter
from gguf_files import TOKENS
from torch import Tensor

from haast.target import load as models

# Names in the file, of a layer and outside.
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the file's order: each pair of a rotation side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(model: Any, path: Path) -> None:
    config, weights = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    for name in ("bos", "eos", "pad", "unk"):
        getattr(writer, f"add_{name}_token_id")(len(TOKENS) - 1)
    names = {ours: theirs for theirs, ours in OUTSIDE.items()}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for theirs, ours in LAYER.items()}
    for ours, theirs in names.items():
        weight = weights[f"{ours}.weight"]
        if ours.endswith(("q_proj", "k_proj")):
            weight = paired(weight, config.num_attention_heads if "q_proj" in ours else config.num_key_value_heads)
        writer.add_tensor(f"{theirs}.weight", weight.float().numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_answers_as_its_weights(tmp_path: Path) -> None:
    stock: Any = tiny_llama(vocab=len(TOKENS))
    stock = stock.float().double()  # what fits into the file
    write(stock, tmp_path / "tiny.gguf")
    target = models.load_target(str(tmp_path / "tiny.gguf"), dtype="float64", packing="off")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert target.config.vocab_size == len(TOKENS)
    assert torch.allclose(target.model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-6)
    assert target.tokenizer is not None
    assert target.tokenizer("the", add_special_tokens=False)["input_ids"] == [TOKENS.index("the")]
    assert target.tokenizer.eos_token == "<|end|>"
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.gguf"]
