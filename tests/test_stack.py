"""All layers in one native call: the bits of the modules, for every kind of model that it takes; others are left."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from haast import native
from haast.cache import TreeCache
from haast.drafters.base import Accepted
from haast.drafters.eagle import EagleDrafter
from haast.drafters.shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine import Engine, StopConfig
from haast.errors import HeadMismatchError
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.sampling import SamplingConfig
from haast.speed.fusing import fuse_small_modules
from haast.speed.packing import pack_linears
from haast.speed.stack import NativeStack
from haast.target import Target, TargetOutput
from haast.tree import DraftTree

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels")
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
PLAIN = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 64}
KINDS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True),
    "llama, angles by llama 3": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral, window": MistralConfig(**SIZES, sliding_window=7),
    "qwen2, biases": Qwen2Config(**PLAIN),
    "qwen2, some windows": Qwen2Config(
        **PLAIN,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3, norms of heads": Qwen3Config(**SIZES),
}


def made(config: PretrainedConfig, form: str = "f16", spread: bool = True) -> Target:
    torch.manual_seed(3)
    make: Any = AutoModelForCausalLM.from_config  # untyped
    target = Target(make(config))
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if spread and ("norm" in name or "bias" in name):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    pack_linears(target.model, form=form)
    fuse_small_modules(target.model)
    return target


def both(target: Target, work: Any) -> tuple[Any, Any]:
    """What `work` gives by one call, and by modules."""
    stack = target._stack
    assert stack is not None
    fast = work()
    target._stack = None
    slow = work()
    target._stack = stack
    return fast, slow


def assert_same(fast: TargetOutput, slow: TargetOutput, live: torch.Tensor) -> None:
    torch.testing.assert_close(fast.logits[live], slow.logits[live], rtol=0, atol=0)
    torch.testing.assert_close(fast.features[live], slow.features[live], rtol=0, atol=0)
    assert fast.hidden.keys() == slow.hidden.keys()
    for index, states in fast.hidden.items():
        torch.testing.assert_close(states[live], slow.hidden[index][live], rtol=0, atol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("form", ["f16", "int8"])
def test_one_call_has_the_bits_of_the_modules(kind: str, form: str) -> None:
    target = made(KINDS[kind], form)
    assert target.use_one_call()

    def steps() -> list[tuple[TargetOutput, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        cache, found = target.new_cache(2, 8), []
        kept: list[Sequence[int] | None] = [range(19), range(11)]
        live = torch.arange(19) < torch.tensor([[19], [11]])
        trees = [DraftTree.chain(torch.randint(0, 61, (2, 19), generator=generator), live)]
        for nodes in (1, 5, 17, 240):  # the last ones make the cache grow
            parents = torch.stack(
                [torch.tensor([-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)])] * 2
            )
            trees.append(DraftTree.from_parents(torch.randint(0, 61, (2, nodes), generator=generator), parents))
        for tree in trees:
            found.append((target.forward(tree, cache, hidden_layers=(0, 1, 3)), tree.live))
            cache.commit(kept)
            kept = [[0], None]
        return found

    for (fast, live), (slow, _) in zip(*both(target, steps), strict=True):
        assert_same(fast, slow, live)


@pytest.mark.parametrize("at_most", [0, 1])
def test_narrower_paths_agree(at_most: int) -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()

    def step() -> TargetOutput:
        return target.forward(DraftTree.chain(torch.arange(9).unsqueeze(0)), target.new_cache())

    with native.narrow_path(at_most):
        fast, slow = both(target, step)
    assert_same(fast, slow, torch.ones(1, 9, dtype=torch.bool))


def test_last_only_gives_the_last_live_nodes_logits() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    live = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tree = DraftTree.chain(torch.arange(10).view(2, 5), live)
    whole = target.forward(tree, target.new_cache(2)).logits
    last = target.forward(tree, target.new_cache(2), last_only=True).logits
    assert last.shape == (2, 1, 61)
    assert torch.equal(last[:, 0], whole[torch.arange(2), torch.tensor([4, 2])])


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**PLAIN, residual_multiplier=0.3),  # its parts have Llama's names, and are added up otherwise
        Olmo2Config(**PLAIN),  # norms behind attention
        LlamaConfig(**SIZES, hidden_act="gelu"),
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
    ids=["granite", "olmo2", "gelu", "dynamic angles"],
)
def test_other_models_keep_their_modules(config: PretrainedConfig) -> None:
    target = made(config, spread=False)
    assert not target.use_one_call() and not target.one_call
    output = target.forward(DraftTree.chain(torch.arange(4).unsqueeze(0)), target.new_cache())
    assert bool(output.logits.isfinite().all())


def test_a_model_that_changes_afterwards_is_run_by_its_modules() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    attention = target.model.get_submodule("model.layers.1.self_attn.qkv_proj")
    attention.register_buffer("packed", attention.get_buffer("packed").clone())
    target.new_cache()
    assert not target.one_call


def test_an_unpacked_model_has_no_stack() -> None:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    target = Target(make(KINDS["llama"]))
    assert not target.use_one_call()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_head_drafts_the_same_trees_by_one_call(layers: int) -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    torch.manual_seed(7)
    sizes = FeatExtrapolatorConfig.for_target(target.config, num_hidden_layers=layers)
    module = FeatExtrapolator(sizes).requires_grad_(False)
    head = Head(module, torch.arange(0, 61, 2), {})
    trees: list[list[torch.Tensor]] = []
    for one_call in (True, False):
        drafter = EagleDrafter(target, copy.deepcopy(head), DraftShape(depth=4, top_k=5, width=5, nodes=20))
        assert drafter._forward.stack is not None
        if not one_call:
            drafter._forward.stack = drafter._quick = None
        seen: list[torch.Tensor] = []
        propose = drafter.propose

        def watched(propose: Any = propose, seen: list[torch.Tensor] = seen) -> DraftTree:
            tree: DraftTree = propose()
            seen.append(torch.stack([tree.tokens, tree.parents]))
            return tree

        drafter.propose = watched  # type: ignore[method-assign]
        prompts = [[1, 2, 3, 4, 5], [9, 8]]
        for _ in Engine(target, drafter).run(prompts, SamplingConfig(temperature=1.0), StopConfig(20)):
            continue
        trees.append(seen)
    assert len(trees[0]) == len(trees[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*trees, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    stack = target._stack
    assert isinstance(stack, NativeStack)
    cache = TreeCache(3, 1)
    cache.begin(2)
    store = cache.storage(2, 16, torch.float32)
    assert store is not None
    states, positions = torch.zeros(1, 2, 40), torch.arange(2).unsqueeze(0)
    seen = torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not fit 3 layers"):
        stack.run(states, positions, seen, [0], store[:4])
    with pytest.raises(ValueError, match="capacity of 256"):
        stack.run(states, positions, seen, [255], store)
    assert cache.storage(2, 8, torch.float32) is None
    assert cache.storage(2, 16, torch.float64) is None


def test_the_likeliest_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, count in ((1, 1), (7, 3), (8, 8), (1001, 24), (8192, 64)):
        logits = torch.randn(5, width, generator=generator) * 4
        expected, places = logits.log_softmax(-1).topk(count)
        for at_most in (0, 2):
            with native.narrow_path(at_most):
                found, ids = native.top(logits, count)
            assert torch.equal(ids, places)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tied = torch.zeros(1, 40)
    assert native.top(tied, 5)[1].tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="count=65"):
        native.top(torch.zeros(1, 100), 65)


@pytest.mark.skipif(not native.features() & 8, reason="no AVX-512")
def test_avx512_gives_avx2s_bits() -> None:
    """Attention, products and norms of a whole forward, with heads that take the wide registers."""
    target = made(LlamaConfig(**{**SIZES, "head_dim": 64, "num_attention_heads": 6, "hidden_size": 48}))
    assert target.use_one_call()
    tree = DraftTree.chain(torch.randint(0, 61, (1, 75), generator=torch.Generator().manual_seed(5)))
    wide = target.forward(tree, target.new_cache()).logits
    with native.narrow_path(1):
        narrow = target.forward(tree, target.new_cache()).logits
    assert torch.equal(wide, narrow)


def _hook(target: Target) -> None:
    target.model.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)


def _replace(name: str, make: Any) -> Any:
    def change(target: Target) -> None:
        parent, _, last = name.rpartition(".")
        setattr(target.model.get_submodule(parent), last, make(target.model.get_submodule(parent), last))

    return change


CHANGES: dict[str, Any] = {
    "half": lambda t: t.model.half().float(),
    "double": lambda t: t.model.double(),
    "a new norm": _replace(
        "model.layers.1.post_attention_layernorm.weight", lambda m, n: torch.nn.Parameter(2 * m.weight)
    ),
    "a new final norm": _replace("model.norm", lambda m, n: copy.deepcopy(getattr(m, n))),
    "a new product": _replace("model.layers.0.mlp.down_proj", lambda m, n: copy.deepcopy(getattr(m, n))),
    "layers swapped": lambda t: t.model.model.layers.insert(0, t.model.model.layers.pop(2)),
    "a layer less": lambda t: t.model.model.layers.__delitem__(1),
    "another embedding": lambda t: t.model.set_input_embeddings(copy.deepcopy(t.embedding)),
    "a hook": _hook,
    "another scale": _replace("model.layers.2.self_attn.scaling", lambda m, n: 0.3),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_any_change_of_the_model_drops_the_call(change: str) -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    CHANGES[change](target)
    target.new_cache()
    assert not target.one_call


def test_weights_can_be_loaded_into_a_fused_model() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    kept = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    with torch.no_grad():
        target.model.model.norm.weight.mul_(3)
    target.model.load_state_dict(kept)
    target.new_cache()
    assert target.one_call
    assert torch.equal(target.model.state_dict()["model.norm.weight"], kept["model.norm.weight"])


def test_a_copy_of_a_target_goes_by_modules() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    other = copy.deepcopy(target)
    assert not other.one_call and target.one_call
    tree = DraftTree.chain(torch.arange(5).unsqueeze(0))
    assert torch.equal(other.forward(tree, other.new_cache()).logits, target.forward(tree, target.new_cache()).logits)


def test_angles_by_kind_of_layer_are_no_stack() -> None:
    class Rotary(torch.nn.Module):
        rope_type = {"full_attention": "default"}  # noqa: RUF012  as Gemma 3 has it

    target = made(KINDS["llama"])
    decoder: Any = target.model.get_decoder()  # type: ignore[no-untyped-call]
    assert NativeStack.of(list(decoder.layers), decoder.norm, Rotary()) is None


def test_odd_heads_have_one_sum_too() -> None:
    """A head of 6 values takes the portable attention in the call and in the modules."""
    target = made(LlamaConfig(**{**SIZES, "head_dim": 6}))
    assert target.use_one_call()
    tree = DraftTree.chain(torch.arange(9).unsqueeze(0))
    fast, slow = both(target, lambda: target.forward(tree, target.new_cache()))
    assert torch.equal(fast.logits, slow.logits)


@pytest.mark.parametrize(
    ("vocab", "message"),
    [(torch.tensor([], dtype=torch.long), "shape"), (torch.tensor([0, -1]), "-1"), (torch.tensor([0, 61]), "61")],
)
def test_an_impossible_draft_vocabulary_is_refused(vocab: torch.Tensor, message: str) -> None:
    target = made(KINDS["llama"])
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    with pytest.raises(HeadMismatchError, match=message):
        EagleDrafter(target, Head(module, vocab, {}))


def test_any_form_of_a_draft_vocabulary_drafts_the_same() -> None:
    target = made(KINDS["llama"])
    texts = []
    for vocab in (torch.arange(0, 61, 2), torch.arange(61)[::2], torch.arange(0, 61, 2, dtype=torch.int32)):
        torch.manual_seed(7)
        module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
        drafter = EagleDrafter(target, Head(module, vocab, {}), DraftShape(depth=3, top_k=4, width=3, nodes=9))
        drafter.start([[1, 2]])
        drafter.observe(Accepted(torch.tensor([[2, 3]]), torch.ones(1, 2, 40), (2,)))
        texts.append(drafter.propose().tokens)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_two_runs_of_one_drafter_end_with_a_clear_error_and_threads_as_they_were() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    drafter = EagleDrafter(target, Head(module, None, {}), DraftShape(depth=3, top_k=4, width=3, nodes=9))
    before, said = torch.get_num_threads(), list[str]()

    def run(prompt: list[int]) -> None:
        for _ in range(10):
            try:
                for _ in Engine(target, drafter).run([prompt], SamplingConfig(), StopConfig(20)):
                    continue
            except RuntimeError as error:
                said.append(str(error))

    threads = [threading.Thread(target=run, args=([1 + i] * (2 + 9 * i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another generation was started" in text for text in said)
    assert torch.get_num_threads() == before


def test_a_head_that_changes_is_drafted_by_its_modules_in_every_later_shape() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    drafter = EagleDrafter(target, Head(module, None, {}), DraftShape(depth=3, top_k=4, width=3, nodes=9))
    expected = Engine(target, VanillaDrafter()).complete([[1, 2, 3]], SamplingConfig(), StopConfig(20))
    layer = drafter._module.get_submodule("layers.0")
    layer.post_attention_layernorm = copy.deepcopy(layer.post_attention_layernorm)
    for nodes in (9, 5):
        drafter.reshape(DraftShape(depth=2, top_k=4, width=2, nodes=nodes))
        assert Engine(target, drafter).complete([[1, 2, 3]], SamplingConfig(), StopConfig(20)) == expected
        assert drafter._forward.stack is None


def test_windows_need_the_positions_of_what_is_in_flight() -> None:
    target = made(KINDS["mistral, window"])
    assert target.use_one_call() and target._stack is not None
    cache = TreeCache(3, 1)
    cache.begin(4)
    store = cache.storage(2, 16, torch.float32)
    assert store is not None
    seen = torch.ones(1, 2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="windows need flight_positions"):
        target._stack.run(torch.zeros(1, 2, 40), torch.arange(2).unsqueeze(0), seen, [0], store)
