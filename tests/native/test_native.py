"""The native kernels and the packed linears: right, and bit for bit independent of what stands beside a row.

Whole layers over block tables are held to the model's own modules, bit for bit, wherever the blocks lie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from haast import native
from haast.core import SamplingParams
from haast.engine.verify import verify
from haast.native.library import thread_count
from haast.sampling import Sampler
from haast.target.fusing import fuse_small_modules
from haast.target.kv_pool import BLOCK
from haast.target.native_cpu import NativeStack
from haast.target.packing import PackedLinear, pack_linears
from haast.tree import DraftTree

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
SIZES = [1, 15, 16, 17, 100, 577]
MASKED = torch.finfo(torch.float32).min


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block kernels that this thread calls run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp16-rounded weights, sums in fp64."""
    return functional.linear(x.double(), weight.half().double(), None if bias is None else bias.double()).float()


# ------------------------------------------------------------------ linear


@needs_native
@pytest.mark.parametrize("in_features", SIZES)
@pytest.mark.parametrize("out_features", SIZES)
def test_linear_is_right_for_odd_sizes(in_features: int, out_features: int) -> None:
    weight, bias = randn(out_features, in_features), randn(out_features, seed=1)
    packed = native.pack_f16(weight)
    for rows in (1, 2, 3, 5, 7, 13):
        x = randn(rows, in_features, seed=rows)
        for b in (None, bias):
            torch.testing.assert_close(
                native.linear(x, packed, b, packed.size(1), out_features),
                exact_linear(x, weight, b),
                rtol=1e-5,
                atol=1e-4,
            )


@needs_native
@pytest.mark.parametrize(("in_features", "out_features"), [(100, 577), (577, 100), (64, 2048), (17, 15)])
def test_linear_rows_are_independent_bit_for_bit(in_features: int, out_features: int) -> None:
    packed, bias = native.pack_f16(randn(out_features, in_features)), randn(out_features, seed=1)
    x = randn(40, in_features, seed=2)
    with threads(1):
        alone = torch.cat([native.linear(row, packed, bias, packed.size(1), out_features) for row in x.unsqueeze(1)])
    for rows in range(1, 41):
        for count in (1, 2):
            with threads(count):
                among = native.linear(x[40 - rows :], packed, bias, packed.size(1), out_features)
            assert torch.equal(among, alone[40 - rows :]), f"{rows} rows, {count} threads"


@needs_native
def test_linear_ignores_what_the_other_rows_hold() -> None:
    packed = native.pack_f16(randn(48, 32))
    x = randn(8, 32)
    expected = native.linear(x, packed, None, packed.size(1), 48)[3]
    x[[0, 1, 2, 4, 5, 6, 7]] = torch.nan
    assert torch.equal(native.linear(x, packed, None, packed.size(1), 48)[3], expected)


@needs_native
def test_linear_takes_strided_and_empty_input() -> None:
    weight = randn(20, 12)
    packed = native.pack_f16(weight)
    wide = randn(9, 24)
    for x in (wide[:, :12], wide[:, ::2], wide[::2, 3:15], randn(12, 5).t(), randn(2, 3, 12), randn(2, 12, 3).mT):
        torch.testing.assert_close(native.linear(x, packed, None, packed.size(1), 20), exact_linear(x, weight, None))
    assert native.linear(torch.empty(0, 12), packed, None, packed.size(1), 20).shape == (0, 20)
    assert native.linear(torch.empty(3, 0, 12), packed, None, packed.size(1), 20).shape == (3, 0, 20)
    assert native.linear(wide[0, :12], packed, None, packed.size(1), 20).shape == (20,)


@needs_native
def test_packing_rounds_as_torch_does_on_both_paths() -> None:
    weight = torch.cat(
        [randn(20, 33), randn(20, 33) * 1e-5, randn(20, 33) * 1e-7, randn(20, 33) * 1e4, torch.zeros(1, 33)]
    )
    rows = native.pack_f16(weight).view(torch.float16).transpose(1, 2).reshape(-1, 33)
    assert torch.equal(rows[:81], weight.half())
    assert not rows[81:].any()
    with native.narrow_path():
        assert torch.equal(native.pack_f16(weight), native.pack_f16(weight))
        again = native.pack_f16(weight)
    assert torch.equal(again, native.pack_f16(weight))


@needs_native
def test_scalar_linear_agrees_and_is_row_independent() -> None:
    packed, x = native.pack_f16(randn(50, 70) * 1e-3), randn(9, 70)
    fast = native.linear(x, packed, None, packed.size(1), 50)
    with native.narrow_path():
        slow = native.linear(x, packed, None, packed.size(1), 50)
        assert torch.equal(native.linear(x[4:5], packed, None, packed.size(1), 50), slow[4:5])
    torch.testing.assert_close(slow, fast, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not native.features() & 8, reason="no AVX-512 here")
