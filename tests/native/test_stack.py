"""All layers in one native call: the bits of the modules, for every kind of model that it takes; others are left."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fakes import commit
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
from haast.core import Accepted, SamplingParams
from haast.drafters.candidates import CandidateRows, Candidates
from haast.drafters.draft_lm import draft_lm_head
from haast.drafters.eagle import EagleDrafter
from haast.drafters.native_draft import NativeDraft, NativeHead
from haast.drafters.tree_builder import Growth, best_places, calibrated
from haast.drafters.tree_shape import DraftShape, Plan, plan
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, StopParams
from haast.errors import HeadMismatchError
from haast.heads.acceptance import Curve, Source
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.target.fusing import fuse_small_modules
from haast.target.kv_pool import BLOCK
from haast.target.native_cpu import NativeStack
from haast.target.packing import pack_linears
from haast.target.target import Target, TargetOutput
from haast.tree import DraftTree
from haast.tuning.policy import CostModel

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
AS_IT_IS = Source()
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
    one_call = target._native
    assert one_call is not None
    fast = work()
    target._native = None
    slow = work()
    target._native = one_call
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
        cache, found = target.new_cache(2, 512), []
        kept: list[Sequence[int] | None] = [range(19), range(11)]
        live = torch.arange(19) < torch.tensor([[19], [11]])
        trees = [DraftTree.chain(torch.randint(0, 61, (2, 19), generator=generator), live)]
        for nodes in (1, 5, 17, 240):
            parents = torch.stack(
                [torch.tensor([-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)])] * 2
            )
            trees.append(DraftTree.from_parents(torch.randint(0, 61, (2, nodes), generator=generator), parents))
        for tree in trees:
            found.append((target.forward(tree, cache, hidden_layers=(0, 1, 3)), tree.live))
            commit(cache, kept)
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


def proposals(
    target: Target, head: Head, shape: DraftShape, temperature: float, native_code: bool
) -> list[torch.Tensor]:
    """Tokens and parents of every tree that a head drafts for two prompts."""
    drafter = EagleDrafter(target, copy.deepcopy(head), shape)
    if not native_code:
        drafter._forward.stack = None
        drafter._shapes.clear()
    seen: list[torch.Tensor] = []
    propose = drafter.propose

    def watched(states: Any, budget: Any = None, others: Any = None) -> DraftTree:
        tree = propose(states, budget, others)
        seen.append(torch.stack([tree.tokens, tree.parents]))
        return tree

    drafter.propose = watched  # type: ignore[method-assign]
    for _ in Engine(target, drafter).run([[1, 2, 3, 4, 5], [9, 8]], SamplingParams(temperature), StopParams(20)):
        continue
    return seen


@pytest.mark.parametrize("layers", [1, 2])
def test_a_head_drafts_the_same_trees_by_one_call(layers: int) -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    torch.manual_seed(7)
    sizes = FeatExtrapolatorConfig.for_target(target.config, num_hidden_layers=layers)
    head = Head(FeatExtrapolator(sizes).requires_grad_(False), torch.arange(0, 61, 2), {})
    assert EagleDrafter(target, copy.deepcopy(head))._forward.stack is not None
    shape = DraftShape(depth=4, top_k=5, width=5, nodes=20)
    trees = [proposals(target, head, shape, 1.0, native_code) for native_code in (True, False)]
    assert len(trees[0]) == len(trees[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*trees, strict=True))


class Quick:
    """A head with pairs behind it: drafted in one native call over a store of blocks, and by its modules, uncached."""

    def __init__(self, layers: int = 1, window: int = 0, layer_ids: tuple[int, ...] = ()) -> None:
        self.target = made(KINDS["llama"])
        torch.manual_seed(7)
        options: dict[str, Any] = {"num_hidden_layers": layers, "layer_ids": layer_ids}
        sizes = FeatExtrapolatorConfig.for_target(self.target.config, **options)
        self.module, self.window = FeatExtrapolator(sizes).requires_grad_(False), window
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.vocab = torch.arange(0, 61, 2)
        self.lm_head = draft_lm_head(self.target, self.module, self.vocab, packed=True)
        pack_linears(self.module)
        fuse_small_modules(self.module)
        stack = self.module.native_stack(window)
        assert stack is not None
        self.stack = stack
        self.lengths = (40, 17, 31)
        self.tokens, self.features = torch.randint(0, 61, (3, 40)), torch.randn(3, 40, 40)
        self.roots = torch.randint(0, 61, (3,))

    def ready(
        self, shape: DraftShape, pace: CostModel | None = None, curves: Source | None = None
    ) -> tuple[NativeDraft, Plan]:
        head = NativeHead.of(self.target.embedding, self.module, self.stack)
        one_call = NativeDraft.of(head, self.lm_head, self.vocab)
        fixed = plan(shape, len(self.vocab))
        assert one_call is not None and one_call.plan(fixed, pace, curves)
        return one_call, fixed

    def propose(
        self,
        one_call: NativeDraft,
        rows: Sequence[int],
        tables: torch.Tensor,
        shift: int = 1,
        dtype: torch.dtype = torch.float32,
        others: Sequence[Candidates] | None = None,
        setting: Sequence[tuple[float, float]] | None = None,
    ) -> tuple[DraftTree, torch.Tensor]:
        """These rows' pairs run, then one proposal."""
        past, at = [self.lengths[row] for row in rows], list(rows)
        lanes, most = 2 * len(self.module.layers), max(past)
        store = torch.full((lanes, self.stack.kv_heads, 40 * BLOCK, self.stack.head_dim), torch.nan, dtype=dtype)
        mixed = self.module.mix(self.target.embedding(self.tokens[at, :most]), self.features[at, :most])
        seen = torch.ones(len(at), most, most, dtype=torch.bool).tril()
        positions = torch.arange(most).expand(len(at), -1)
        states, _ = self.stack.run(mixed, positions, seen, [0] * len(at), store, tables, shift=shift)
        newest = states[torch.arange(len(at)), torch.tensor(past) - 1]
        place = (torch.tensor(past), tables, store, shift)
        packed = None if others is None else CandidateRows.of(others)
        return one_call.propose(newest, self.roots[at], *place, others=packed, setting=setting)

    def by_modules(
        self,
        row: int,
        fixed: Plan,
        pace: CostModel | None,
        curves: Source = AS_IT_IS,
        setting: tuple[float, float] = (0.0, 0.0),
        others: Candidates | None = None,
    ) -> tuple[DraftTree, torch.Tensor]:
        """As `EagleDrafter` grows a tree, every level with the whole text."""
        past = self.lengths[row]
        embedded = self.target.embedding(self.tokens[row : row + 1, :past])
        states, positions = self.features[row : row + 1, :past], torch.arange(past)
        seen = torch.ones(past, past, dtype=torch.bool).tril()

        def run() -> torch.Tensor:
            far = positions.unsqueeze(1) - positions.unsqueeze(0) >= (self.window or 10**6)
            bias = torch.zeros(seen.shape).masked_fill(~seen | far, torch.finfo(torch.float32).min)
            output: torch.Tensor = self.module(embedded, states, positions.unsqueeze(0), bias[None, None])
            return output

        def children(found: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            best, ids = native.top(self.lm_head(found), fixed.top_k)
            return self.vocab[ids].flatten(1), (scores.unsqueeze(2) + best).flatten(1)

        grown, found = Growth(self.roots[row : row + 1]), run()[:, -1:]
        tokens, scores = children(found, grown.root_scores())
        index = grown.add(tokens, scores, None)
        above_seen = torch.zeros(1, 0, dtype=torch.bool)
        for level, width in enumerate(fixed.widths):
            fixed_level = None if fixed.frontier is None else torch.tensor([fixed.frontier[level]])
            chosen = best_places(scores, width) if fixed_level is None else fixed_level
            above = scores.gather(1, chosen)
            if pace is not None and fixed.keep is None and not pace.deeper(calibrated(above, curves, [setting])):
                break
            parent = (chosen // fixed.top_k)[0]
            above_seen = torch.cat([above_seen[parent], torch.eye(width, dtype=torch.bool)], 1)
            before = len(seen)
            seen = torch.nn.functional.pad(seen, (0, width, 0, width))
            seen[before:, :past], seen[before:, past:] = True, above_seen
            positions = torch.cat([positions, torch.full((width,), past + level)])
            embedded = torch.cat([embedded, self.target.embedding(tokens.gather(1, chosen))], 1)
            states = torch.cat([states, found[:, parent]], 1)
            found = run()[:, -width:]
            frontier = index.gather(1, chosen)
            tokens, scores = children(found, above)
            index = grown.add(tokens, scores, frontier.repeat_interleave(fixed.top_k, 1))
        grown.calibrate(curves, [setting])
        keep = None if fixed.keep is None else torch.tensor([fixed.keep])
        if others is not None:
            grown.compete([others], keep)
        if keep is None or others is not None:
            keep = grown.best(fixed.nodes - 1, None if fixed.keep is not None else pace)
        return grown.tree(keep), grown.head_scores(keep)


def equal(found: tuple[DraftTree, torch.Tensor], expected: tuple[DraftTree, torch.Tensor]) -> bool:
    (tree, scores), (other, others) = found, expected
    parts = ("tokens", "parents", "depths", "ancestors")
    same = all(torch.equal(getattr(tree, name), getattr(other, name)) for name in parts)
    return same and torch.allclose(scores, others, rtol=1e-4, atol=1e-4) and int(tree.depths.max()) <= tree.height


def blocks(rows: int, count: int, seed: int) -> torch.Tensor:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    return order[: rows * count].view(rows, count).int()


PACE = CostModel((1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.9, 2.4, 3.2, 4.0), 0.15, 0.4)
SHAPES = {
    "dynamic": (DraftShape(depth=4, top_k=5, width=5, nodes=20), None),
    "dynamic, paced": (DraftShape(depth=4, top_k=5, width=5, nodes=10), PACE),
    "static": (DraftShape(kind="static", depth=4, top_k=4, nodes=16), None),
    "chain": (DraftShape(kind="chain", depth=4), None),
}


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize(("layers", "window"), [(1, 0), (2, 0), (1, 9)])
def test_one_call_drafts_the_trees_of_the_heads_modules(kind: str, layers: int, window: int) -> None:
    head, (shape, pace) = Quick(layers, window), SHAPES[kind]
    one_call, fixed = head.ready(shape, pace)
    sizes = set()
    for row in range(3):
        expected = head.by_modules(row, fixed, pace)
        found = head.propose(one_call, [row], blocks(1, 5, row))
        assert equal(found, expected)
        sizes.add(found[0].nodes)
    assert pace is None or min(sizes) < fixed.nodes


CURVES = Source(Curve((-4.0, -1.0, -0.2), (-5.0, -0.8, -0.1)), Curve((-3.0, -0.5), (-3.5, -0.4)))


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("setting", [(0.0, 0.0), (1.0, 0.3), (0.4, -0.5)])
def test_one_call_lets_another_source_compete_as_the_tensors_do(kind: str, setting: tuple[float, float]) -> None:
    head, (shape, pace) = Quick(), SHAPES[kind]
    one_call, fixed = head.ready(shape, pace, CURVES)
    changed = 0
    for row in range(3):
        own, _ = head.by_modules(row, fixed, pace, CURVES, setting)
        first = int(own.tokens[0, 1]) if own.nodes > 1 else 5
        others = Candidates([first, 60, 7, 8, 9], [-1, -1, 0, 2, 3], [-0.05, -3.0, -0.1, -0.2, -0.3])
        found = head.propose(one_call, [row], blocks(1, 5, row), others=[others], setting=[setting])
        assert equal(found, head.by_modules(row, fixed, pace, CURVES, setting, others))
        assert ({7} if kind == "chain" else {7, 8, 9}) <= set(found[0].tokens[0].tolist())
        changed += not torch.equal(found[0].tokens, own.tokens)
    assert changed == 3, "the other source's likely path enters every tree"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 9])
