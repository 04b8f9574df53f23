"""The native kernels and the packed linears: right, and bit for bit independent of what stands beside a row."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from haast import native
from haast.speed.packing import PackedLinear, pack_linears

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
SIZES = [1, 15, 16, 17, 100, 577]
MASKED = torch.finfo(torch.float32).min


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
                native.linear(x, packed, None, b, out_features), exact_linear(x, weight, b), rtol=1e-5, atol=1e-4
            )


@needs_native
@pytest.mark.parametrize(("in_features", "out_features"), [(100, 577), (577, 100), (64, 2048), (17, 15)])
def test_linear_rows_are_independent_bit_for_bit(in_features: int, out_features: int) -> None:
    packed, bias = native.pack_f16(randn(out_features, in_features)), randn(out_features, seed=1)
    x = randn(40, in_features, seed=2)
    alone = torch.cat([native.linear(row, packed, None, bias, out_features, threads=1) for row in x.unsqueeze(1)])
    for rows in range(1, 41):
        for threads in (1, 2):
            among = native.linear(x[40 - rows :], packed, None, bias, out_features, threads=threads)
            assert torch.equal(among, alone[40 - rows :]), f"{rows} rows, {threads} threads"


@needs_native
def test_linear_ignores_what_the_other_rows_hold() -> None:
    packed = native.pack_f16(randn(48, 32))
    x = randn(8, 32)
    expected = native.linear(x, packed, None, None, 48)[3]
    x[[0, 1, 2, 4, 5, 6, 7]] = torch.nan
    assert torch.equal(native.linear(x, packed, None, None, 48)[3], expected)


@needs_native
def test_linear_takes_strided_and_empty_input() -> None:
    weight = randn(20, 12)
    packed = native.pack_f16(weight)
    wide = randn(9, 24)
    for x in (wide[:, :12], wide[:, ::2], wide[::2, 3:15], randn(12, 5).t(), randn(2, 3, 12), randn(2, 12, 3).mT):
        torch.testing.assert_close(native.linear(x, packed, None, None, 20), exact_linear(x, weight, None))
    assert native.linear(torch.empty(0, 12), packed, None, None, 20).shape == (0, 20)
    assert native.linear(torch.empty(3, 0, 12), packed, None, None, 20).shape == (3, 0, 20)
    assert native.linear(wide[0, :12], packed, None, None, 20).shape == (20,)


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
    fast = native.linear(x, packed, None, None, 50)
    with native.narrow_path():
        slow = native.linear(x, packed, None, None, 50)
        assert torch.equal(native.linear(x[4:5], packed, None, None, 50), slow[4:5])
    torch.testing.assert_close(slow, fast, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not native.features() & 8, reason="no AVX-512 here")
@pytest.mark.parametrize(("in_features", "out_features"), [(100, 577), (577, 100), (64, 2048), (17, 15), (3, 129)])
def test_avx512_and_avx2_give_the_same_bits(in_features: int, out_features: int) -> None:
    packed, bias = native.pack_f16(randn(out_features, in_features)), randn(out_features, seed=1)
    x = randn(31, in_features, seed=2)
    for rows in range(1, 32):
        for b in (None, bias):
            wide = native.linear(x[:rows], packed, None, b, out_features)
            with native.narrow_path(1):
                narrow = native.linear(x[:rows], packed, None, b, out_features)
            assert torch.equal(wide, narrow), f"{rows} rows"


@needs_native
def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    packed, x = native.pack_f16(randn(640, 128)), randn(12, 128)
    expected = native.linear(x, packed, None, None, 640, threads=1)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            if not torch.equal(native.linear(x, packed, None, None, 640, threads=2), expected):
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
        native.linear(torch.zeros(1, 12, dtype=torch.float64), packed, None, None, 20)
    with pytest.raises(ValueError, match="12 inputs"):
        native.linear(torch.zeros(1, 13), packed, None, None, 20)
    with pytest.raises(ValueError, match="out_features is 33"):
        native.linear(torch.zeros(1, 12), packed, None, None, 33)
    with pytest.raises(ValueError, match="bias"):
        native.linear(torch.zeros(1, 12), packed, None, torch.zeros(19), 20)
    with pytest.raises(ValueError, match="no_grad"):
        native.linear(torch.zeros(1, 12, requires_grad=True), packed, None, None, 20)
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
    whole = native.tree_attention(q, k, v, mask, 0.125)
    assert torch.equal(native.tree_attention(q, k, v, mask, 0.125, threads=1), whole)
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


# ------------------------------------------------------------------ packed modules


@pytest.mark.parametrize("reference", [False, True])
def test_packed_linear_is_a_linear_with_rounded_weights(reference: bool) -> None:
    linear = nn.Linear(33, 50)
    packed = PackedLinear.from_weight(linear.weight, linear.bias, reference=reference)
    assert (packed.in_features, packed.out_features) == (33, 50)
    assert torch.equal(packed.unpack(), linear.weight.half().float())
    x = randn(2, 5, 33)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), exact_linear(x, linear.weight, linear.bias))
        assert packed(x[:0]).shape == (0, 5, 50)


def test_packed_linear_names_the_remedy() -> None:
    packed = PackedLinear.from_weight(randn(4, 4))
    with pytest.raises(ValueError, match=r"bfloat16 on cpu.*dtype=torch.float32"):
        packed(torch.zeros(1, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="meta"):
        packed(torch.zeros(1, 4, device="meta"))
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        PackedLinear.from_weight(torch.zeros(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="outputs"):
        PackedLinear.from_weight(torch.zeros(4, 4), torch.zeros(5))


@needs_native
def test_packed_weights_outlive_casts_of_the_model() -> None:
    packed, x = PackedLinear.from_weight(randn(20, 12)), randn(3, 12)
    expected = packed(x)
    assert torch.equal(packed.double().float()(x), expected)
    assert torch.equal(packed.bfloat16()(x), expected)


@needs_native
def test_the_operator_traces_and_agrees() -> None:
    packed, x = PackedLinear.from_weight(randn(20, 12), randn(20)), randn(3, 12)
    torch.library.opcheck(torch.ops.haast.linear.default, (x, packed.packed, packed.scale, packed.bias, 20))
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
    report = pack_linears(model, reference=reference)
    round_linears(rounded)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-5)
    assert report.layers == layers
    assert report.native == (native.available() and not reference)
    assert bool(report.note) != report.native
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
