"""SafeAILab's EAGLE-1, -2 and -3 heads, and those in the same layout: AngelSlim's, and what vLLM and SGLang load.

Source: the official repository's `cnets.py`. EAGLE-1 and -2 share their weights; they differ in how trees grow. Where
no key names layers, EAGLE-3 reads the inputs of layers 2, L // 2 and L - 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haast.formats.base import Engine, Format, HeadFiles, Question, Reading, TargetFacts, Written
from haast.formats.detect import plain_names
from haast.formats.layout import eagle1_reading, eagle3_config, eagle3_reading, made, sizes
from haast.heads.config import HeadConfig, HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig


def named_layers(document: dict[str, Any]) -> list[int] | None:
    """The layers that a config.json names, as HF `hidden_states` indices by the meaning of the key; None for none.

    `target_layer_ids` and the ids inside `eagle_config` (SpecForge, ModelOpt) count outputs, one less; those inside
    `eagle_config` of heads that were made for vLLM do not, which only measuring tells.
    """
    nested = document.get("eagle_config") or {}
    for place, key, shift in (
        (document, "eagle_aux_hidden_state_layer_ids", 0),
        (document, "aux_hidden_state_layer_ids", 0),
        (nested, "eagle_aux_hidden_state_layer_ids", 1),
        (nested, "layer_ids", 0),
        (document, "target_layer_ids", 1),
    ):
        found = place.get(key)
        if isinstance(found, list) and found and all(isinstance(each, int) for each in found):
            return [each + shift for each in found]
    return None


def says(document: dict[str, Any], key: str, default: bool = False) -> bool:
    """A switch of a config.json, or of its `eagle_config`."""
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
            found: HeadSizes = made(files, FeatExtrapolatorConfig, **sizes(files, document, facts))
            return found
        conventions = {key: says(document, key) for key in ("norm_before_residual", "norm_output")}
        return eagle3_config(files, document, facts, named_layers(document), **conventions)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        if isinstance(config, Eagle3Config):
            return eagle3_reading(files, config, facts, float(files.document.get("logit_scale") or 1.0))
        assert isinstance(config, FeatExtrapolatorConfig), "there are two kinds"
        return eagle1_reading(files, config, facts)

    def write(self, reading: Reading, engine: Engine) -> Written:
        config = reading.config
        if isinstance(config, Eagle3Config):
            return _write_eagle3(reading, config, engine)
        if isinstance(config, FeatExtrapolatorConfig):
            return _write_eagle1(reading, config, engine)
        raise ValueError("Medusa heads are written in Medusa's layout")


def refuse_own(config: HeadConfig, engine: str, **supported: bool) -> None:
    """Refuse what only Haast, or only some engines, know. Raises ValueError."""
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
                f"{engine} does not know {key}={value!r}, which this head needs: its drafts would be others there; "
                f"export to another engine, or train a head without it"
            )


def layers_document(config: HeadConfig, engine: Engine) -> dict[str, Any]:
    """The keys of config.json that describe Llama's layers and the target's tokens."""
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


def _write_eagle1(reading: Reading, config: FeatExtrapolatorConfig, engine: Engine) -> Written:
    """For the official code, vLLM and SGLang, which differ in the class's name and in whether `fc` has a bias."""
    if engine.name == "llama.cpp":
        raise ValueError("llama.cpp reads EAGLE-3 heads alone: train one (haast train --head eagle3)")
    sglang = engine.name == "sglang"
    biased = engine.name != "vllm"
    refuse_own(config, engine.name, fc_bias=biased, qkv_bias=engine.name == "official", own_embedding=not sglang)
    if config.num_hidden_layers > 1 and engine.name == "official":
        raise ValueError(f"the official code knows one layer, the head has {config.num_hidden_layers}")
    tensors = dict(reading.weights)
    if sglang and not config.fc_bias:
        tensors["fc.bias"] = torch.zeros(config.hidden_size)  # its fc always has one
    notes = []
    if reading.draft_vocab is not None:
        notes.append(
            f"the draft vocabulary of {len(reading.draft_vocab)} tokens is lost: EAGLE-1 has no tensor for it, so "
            f"{engine.name} drafts over all {config.vocab_size}, which costs time and no accepted token"
        )
    document = {
        "architectures": ["LlamaForCausalLMEagle" if sglang else "LlamaForCausalLM"],
        **layers_document(config, engine),
        # SGLang takes it for biases of q, k, v and o, and leaves those as the memory was; its fc needs no key.
        "bias": config.fc_bias and not sglang,
        "qkv_bias": config.qkv_bias,
    }
    return Written(document, tensors, tuple(notes))