def test_a_proposal_is_the_same_wherever_its_blocks_lie_and_who_else_drafts(dtype: torch.dtype, window: int) -> None:
    head, every = Quick(window=window), range(3)
    one_call, _ = head.ready(DraftShape(depth=4, top_k=5, width=5, nodes=20))
    whole, _ = head.propose(one_call, every, torch.arange(15, dtype=torch.int32).view(3, 5), 1, dtype)
    for seed, shift in ((0, 0), (1, 1)):
        other, _ = head.propose(one_call, every, blocks(3, 5, seed), shift, dtype)
        assert torch.equal(other.tokens, whole.tokens) and torch.equal(other.parents, whole.parents)
    for row in every:
        alone, _ = head.propose(one_call, [row], blocks(1, 5, row), 1, dtype)
        assert torch.equal(alone.tokens[0], whole.tokens[row]) and torch.equal(alone.parents[0], whole.parents[row])


@pytest.mark.parametrize(("layers", "window"), [(1, 0), (2, 0), (1, 9)])
@pytest.mark.parametrize("layer_ids", [(), (0, 2, 3)])
def test_pairs_committed_in_one_call_have_the_bits_of_the_layers(
    layers: int, window: int, layer_ids: tuple[int, ...]
) -> None:
    head = Quick(layers, window, layer_ids)
    width, rows = 40 * max(len(layer_ids), 1), torch.tensor(head.lengths)
    one_call = NativeHead.of(head.target.embedding, head.module, head.stack)
    assert one_call is not None and one_call.width == width
    features = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(1))
    tables = blocks(3, 5, 0)
    stores = [torch.zeros(2 * layers, 2, 40 * BLOCK, 16) for _ in range(3)]
    mixed = head.module.mix(head.target.embedding(head.tokens), head.module.fuse(features))
    seen = torch.ones(3, 40, 40, dtype=torch.bool).tril()
    positions = torch.arange(40).expand(3, -1)
    expected, _ = head.stack.run(mixed, positions, seen, [0, 0, 0], stores[0], tables, shift=1)
    found = one_call.commit(head.tokens, features, [0, 0, 0], tables, stores[1])
    assert torch.equal(found, expected) and torch.equal(stores[0], stores[1])
    # In two parts, of which the second begins in another place in every row.
    begun = rows - 9
    first = one_call.commit(head.tokens[:, :31], features[:, :31], torch.zeros(3, dtype=torch.int64), tables, stores[2])
    assert torch.equal(first, expected[:, :31])
    index = begun.unsqueeze(1) + torch.arange(9)
    wide = index.unsqueeze(2)
    part = features.gather(1, wide.expand(-1, -1, width))
    second = one_call.commit(head.tokens.gather(1, index), part, begun, tables, stores[2])
    assert torch.equal(second, expected.gather(1, wide.expand(-1, -1, 40)))


