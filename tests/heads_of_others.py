"""Tiny heads in the layouts of their trainers, written tensor by tensor and key by key as those trainers do.

Nothing here uses `haast.formats`: what Haast reads is compared with what was written down on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from haast.heads.block import BlockConfig
from haast.heads.checkpoint import Head, build_module
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig
from haast.target.target import Target

IDS = (2, 4, 5)  # what everybody's default is for 8 layers
DRAFTED = (1, 2, 3, 5, 8, 9, 13, 17, 19, 20, 23, 25, 28, 31)  # target ids, ascending


def random_weights(module: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Weights that make a head say this and that, in fp32 exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = drawn + 1 if "norm" in name else drawn
    return module.eval().requires_grad_(False)


def eagle1(target: Target, **more: Any) -> Head:
    """An EAGLE-1 head with the official biases and table, unless `more` says otherwise."""
    config = FeatExtrapolatorConfig.for_target(target.config, **more)
    return Head(random_weights(build_module(config, None)), None, {})  # type: ignore[arg-type]


def eagle3(target: Target, drafted: tuple[int, ...] | None = DRAFTED, ids: tuple[int, ...] = IDS, **more: Any) -> Head:
    """An EAGLE-3 head."""
    size = 0 if drafted is None else len(drafted)
    config = Eagle3Config.for_target(target.config, layer_ids=ids, draft_vocab_size=size, **more)
    module = random_weights(build_module(config, None))
    return Head(module, None if drafted is None else torch.tensor(drafted), {})  # type: ignore[arg-type]


def medusa(target: Target, heads: int = 3, blocks: int = 1) -> Head:
    """Medusa heads."""
    config = MedusaConfig.for_target(target.config, heads, blocks)
    return Head(random_weights(build_module(config, None)), None, {})  # type: ignore[arg-type]


def layer_names(config: Any, first: str) -> dict[str, str]:
    """Haast's prefixes of an EAGLE-3 head's layers, and the trainer's."""
    return {"midlayer.": first, **{f"more.{i}.": f"layers.{i + 1}." for i in range(config.num_hidden_layers - 1)}}


def renamed(head: Head, names: dict[str, str]) -> dict[str, Tensor]:
    """The head's tensors with other prefixes."""
    found = {}
    for name, tensor in head.module.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        found[name] = tensor.clone().contiguous()
    return found


def offsets(head: Head, vocab: int, both: bool = True) -> dict[str, Tensor]:
    """`d2t`, as everybody's safetensors hold it, and `t2d`."""
    if head.draft_vocab is None:
        return {}
    d2t = head.draft_vocab - torch.arange(len(head.draft_vocab))
    t2d = torch.zeros(vocab, dtype=torch.bool).index_fill(0, head.draft_vocab, True)
    return {"d2t": d2t, "t2d": t2d} if both else {"d2t": d2t}


def llama_keys(config: Any, **more: Any) -> dict[str, Any]:
    """What a Llama config.json holds."""
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": 2048,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        **more,
    }


def put(folder: Path, document: dict[str, Any], tensors: dict[str, Tensor], file: str = "model.safetensors") -> Path:
    """Write the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder


def official_eagle1(folder: Path, head: Head, target: Target, **more: Any) -> Path:
    """yuhuili/EAGLE-*: pytorch_model.bin with the target's embedding."""
    tensors = dict(head.module.state_dict())
    tensors.setdefault("embed_tokens.weight", target.embedding.weight.detach().float())  # type: ignore[operator]
    config: Any = head.module.config
    keys = llama_keys(config, architectures=["LlamaForCausalLM"], **more)
    return put(folder, keys, tensors, "pytorch_model.bin")


def official_eagle3(folder: Path, head: Head, target: Target, **more: Any) -> Path:
    """yuhuili/EAGLE3-*: midlayer.*, no embedding, a number of layers that is wrong."""
    config: Any = head.module.config
    tensors = {**renamed(head, layer_names(config, "midlayer.")), **offsets(head, config.vocab_size)}
    keys = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config.drafts, "num_hidden_layers": 40}
    return put(folder, llama_keys(config, **{**keys, **more}), tensors, "pytorch_model.bin")


def angelslim(folder: Path, head: Head, target: Target) -> Path:
    """AngelSlim: says that embeddings are tied although the LM head is its own, and no head_dim."""
    keys = {"architectures": ["Eagle3LlamaForCausalLM"], "target_model_type": "qwen3", "tie_word_embeddings": True}
    return official_eagle3(folder, head, target, **keys)


