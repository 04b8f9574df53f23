"""SafeAILab's EAGLE-1, -2 and -3 heads, and others in the same layout: AngelSlim's, and what vLLM and SGLang load.

Source: the official repository's `cnets.py`. EAGLE-1 and -2 share their weights and differ in how they grow trees. If
no key lists the layers, EAGLE-3 reads the inputs of layers 2, L // 2 and L - 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haast.formats.base import Format, HeadFiles, Question, Reading, ServingEngine, TargetFacts, WrittenHead
from haast.formats.detect import plain_names
from haast.formats.layout import build_config, eagle1_reading, eagle3_config, eagle3_reading, sizes
from haast.heads.config import HeadConfig, HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig


def config_layers(document: dict[str, Any]) -> list[int] | None:
    """The layers that a config.json lists, as indices of transformers' `hidden_states`; None if it lists none.

    `target_layer_ids` and the ids in `eagle_config` (SpecForge, ModelOpt) index layer outputs, which is one less. Those
    in `eagle_config` of heads made for vLLM do not; only measuring can tell them apart.
    """
    nested = document.get("eagle_config") or {}
    for place, key, shift in (
        (document, "eagle_aux_hidden_state_layer_ids", 0),
        (document, "aux_hidden_state_layer_ids", 0),
        (nested, "eagle_aux_hidden_state_layer_ids", 1),
        (nested, "layer_ids", 0),
        (document, "target_layer_ids", 1),
    ):
        layers = place.get(key)
        if isinstance(layers, list) and layers and all(isinstance(layer, int) for layer in layers):
            return [layer + shift for layer in layers]
    return None


def config_flag(document: dict[str, Any], key: str, default: bool = False) -> bool:
    """A boolean of a config.json or its `eagle_config`, which takes precedence."""
    nested = document.get("eagle_config") or {}
    return bool(nested.get(key, document.get(key, default)))


class Official(Format):
    """See the module docstring."""

    name = "official"
    kinds = ("eagle", "eagle3")

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return kind in self.kinds

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        document = files.document
        if "layers.0.hidden_norm.weight" not in plain_names(files.tensors):
            config: HeadSizes = build_config(files, FeatExtrapolatorConfig, **sizes(files, document, facts))
            return config
        conventions = {key: config_flag(document, key) for key in ("norm_before_residual", "norm_output")}
        return eagle3_config(files, document, facts, config_layers(document), **conventions)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        if isinstance(config, Eagle3Config):
            return eagle3_reading(files, config, facts, float(files.document.get("logit_scale") or 1.0))
        assert isinstance(config, FeatExtrapolatorConfig), "read_config returns one of two"
        return eagle1_reading(files, config, facts)

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        config = reading.config
        if isinstance(config, Eagle3Config):
            return _write_eagle3(reading, config, engine)
        if isinstance(config, FeatExtrapolatorConfig):
            return _write_eagle1(reading, config, engine)
        raise ValueError("Medusa heads need Medusa's layout, not the official one")


def refuse_unsupported(config: HeadConfig, engine: str, **supported: bool) -> None:
    """Raise ValueError if the head uses a feature that the engine does not support."""
    for key, default in (
        ("markov_rank", 0),
        ("inputs", "feature+shifted-token"),
        ("embedding_scale", 1.0),
        ("norms", False),
        ("qk_norm", False),
        ("last_norm", True),
        ("embedding_everywhere", False),
        ("o_bias", False),
        ("fc_bias", False),
        ("qkv_bias", False),
        ("fc_norm", False),
        ("input_norm", False),
        ("norm_before_residual", False),
        ("norm_output", False),
        ("mask_token_id", -1),
        ("own_embedding", False),
    ):
        value = getattr(config, key, default)
        if value != default and not supported.get(key, False):
            raise ValueError(
                f"{engine} does not support {key}={value!r}, which this head needs, and would draft differently: "
                f"export to another engine, or train a head without it"
            )


def layers_document(config: HeadConfig, engine: ServingEngine) -> dict[str, Any]:
    """The keys of config.json that describe Llama layers and the target's tokens."""
    rope = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theirs = engine.config
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": config.qkv_bias,
        "initializer_range": 0.02,
        "use_cache": True,
        **{key: theirs.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _write_eagle1(reading: Reading, config: FeatExtrapolatorConfig, engine: ServingEngine) -> WrittenHead:
    """For the official code, vLLM and SGLang, which differ in the class name and in whether `fc` has a bias."""
    if engine.name == "llama.cpp":
        raise ValueError("llama.cpp can only read EAGLE-3 heads: train one (haast train --head eagle3)")
    if config.layer_ids:
        raise ValueError(
            f"{engine.name} cannot read a FeatExtrapolator that also reads layers {list(config.layer_ids[:-1])} of its "
            f"target: train one without context_layers, or an EAGLE-3 head (--head eagle3)"
        )
    sglang = engine.name == "sglang"
    biased = engine.name != "vllm"
    refuse_unsupported(
        config, engine.name, fc_bias=biased, qkv_bias=engine.name == "official", own_embedding=not sglang
    )
    if config.num_hidden_layers > 1 and engine.name == "official":
        raise ValueError(
            f"the official code supports one layer, the head has {config.num_hidden_layers}: export to vllm or sglang"
        )
    tensors = dict(reading.weights)
    if sglang and not config.fc_bias:
        tensors["fc.bias"] = torch.zeros(config.hidden_size)  # its fc always has one
    notes = []
    if reading.draft_vocab is not None:
        notes.append(
            f"the draft vocabulary of {len(reading.draft_vocab)} tokens is lost: the EAGLE-1 layout has no tensor for "
            f"it, so {engine.name} drafts over all {config.vocab_size} tokens, which costs time but no accepted length"
        )
    document = {
        "architectures": ["LlamaForCausalLMEagle" if sglang else "LlamaForCausalLM"],
        **layers_document(config, engine),
        # SGLang reads this key as biases of q, k, v and o, which stay uninitialised; its fc needs no key.
        "bias": config.fc_bias and not sglang,
        "qkv_bias": config.qkv_bias,
    }
    return WrittenHead(document, tensors, tuple(notes))


def _write_eagle3(reading: Reading, config: Eagle3Config, engine: ServingEngine) -> WrittenHead:
    """For the official code, vLLM, SGLang and llama.cpp, which can share a folder if layer ids are the default."""
    ids, default = list(config.layer_ids), _default_ids(engine)
    _check_eagle3(config, engine)
    document = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layers_document(config, engine),
        "draft_vocab_size": config.drafts,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
    }
    if config.fc_bias:
        document["bias"] = True  # without it SGLang silently drops the tensor
    if config.fc_norm:
        document["fc_norm"] = True
    if config.input_norm:
        document["norm_before_fc"] = True
    if config.read_size != config.hidden_size:
        document["target_hidden_size"] = config.read_size
    notes = []
    if ids == default:
        notes.append("layer ids are the default: this folder works for vLLM, SGLang and llama.cpp")
    elif engine.name == "sglang":
        document["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in ids]}
        document["num_aux_hidden_states"] = len(ids)
        notes.append("SGLang's layer ids are one lower than vLLM's: this folder works only for SGLang")
    else:
        document["eagle_aux_hidden_state_layer_ids"] = ids
        document["num_aux_hidden_states"] = len(ids)
        notes.append(f"layers {ids} are not the default: for SGLang, export with --to sglang instead")
    first = "midlayer." if engine.name in ("official", "sglang") else "layers.0."
    tensors = eagle3_tensors(reading, first)
    if config.fc_bias:
        # Only SGLang supports an fc bias. The same config.json key makes it expect a bias of o_proj too.
        tensors["midlayer.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
    return WrittenHead(document, tensors, tuple(notes))


def _check_eagle3(config: Eagle3Config, engine: ServingEngine) -> None:
    """Raise ValueError for a head that the engine can't run, with the engines that can."""
    supported = {
        "official": {},
        "vllm": {"fc_norm": True, "input_norm": True, "norm_before_residual": True, "norm_output": True},
        "sglang": {"fc_norm": True, "input_norm": True, "norm_output": True, "fc_bias": True},
        "llama.cpp": {"input_norm": True, "norm_before_residual": True},
    }
    # SGLang replaces a head's own embedding by the target's if their widths are equal.
    narrow = config.read_size != config.hidden_size
    own_embedding = engine.name != "sglang" or narrow
    refuse_unsupported(config, engine.name, **supported[engine.name], own_embedding=own_embedding)
    if config.num_hidden_layers > 1 and engine.name != "vllm":
        raise ValueError(
            f"{engine.name} supports one layer in an EAGLE-3 head, this head has {config.num_hidden_layers}: export to "
            f"vllm or speculators"
        )
    if len(config.layer_ids) != 3 and engine.name in ("official", "llama.cpp"):
        raise ValueError(
            f"{engine.name} reads three layers of the target, the head reads {list(config.layer_ids)}: export to "
            f"another engine"
        )
    ids, default = list(config.layer_ids), _default_ids(engine)
    if ids != default and engine.name == "official":
        raise ValueError(
            f"the official code always reads layers {default} of this target, the head needs {ids}: "
            f"export to vllm, sglang or llama.cpp"
        )


def _default_ids(engine: ServingEngine) -> list[int]:
    """The layers that engines take for an EAGLE-3 head of this target if its files name none; not clamped as ours."""
    count = int(engine.config["num_hidden_layers"])
    return [2, count // 2, count - 3]


def eagle3_tensors(reading: Reading, first: str = "layers.0.") -> dict[str, Tensor]:
    """An EAGLE-3 head's tensors under the names that all engines use, with `d2t` and `t2d` of its draft vocabulary.

    `first` is the prefix of the first layer. Later layers are numbered from 1 (Haast's `more.*` from 0).
    """
    tensors = {}
    for name, tensor in reading.weights.items():
        if name.startswith("more."):
            _, number, rest = name.split(".", 2)
            name = f"layers.{int(number) + 1}.{rest}"
        tensors[first + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name] = tensor
    if reading.draft_vocab is not None:
        ids = reading.draft_vocab.long()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(reading.config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return tensors
