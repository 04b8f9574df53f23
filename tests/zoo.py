"""Every causal LM class of transformers, built tiny with random weights: does Haast say what stock `generate` says?

    python tests/zoo.py --json results/zoo.json

A class says the same text, or is refused by its name, or no tiny one could be built (`NOT_BUILT` says why). Anything
else is a bug. Sizes are found by what fields a configuration has; what that leaves open is in `MORE`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import platform
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from fakes import RandomTrees, head_for
from matrix import commit
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import haast
from haast.drafters.tree_shape import DraftShape
from haast.errors import HeadMismatchError, UnsupportedModelError

VOCAB = 64
PROMPT = (5, 6, 7, 9, 5, 6, 7, 9, 5)
NEW = 12
WANDERS = 4  # different tokens that a text should have: one that repeats itself would show little
APART = 2e-3  # logits at most, relative to their spread
_SEEDS = 5  # tried until a text wanders

_OF_EACH_NAME: dict[str | int, Sequence[str]] = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size", "unpadded_vocab_size"),
    128: (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "original_max_position_embeddings",
        "max_target_positions", "encoder_hash_byte_group_vocab",
    ),
    48: (
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "dff", "n_inner", "d_inner",
        "feed_forward_size", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size",
        "dense_intermediate_size", "prefix_dense_intermediate_size", "mlp_dim",
    ),
    32: (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "dim_model_base",
        "out_hidden_size", "output_channels",
    ),
    24: (
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
        "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
    ),
    16: ("kv_lora_rank", "q_lora_rank", "o_lora_rank"),
    12: ("v_head_dim",),
    8: (
        "head_dim", "dim_head", "swa_head_dim", "kv_channels", "d_head", "attention_head_size", "qk_nope_head_dim",
        "qk_rope_head_dim", "index_head_dim", "index_topk", "linear_key_head_dim", "linear_value_head_dim",
        "linear_head_dim", "mamba_head_dim", "mamba_d_head", "ssm_state_size", "mamba_d_state", "state_size",
        "mamba_n_heads", "mamba_num_heads", "n_mamba_heads",
        "index_n_heads",  # scores that are zero in all heads would be ties
    ),
    6: (  # windows, which the text outgrows
        "sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "local_attention",
        "window_size",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads", "attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "rotary_dim",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers", "depth",
        "num_encoder_layers", "num_decoder_layers", "num_blocks", "num_key_value_heads", "swa_num_key_value_heads",
        "num_experts_per_tok", "moe_topk", "moe_k", "n_group", "linear_num_key_heads", "linear_num_value_heads",
        "linear_num_heads", "eos_token_id",
    ),
    1: ("topk_group", "bos_token_id", "max_window_layers", "use_sliding_window"),
    0: ("pad_token_id", "tie_word_embeddings"),
}  # fmt: skip
SIZES = {name: size for size, names in _OF_EACH_NAME.items() for name in names}
SWITCHES = ("use_sliding_window", "tie_word_embeddings")
# Fields that give every layer a kind; a tiny model has one layer of each kind, and two at least.
KINDS = ("layer_types", "layers_block_type")

# Classes whose configuration, as the mapping has it, is that of a larger model: their own is the decoder's.
OWN_CONFIG = ("musicgen", "musicgen_melody")
CLASSES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NOT_BUILT = {
    "gemma3n": "its vision tower is timm's, which is not installed; Gemma3nForCausalLM is built",
    "gemma4_assistant": "transformers 5.23 builds none: all of its layers must share keys, and then none makes them",
}

_REASONS = {
    "is not causal": "not causal: its logits at a token depend on later tokens",
    "can't take a tree": "its forward fails when it is given a 4-D mask, positions and Haast's cache",
    "can't be drafted for": "with Haast's masks, positions and cache its logits are not those of its own forward",
    "can't verify a tree": "the logits of a tree node are not those of its path alone",
}

_LATENT = {"num_key_value_heads": 4}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_TWICE = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
         "minicpm3", "youtu", "kimi_linear"), _LATENT,
    ),
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "qk_rope_head_dim": 4},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {**_BOTH, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cpmant": {"prompt_length": 4, "prompt_types": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2}},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2,
                    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**_LATENT, "layer_types": ["indexed_attention", "sliding_attention"], "per_layer_config": {
        1: {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
    "gemma3n_text": {**_TWICE, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    "gemma4_unified_assistant": {"backbone_hidden_size": 32, "text_config": {**_TWICE, "num_kv_shared_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "gemma4_text": {**_TWICE, "num_kv_shared_layers": 2},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "nemotron_h": {"n_groups": 2},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 28, "crop_size": 28},
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4,
                         "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}},
    "qwen4_exp_text": {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "xlstm": {"embedding_dim": 64, "hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5,
              "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


def fields_of(kind: type) -> set[str]:
    """The settings that a configuration class takes."""
    if dataclasses.is_dataclass(kind):
        return {each.name for each in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]  # older transformers


def tiny_config(kind: Any, default: Any = None, more: Mapping[str, Any] | None = None) -> Any:
    """A tiny configuration of a class; `default` is an instance with its usual settings, `more` goes over all."""
    default = kind() if default is None else default
    names = fields_of(kind)
    given: dict[str, Any] = {
        name: bool(size) if name in SWITCHES else size for name, size in SIZES.items() if name in names
    }
    for name in KINDS:
        if name in names and getattr(default, name, None):
            kinds = list(dict.fromkeys(getattr(default, name)))
            if kinds == ["full_attention"] and "sliding_window" in names:
                kinds = _BOTH["layer_types"]
            given[name] = kinds if len(kinds) > 1 else 2 * kinds
            given["num_hidden_layers"] = len(given[name])
    given = {**given, **MORE.get(kind.model_type, {}), **(more or {})}
    for name in kind.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            given[name] = tiny_config(type(inner), inner, given.get(name))
    return kind(**given)


def build(kind: str, decodes: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of a type, with `is_decoder=True` if it `decodes`: the same weights for the same seed."""
    model_class: Any = getattr(transformers, CLASSES[kind])
    config = tiny_config(model_class.config_class if kind in OWN_CONFIG else CONFIG_MAPPING[kind])
    if decodes:
        config.is_decoder = True
    auto: Any = AutoModelForCausalLM
    torch.manual_seed(seed)
    model = model_class(config) if kind in OWN_CONFIG else auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.3 * noise)
            elif parameter.is_floating_point():  # biases and norms, which begin at zero and one
                parameter.add_(0.1 * noise)
    model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]  # nothing ends a text
    return model.to(dtype).eval()


