"""Model families: a tree through Target equals the stock model path by path; what can't take a tree is refused.

Stock RMSNorm, rotary and softmax compute in fp32 whatever the model's dtype, so fp64 models agree to about 1e-6.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import zoo
from fakes import commit, decode, random_head
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Stats
from haast.errors import UnsupportedModelError
from haast.target.target import Target
from haast.tree import DraftTree

VOCAB = 48


@dataclass(frozen=True)
class Family:
    """One tiny random model: its type and what its config needs beside the common sizes."""

    kind: str
    extra: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        if self.kind == "gpt2":  # no fp32 inside
            return 1e-11
        return 1e-5 if self.dtype is torch.float64 else 2e-4


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
FULL_AND_SLIDING = ["sliding_attention", "full_attention"]
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
          "num_key_value_heads": 4}  # fmt: skip
FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen2-sliding": Family("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": Family("qwen3", {"head_dim": 8}),
    "mistral": Family("mistral", {"sliding_window": None}),
    "mistral-sliding": Family("mistral", {"sliding_window": 6}),
    "gemma2": Family("gemma2", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
                                "layer_types": FULL_AND_SLIDING}),
    "gemma3": Family("gemma3_text", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                     "layer_types": FULL_AND_SLIDING}),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2", GPT2),
    "gpt_neox": Family("gpt_neox"),
    "olmo2": Family("olmo2"),
    "mixtral": Family("mixtral", EXPERTS),
    "mixtral-fp32": Family("mixtral", EXPERTS, torch.float32),
    "llama-fp32": Family("llama", {}, torch.float32),
    "qwen2_moe": Family("qwen2_moe", QWEN_EXPERTS),
    "qwen3_moe": Family("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                      "head_dim": 8}),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": Family("gpt_oss", {**EXPERTS, "head_dim": 8, "sliding_window": 6, "layer_types": FULL_AND_SLIDING,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "deepseek_v2": Family("deepseek_v2", {**ROUTED, **LATENT}),
    "deepseek_v3": Family("deepseek_v3", {**ROUTED, **LATENT}),
    "granitemoe": Family("granitemoe", EXPERTS),
    "glm4_moe": Family("glm4_moe", {**ROUTED, "head_dim": 8}),
    "granite": Family("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5,
                                  "attention_multiplier": 0.2}),
    "cohere": Family("cohere"),
}  # fmt: skip
names = pytest.mark.parametrize("name", sorted(FAMILIES))


def stock(name: str) -> PreTrainedModel:
    """A fresh instance with its own eager attention: the same weights each time."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **{**COMMON, **family.extra})
    build: Any = AutoModelForCausalLM
    if family.dtype is torch.float64:
        config._experts_implementation = "eager"  # grouped products know no fp64
    model: PreTrainedModel = build.from_config(config, attn_implementation="eager").to(family.dtype).eval()
    return model


def answers(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """The stock model's logits (nodes, vocab) and LM head's input (nodes, hidden) for a plain text, uncached."""
    seen: list[Tensor] = []
    lm_head = cast(Any, model).get_output_embeddings()
    hook = lm_head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    hook.remove()
    return logits, seen[0][0]


def close(mine: Tensor, theirs: Tensor, name: str) -> bool:
    return bool((mine - theirs).abs().max() <= FAMILIES[name].tolerance)


@names
def test_a_chain_answers_as_the_stock_model(name: str) -> None:
    text = random.Random(1).choices(range(VOCAB), k=20)
    target, reference = Target(stock(name)), stock(name)
    logits, features = answers(reference, text)
    assert float(logits.std()) > 1e-3, "a model that says the same everywhere would show nothing"
    output = target.forward(DraftTree.chain(torch.tensor([text])), target.new_cache(), hidden_layers=(0, 1))
    assert close(output.logits[0], logits, name)
    assert close(output.features[0], features, name)
    assert sorted(output.hidden) == [0, 1] and output.hidden[1].shape == output.features.shape
    last = target.forward(DraftTree.chain(torch.tensor([text])), target.new_cache(), last_only=True)
    assert last.logits.shape == (1, 1, VOCAB) and close(last.logits[0, 0], logits[-1], name)
    assert close(last.features[0], features, name)


@names
def test_a_random_tree_answers_path_by_path(name: str) -> None:
    rng = random.Random(2)
    past = rng.choices(range(VOCAB), k=9)
    nodes = 18  # two chains side by side, deeper than the windows, then random twigs
    parents = [-1, *(max(0, number - 2) if number < 14 else rng.randrange(number) for number in range(1, nodes))]
    tokens = rng.choices(range(VOCAB), k=nodes)
    target, reference = Target(stock(name)), stock(name)
    cache = target.new_cache(2)
    live = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])  # a ragged second row: its past is shorter
    target.forward(DraftTree.chain(torch.tensor([past, past]), live), cache)
    commit(cache, [range(9), range(5)])
    output = target.forward(DraftTree.from_parents(torch.tensor([tokens] * 2), torch.tensor([parents] * 2)), cache)
    for row, length in enumerate((9, 5)):
        for node in range(nodes):
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            logits, features = answers(reference, past[:length] + [tokens[n] for n in path])
            assert close(output.logits[row, node], logits[-1], name), f"row {row}, node {node}"
            assert close(output.features[row, node], features[-1], name), f"row {row}, node {node}"


