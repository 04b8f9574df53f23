"""Each private API of transformers and torch by itself: the test that fails names what has changed.

Below them stand the conventions that are public but written down nowhere, on which Haast relies as much.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fakes import tiny_llama
from gguf_files import write_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    Glm4MoeConfig,
    LlamaConfig,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from haast import compat
from haast.integrations.arguments import PARAMETERS
from haast.target.attention import NAME
from haast.target.kv_cache import CACHE_NAMES, KVCache, cache_name
from haast.target.kv_pool import KVPool

IDS = torch.tensor([[1, 2, 3, 4]])
PAGE = Path(__file__).parents[2] / "docs" / "versions.md"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


# ------------------------------------------------------------------ transformers


def test_a_config_names_its_attention(model: Any) -> None:
    config = LlamaConfig()
    assert compat.attention_name(config) is None
    compat.set_attention_name(config, NAME)
    assert compat.attention_name(config) == NAME
    model.set_attn_implementation("eager")
    assert compat.attention_name(model.config) == "eager"


def test_the_attention_that_a_config_names_is_the_one_that_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    asked = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(module)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("noted", attend)
    compat.set_attention_name(model.config, "noted")
    model(input_ids=IDS)
    compat.set_attention_name(model.config, "eager")
    assert len(asked) == model.config.num_hidden_layers


def test_a_config_names_how_it_multiplies_by_experts() -> None:
    config: Any = Glm4MoeConfig()
    assert compat.experts_name(config) is None
    config._experts_implementation = "eager"
    assert compat.experts_name(config) == "eager"


def test_models_say_whether_a_registered_attention_fits(model: Any) -> None:
    from transformers import GptOssForCausalLM

    assert compat.takes_registered_attention(model)
    assert not compat.takes_registered_attention(GptOssForCausalLM.__new__(GptOssForCausalLM)), "it has attention sinks"


def test_models_say_whether_they_carry_state(model: Any) -> None:
    from transformers import MambaForCausalLM

    assert not compat.is_stateful(model)
    assert compat.is_stateful(MambaForCausalLM.__new__(MambaForCausalLM))
    assert "_is_stateful" in vars(PreTrainedModel), "else nothing is ever stateful"


def test_generate_notes_the_pad_token_that_it_takes(model: Any) -> None:
    found = generated(model, eos_token_id=7)["generation_config"]
    assert found.pad_token_id is None or found.pad_token_id == 7
    assert compat.prepared_pad_token(found) == 7
    given = generated(model, eos_token_id=7, pad_token_id=3)["generation_config"]
    assert compat.prepared_pad_token(given) == given.pad_token_id == 3
    assert compat.prepared_pad_token(generated(model)["generation_config"]) is None


def test_generate_fills_in_the_settings_that_stand_for_nothing(model: Any) -> None:
    usual, prepared = compat.default_generation_settings(), vars(generated(model)["generation_config"])
    asked = {"max_new_tokens", "max_length"}
    assert set(vars(GenerationConfig())) <= set(usual)  # type: ignore[no-untyped-call]
    filled = {name: value for name, value in prepared.items() if name in usual and name not in asked}
    others = {name for name, value in filled.items() if value not in (None, False) and value != usual[name]}
    assert {name for name in others if not name.startswith("_")} <= {"transformers_version"}


def test_the_users_function_of_allowed_tokens_is_found() -> None:
    def allowed(row: int, text: Tensor) -> list[int]:
        return [row, len(text)]

    assert compat.allowed_tokens_function(PrefixConstrainedLogitsProcessor(allowed, 1)) is allowed


# ------------------------------------------------------------------ what `generate` keeps from a callable


class Reads:
    """A decoding method whose signature is read as `haast.Decoder`'s is; it notes what it is called with."""

    def __init__(self, known: frozenset[str] = PARAMETERS) -> None:
        self.known = known
        self.called: dict[str, Any] = {}

    @property
    def __signature__(self) -> inspect.Signature:
        compat.recover_arguments(self.known, CACHE_NAMES)
        call = inspect.signature(type(self).__call__)
        return call.replace(parameters=list(call.parameters.values())[1:])

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        tokenizer: Any = None,
        handover: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        self.called = {"handover": handover, "generation_config": generation_config, **model_kwargs}
        return input_ids


def generated(model: Any, reads: Reads | None = None, **given: Any) -> dict[str, Any]:
    """What a decoding method gets of a `generate` call."""
    reads = reads or Reads()
    model.generate(IDS, max_new_tokens=2, do_sample=False, custom_generate=reads, **given)
    return reads.called


class Silent(BaseStreamer):
    def put(self, value: Any) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("name", ["streamer", "tokenizer", "assistant_model", "assistant_tokenizer"])
def test_generate_hands_over_what_it_keeps(model: Any, name: str) -> None:
    thing: Any = Silent() if name == "streamer" else object()
    assert generated(model, **{name: thing})["handover"][name] is thing