def may_decode(kind: str) -> bool:
    """Whether models of a type are causal only if their configuration says so."""
    return "is_decoder" in fields_of(CONFIG_MAPPING[kind]) and "is_decoder" not in MORE.get(kind, {})


def said(model: Any, **more: Any) -> tuple[list[int], Tensor]:
    """The greedy text, and the logits (tokens, vocab) that it was chosen by."""
    ids = torch.tensor([PROMPT])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
    output = model.generate(**given, output_logits=True, return_dict_in_generate=True, **more)
    return output.sequences[0, len(PROMPT) :].tolist(), torch.cat(output.logits)


def outcome(kind: str, decodes: bool = False) -> dict[str, Any]:
    """What came of one type: "same text", "refused", "not built", or what must not be: "other text", "error"."""
    row: dict[str, Any] = {"type": kind, "class": CLASSES[kind], "is_decoder": decodes}
    for seed in range(_SEEDS):
        try:
            model = build(kind, decodes, seed)
        except Exception as error:
            return {**row, "outcome": "not built", "why": NOT_BUILT.get(kind, _line(error))}
        try:
            text, logits = said(model)
        except Exception as error:  # what draws or speaks can't go by text alone
            return {**row, **_compared(model, None), "stock": _line(error)}
        if len(set(text)) >= WANDERS:
            break
    return {**row, **_compared(model, (text, logits)), "distinct": len(set(text))}


def _compared(model: Any, stock: tuple[list[int], Tensor] | None) -> dict[str, Any]:
    """`stock` is what stock `generate` says and by which logits; None where it can't say anything."""
    try:
        decoders = dict(_decoders(model, [] if stock is None else stock[0]))
        if stock is None:
            raise AssertionError("it was taken up, and stock generate can't run it")
    except UnsupportedModelError as error:
        return {"outcome": "refused" if stock is None or _refused_in_call(model) else "error", "why": _line(error)}
    except Exception as error:
        return {"outcome": "error", "why": _line(error)}
    text, logits = stock
    taus = dict[str, float]()
    for name, decoder in decoders.items():
        try:
            mine, by = said(model, custom_generate=decoder)
        except Exception as error:
            return {"outcome": "error", "why": f"with {name}: {_line(error)}"}
        apart = float((by - logits).abs().max() / logits.std())
        if mine != text or not apart <= APART:
            why = f"with {name}: {mine} instead of {text}, logits {apart:.1g} of their spread"
            return {"outcome": "other text", "why": why}
        taus[name] = round(decoder.stats.tau, 2)
    return {"outcome": "same text", "tau": taus}