def specforge(folder: Path, head: Head, target: Target) -> Path:
    """SpecForge: both maps, layer ids as outputs, `norm_output` true, rotary parameters twice."""
    config: Any = head.module.config
    keys = {
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [each - 1 for each in config.layer_ids]},
        "norm_output": config.last_norm,
        "fc_norm": config.fc_norm,
        "rope_parameters": {"rope_theta": config.rope_parameters["rope_theta"], "rope_type": "default"},
    }
    official_eagle3(folder, head, target, **keys)
    if not config.last_norm:  # it is there all the same
        tensors = torch.load(folder / "pytorch_model.bin")
        torch.save({**tensors, "norm.weight": torch.full((config.hidden_size,), 1.5)}, folder / "pytorch_model.bin")
    return folder


def modelopt(folder: Path, head: Head, target: Target) -> Path:
    """ModelOpt: layers.0.*, d2t without t2d, `eagle_config` full of switches."""
    config: Any = head.module.config
    tensors = {**renamed(head, layer_names(config, "layers.0.")), **offsets(head, config.vocab_size, both=False)}
    nested = {
        "eagle_aux_hidden_state_layer_ids": [each - 1 for each in config.layer_ids],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }
    keys = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config.drafts, "eagle_config": nested}
    more = {"attention_bias": False, "mlp_bias": False, "head_dim": config.head_dim}
    return put(folder, llama_keys(config, **keys, **more), tensors)


def speculators(folder: Path, head: Head, target: Target, **more: Any) -> Path:
    """speculators: the layers' configuration without its defaults, an embedding, ids as HF indices."""
    config: Any = head.module.config
    qwen = config.qk_norm
    layers = {
        "model_type": "qwen3" if qwen else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": 2048,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_parameters["rope_theta"], "rope_type": "default"},
        "vocab_size": config.vocab_size,
    }
    document = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "transformer_layer_config": layers,
        "draft_vocab_size": config.drafts,
        **_eagle3_keys(config),
        "target_hidden_size": None,
        "embed_requires_grad": False,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "someone/tiny"}},
        **more,
    }
    names = layer_names(config, "layers.0.") if isinstance(config, Eagle3Config) else {}
    tensors = {**renamed(head, names), **offsets(head, config.vocab_size)}
    tensors.setdefault("embed_tokens.weight", target.embedding.weight.detach().float())  # type: ignore[operator]
    return put(folder, document, tensors)


def _eagle3_keys(config: Any) -> dict[str, Any]:
    if not isinstance(config, Eagle3Config):
        return {}
    return {
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.input_norm,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "eagle_aux_hidden_state_layer_ids": list(config.layer_ids),
    }


def p_eagle(folder: Path, head: Head, target: Target) -> Path:
    """speculators' P-EAGLE, which amazon's heads say with another key."""
    more = {"speculators_model_type": "peagle", "architectures": ["PEagleDraftModel"]}
    return speculators(folder, head, target, **more, mask_token_id=head.module.config.mask_token_id)  # type: ignore[union-attr]


def amazon_p_eagle(folder: Path, head: Head, target: Target) -> Path:
    """amazon/*-P-EAGLE: an EAGLE-3 config.json with `ptd_token_id`."""
    config: Any = head.module.config
    keys = {"ptd_token_id": config.mask_token_id, "eagle_aux_hidden_state_layer_ids": list(config.layer_ids)}
    return official_eagle3(folder, head, target, **keys)


def speculators_first(folder: Path, head: Head, target: Target) -> Path:
    """speculators' first version: EAGLE heads under names of its own, with norms where it is HASS's kind."""
    names = {"fc.": "fusion_fc.", "layers.0.": "transformer.", "embedding_norm.": "embedding_layernorm."}
    tensors = renamed(head, {**names, "norm.": "pre_lm_head_layernorm."})
    config: Any = head.module.config
    document = {
        "speculators_model_type": "eagle",
        "speculators_version": "0.1.0",
        "architectures": ["EagleSpeculator"],
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "layernorms": config.norms,
        "fusion_bias": config.fc_bias,
        "transformer_layer_config": llama_keys(config, head_dim=config.head_dim),
    }
    return put(folder, document, tensors)


def deepspec(folder: Path, head: Head, target: Target) -> Path:
    """DeepSpec: Qwen3 layers, five layers as outputs, the embedding in every layer, nothing reduced."""
    config: Any = head.module.config
    tensors = renamed(head, layer_names(config, "layers.0."))
    tensors["embed_tokens.weight"] = target.embedding.weight.detach().float()  # type: ignore[operator]
    keys = {
        "model_type": "qwen3",
        "architectures": ["Qwen3Eagle3Model"],
        "target_layer_ids": [each - 1 for each in config.layer_ids],
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "ttt_length": 7,
        "step_loss_decay": 0.8,
        "norm_before_residual": config.norm_before_residual,
    }
    return put(folder, llama_keys(config, **keys), tensors)