def test_generate_hands_over_whether_it_is_to_run_in_step(model: Any) -> None:
    assert generated(model)["handover"] == {"synced_gpus": False}
    assert generated(model, synced_gpus=True)["handover"]["synced_gpus"] is True


def test_a_users_cache_is_handed_over_and_the_prepared_one_is_not(model: Any) -> None:
    cache = DynamicCache()
    name = cache_name(type(model).forward)
    given: dict[str, Any] = {name: cache}
    assert generated(model, **given)["handover"][name] is cache
    assert name not in generated(model)["handover"]


def test_a_parameter_that_haast_does_not_know_is_handed_over(model: Any) -> None:
    function = lambda row, text: [1]  # noqa: E731
    reads = Reads(PARAMETERS - {"prefix_allowed_tokens_fn"})
    assert (
        generated(model, reads, prefix_allowed_tokens_fn=function)["handover"]["prefix_allowed_tokens_fn"] is function
    )
    assert "prefix_allowed_tokens_fn" not in generated(model, reads)["handover"]


def test_a_signature_that_nobody_generates_with_may_be_read() -> None:
    assert "handover" in inspect.signature(Reads()).parameters


# ------------------------------------------------------------------ torch


def test_hooks_of_others_are_counted_and_those_of_transformers_are_not() -> None:
    model = tiny_llama()
    modules = list(model.modules())
    before = compat.foreign_hooks(modules)
    model(input_ids=IDS, output_hidden_states=True)
    assert compat.foreign_hooks(modules) == before == 0
    hooks = [modules[3].register_forward_hook(lambda *_: None), modules[4].register_forward_pre_hook(lambda *_: None)]
    assert compat.foreign_hooks(modules) == 2
    for hook in hooks:
        hook.remove()
    assert compat.foreign_hooks(modules) == 0


def test_buffers_are_those_that_the_module_has() -> None:
    module = nn.BatchNorm1d(3)
    assert compat.buffers_of(module)["running_mean"] is module.running_mean
    module.double()
    assert compat.buffers_of(module)["running_mean"] is module.running_mean


def test_a_write_to_a_weight_is_seen() -> None:
    module = torch.nn.Linear(2, 2)
    before = compat.weights_state(module)
    assert compat.weights_state(module) == before
    with torch.no_grad():
        module.bias.add_(1)
    written = compat.weights_state(module)
    assert written != before
    module.weight.data = module.weight.data.clone()
    moved = compat.weights_state(module)
    assert moved != written
    module.register_buffer("packed", torch.zeros(2))
    with_buffer = compat.weights_state(module)
    module.get_buffer("packed").add_(1)
    assert moved != with_buffer != compat.weights_state(module)
    with torch.inference_mode():
        made = torch.nn.Linear(2, 2)
    assert len(compat.weights_state(made)) == 2
    on_meta = compat.weights_state(torch.nn.Linear(2, 2, device="meta"))
    assert [address for address, _ in on_meta] == [0, 0]


def test_a_copy_of_a_module_has_parameters_of_its_own() -> None:
    module = nn.Linear(3, 2, bias=False)
    made: Any = compat.with_own_parameters(module)
    assert type(made) is nn.Linear and made.weight is module.weight and made.bias is None
    made.weight = nn.Parameter(torch.zeros(2, 3))
    assert bool(module.weight.abs().sum() > 0) and not bool(made(torch.ones(3)).any())


def test_what_accelerate_hangs_on_a_module_is_found() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    module, hook = nn.Linear(3, 2), AlignDevicesHook(execution_device="cpu")
    assert compat.accelerate_hook(module) is None
    add_hook_to_module(module, hook)
    assert compat.accelerate_hook(module) is hook
    remove_hook_from_module(module)
    assert compat.accelerate_hook(module) is None


def test_a_tensor_is_marked_static_without_changing_it() -> None:
    tensor = torch.arange(3.0)
    compat.mark_static(tensor)
    assert torch.equal(tensor, torch.arange(3.0))


@pytest.mark.parametrize(("allowed", "compiled"), [(2, 2), (9, 4)])
def test_as_many_variants_are_compiled_as_allowed(allowed: int, compiled: int) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    double = torch.compile(lambda tensor: tensor * 2, backend=backend, dynamic=False)
    with compat.recompile_limits(allowed):
        assert [float(double(torch.ones(size)).sum()) for size in (2, 3, 4, 5)] == [4.0, 6.0, 8.0, 10.0]
    assert len(graphs) == compiled
    torch._dynamo.reset()


def test_torch_says_where_it_would_keep_compiled_code() -> None:
    folder = Path(compat.default_code_folder())
    assert folder.is_absolute()
    assert "torchinductor" in folder.name


# ------------------------------------------------------------------ public, but written down nowhere