def _write_eagle3(reading: Reading, config: Eagle3Config, engine: Engine) -> Written:
    """One directory for the official code, vLLM, SGLang and llama.cpp where layer ids are everybody's default."""
    names = {
        "official": {},
        "vllm": {"fc_norm": True, "input_norm": True, "norm_before_residual": True, "norm_output": True},
        "sglang": {"fc_norm": True, "input_norm": True, "norm_output": True, "fc_bias": True},
        "llama.cpp": {"input_norm": True, "norm_before_residual": True},
    }
    narrow = config.read_size != config.hidden_size  # for others SGLang puts the target's table in its place
    refuse_own(config, engine.name, **names[engine.name], own_embedding=engine.name != "sglang" or narrow)
    if config.num_hidden_layers > 1 and engine.name != "vllm":
        raise ValueError(f"{engine.name} reads one layer of such a head, this one has {config.num_hidden_layers}")
    if len(config.layer_ids) != 3 and engine.name in ("official", "llama.cpp"):
        raise ValueError(f"{engine.name} reads three layers of the target, the head {list(config.layer_ids)}")
    ids, count = list(config.layer_ids), int(engine.config["num_hidden_layers"])
    usual = ids == [2, count // 2, count - 3]
    if not usual and engine.name == "official":
        raise ValueError(
            f"the official code reads layers {[2, count // 2, count - 3]} of this target, and nothing tells it to read "
            f"{ids}: export to vllm, sglang or llama.cpp"
        )
    document = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layers_document(config, engine),
        "draft_vocab_size": config.drafts,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
    }
    if config.fc_bias:
        document["bias"] = True  # without it SGLang drops the tensor, and says nothing
    if config.fc_norm:
        document["fc_norm"] = True
    if config.input_norm:
        document["norm_before_fc"] = True
    if config.read_size != config.hidden_size:
        document["target_hidden_size"] = config.read_size
    notes = []
    if usual:
        notes.append("layer ids are everybody's default: this folder serves vLLM, SGLang and llama.cpp alike")
    elif engine.name == "sglang":
        document["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [each - 1 for each in ids]}
        document["num_aux_hidden_states"] = len(ids)
        notes.append("SGLang counts layers one lower than vLLM: this folder is for SGLang alone")
    else:
        document["eagle_aux_hidden_state_layer_ids"] = ids
        document["num_aux_hidden_states"] = len(ids)
        notes.append(f"layers {ids} are not the default: this folder is not for SGLang (--to sglang writes one)")
    first = "midlayer." if engine.name in ("official", "sglang") else "layers.0."
    tensors = eagle3_tensors(reading, first)
    if config.fc_bias:
        # SGLang, the one that knows it, then wants a bias of o too, which its config.json can't say apart.
        tensors["midlayer.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
    return Written(document, tensors, tuple(notes))


def eagle3_tensors(reading: Reading, first: str = "layers.0.") -> dict[str, Tensor]:
    """An EAGLE-3 head's tensors by everybody's names, with both maps of its draft vocabulary.

    `first` is what the first layer is called; layers after it are counted from 1, as Haast's `more.*` are from 0.
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
