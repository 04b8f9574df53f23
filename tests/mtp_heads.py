"""Targets with an MTP head in their checkpoint, written as each producer does, and the plainest forward of such a head.

Nothing here uses `haast.heads` or `haast.formats`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCAB = 32
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_DIM: dict[str, Any] = {"head_dim": 8}
_HYBRID: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen": Qwen3Config(**_SIZES, **_DIM),
    "Qwen3-Next": Qwen3NextConfig(**{**_SIZES, "num_hidden_layers": 4}, **_DIM, **_HYBRID),
    "DeepSeek": DeepseekV3Config(**{**_SIZES, "num_key_value_heads": 4}, **_EXPERTS, **_LATENT),
    "GLM": Glm4MoeConfig(**_SIZES, **_EXPERTS, **_DIM),
    "MiMo": Qwen2Config(**_SIZES),
}
# The names of each part in a checkpoint, with the number of the head's layer alone or after the target's.
_NAMES = {
    "Qwen": {
        "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "project": "mtp.fc",
        "norm": "mtp.norm", "layer": "mtp.layers.{head}",
    },
    "DeepSeek": {
        "enorm": "model.layers.{all}.enorm", "hnorm": "model.layers.{all}.hnorm",
        "project": "model.layers.{all}.eh_proj", "norm": "model.layers.{all}.shared_head.norm",
        "layer": "model.layers.{all}",
    },
    "MiMo": {
        "enorm": "model.mtp_layers.{head}.token_layernorm", "hnorm": "model.mtp_layers.{head}.hidden_layernorm",
        "project": "model.mtp_layers.{head}.input_proj", "norm": "model.mtp_layers.{head}.final_layernorm",
        "layer": "model.mtp_layers.{head}",
    },
}  # fmt: skip


def tiny_model(producer: str, seed: int = 0) -> PreTrainedModel:
    """A random target of the producer's class, in fp64."""
    torch.manual_seed(seed)
    config: Any = copy.deepcopy(CONFIGS[producer])
    config._experts_implementation = "eager"  # grouped products know no fp64
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    built: PreTrainedModel = model.double().eval()
    return built


class PlainMtp(nn.Module):
    """`depths` MTP modules of a model, with random weights, and their forward over a whole text without a cache.

    Module k (from 1) reads h^{k-1}_i and the embedding of x_{i+k}, and gives h^k_i, which predicts x_{i+k+1}; h^0 are
    the target's features (DeepSeek-V3, section 2.2). Past the last module the first one's output stands for a feature.
    """

    def __init__(
        self, model: PreTrainedModel, producer: str, depths: int = 1, norm_output: bool = True, seed: int = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        config = copy.deepcopy(model.config)
        config._attn_implementation = "sdpa"
        hidden, last = config.hidden_size, config.num_hidden_layers - 1
        norm = type(decoder.norm)
        self.layers = nn.ModuleList([type(decoder.layers[-1])(config, last) for _ in range(depths)])
        self.enorms, self.hnorms, self.norms = (
            nn.ModuleList([norm(hidden, eps=config.rms_norm_eps) for _ in range(depths)]) for _ in range(3)
        )
        self.projects = nn.ModuleList([nn.Linear(2 * hidden, hidden, bias=False) for _ in range(depths)])
        for name, part in [*self.named_parameters(), *self.named_buffers()]:
            part.data = torch.randn_like(part) * 0.3 + (1 if "norm" in name else 0)
        self.double().eval()
        self.decoder, self.producer, self.depths = [decoder], producer, depths
        self.lm_head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.norm_output = norm_output

    def states(self, depth: int, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Module `depth` (from 0) over states (n, hidden) and the tokens that they are paired with."""
        decoder = self.decoder[0]
        embedded = self.enorms[depth](decoder.embed_tokens(torch.tensor([list(tokens)])))
        parts = [embedded, self.hnorms[depth](states.unsqueeze(0))]
        mixed = self.projects[depth](torch.cat(parts[::-1] if self.producer == "MiMo" else parts, -1))
        count = len(tokens)
        mask = torch.full((count, count), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
        places = torch.arange(count)[None] + depth  # rotary angles are fp32: from elsewhere they give other last bits
        rotary = decoder.rotary_emb(mixed, position_ids=places)
        output = self.layers[depth](mixed, attention_mask=mask, position_ids=places, position_embeddings=rotary)[0]
        return self.norms[depth](output) if self.norm_output else output  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, features: Tensor, tokens: Sequence[int], path: Sequence[int]) -> Tensor:
        """After the text `tokens`, whose features are given except for the last one's, and the drafts `path`."""
        text = [*tokens, *path]
        for _ in range(len(path) - self.depths + 1):  # the module recurses: its states stand for features
            found = self.states(0, features, text[1 : len(features) + 1])
            features = torch.cat([features, found[-1:]])
        module = min(len(path), self.depths - 1)
        states = features
        for depth in range(module + 1):
            states = self.states(depth, states, text[depth + 1 : depth + 1 + len(features)])
        normed = states[-1] if self.norm_output else self.norms[module](states[-1])
        return self.lm_head(normed)  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """As the producer names them."""
        config = self.decoder[0].config
        names = _NAMES[{"GLM": "DeepSeek", "Qwen3-Next": "Qwen"}.get(self.producer, self.producer)]
        found: dict[str, Tensor] = {}
        for head in range(self.depths):
            place = {"head": head, "all": config.num_hidden_layers + head}
            owners = {"enorm": self.enorms, "hnorm": self.hnorms, "project": self.projects, "norm": self.norms}
            for part, owner in owners.items():
                found[f"{names[part].format(**place)}.weight"] = owner[head].state_dict()["weight"]
            for name, tensor in _unmerged(self.layers[head].state_dict()).items():
                found[f"{names['layer'].format(**place)}.{name}"] = tensor
            if self.producer in ("DeepSeek", "GLM"):  # copies of the target's
                layer = names["layer"].format(**place)
                found[f"{layer}.embed_tokens.weight"] = self.decoder[0].embed_tokens.weight
                found[f"{layer}.shared_head.head.weight"] = self.lm_head.weight
        return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _unmerged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor for each expert, as checkpoints have them."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    found[name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert, each in enumerate(tensor):
                found[name.replace("down_proj", f"{expert}.down_proj.weight")] = each
        else:
            found[name] = tensor
    return found


def write_checkpoint(folder: Path, model: PreTrainedModel, head: PlainMtp, own_file: bool = False) -> Path:
    """A checkpoint of the model with the head; `own_file` puts it in a file that no index lists."""
    model.save_pretrained(folder)
    if own_file:
        save_file(head.tensors(), folder / "mtp.safetensors")
    else:
        whole = load_file(folder / "model.safetensors")
        save_file({**whole, **head.tensors()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