@pytest.mark.parametrize(("in_features", "out_features"), [(100, 577), (577, 100), (64, 2048), (17, 15), (3, 129)])
def test_avx512_and_avx2_give_the_same_bits(in_features: int, out_features: int) -> None:
    packed, bias = native.pack_f16(randn(out_features, in_features)), randn(out_features, seed=1)
    x = randn(31, in_features, seed=2)
    for rows in range(1, 32):
        for b in (None, bias):
            wide = native.linear(x[:rows], packed, b, packed.size(1), out_features)
            with native.narrow_path(1):
                narrow = native.linear(x[:rows], packed, b, packed.size(1), out_features)
            assert torch.equal(wide, narrow), f"{rows} rows"


@needs_native
def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    packed, x = native.pack_f16(randn(640, 128)), randn(12, 128)
    with threads(1):
        expected = native.linear(x, packed, None, packed.size(1), 640)
    wrong: list[int] = []

    def work(number: int) -> None:
        _set_own_threads(2)
        for _ in range(200):
            if not torch.equal(native.linear(x, packed, None, packed.size(1), 640), expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_native
def test_bad_input_is_refused_by_name() -> None:
    packed = native.pack_f16(randn(20, 12))
    with pytest.raises(ValueError, match="float64"):
        native.linear(torch.zeros(1, 12, dtype=torch.float64), packed, None, packed.size(1), 20)
    with pytest.raises(ValueError, match="12 inputs"):
        native.linear(torch.zeros(1, 13), packed, None, packed.size(1), 20)
    with pytest.raises(ValueError, match="out_features is 33"):
        native.linear(torch.zeros(1, 12), packed, None, packed.size(1), 33)
    with pytest.raises(ValueError, match="bias"):
        native.linear(torch.zeros(1, 12), packed, torch.zeros(19), packed.size(1), 20)
    with pytest.raises(ValueError, match="no_grad"):
        native.linear(torch.zeros(1, 12, requires_grad=True), packed, None, packed.size(1), 20)
    with pytest.raises(ValueError, match="65504"):
        native.pack_f16(torch.full((1, 1), 7e4))
    with pytest.raises(ValueError, match="mask has shape"):
        native.tree_attention(randn(1, 2, 1, 8), randn(1, 1, 4, 8), randn(1, 1, 4, 8), torch.zeros(1, 1, 1, 3), 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        native.tree_attention(randn(1, 3, 1, 8), randn(1, 2, 4, 8), randn(1, 2, 4, 8), None, 1.0)


# ------------------------------------------------------------------ attention


def tree_mask(rows: int, n: int, past: int, spare: int, seed: int) -> Tensor:
    """A random tree per row after a padded past, and slots nobody has written: (rows, 1, n, past + n + spare)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.full((rows, 1, n, past + n + spare), MASKED)
    for row in range(rows):
        mask[row, 0, :, row:past] = 0.0  # row many padding slots on the left
        for node in range(n):
            if node:
                parent = int(torch.randint(node, (1,), generator=generator))
                mask[row, 0, node, past : past + n] = mask[row, 0, parent, past : past + n]
            mask[row, 0, node, past + node] = 0.0
    return mask


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = mask <= -1e30
    scores = (scores + mask.double().masked_fill(hidden, 0.0)).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a node that sees nothing
    return (weights @ v).transpose(1, 2).float()


@needs_native
@pytest.mark.parametrize("d", [16, 20, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention_is_right_on_random_trees(d: int, group: int, softcap: float) -> None:
    for n, past, spare in ((1, 0, 0), (1, 40, 3), (7, 21, 5), (24, 100, 0)):
        slots = past + n + spare
        q, k, v = randn(2, 2 * group, n, d), randn(2, 2, slots, d, seed=1), randn(2, 2, slots, d, seed=2)
        mask = tree_mask(2, n, past, spare, seed=n)
        bias = randn(2, 1, n, slots, seed=3)  # a mask may carry a bias (ALiBi), not only 0 and -inf
        for m in (mask, torch.where(mask == 0.0, bias, -torch.inf)):
            expected = reference_attention(q, k, v, m, d**-0.5, softcap)
            torch.testing.assert_close(
                native.tree_attention(q, k, v, m, d**-0.5, softcap), expected, rtol=1e-5, atol=2e-6
            )
            with native.narrow_path():
                slow = native.tree_attention(q, k, v, m, d**-0.5, softcap)
            torch.testing.assert_close(slow, expected, rtol=1e-5, atol=2e-6)


@needs_native
@pytest.mark.parametrize("d", [16, 64, 80])
def test_attention_of_a_node_is_the_same_alone_and_among_others(d: int) -> None:
    n, past = 24, 93
    q, k, v = randn(1, 9, n, d), randn(1, 3, past + n, d, seed=1), randn(1, 3, past + n, d, seed=2)
    mask = tree_mask(1, n, past, 0, seed=4)
    with threads(2):
        whole = native.tree_attention(q, k, v, mask, 0.125)
    with threads(1):
        assert torch.equal(native.tree_attention(q, k, v, mask, 0.125), whole)
    for node in range(n):
        seen = mask[0, 0, node] == 0.0  # as vanilla would run it: its own path, contiguous, nothing else in the cache
        alone = native.tree_attention(q[:, :, node : node + 1], k[:, :, seen], v[:, :, seen], None, 0.125)
        assert torch.equal(alone[:, 0], whole[:, node]), f"node {node}"
        some = native.tree_attention(q[:, :, node : node + 3], k, v, mask[:, :, node : node + 3], 0.125)
        assert torch.equal(some[:, 0], whole[:, node])


@needs_native
def test_attention_rows_are_independent_and_masks_broadcast() -> None:
    q, k, v = randn(3, 4, 5, 32), randn(3, 2, 30, 32, seed=1), randn(3, 2, 30, 32, seed=2)
    mask = tree_mask(1, 5, 25, 0, seed=1)
    whole = native.tree_attention(q, k, v, mask, 1.0)
    assert torch.equal(native.tree_attention(q, k, v, mask.expand(3, -1, -1, -1), 1.0), whole)
    for row in range(3):
        pick = slice(row, row + 1)
        assert torch.equal(native.tree_attention(q[pick], k[pick], v[pick], mask, 1.0), whole[pick])


@needs_native
def test_attention_reads_views_of_a_cache_and_never_an_unseen_slot() -> None:
    cache = torch.full((2, 1, 3, 64, 16), torch.nan)  # (k or v, rows, kv heads, capacity, d)
    cache[..., :20, :] = randn(2, 1, 3, 20, 16)
    q = randn(1, 4, 6, 16).transpose(1, 2)  # (1, 6, 4, 16), as a projection leaves it
    mask = tree_mask(1, 4, 16, 44, seed=2)
    got = native.tree_attention(q, cache[0], cache[1], mask, 0.25)
    small = cache[..., :20, :].contiguous()
    torch.testing.assert_close(
        got, reference_attention(q, small[0], small[1], mask[..., :20], 0.25, 0.0), rtol=1e-5, atol=2e-6
    )


@needs_native
@pytest.mark.parametrize("masked", [MASKED, -torch.inf, -1e30])
def test_a_node_that_sees_nothing_gets_zeros(masked: float) -> None:
    q, k, v = randn(1, 4, 3, 16), randn(1, 2, 11, 16), randn(1, 2, 11, 16)
    mask = torch.zeros(1, 1, 3, 11)
    mask[:, :, 1] = masked
    for scalar in (False, True):
        if scalar:
            with native.narrow_path():
                out = native.tree_attention(q, k, v, mask, 0.25)
        else:
            out = native.tree_attention(q, k, v, mask, 0.25)
        assert not out[:, 1].any()
        assert out.isfinite().all()


@needs_native
def test_attention_survives_large_scores() -> None:
    q, k, v = randn(1, 2, 2, 16) * 1e3, randn(1, 1, 40, 16) * 1e3, randn(1, 1, 40, 16)
    mask = torch.zeros(1, 1, 2, 40)
    for softcap in (0.0, 30.0):
        expected = reference_attention(q, k, v, mask, 1.0, softcap)
        torch.testing.assert_close(native.tree_attention(q, k, v, mask, 1.0, softcap), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ row-wise helpers


@needs_native
@pytest.mark.parametrize("dim", [1, 7, 8, 576, 1537])
def test_rms_norm_and_swiglu(dim: int) -> None:
    x, weight, gate_up = randn(3, 37, dim) * 3, randn(dim, seed=1), randn(37, 2 * dim, seed=2) * 20
    expected = functional.rms_norm(x.double(), [dim], weight.double(), 1e-5).float()
    silu = (functional.silu(gate_up[:, :dim].double()) * gate_up[:, dim:].double()).float()
    fast = native.rms_norm(x, weight, 1e-5), native.swiglu(gate_up)
    with native.narrow_path():
        slow = native.rms_norm(x, weight, 1e-5), native.swiglu(gate_up)
    for norm, gated in (fast, slow):
        torch.testing.assert_close(norm, expected, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gated, silu, rtol=2e-6, atol=1e-6)
    assert torch.equal(native.rms_norm(x[1, 5], weight, 1e-5), fast[0][1, 5])
    assert torch.equal(native.swiglu(gate_up[9]), fast[1][9])


# ------------------------------------------------------------------ layers over block tables

LAYERS: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
STACKS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LAYERS),
    "mistral, window": MistralConfig(**LAYERS, sliding_window=21),
    "qwen3, norms of heads": Qwen3Config(**LAYERS),
    "heads of 64": LlamaConfig(**{**LAYERS, "head_dim": 64}),
    "heads of 6": LlamaConfig(**{**LAYERS, "head_dim": 6}),  # the portable attention
}
FORMS = [torch.float32, torch.float16, torch.bfloat16]
SLOTS = 20 * BLOCK


class Layers:
    """A small model's decoder layers: by one native call over a store of blocks, and by modules."""

    def __init__(self, config: PretrainedConfig) -> None:
        torch.manual_seed(3)
        make: Any = AutoModelForCausalLM.from_config  # untyped
        model: Any = make(config).requires_grad_(False)
        pack_linears(model)
        fuse_small_modules(model)
        self.decoder, self.config = model.model, config
        stack = NativeStack.of(list(self.decoder.layers), self.decoder.norm, self.decoder.rotary_emb)
        assert stack is not None
        self.stack, self.window = stack, getattr(config, "sliding_window", None)

    def store(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """One that nobody has written to; what is read all the same makes the results NaN."""
        return torch.full((6, self.stack.kv_heads, SLOTS, self.stack.head_dim), torch.nan, dtype=dtype)

    def run(
        self, states: Tensor, past: list[int], store: Tensor, tables: Tensor, seen: Tensor, depths: Tensor, **kw: Any
    ) -> Tensor:
        """(rows, nodes, hidden) behind `past`, at positions past + depth."""
        positions = torch.tensor(past).unsqueeze(1) + depths
        return self.stack.run(states.clone(), positions, seen, past, store, tables, **kw)[0]

    def chain(self, states: Tensor, past: list[int], store: Tensor, tables: Tensor, **kw: Any) -> Tensor:
        nodes = states.shape[1]
        seen = torch.ones(len(past), nodes, nodes, dtype=torch.bool).tril()
        return self.run(states, past, store, tables, seen, torch.arange(nodes), **kw)

    def by_modules(self, states: Tensor, seen: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """All of a text at once, (1, slots, hidden), without a cache; keys and values rounded to `dtype`."""

        def rounded(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kw: Any) -> tuple[Tensor, None]:
            k, v = (each.to(dtype).float() for each in (k, v))
            return native.tree_attention(q, k, v, mask, kw["scaling"]), None

        near = positions.unsqueeze(1) - positions.unsqueeze(0) < (self.window or 10**6)
        mask = torch.zeros(seen.shape).masked_fill(~(seen & near), MASKED)[None, None]
        AttentionInterface.register("rounded", rounded)
        before, self.config._attn_implementation = self.config._attn_implementation, "rounded"
        try:
            angles = self.decoder.rotary_emb(states, position_ids=positions.unsqueeze(0))
            for layer in self.decoder.layers:
                states = layer(states, attention_mask=mask, position_embeddings=angles)
            output: Tensor = self.decoder.norm(states)
        finally:
            self.config._attn_implementation = before
        return output


def table(rows: int, blocks: int, seed: int) -> Tensor:
    """Blocks in any order, none twice; block 0 is nobody's."""
    order = torch.randperm(SLOTS // BLOCK - 1, generator=torch.Generator().manual_seed(seed))
    return (1 + order[: rows * blocks]).view(rows, blocks).int()


def small_tree(nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """What each node of a random tree sees (nodes, nodes), and depths (nodes,)."""
    seen, generator = torch.eye(nodes, dtype=torch.bool), torch.Generator().manual_seed(seed)
    for node in range(1, nodes):
        seen[node] |= seen[int(torch.randint(node, (), generator=generator))]
    return seen, seen.sum(1) - 1


@needs_native
@pytest.mark.parametrize("kind", sorted(STACKS))
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("shift", [0, 1])
def test_layers_over_blocks_have_the_bits_of_the_modules(kind: str, dtype: torch.dtype, shift: int) -> None:
    """A prompt in two parts and a tree behind it; 16 bits are held to modules that round keys and values alike."""
    layers, prompt, nodes = Layers(STACKS[kind]), 45, 9
    states = randn(1, prompt + nodes, 48)
    tree, depths = small_tree(nodes, seed=1)
    seen = torch.ones(prompt + nodes, prompt + nodes, dtype=torch.bool).tril()
    seen[prompt:, prompt:] = tree
    positions = torch.cat([torch.arange(prompt), prompt + depths])
    expected = layers.by_modules(states, seen, positions, dtype)
    store, tables = layers.store(dtype), table(1, 4, seed=shift)
    parts = [
        layers.chain(states[:, :20], [0], store, tables, shift=shift),
        layers.chain(states[:, 20:prompt], [20], store, tables, shift=shift),
        layers.run(states[:, prompt:], [prompt], store, tables, tree.unsqueeze(0), depths, shift=shift),
    ]
    assert torch.equal(torch.cat(parts, 1), expected)
    written = store.isfinite()[0, 0, :, 0].nonzero().flatten().tolist()
    logical = range(shift, shift + prompt + nodes)
    assert written == sorted(int(tables[0, i // BLOCK]) * BLOCK + i % BLOCK for i in logical)


@needs_native
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("kind", ["llama", "heads of 64", "heads of 6", "mistral, window"])
def test_where_the_blocks_lie_and_who_else_runs_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    layers, lengths, nodes = Layers(STACKS[kind]), [61, 33, 5], 7
    states, prompts = randn(3, nodes, 48), randn(3, 61, 48, seed=1)
    trees = [small_tree(nodes, seed) for seed in range(3)]
    seen, depths = torch.stack([tree[0] for tree in trees]), torch.stack([tree[1] for tree in trees])

    def together(tables: Tensor, shift: int) -> Tensor:
        store = layers.store(dtype)
        layers.chain(prompts, [0, 0, 0], store, tables, shift=shift)
        return layers.run(states, lengths, store, tables, seen, depths, shift=shift)

    contiguous = 1 + torch.arange(15, dtype=torch.int32).view(3, 5)
    whole = together(contiguous, 0)
    assert whole.isfinite().all()
    for tables, shift in ((table(3, 5, 0), 0), (table(3, 5, 1), 1), (contiguous.flip(0, 1), 0), (contiguous, 1)):
        assert torch.equal(together(tables, shift), whole)
    for row in range(3):
        store, one, own = layers.store(dtype), slice(row, row + 1), table(1, 5, row)
        layers.chain(prompts[one, : lengths[row]], [0], store, own)
        alone = layers.run(states[one], [lengths[row]], store, own, seen[one], depths[one])
        assert torch.equal(alone[0], whole[row])


@needs_native
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_may_share_the_blocks_of_a_prefix(shift: int) -> None:
    layers, prefix = Layers(STACKS["llama"]), 2 * BLOCK - shift
    states = randn(1, prefix, 48)
    ends = randn(3, 10, 48, seed=1)
    store, own = layers.store(), table(1, 5, seed=4)[0]
    layers.chain(states, [0], store, own[:2].unsqueeze(0).contiguous(), shift=shift)
    shared = torch.stack([torch.cat([own[:2], own[2 + row : 3 + row]]) for row in range(3)])
    among = layers.chain(ends, [prefix] * 3, store, shared, shift=shift)
    for row in range(3):
        store = layers.store()
        alone = layers.chain(torch.cat([states, ends[row : row + 1]], 1), [0], store, table(1, 3, row), shift=shift)
        assert torch.equal(alone[0, prefix:], among[row])


@needs_native
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("kind", ["llama", "heads of 64"])
def test_every_path_reads_every_form(kind: str, dtype: torch.dtype) -> None:
    layers, states, tables = Layers(STACKS[kind]), randn(1, 75, 48), table(1, 5, 2)
    seen, found = torch.ones(75, 75, dtype=torch.bool).tril(), list[tuple[Tensor, Tensor]]()
    for at_most in (0, 1, 3):
        store = layers.store(dtype)
        with native.narrow_path(at_most):
            output = layers.chain(states, [0], store, tables)
            assert torch.equal(output, layers.by_modules(states, seen, torch.arange(75), dtype))
        found.append((output, store.nan_to_num(9.0)))
    for narrow, wide in zip(found[1], found[2], strict=True):  # AVX-512 gives AVX2's bits
        assert torch.equal(narrow, wide)


@needs_native
@pytest.mark.parametrize("at_most", [0, 1, 2])
@pytest.mark.parametrize("dtype", FORMS[1:])
def test_keys_and_values_are_rounded_as_torch_rounds(dtype: torch.dtype, at_most: int) -> None:
    layers, tables = Layers(LlamaConfig(**{**LAYERS, "head_dim": 18}, attention_bias=True)), table(1, 1, 0)
    special = [1e-8, -3e-8, 6e-8, 5e-5, 65504.0, 65519.0, 65520.0, -1e6, 3.38e38, 1.00048828125, 1.00390625, 1.01171875]
    bias = layers.decoder.layers[0].self_attn.qkv_proj.bias
    bias[-36:] = torch.tensor(special * 3)
    exact = layers.store()
    states = torch.cat([torch.zeros(1, 1, 48), randn(1, 9, 48)], 1)
    with native.narrow_path(at_most):
        layers.chain(states, [0], exact, tables)
        rounded = layers.store(dtype)
        layers.chain(states, [0], rounded, tables)
    written = exact[0, 0, :, 0].isfinite()
    assert written.sum() == 10
    for which in (0, 1):  # of the first layer, whose keys and values depend on none before
        assert torch.equal(rounded[which][:, written], exact[which][:, written].to(dtype))


@needs_native
def test_past_and_windows_bound_what_must_be_there() -> None:
    """Blocks that lie before every layer's window may be gone; with a layer that sees all, none."""
    windowed, tables = Layers(STACKS["mistral, window"]), table(1, 5, 0)
    states, store = randn(1, 70, 48), windowed.store()
    whole = windowed.chain(states, [0], store, tables)
    gone = tables.clone()
    gone[0, :2] = -1
    assert torch.equal(windowed.chain(states[:, 60:], [60], store, gone), whole[:, 60:])
    with pytest.raises(ValueError, match="from -1 to"):
        windowed.chain(states[:, 40:], [40], store, gone)
    plain = Layers(STACKS["llama"])
    with pytest.raises(ValueError, match=r"from -1 to .* has 20"):
        plain.chain(states[:, 60:], [60], plain.store(), gone)


@needs_native
def test_lengths_may_be_a_tensor_and_angles_grow() -> None:
    layers, tables = Layers(STACKS["llama"]), table(2, 3, 0)
    states, store = randn(2, 4, 48), layers.store()
    seen = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    positions = torch.tensor([[7], [900]]) + torch.arange(4)  # more than the angles that there are at first
    expected, _ = layers.stack.run(states.clone(), positions, seen, [0, 0], store, tables)
    past = torch.tensor([0, 0])
    found, taken = layers.stack.run(states.clone(), positions, seen, past, store, tables, capture=(0, 3))
    assert torch.equal(found, expected) and torch.equal(taken[0], states) and torch.equal(taken[3], expected)


@needs_native
def test_what_does_not_fit_the_layers_is_refused_before_anything_is_written() -> None:
    layers, tables = Layers(STACKS["llama"]), table(1, 2, 0)
    store, states = layers.store(), randn(1, 2, 48)
    seen, at = torch.ones(1, 2, 2, dtype=torch.bool).tril(), torch.arange(2).unsqueeze(0)
    run = layers.stack.run
    bad: dict[str, tuple[Any, ...]] = {
        r"31 past slots, 2 in flight and a shift of 0 .* 2 blocks of 16": (states, at, seen, [31], store, tables),
        r"must not be negative": (states, at, seen, [-1], store, tables),
        r"positions .* must not be negative": (states, at - 1, seen, [0], store, tables),
        r"contain blocks from .* to 20; the store has 20": (states, at, seen, [9], store, tables * 0 + 20),
        r"past has 2 numbers for 1 rows": (states, at, seen, [9, 9], store, tables),
        r"past is torch.int32": (states, at, seen, torch.tensor([9], dtype=torch.int32), store, tables),
        r"store of torch.float64": (states, at, seen, [9], store.double(), tables),
        r"does not fit 3 layers of 2 key heads of 16": (states, at, seen, [9], store[:4], tables),
        r"slots a multiple of 16": (states, at, seen, [9], store[:, :, :33].contiguous(), tables),
        r"block tables are torch.int64": (states, at, seen, [9], store, tables.long()),
        r"block tables .* shape \(2, 2\)": (states, at, seen, [9], store, tables.repeat(2, 1)),
        r"states are torch.float64": (states.double(), at, seen, [9], store, tables),
        r"states .* expected contiguous fp32 \(1, 2, 48\)": (states[..., :40], at, seen, [9], store, tables),
        r"positions \(1, 2\) torch.int32 .* do not fit": (states, at.int(), seen, [9], store, tables),
        r"positions \(1, 3\)": (states, torch.arange(3).unsqueeze(0), seen, [9], store, tables),
        r"flight at least nodes": (states, at, seen[:, :, :1], [9], store, tables),
    }
    for match, arguments in bad.items():
        with pytest.raises(ValueError, match=match):
            run(*arguments)
    with pytest.raises(ValueError, match="30 past slots, 2 in flight and a shift of 1"):
        run(states, at, seen, [30], store, tables, shift=1)
    with pytest.raises(ValueError, match="shift -1"):
        run(states, at, seen, [3], store, tables, shift=-1)
    with pytest.raises(ValueError, match=r"flight_positions \(1, 3\)"):
        run(states, at, seen, [3], store, tables, flight_positions=torch.arange(3).unsqueeze(0))
    assert store.isnan().all()
    windowed = Layers(STACKS["mistral, window"])
    with pytest.raises(ValueError, match="windows need flight_positions"):
        windowed.stack.run(states, at, torch.ones(1, 2, 4, dtype=torch.bool), [0], windowed.store(), tables)


@needs_native
def test_threads_run_one_stack_over_one_store() -> None:
    """Rows of their own in a store that they share, as several engines of a process have."""
    layers, tables, states = Layers(STACKS["llama"]), table(3, 4, 0), randn(3, 50, 48)
    expected = layers.chain(states, [0] * 3, layers.store(), tables)
    store, wrong = layers.store(), list[int]()

    def work(row: int) -> None:
        one = slice(row, row + 1)
        for _ in range(20):
            if not torch.equal(layers.chain(states[one], [0], store, tables[one])[0], expected[row]):
                wrong.append(row)

    _in_threads(work, 3)
    assert not wrong


# ------------------------------------------------------------------ keeping nodes

TABLES = torch.tensor([[7, 2, 9, 0], [3, 8, 1, 5]], dtype=torch.int32)  # blocks of 4 slots


def physical(row: int, slot: int, shift: int) -> int:
    return int(TABLES[row, (slot + shift) // 4]) * 4 + (slot + shift) % 4


@needs_native
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shift", [0, 1])
def test_kept_nodes_move_up_in_turn(dtype: torch.dtype, count: int, shift: int) -> None:
    store = randn(8, 3, 40, 20).to(dtype)
    lengths, counts = torch.tensor([3, 6]), torch.tensor([4, 1])
    path = torch.tensor([[0, 2, 3, 7], [0, 5, 5, 5]])  # nodes 2 and 3 are read before they are written to
    expected = store.clone()
    for row in range(2):
        for place, node in enumerate(path[row, : counts[row]].tolist()):
            source, target = (physical(row, int(lengths[row]) + each, shift) for each in (node, place))
            expected[:, :, target] = expected[:, :, source]
    with threads(count):
        native.keep(store, TABLES, lengths, path, counts, block=4, shift=shift)
    assert torch.equal(store, expected)
    native.keep(store, TABLES, lengths, path[:, :0], counts * 0, block=4)
    assert torch.equal(store, expected)


@needs_native
def test_many_nodes_are_kept_by_several_threads() -> None:
    store, table = randn(60, 4, 400, 64), torch.arange(100, dtype=torch.int32).unsqueeze(0)
    path = torch.arange(0, 400, 2).unsqueeze(0)
    expected = store.clone()
    expected[:, :, :200] = store[:, :, ::2]
    with threads(2):
        native.keep(store, table, torch.tensor([0]), path, torch.tensor([200]), block=4)
    assert torch.equal(store, expected)


@needs_native
def test_what_can_not_be_kept_is_refused() -> None:
    store, table = randn(2, 1, 16, 4), torch.tensor([[0, 3]], dtype=torch.int32)
    before, length, path, count = store.clone(), torch.tensor([2]), torch.tensor([[0, 3]]), torch.tensor([2])
    with pytest.raises(ValueError, match="too short"):
        native.keep(store, table, length, torch.tensor([[0, 6]]), count, block=4)
    with pytest.raises(ValueError, match="too short"):
        native.keep(store, table, torch.tensor([-9]), path, count, block=4)
    with pytest.raises(ValueError, match="not in the store"):
        native.keep(store, table + 1, length, path, count, block=4)
    for wrong in (
        (table.long(), length, path, count), (table, length, path.int(), count), (table, length[:0], path, count),
        (table, length, path, count.unsqueeze(0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="int64"):
            native.keep(store, *wrong, block=4)
    for other in (store.double(), store[0], store.transpose(1, 2)[:, :, :, :2]):
        with pytest.raises(ValueError, match="the store is"):
            native.keep(other, table, length, path, count, block=4)
    assert torch.equal(store, before)


# ------------------------------------------------------------------ judging trees

ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "ties": lambda x: x.round(),
    "all alike": torch.zeros_like,
    "NaN": lambda x: x.masked_fill(x > 1.5, torch.nan),
    "masked": lambda x: x.masked_fill(x < 2, -torch.inf),
    "nothing is possible": lambda x: torch.full_like(x, -torch.inf),
    "infinity": lambda x: x.masked_fill(x > 3, torch.inf),
    "far apart": lambda x: x * 300,
}


@needs_native
@pytest.mark.parametrize("vocab", [5, 256, 1000])
@pytest.mark.parametrize("wide", [0, 1, 2])
@pytest.mark.parametrize("odd", ODD)
def test_trees_are_judged_as_by_tensors(vocab: int, wide: int, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for trial in range(4):
        rows, nodes = 3, 12
        parents = torch.stack([torch.tensor([-1, *(int(torch.randint(i, (), generator=generator)) for i in
                                                   range(1, nodes))]) for _ in range(rows)])  # fmt: skip
        tokens = torch.randint(min(vocab, 3), (rows, nodes), generator=generator)
        live = torch.ones(rows, nodes, dtype=torch.bool)
        live[1, 8:] = False
        live[1] &= live[1].gather(0, parents[1].clamp_min(0))
        placeholder = None if trial % 2 else torch.rand(rows, nodes, generator=generator) < 0.2
        tree = DraftTree.from_parents(tokens, parents, live, placeholder)
        logits = ODD[odd](3 * torch.randn(rows, nodes, vocab, generator=generator))
        samplers = [Sampler(SamplingParams(temperature=t, seed=trial)) for t in (0.0, 0.7, 1.0)]
        histories = [[0] * (row + 1) for row in range(rows)]
        with native.narrow_path(wide):
            found = verify(tree, logits, samplers, histories)
        with monkeypatch.context() as patched:
            patched.setattr(native, "available", lambda: False)
            expected = verify(tree, logits, samplers, histories)
        assert found.rows == expected.rows


@needs_native
def test_draws_fall_where_the_exact_distribution_puts_them() -> None:
    """Against 28 digits of decimal arithmetic, on both sides of every border between two tokens."""
    logits = 4 * torch.randn(1, 1, 300, generator=torch.Generator().manual_seed(1))
    weights = [Decimal(value).exp() for value in logits.flatten().tolist()]
    total, reached = sum(weights), Decimal(0)
    field, live = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for token, weight in enumerate(weights):
        for share in ("0.01", "0.99"):
            draw = float((reached + Decimal(share) * weight) / total)
            out = native.judge(logits, field, field - 1, live, None, temperatures=[1.0], draws=[[draw]])
            assert out.tolist() == [[1, 0, token, -1]]
        reached += weight


@needs_native
def test_what_can_not_be_judged_is_refused() -> None:
    logits, field, live = randn(1, 2, 8), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    drawn: dict[str, Any] = {"temperatures": [1.0], "draws": [[0.5, 0.5]]}
    for wrong in (
        (logits.double(), field, field, live, None), (logits[0], field, field, live, None),
        (logits, field.int(), field, live, None), (logits, field, field[:, :1], live, None),
        (logits, field, field, live.long(), None), (logits, field, field, live, live[:, :1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"float32|dimensions|a tree has a field"):
            native.judge(*wrong, **drawn)
    for name, value in (("temperatures", ()), ("draws", [[]]), ("draws", ())):
        with pytest.raises(ValueError, match="are given; expected"):
            native.judge(logits, field, field, live, None, **{**drawn, name: value})


# ------------------------------------------------------------------ threads


def _in_threads(work: Callable[[int], object], count: int) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _set_own_threads(count: int) -> None:
    torch.get_num_threads()  # at its first use a thread takes the process's count, over what was set before
    torch.set_num_threads(count)


def test_the_kernels_keep_torchs_threads_in_one_thread_alone() -> None:
    before, inside, done = torch.get_num_threads(), threading.Event(), threading.Event()
    seen: dict[str, int] = {}

    def other() -> None:
        _set_own_threads(3)
        inside.wait(10)
        seen["another thread"], seen["its kernels"] = torch.get_num_threads(), thread_count()
        done.wait(10)
        seen["another thread, later"] = torch.get_num_threads()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        torch.set_num_threads(2)
        with native.sole_threads(), native.sole_threads():
            alone = torch.get_num_threads()
            assert alone == 1 or (alone, thread_count()) == (2, 2)  # no OpenMP to be had: nothing is changed
            assert thread_count() == 2
            inside.set()
            _in_threads(lambda _: seen.update({"born inside": torch.get_num_threads()}), 1)
        assert (torch.get_num_threads(), thread_count()) == (2, 2)
    finally:
        inside.set()
        done.set()
        thread.join()
        torch.set_num_threads(before)
    assert seen["born inside"] > 1
    assert seen["another thread"] == seen["its kernels"] == seen["another thread, later"] == 3


def test_threads_that_overlap_each_get_back_what_they_had() -> None:
    before, meet = torch.get_num_threads(), threading.Barrier(2)

    def work(number: int) -> None:
        _set_own_threads(2 + number)
        for _ in range(50):
            meet.wait(10)
            with native.sole_threads():
                assert thread_count() == 2 + number
                if number:
                    meet.wait(10)  # leaves after the other
            if not number:
                meet.wait(10)
            assert torch.get_num_threads() == thread_count() == 2 + number

    try:
        _in_threads(work, 2)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------ packed modules


@pytest.mark.parametrize("reference", [False, True])
def test_packed_linear_is_a_linear_with_rounded_weights(reference: bool) -> None:
    linear = nn.Linear(33, 50)
    packed = PackedLinear(linear.weight, linear.bias, reference=reference)
    assert (packed.in_features, packed.out_features) == (33, 50)
    assert torch.equal(packed.unpack(), linear.weight.half().float())
    x = randn(2, 5, 33)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), exact_linear(x, linear.weight, linear.bias))
        assert packed(x[:0]).shape == (0, 5, 50)


def test_packed_linear_names_the_remedy() -> None:
    packed = PackedLinear(randn(4, 4))
    with pytest.raises(ValueError, match=r"bfloat16 on cpu.*dtype=torch.float32"):
        packed(torch.zeros(1, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="meta"):
        packed(torch.zeros(1, 4, device="meta"))
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        PackedLinear(torch.zeros(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="outputs"):
        PackedLinear(torch.zeros(4, 4), torch.zeros(5))


@needs_native
def test_packed_weights_outlive_casts_of_the_model() -> None:
    packed, x = PackedLinear(randn(20, 12)), randn(3, 12)
    expected = packed(x)
    assert torch.equal(packed.double().float()(x), expected)
    assert torch.equal(packed.bfloat16()(x), expected)


@needs_native
def test_the_operator_traces_and_agrees() -> None:
    packed, x = PackedLinear(randn(20, 12), randn(20)), randn(3, 12)
    torch.library.opcheck(torch.ops.haast.linear.default, (x, packed.packed, packed.bias, 12, 20, "f16"))
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), packed(x))


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("build", "layers"), [(tiny_llama, 2 * 7 + 1), (tiny_gpt2, 2 * 4 + 1)])
def test_a_packed_model_says_what_a_rounded_one_says(
    build: Callable[[], PreTrainedModel], layers: int, reference: bool
) -> None:
    torch.manual_seed(0)
    model, rounded = build().train(False), build().train(False)
    rounded.load_state_dict(model.state_dict())
    embedding: Tensor = model.get_input_embeddings().get_parameter("weight")
    before = embedding.clone()
    pack_linears(model, reference=reference)
    round_linears(rounded)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-5)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == layers
    assert all(module.reference == (reference or not native.available()) for module in packed)
    assert torch.equal(embedding, before)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


def round_linears(model: PreTrainedModel) -> None:
    """Round the weights of every linear to fp16, in plain torch; a tied embedding keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight = nn.Parameter(module.weight.detach().half().float())


def test_pack_linears_names_the_layer_it_cannot_pack() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model.get_submodule("1").get_parameter("weight")[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"cannot pack 1: .*65504"):
        pack_linears(model)
