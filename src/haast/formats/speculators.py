"""Red Hat's speculators format: EAGLE-3 and P-EAGLE heads with Llama or Qwen3 layers; EAGLE heads of its first version.

`transformer_layer_config` holds only what differs from the defaults of its class. Layer ids index transformers'
`hidden_states`. Readers disagree about a missing `norm_before_residual`: speculators' own class adds the plain state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from haast.formats.base import Format, HeadFiles, Question, Reading, ServingEngine, TargetFacts, WrittenHead
from haast.formats.keys import SIZE_ERRORS
from haast.formats.layout import MASKS, Names, build_config, eagle1_reading, eagle3_config, eagle3_reading, sizes
from haast.formats.official import config_layers, eagle3_tensors, layers_document, refuse_unsupported
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig

_CLASSES: dict[str, Any] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
_FIRST_VERSION = {  # tensor name prefixes of format version 1
    "fusion_fc.": "fc.",
    "transformer.": "layers.0.",
    "embedding_layernorm.": "embedding_norm.",
    "pre_lm_head_layernorm.": "norm.",
}
_SUPPORTED = (  # settings of Haast's heads that this layout can express
    *("norm_before_residual", "norm_output", "fc_norm", "input_norm"),
    *("qk_norm", "qkv_bias", "o_bias", "own_embedding"),
)
_ACCEPTANCE = {"verifier_accept_k": 1, "accept_tolerance": 0.0}  # for its greedy proposals
VERSION = "0.9.0"


class Speculators(Format):
    """See the module docstring."""

    name = "speculators"
    kinds = ("eagle", "eagle3", "p-eagle")

    def detect(self, kind: str, files: HeadFiles) -> bool:
        named = "speculators_model_type" in files.document or "fusion_fc.weight" in files.tensors
        return kind in self.kinds and (kind == "p-eagle" or named)

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        document = completed_document(files)
        if "sliding_attention" in (document.get("layer_types") or ()):
            raise files.error("layer_types has sliding_attention", "use a head with full attention")
        if "fusion_fc.weight" in files.tensors:
            files = _renamed_first_version(files)
            norms = "embedding_norm.weight" in files.tensors
            layers = sizes(files, document, facts)
            config: HeadSizes = build_config(files, FeatExtrapolatorConfig, **layers, norms=norms)
            return config
        conventions: dict[str, Any] = {
            key: bool(document.get(key, False)) for key in ("norm_before_residual", "norm_output")
        }
        if "mask_hidden" in files.tensors:
            masks = [document[key] for key in MASKS if isinstance(document.get(key), int)]
            if not masks:
                raise files.error(
                    f"config.json of this P-EAGLE head has no mask token ({', '.join(MASKS)})", "add one of these keys"
                )
            conventions["mask_token_id"] = masks[0]
        return eagle3_config(files, document, facts, config_layers(document), **conventions)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        if isinstance(config, Eagle3Config):
            return eagle3_reading(files, config, facts)
        assert isinstance(config, FeatExtrapolatorConfig), "read_config returns one of two"
        files = _renamed_first_version(files)
        return eagle1_reading(files, config, facts, Names.of(files))

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        config = reading.config
        if not isinstance(config, Eagle3Config):
            raise ValueError(
                "speculators 0.9 can't read EAGLE-1 or Medusa heads: export to official, vllm or sglang, or train an "
                "EAGLE-3 head (haast train --head eagle3)"
            )
        refuse_unsupported(config, "speculators", **dict.fromkeys(_SUPPORTED, True))
        layers = layers_document(config, engine)
        layers["model_type"] = "qwen3" if config.qk_norm else "llama"
        layers["attention_bias"] = config.qkv_bias or config.o_bias  # one key for q, k, v and o
        kept = set(layers) - {"tie_word_embeddings", "use_cache", "initializer_range"}
        document = {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": VERSION,
            "transformer_layer_config": {key: layers[key] for key in sorted(kept) if layers[key] is not None},
            "draft_vocab_size": config.drafts,
            "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": config.input_norm,
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
            "target_hidden_size": None if config.read_size == config.hidden_size else config.read_size,
            "eagle_aux_hidden_state_layer_ids": list(config.layer_ids),
            "embed_requires_grad": config.own_embedding,
            "tie_word_embeddings": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        "speculative_tokens": 3,
                        "verifier_accept_k": 1,
                        "accept_tolerance": 0.0,
                    }
                ],
                "verifier": {"name_or_path": engine.target, "architectures": engine.config.get("architectures") or []},
            },
        }
        notes = []
        if config.read_size != config.hidden_size:
            notes.append("speculators' own class needs a head as wide as the target: this folder works only for vLLM")
        return WrittenHead(document, {**_zero_biases(config), **eagle3_tensors(reading)}, tuple(notes))


def completed_document(files: HeadFiles) -> dict[str, Any]:
    """config.json merged with the layer configuration, which is completed with the defaults of its class."""
    document = files.document
    layers = document.get("transformer_layer_config")
    if not isinstance(layers, dict):
        return document
    kind = str(layers.get("model_type") or "qwen3")
    if kind not in _CLASSES:
        raise files.error(f"transformer_layer_config is of type {kind!r}", "use a head with llama or qwen3 layers")
    try:
        kept = {key: value for key, value in layers.items() if key not in ("torch_dtype", "dtype")}
        complete = _CLASSES[kind](**kept).to_dict()
    except SIZE_ERRORS as error:
        raise files.error(f"transformer_layer_config is invalid for {kind} ({error})", "correct it") from error
    return {**complete, **{key: value for key, value in document.items() if value is not None}}


def _zero_biases(config: Eagle3Config) -> dict[str, Tensor]:
    """Zero biases for q, k, v and o if the head has some of them: the layout has one key for all four."""
    if config.qkv_bias == config.o_bias:
        return {}
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    rows = {**{name: count * config.head_dim for name, count in heads.items()}, "o": config.hidden_size}
    return {
        f"layers.{layer}.self_attn.{name}_proj.bias": torch.zeros(count)
        for layer in range(config.num_hidden_layers)
        for name, count in rows.items()
    }


def _renamed_first_version(files: HeadFiles) -> HeadFiles:
    """Files of format version 1 with the tensor names of the official layout."""
    tensors = {}
    for name, tensor in files.tensors.items():
        for theirs, ours in _FIRST_VERSION.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        tensors[name] = tensor
    return HeadFiles(files.folder, files.document, tensors, files.source, files.notes)