def block(target: Target, drafted: tuple[int, ...] | None = DRAFTED, ids: tuple[int, ...] = IDS, **more: Any) -> Head:
    """A block head."""
    size = 0 if drafted is None else len(drafted)
    config = BlockConfig.for_target(target.config, layer_ids=ids, draft_vocab_size=size, **more)
    module = random_weights(build_module(config, None))
    return Head(module, None if drafted is None else torch.tensor(drafted), {})  # type: ignore[arg-type]


def block_keys(config: Any, **more: Any) -> dict[str, Any]:
    """What a Qwen3 config.json of a block head holds."""
    keys = {
        "model_type": "qwen3",
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "block_size": config.block_size,
    }
    return llama_keys(config, **keys, **more)


def dflash(folder: Path, head: Head, target: Target, **more: Any) -> Path:
    """z-lab/*-DFlash: no embedding, no LM head; layers as outputs, and the mask token, in `dflash_config`."""
    config: Any = head.module.config
    nested = {"mask_token_id": config.mask_token_id, "target_layer_ids": [each - 1 for each in config.layer_ids]}
    keys = {"architectures": ["DFlashDraftModel"], "num_target_layers": 8, "dflash_config": nested | more}
    return put(folder, block_keys(config, **keys), renamed(head, {}))


def deepspec_dspark(folder: Path, head: Head, target: Target, **more: Any) -> Path:
    """deepseek-ai/dspark_*: all keys at the top, the target's embedding and LM head in the file, nothing reduced."""
    config: Any = head.module.config
    keys = {
        "architectures": ["Qwen3DSparkModel"],
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": [each - 1 for each in config.layer_ids],
        "num_anchors": 512,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_kind,
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": config.confidence_markov,
    }
    tensors = renamed(head, {})
    tensors["embed_tokens.weight"] = target.embedding.weight.detach().float()  # type: ignore[operator]
    return put(folder, block_keys(config, **keys, **more), tensors)


def modelopt_dspark(folder: Path, head: Head, target: Target) -> Path:
    """ModelOpt: a DFlash config.json, and the Markov and confidence heads without their modules' names."""
    config: Any = head.module.config
    names = {"markov_head.": "", "confidence_head.proj.": "confidence_proj."}
    more = {"projector_type": "dspark", "sample_from_anchor": config.sample_from_anchor}
    dflash(folder, head, target, **more)
    return put(folder, json.loads((folder / "config.json").read_text()), renamed(head, names))


def speculators_dspark(folder: Path, head: Head, target: Target, kind: str = "dspark") -> Path:
    """RedHatAI/*-speculator.dspark and .dflash: reduced vocabularies, layers as HF indices."""
    config: Any = head.module.config
    keys = {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": kind,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "aux_hidden_state_layer_ids": list(config.layer_ids),
        "sample_from_anchor": config.sample_from_anchor,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_kind,
    }
    return speculators(folder, head, target, **keys)


def official_medusa(folder: Path, head: Head, target: Target) -> Path:
    """FasterDecoding/medusa-*: a flat pickle, and a number of heads that is wrong."""
    document = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "someone/tiny"}
    return put(folder, document, dict(head.module.state_dict()), "medusa_lm_head.pt")


def gguf_eagle3(folder: Path, head: Head, target: Target) -> Path:
    """llama.cpp's converter: query and key rows paired, `d2t` as ids, layers as HF indices."""
    import gguf

    config: Any = head.module.config
    names = {
        "fc.weight": "fc.weight",
        "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
        "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
        "midlayer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "midlayer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "midlayer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "midlayer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "midlayer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "midlayer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "input_norm.weight": "enc.output_norm.weight",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "head.gguf"
    writer = gguf.GGUFWriter(path, "eagle3")
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_array("eagle3.target_layers", list(config.layer_ids))
    writer.add_uint32("eagle3.target_hidden_size", config.hidden_size)
    writer.add_bool("eagle3.norm_before_residual", config.norm_before_residual)
    for name, tensor in head.module.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = [
                torch.stack(block.chunk(2), dim=1).flatten(0, 1) for block in tensor.split(config.head_dim)
            ]  # half and half become pairs
            tensor = torch.cat(rows)
        writer.add_tensor(names[name], tensor.float().contiguous().numpy())
    if head.draft_vocab is not None:
        writer.add_tensor("d2t", head.draft_vocab.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Writer = Callable[[Path, Head, Target], Path]