def test_pairs_that_do_not_fit_are_refused() -> None:
    head = Quick()
    one_call = NativeHead.of(head.target.embedding, head.module, head.stack)
    assert one_call is not None
    store, features, tokens = torch.zeros(2, 2, 8 * BLOCK, 16), torch.zeros(1, 3, 40), torch.tensor([[0, 60, 1]])
    place = (torch.arange(2, dtype=torch.int32).unsqueeze(0), store)
    assert one_call.commit(tokens, features, [28], *place).shape == (1, 3, 40)
    before = store.clone()
    for strange in (-1, 61):
        with pytest.raises(
            ValueError, match=rf"tokens are from {min(0, strange)} to .*, the embedding has ids from 0 to 60"
        ):
            one_call.commit(torch.tensor([[0, strange, 1]]), features, [0], *place)
    with pytest.raises(ValueError, match=r"29 past slots, 3 in flight and a shift of 1 do not fit .* 2 blocks"):
        one_call.commit(tokens, features, [29], *place)
    with pytest.raises(ValueError, match="must not be negative"):
        one_call.commit(tokens, features, [-1], *place)
    with pytest.raises(ValueError, match=r"features have shape \(1, 3, 80\) on cpu: give \(1, 3, 40\)"):
        one_call.commit(tokens, torch.zeros(1, 3, 80), [0], *place)
    with pytest.raises(ValueError, match=r"tokens are torch\.int32, features torch\.float32"):
        one_call.commit(tokens.int(), features, [0], *place)
    assert torch.equal(store, before)
    far = torch.zeros(1, 40, dtype=torch.int32)  # more positions than there are angles at first
    assert one_call.commit(tokens, features, [600], far, store).isfinite().all()