def test_generate_calls_a_decoding_method_with_what_ours_takes(model: Any) -> None:
    """`model` and `input_ids` by position, and the rest by name."""
    given = inspect.signature(GenerationMixin._sample).parameters
    assert list(given)[:2] == ["self", "input_ids"]
    assert {"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"} <= set(given)


def test_decoders_are_reached_and_name_their_layers(model: Any) -> None:
    names = {name for name, _ in model.get_decoder().named_children()}
    assert names == {"embed_tokens", "layers", "norm", "rotary_emb"}
    layer = {name for name, _ in model.get_decoder().layers[0].named_children()}
    assert layer == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def test_the_decoders_output_is_what_the_lm_head_reads(model: Any) -> None:
    states = model.get_decoder()(input_ids=IDS).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(states), model(input_ids=IDS).logits)


def test_configs_name_their_layer_types_and_windows() -> None:
    from transformers import Gemma2Config

    config: Any = Gemma2Config(num_hidden_layers=2)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert isinstance(config.sliding_window, int)
    assert config.rope_parameters["rope_type"] == "default"
    assert config.get_text_config() is config
    assert isinstance(config.sub_configs, dict)


def test_a_mask_per_layer_type_reaches_the_layers_as_it_is() -> None:
    """A model with several kinds of layer takes a dict of 4-D masks; one that hides nearly all changes the answer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    config = Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=32, head_dim=8, **sizes)
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM(config)
    model.eval()
    causal = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min).triu(1)
    alone = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min).masked_fill(torch.eye(4, dtype=torch.bool), 0)
    kinds = ("sliding_attention", "full_attention")
    plain, same, other = (
        model(input_ids=IDS, attention_mask=mask).logits
        for mask in (None, dict.fromkeys(kinds, causal), dict.fromkeys(kinds, alone))
    )
    assert torch.allclose(plain, same, atol=1e-5)
    assert not torch.allclose(plain, other, atol=1e-3)


def test_stock_layers_write_to_a_cache_of_ours(model: Any) -> None:
    pool = KVPool(8)
    cache = KVCache(pool, model.config.num_hidden_layers, torch.device("cpu")).bind([pool.sequence()])
    cache.begin(4)
    with torch.inference_mode():  # as every forward of ours
        model(input_ids=IDS, use_cache=True, **{cache_name(type(model).forward): cache})
    assert cache.updated_layers == set(range(model.config.num_hidden_layers))


# ------------------------------------------------------------------ GGUF files


def test_transformers_says_what_it_changes_in_a_gguf_files_tensors() -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    rows = np.arange(8.0)[:, None]
    llama, other = compat.gguf_processor("llama", config), compat.gguf_processor("qwen3", config)
    values, name, *_ = llama.process(rows, "blk.0.attn_q.weight", tensor_key_mapping={}, parsed_parameters={})
    assert name == "blk.0.attn_q.weight" and values[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert other.process(rows, "blk.0.attn_q.weight")[0] is rows
    assert llama.preprocess_name("model.norm") == "model.norm"
    found = dict[str, str]()
    compat.gguf_processor("qwen3moe", config).perform_fallback_tensor_mapping(
        found, "", "", "model.layers.0.mlp.experts.gate_up_proj"
    )
    assert {*found} <= {"blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"}


def test_transformers_reads_metadata_with_the_gguf_packages_reader(tmp_path: Path) -> None:
    path, original = write_model(tmp_path / "tiny.gguf"), gguf.GGUFReader
    other = write_model(tmp_path / "other.gguf", "qwen2")
    metadata = {
        "general.architecture": "llama", "llama.block_count": 7, "llama.rope.freq_base": 5e5, "llama.vocab_size": 3,
        "tokenizer.ggml.add_bos_token": True, "llama.list": np.arange(3), "empty": (), "tokenizer.ggml.tokens": ("a",),
    }  # fmt: skip
    with compat.quick_gguf_reader(path, metadata, ["output.weight"]):
        config = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
        assert gguf.GGUFReader(other).fields["general.architecture"].contents() == "qwen2"
    assert (config.num_hidden_layers, config.vocab_size, config.rope_parameters["rope_theta"]) == (7, 3, 5e5)
    assert config.tie_word_embeddings is False and gguf.GGUFReader is original


# ------------------------------------------------------------------ the page


def functions() -> dict[str, Callable[..., Any]]:
    """The compat by name."""
    every = vars(compat).items()
    own = {name: thing for name, thing in every if inspect.isfunction(thing) and thing.__module__ == compat.__name__}
    return {name: thing for name, thing in own.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(functions()))
def test_every_private_api_says_what_it_touches_and_what_fails(name: str) -> None:
    told = functions()[name].__doc__ or ""
    for heading in ("Touches: ", "Public: ", "There: ", "Fails without it: "):
        assert heading in told


def test_the_page_lists_every_private_api() -> None:
    listed = {line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    assert listed == set(functions())


def test_there_is_a_test_of_every_private_api() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in functions() if f"compat.{name}(" not in source] == []
