"""Products with block weights: every GGUF block format against gguf's own numbers, on every code path of this CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf_files import data_of
from torch import Tensor, nn
from torch.nn import functional

from haast import native
from haast.native.library import LANES
from haast.target.packing import PackedEmbedding, PackedLinear, exact_products, linear_sizes, rounded_activations

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

FORMS = sorted(native.BLOCK_FORMS)
PATHS = [0, 1] + [2] * bool(native.features() & (32 | 128)) + [3] * bool(native.features() & 64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(form: str, outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random blocks as in a file, and the weight (outputs, inputs) fp32 that gguf reads from them."""
    rows = data_of((outputs, inputs), form, np.random.default_rng(seed))
    weight = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[form])
    return torch.from_numpy(rows), torch.from_numpy(weight.astype(np.float32))


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of rounded activations, with sums in fp64."""
    return functional.linear(rounded_activations(x).double(), weight.double(), None if bias is None else bias.double())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_formats_have_ggml_s_sizes() -> None:
    sizes = {form: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]] for form in FORMS}
    assert sizes == native.BLOCK_FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", [1, 16, 50])
def test_weights_keep_the_file_s_values(form: str, outputs: int) -> None:
    blocks, weight = blocks_of(form, outputs, 512)
    packed = native.pack_blocks(blocks, form, 512)
    assert packed.shape[0] == -(-outputs // LANES) and packed.shape[1] == native.panel_bytes(form, 512)
    assert torch.equal(native.unpack_rows(packed, form, 512, outputs), weight)
    rows = torch.tensor([[outputs - 1, 0], [0, outputs // 2]])
    assert torch.equal(native.unpack_rows(packed, form, 512, outputs, rows), weight[rows])


@pytest.mark.parametrize("form", FORMS)
def test_a_panel_is_hardly_larger_than_the_file_s_blocks(form: str) -> None:
    blocks, _ = blocks_of(form, 160, 1024)
    packed = native.pack_blocks(blocks, form, 1024)
    most = {"Q2_K": 1.2, "Q3_K": 1.05, "Q4_K": 1.03}.get(form, 1.03)  # scales of fewer than 8 bits take a byte
    assert packed.nbytes <= most * blocks.numel()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 16), (768, 50), (1536, 129)])
def test_every_path_gives_the_same_right_bits(form: str, inputs: int, outputs: int) -> None:
    blocks, weight = blocks_of(form, outputs, inputs)
    packed, bias, x = native.pack_blocks(blocks, form, inputs), randn(outputs), randn(27, inputs, seed=1)
    expected, found = exact(x, weight, bias).float(), dict[int, Tensor]()
    for path in PATHS:
        with native.narrow_path(path):
            found[path] = native.linear(x, packed, bias, inputs, outputs, form)
            for rows in range(1, 14):
                for count in (1, 2):
                    with threads(count):
                        alone = native.linear(x[27 - rows :], packed, bias, inputs, outputs, form)
                    assert torch.equal(alone, found[path][27 - rows :]), f"path {path}, {rows} rows, {count} threads"
        torch.testing.assert_close(found[path], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        assert torch.equal(found[path], found[0]), f"path {path}"


@pytest.mark.parametrize("inputs", [1, 31, 33, 100])
def test_rounding_to_8_bits_takes_any_number_of_inputs(inputs: int) -> None:
    weight, bias, x = randn(37, inputs), randn(37, seed=1), randn(9, inputs, seed=2)
    layer, reference = PackedLinear(weight, bias, form="int8"), PackedLinear(weight, bias, form="int8", reference=True)
    assert torch.equal(layer.unpack(), reference.unpack())
    assert float((layer.unpack() - weight).abs().max()) <= float(weight.abs().max()) / 250
    for path in PATHS:
        with native.narrow_path(path):
            torch.testing.assert_close(layer(x), reference(x), rtol=1e-5, atol=1e-5)


def test_strange_activations() -> None:
    """Zeros and tiny numbers give the bias, and not-a-number and infinity stay in their own row, on every path."""
    blocks, _ = blocks_of("Q4_1", 20, 64)
    packed, bias = native.pack_blocks(blocks, "Q4_1", 64), randn(20)
    x = randn(6, 64, seed=3)
    x[0], x[1], x[2, 5], x[3, 40], x[4] = 0.0, 1e-36, float("nan"), float("inf"), 3e38
    for path in PATHS:
        with native.narrow_path(path):
            y = native.linear(x, packed, bias, 64, 20, "Q4_1")
            assert torch.equal(y[0], bias) and torch.equal(y[1], bias)
            assert not bool(y[2].isfinite().any()) and not bool(y[3].isfinite().any())
            assert torch.equal(y[5], native.linear(x[5:], packed, bias, 64, 20, "Q4_1")[0])
            assert bool(y[5].isfinite().all())


@pytest.mark.parametrize(
    ("forms", "parts"),  # 20 outputs do not fill a panel, so the layer after them stays apart
    [(("Q4_K", "Q4_K", "Q6_K"), 2), (("Q8_0", "Q5_0", "Q5_0"), 3), (("Q4_1",) * 3, 2)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_joined_layers_give_their_own_bits(forms: tuple[str, ...], parts: int, biased: bool) -> None:
    layers = []
    for number, (form, outputs) in enumerate(zip(forms, (64, 20, 33), strict=True)):
        bias = randn(outputs, seed=number) if biased else None
        layers.append(PackedLinear.of_blocks(blocks_of(form, outputs, 256, number)[0], form, 256, bias))
    joined, x = PackedLinear.joined(layers), randn(2, 5, 256)
    assert joined.out_features == 117
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], -1))
    assert torch.equal(joined.unpack(), torch.cat([layer.unpack() for layer in layers]))
    assert torch.equal(joined.unpack(torch.tensor([116, 3])), joined.unpack()[[116, 3]])
    assert linear_sizes(joined.modules())[1] == 117 * 256
    assert len(joined.parts()) == parts
    again = PackedLinear.joined([joined, layers[0]])  # nothing of a joined layer may get lost
    assert torch.equal(again(x), torch.cat([joined(x), layers[0](x)], -1))


@pytest.mark.parametrize("biased", [False, True])
def test_joined_fp16_layers_are_one_matrix(biased: bool) -> None:
    layers = [
        PackedLinear(randn(outputs, 40, seed=outputs), randn(outputs) if biased else None) for outputs in (20, 33, 7)
    ]
    layers[0].packing = "gguf"
    joined, x = PackedLinear.joined(layers), randn(3, 40)
    assert len(joined.parts()) == 1 and joined.packing == "gguf"
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], -1))


def test_exact_products_do_not_round_the_input() -> None:
    layers = [PackedLinear.of_blocks(blocks_of(form, 48, 256)[0], form, 256, randn(48)) for form in ("Q4_K", "Q6_K")]
    joined, x = PackedLinear.joined(layers), randn(5, 256)
    rounded, bias = joined(x), torch.cat([layer.bias for layer in layers if layer.bias is not None])
    expected = functional.linear(x.double(), joined.unpack().double(), bias.double()).float()
    with exact_products(joined):
        exactly = joined(x)
    tolerance = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(exactly, expected, rtol=0, atol=tolerance)
    assert float((rounded - expected).abs().max()) > 100 * tolerance
    assert torch.equal(joined(x), rounded)


def test_an_embedding_shares_a_tied_head_s_weight() -> None:
    blocks, weight = blocks_of("Q6_K", 40, 256)
    head = PackedLinear.of_blocks(blocks, "Q6_K", 256)
    embedding = PackedEmbedding(head)
    ids = torch.tensor([[3, 39, 0]])
    assert torch.equal(embedding(ids), functional.embedding(ids, weight)) and torch.equal(embedding.weight, weight)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert sum(buffer.nbytes for buffer in model.buffers()) == head.packed.nbytes
    with pytest.raises(ValueError, match="row 40 does not exist: the matrix has rows 0 to 39"):
        embedding(torch.tensor([3, 40, -1]))


def test_bad_blocks_are_refused_by_name() -> None:
    blocks, _ = blocks_of("Q4_K", 4, 256)
    with pytest.raises(ValueError, match="'IQ2_XS' is unknown: give one of Q4_0"):
        native.pack_blocks(blocks, "IQ2_XS", 256)
    with pytest.raises(ValueError, match=r"300 inputs in Q4_K need uint8 rows of 144 bytes per 256 inputs"):
        native.pack_blocks(blocks, "Q4_K", 300)
    with pytest.raises(ValueError, match=r"512 inputs in Q4_K need"):
        native.pack_blocks(blocks, "Q4_K", 512)
    packed = native.pack_blocks(blocks, "Q4_K", 256)
    with pytest.raises(ValueError, match="does not fit 256 inputs in form 'f16'"):
        native.linear(randn(1, 256), packed, None, 256, 4)
    with pytest.raises(ValueError, match="does not fit 512 inputs in form 'Q4_K'"):
        native.linear(randn(1, 512), packed, None, 512, 4, "Q4_K")
    with pytest.raises(ValueError, match="panels for 40 outputs"):
        native.unpack_rows(packed, "Q4_K", 256, 40)
    with pytest.raises(ValueError, match="for 256 inputs"):
        native.linear(randn(1, 255), packed, None, 256, 4, "Q4_K")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"not finite or too large for 8 bits \(largest magnitude nan\)"):
            native.pack_q8(torch.tensor([[1.0, float("nan")]]))