def test_what_does_not_fit_a_proposal_is_refused() -> None:
    head = Quick()
    one_call, _ = head.ready(DraftShape(depth=4, top_k=5, width=5, nodes=20))
    assert one_call.room == 15
    store, states, roots = torch.zeros(2, 2, 8 * BLOCK, 16), torch.zeros(1, 40), torch.zeros(1, dtype=torch.int64)
    tables = torch.arange(2, dtype=torch.int32).unsqueeze(0)
    assert one_call.propose(states, roots, [16], tables, store)[0].nodes == 20
    with pytest.raises(ValueError, match=r"17 past slots, 15 in flight and a shift of 1 do not fit .* 2 blocks"):
        one_call.propose(states, roots, [17], tables, store)
    with pytest.raises(ValueError, match="from 7 to 8; the store has 8"):
        one_call.propose(states, roots, [16], tables + 7, store)
    with pytest.raises(ValueError, match="must not be negative"):
        one_call.propose(states, roots, [-1], tables, store)
    with pytest.raises(ValueError, match="past has 2 numbers for 1 rows"):
        one_call.propose(states, roots, [1, 1], tables, store)
    with pytest.raises(ValueError, match=r"expected contiguous fp32 \(1, 40\)"):
        one_call.propose(states[:, :8], roots, [1], tables, store)
    with pytest.raises(ValueError, match=r"block tables are torch\.int64"):
        one_call.propose(states, roots, [1], tables.long(), store)
    far = 600  # more positions than there are angles at first
    tables = torch.zeros(1, 40, dtype=torch.int32)
    assert one_call.propose(states, roots, [far], tables, store)[0].nodes == 20


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
        kv = target.pool.sequence()
        kv.reserve(64)
        state = drafter.begin([1, 2], kv, 0)
        drafter.observe([state], Accepted(torch.tensor([[2, 3]]), torch.ones(1, 2, 40), torch.tensor([2])))
        texts.append(drafter.propose([state]).tokens)
        kv.release()
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_threads_share_one_drafter_and_torchs_threads_stay_as_they_were() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    drafter = EagleDrafter(target, Head(module, None, {}), DraftShape(depth=3, top_k=4, width=3, nodes=9))
    before, said = torch.get_num_threads(), dict[int, list[list[int]]]()
    prompts = [[1 + i] * (2 + 9 * i) for i in range(3)]

    def run(number: int) -> None:
        engine = Engine(target, drafter)
        said[number] = [engine.complete([prompts[number]], SamplingParams(), StopParams(20))[0] for _ in range(10)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = Engine(target, VanillaDrafter()).complete(prompts, SamplingParams(), StopParams(20))
    assert [said[number] for number in range(3)] == [[text] * 10 for text in expected]
    assert torch.get_num_threads() == before


def test_a_head_that_changes_is_drafted_by_its_modules_in_every_later_shape() -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    drafter = EagleDrafter(target, Head(module, None, {}), DraftShape(depth=3, top_k=4, width=3, nodes=9))
    expected = Engine(target, VanillaDrafter()).complete([[1, 2, 3]], SamplingParams(), StopParams(20))
    layer = drafter._module.get_submodule("layers.0")
    layer.post_attention_layernorm = copy.deepcopy(layer.post_attention_layernorm)
    for nodes in (9, 5):
        drafter.reshape(DraftShape(depth=2, top_k=4, width=2, nodes=nodes))
        assert Engine(target, drafter).complete([[1, 2, 3]], SamplingParams(), StopParams(20)) == expected
        assert drafter._forward.stack is None


def _assign(module: torch.nn.Module) -> None:
    """New memory for every weight, which frees the old one unless somebody holds it."""
    module.load_state_dict({name: each.clone() for name, each in module.state_dict().items()}, assign=True)


def _data(module: torch.nn.Module) -> None:
    for each in (*module.parameters(), *module.buffers()):
        each.data = each.data.clone()


@pytest.mark.parametrize("how", [_assign, _data])
@pytest.mark.parametrize("where", ["embedding", "fc", "context", "lm_head"])
def test_weights_that_are_assigned_are_never_read_where_they_were(
    how: Callable[[torch.nn.Module], None], where: str
) -> None:
    target = made(KINDS["llama"])
    assert target.use_one_call()
    sizes = FeatExtrapolatorConfig.for_target(target.config, layer_ids=(0, 2, 3))
    drafter = EagleDrafter(target, Head(FeatExtrapolator(sizes).requires_grad_(False), None, {}))
    engine, law = Engine(target, drafter), (SamplingParams(), StopParams(20))
    expected = engine.complete([[1, 2, 3]], *law)
    native_head, one_call = drafter._forward.native_head, drafter._prepared(drafter.configs[1], None)
    assert native_head is not None and one_call is not None and one_call.one_call is not None
    addresses = [part.packed for part in (native_head.structure.fc, one_call.one_call._draft.lm)]
    holders: dict[str, Any] = {"embedding": target.embedding, "lm_head": drafter._lm_head}
    how(holders.get(where) or getattr(drafter._module, where))
    del holders
    assert engine.complete([[1, 2, 3]], *law) == expected
    if where == "lm_head":
        assert one_call.one_call._draft.lm.packed == target.lm_head.packed.data_ptr() != addresses[1]  # type: ignore[operator]
    else:
        assert drafter._forward.native_head is None and drafter._forward.stack is not None
    # What the old structures point to has stayed what it was, as long as they exist.
    memory = [held.data_ptr() for kept in native_head._referenced for held in kept]  # type: ignore[attr-defined]
    assert native_head.structure.fc.packed == addresses[0] and addresses[0] in memory
    assert native_head.structure.embedding.packed in memory and native_head.structure.context.packed in memory


@pytest.mark.parametrize(
    "form",
    [
        {"fc_bias": True},
        {"fc_bias": True, "qkv_bias": True},
        {"o_bias": True},
        {"qk_norm": True},
        {"own_embedding": True},
        {"norms": True},
        {"norms": True, "norm_output": True},
        {"embedding_scale": 4.0},
    ],
)
def test_heads_of_others_draft_in_one_call_as_by_modules(form: dict[str, Any]) -> None:
    target = made(KINDS["llama"])
    target.use_one_call()
    torch.manual_seed(7)
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config, **form)).requires_grad_(False)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and parameter.dim() == 1), std=0.3)
    head = Head(module.eval(), torch.arange(0, 61, 2), {})
    trees = [proposals(target, head, DraftShape(nodes=8, depth=3), 0.0, native_code) for native_code in (True, False)]
    assert len(trees[0]) == len(trees[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*trees, strict=True))