def _decoders(model: Any, text: Sequence[int]) -> Iterator[tuple[str, haast.Decoder]]:
    """Decoders by the name of their drafts; without "head" if it refuses the model. Most nodes of trees are wrong."""
    trees = RandomTrees(14, 3, [[*PROMPT, *text]], rate=0.6, vocab=VOCAB)
    yield "trees", haast.Decoder(model, drafter=trees)
    yield "suffix", haast.Decoder(drafter="suffix")
    yield "lookahead", haast.Decoder(drafter="lookahead")
    head = head_for(model.config.get_text_config())
    with contextlib.suppress(HeadMismatchError):
        yield "head", haast.Decoder(model, head=head, drafter="eagle", shape=DraftShape(depth=3, nodes=12))


def _refused_in_call(model: Any) -> bool:
    """Whether `generate` refuses the model too, where nothing has been checked before."""
    try:
        said(model, custom_generate=haast.Decoder(drafter="suffix"))
    except UnsupportedModelError:
        return True
    return False


def _line(error: Exception) -> str:
    """An error in one line. A refusal is its message."""
    name = "" if type(error) is UnsupportedModelError else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())


def survey() -> list[dict[str, Any]]:
    """All types, in alphabetical order, those that may decode also as decoders."""
    rows = list[dict[str, Any]]()
    for kind in sorted(CLASSES):
        rows += [outcome(kind, decodes) for decodes in ((False, True) if may_decode(kind) else (False,))]
        print(f"{kind}: {', '.join(row['outcome'] for row in rows if row['type'] == kind)}", flush=True)
    return rows


def counts(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many types came to what, each as its configuration is by default."""
    return Counter(row["outcome"] for row in rows if not row["is_decoder"])


def page(held: Mapping[str, Any]) -> str:
    """docs/models.md."""
    rows, number = held["types"], counts(held["types"])
    decoders = [row for row in rows if row["is_decoder"]]
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row["outcome"] == "refused":
            refused.setdefault(_reason(row), []).append(f"{row['class']} ({_type(row)})")
    lines = [
        "# Models",
        "",
        f"transformers {held['versions']['transformers']} has {number.total()} types of causal LM. A tiny model of "
        f"each was built with random weights in float32. Haast's greedy text and logits were compared with stock "
        f"`generate`'s, token by token, with suffix drafts, lookahead, and random trees in which some nodes are right: "
        f"**{number['same text']} give the same text, {number['refused']} are refused by name, {number['not built']} "
        f"could not be built**, and none says another text. Of {len(decoders)} that are also built with "
        f"`is_decoder=True`, {Counter(row['outcome'] for row in decoders)['same text']} give the same text.",
        "",
        "```bash",
        "python tests/zoo.py --json results/zoo.json --page docs/models.md",
        "```",
        "",
        f"`results/zoo.json`: `{held['command']}`; torch {held['versions']['torch']}, transformers "
        f"{held['versions']['transformers']}; commit {held['commit']}. The error of a "
        f"refused model names the reason and the remedy. It is raised when the model is loaded, from its class and "
        f"configuration or from a probe with a few tokens ([How it works](design.md#checks-when-a-model-is-loaded)).",
        "",
        "## The same text",
        "",
        ", ".join(f"{row['class']} ({_type(row)})" for row in rows if row["outcome"] == "same text") + ".",
        "",
        "## Refused",
        "",
        "| reason | classes |",
        "|---|---|",
        *(f"| {reason} | {', '.join(classes)} |" for reason, classes in refused.items()),
        "",
        "## Not built",
        "",
        "| class | type | reason |",
        "|---|---|---|",
        *(f"| {row['class']} | {_type(row)} | {row['why']} |" for row in rows if row["outcome"] == "not built"),
    ]
    return "\n".join(lines) + "\n"


def _type(row: Mapping[str, Any]) -> str:
    return str(row["type"]) + (", is_decoder=True" if row["is_decoder"] else "")


def _reason(row: Mapping[str, Any]) -> str:
    """Why a type is refused, without what was measured and what to do instead."""
    message = str(row["why"]).removeprefix(row["class"]).partition(";")[0].strip()
    return next((reason for begin, reason in _REASONS.items() if message.startswith(begin)), message)


def main(words: Sequence[str]) -> int:
    """Returns 1 where a class says another text or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write docs/models.md from it")
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    rows = survey()
    held = {
        "kind": "zoo",
        "command": shlex.join(["python", "tests/zoo.py", *words]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "types": rows,
    }
    given.json.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    if given.page is not None:
        given.page.write_text(page(held), encoding="utf-8")
    print(dict(counts(rows)))
    return int(any(row["outcome"] in ("other text", "error") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