@names
def test_greedy_text_through_a_random_head_is_stock_generates(name: str) -> None:
    prompt = random.Random(3).choices(range(VOCAB), k=8)
    target, reference = Target(stock(name)), cast(Any, stock(name))
    ids = torch.tensor([prompt])
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    shape, stats = DraftShape("dynamic", depth=3, top_k=16, width=6, nodes=40), Stats()
    new = decode(target, EagleDrafter(target, random_head(target), shape), [prompt], 16, stats=stats)
    assert new[0] == expected[0, 8:].tolist()
    assert len(set(new[0])) > 2, "a constant text would show little"


def tiny(kind: str, **extra: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = AutoConfig.for_model(kind, **{**COMMON, **extra})
        model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(config)
        return model

    return build


def tiny_t5() -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model: PreTrainedModel = cast(Any, AutoModelForSeq2SeqLM).from_config(AutoConfig.for_model("t5", **sizes))
    return model


def headless() -> PreTrainedModel:
    model = cast(Any, tiny("llama")()).get_decoder()
    assert isinstance(model, PreTrainedModel)
    return model


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "T5ForConditionalGeneration": (tiny_t5, "encoder-decoder"),
    "RecurrentGemmaForCausalLM": (lambda: zoo.build("recurrent_gemma"), "recurrent state that it does not keep"),
    "RwkvForCausalLM": (lambda: zoo.build("rwkv"), "recurrent state that it does not keep"),
    "xLSTMForCausalLM": (lambda: zoo.build("xlstm"), "recurrent state that it does not keep"),
    "LlamaModel": (headless, "LM head"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_take_a_tree_is_refused_by_name(name: str) -> None:
    build, why = REFUSED[name]
    model = build()
    with pytest.raises(UnsupportedModelError, match=f"^{name} .*{why}"):
        Target(model)


def test_nothing_stays_on_the_model() -> None:
    model = stock("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    target = Target(model)
    target.forward(DraftTree.chain(torch.tensor([[1, 2, 3]])), target.new_cache())
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_wrong_calls_are_refused() -> None:
    target = Target(stock("llama"))
    tree = DraftTree.chain(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="1 rows, the cache 2"):
        target.forward(tree, target.new_cache(2))
    with pytest.raises(ValueError, match="hidden layer 3 does not exist"):
        target.forward(tree, target.new_cache(), hidden_layers=(3,))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128}),
    ],
)
def test_models_that_take_positions_from_slots_are_refused(kind: str, extra: dict[str, Any]) -> None:
    """They would answer a node of a tree otherwise than vanilla does: lossy without a word."""
    with pytest.raises(UnsupportedModelError, match=r"slots|can't verify a tree|can't take a tree"):
        Target(tiny(kind, **extra)())


def test_longrope_is_used_up_to_where_its_angles_switch() -> None:
    factors = [1.0, 1.0, 1.0, 1.0]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64}  # fmt: skip
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64)()
    assert Target(model).context_length == 64


@pytest.mark.parametrize(("name", "padding"), [("llama", 5), ("mistral-sliding", 0)])
def test_a_model_answers_as_before_outside_haast(name: str, padding: int) -> None:
    """transformers hands the attention boolean masks then; they hide, they are not added."""
    model = stock(name)
    model.set_attn_implementation("sdpa")  # eager gives a padded row NaN by itself
    text = torch.tensor([random.Random(3).choices(range(VOCAB), k=20)] * 2)
    kept = torch.ones_like(text)
    kept[0, :padding] = 0
    with torch.inference_mode():
        before = model(input_ids=text, attention_mask=kept).logits[:, padding:]
        Target(model)
        after = model(input_ids=text, attention_mask=kept).logits[:, padding:]
    assert float((before - after).abs().max()) < 1e-5
