"""A GGUF file's model: the same bits as transformers', blocks as they are in the file, and no file that is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import FLOATS, HIDDEN, K_TYPES, LAYERS, LEGACY, TOKENS, shapes_of, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from haast import native
from haast.errors import UnsupportedModelError
from haast.target import gguf_model, gguf_plan, load
from haast.target.device_map import Placement
from haast.target.gguf_file import open_gguf
from haast.target.gguf_model import build, read_config, read_tokenizer
from haast.target.gguf_plan import Blocks

IDS = torch.tensor([[3, 1, 4, 1, 5]])
TEXTS = ("the then", "  two  spaces\n\n", "a<|end|>b", "", "Zürich, 日本語 🙂", "the<|end|>", "\t1234 x'll")


def theirs(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    ours, expected = one.state_dict(), other.state_dict()
    assert list(ours) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    for ours_buffer, buffer in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert ours_buffer[0] == buffer[0] and torch.equal(ours_buffer[1], buffer[1])


class Kept(nn.Module):
    """A layer with the values of its blocks."""

    def __init__(self, blocks: Blocks, bias: Tensor | None = None) -> None:
        super().__init__()
        self.blocks, self.bias_given = blocks, bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.blocks.dequantise(x.dtype), self.bias_given)


class KeptEmbedding(Kept):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.blocks.dequantise())


@pytest.mark.parametrize("kind", [*LEGACY, *K_TYPES, *FLOATS])
def test_the_bits_of_every_type_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "tiny.gguf", kind=kind)
    assert_same_bits(build(open_gguf(path)), theirs(path))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "class_name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3", "Gemma3ForCausalLM"),
    ],
)
def test_the_bits_of_every_architecture_are_those_of_transformers(
    tmp_path: Path, architecture: str, class_name: str, tied: bool
) -> None:
    if architecture == "gemma2" and not tied:
        pytest.skip("the gguf package has no name for an LM head of Gemma 2")
    kinds = {"ffn_down.weight": "Q6_K", "token_embd.weight": "Q8_0", "": "Q4_K"}
    path = write_model(tmp_path / "tiny.gguf", architecture, kinds, tied=tied)
    if architecture == "qwen3":
        path = write_model(path, architecture, kinds, tied=tied, head_size=128)  # what transformers takes it for
    model: Any = build(open_gguf(path))
    expected = theirs(path)
    assert type(model).__name__ == type(expected).__name__ == class_name
    assert_same_bits(model, expected)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not model.training and not any(each.is_meta for each in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    ours, others = model.config.to_dict(), expected.config.to_dict()
    assert {key for key in ours if ours[key] != others.get(key)} <= {"_name_or_path", "architectures", "dtype"}


def test_mistrals_of_the_time_when_they_were_llamas(tmp_path: Path) -> None:
    """transformers gives them Mistral's class by their name, and then finds no names for their tensors."""
    llama = build(open_gguf(write_model(tmp_path / "llama.gguf")))
    mistral = build(open_gguf(write_model(tmp_path / "mistral.gguf", name="mistral")))
    assert type(mistral).__name__ == "MistralForCausalLM"
    assert_same_bits(mistral, llama)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_model(tmp_path / "tiny.gguf", kind="Q4_K")
    model, expected = build(open_gguf(path), dtype=dtype), theirs(path)
    assert {each.dtype for each in model.parameters()} == {dtype} and model.config.dtype is dtype
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_blocks_are_handed_over(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_model(tmp_path / "tiny.gguf", architecture, "Q4_K", tied=tied)
    file = open_gguf(path)
    model = build(file, make_linear=Kept, make_embedding=KeptEmbedding)
    kept = {name: module for name, module in model.named_modules() if isinstance(module, Kept)}
    assert len(kept) == 7 * LAYERS + 2 and not any(isinstance(each, nn.Linear) for each in model.modules())
    assert torch.equal(model(input_ids=IDS).logits, build(file)(input_ids=IDS).logits)
    q, v = (kept[f"model.layers.1.self_attn.{name}_proj"].blocks for name in "qv")
    assert (q.type_name, q.out_features, q.in_features, str(q.data.dtype)) == ("Q4_K", 256, 256, "uint8")
    assert np.shares_memory(v.data, file.tensors["blk.1.attn_v.weight"].data)
    assert np.shares_memory(q.data, file.tensors["blk.1.attn_q.weight"].data) == (architecture != "llama")
    assert not q.data.flags.writeable and not v.data.flags.writeable
    assert (kept["lm_head"].blocks is kept["model.embed_tokens"].blocks) == tied
    bias = kept["model.layers.0.self_attn.q_proj"].bias_given
    assert (bias is not None) == (architecture == "qwen2")
    assert kept["model.layers.0.mlp.up_proj"].bias_given is None


def test_a_layer_that_the_caller_declines_stays_linear(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", kind={"ffn_up.weight": "IQ4_XS", "": "Q4_K"})
    model = build(
        open_gguf(path), make_linear=lambda blocks, bias: Kept(blocks, bias) if blocks.type_name[:2] == "Q4" else None
    )
    layer: Any = model.model.layers[0]
    assert isinstance(layer.mlp.gate_proj, Kept) and type(layer.mlp.up_proj) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding and isinstance(model.lm_head, Kept)
    assert torch.equal(model(input_ids=IDS).logits, build(open_gguf(path))(input_ids=IDS).logits)


def test_values_that_transformers_changes_are_no_blocks(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", "gemma2", "Q8_0")
    seen = list[Blocks]()
    build(open_gguf(path), make_linear=lambda blocks, _: seen.append(blocks), make_embedding=seen.append)
    assert {blocks.data.ndim for blocks in seen} == {2} and all(blocks.in_features >= HIDDEN for blocks in seen)


def test_memory_is_one_model_and_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    original = gguf_plan.dequantised

    def noted(data: Any, type_name: str) -> Any:
        values = original(data, type_name)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(gguf_plan, "dequantised", noted)
    build(open_gguf(write_model(tmp_path / "tiny.gguf", kind="Q8_0")))
    assert max(sizes) <= gguf_plan._CHUNK < HIDDEN * HIDDEN


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole, first = write_model(tmp_path / "tiny.gguf", tied=False), write_model(tmp_path / "many", tied=False, shards=3)
    assert_same_bits(build(open_gguf(first)), build(open_gguf(whole)))
    assert torch.equal(
        load.load_stock(str(first))[0](input_ids=IDS).logits, load.load_stock(str(whole))[0](input_ids=IDS).logits
    )


def test_the_tokenizer_is_transformers(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    ours, expected = read_tokenizer(open_gguf(path)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert ours(text)["input_ids"] == expected(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == expected.decode(expected(text)["input_ids"])
    assert (ours.all_special_ids, ours.eos_token) == (expected.all_special_ids, expected.eos_token)


def test_nothing_is_written(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    before = path.stat().st_mtime_ns
    target = load.load_target(str(path), packing="off")
    assert load.load_tokenizer(str(path))[1] == (len(TOKENS) - 1,)
    config = load.local_config(str(path))
    assert config is not None and config.architectures == ["LlamaForCausalLM"] and config.vocab_size == len(TOKENS)
    assert [each.name for each in tmp_path.iterdir()] == [path.name] and path.stat().st_mtime_ns == before
    assert target.model.name_or_path == str(path)


def test_a_spread_model_is_the_same(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tied=False)
    target = load.load_target(str(path), packing="off", placement=Placement(device_map="auto"))
    assert torch.equal(target.model(input_ids=IDS).logits, load.load_stock(str(path))[0](input_ids=IDS).logits)
    assert target.model.name_or_path == str(path)


def test_llama_3s_factors_of_rope_are_in_the_configuration(tmp_path: Path) -> None:
    """Against transformers' own formula; llama.cpp divides the frequencies by the factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = read_config(open_gguf(write_model(tmp_path / "plain.gguf")))
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    plain.rope_parameters = dict(scaled)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](plain, torch.device("cpu"))
    factors = (1 / 10000.0 ** (torch.arange(0, 64, 2) / 64) / expected).numpy()
    model: Any = build(open_gguf(write_model(tmp_path / "rope.gguf", more={"rope_freqs.weight": factors})))
    assert {key: model.config.rope_parameters[key] for key in scaled} == pytest.approx(scaled)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected, rtol=1e-5)
    other = write_model(tmp_path / "other.gguf", more={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(ValueError, match="not Llama 3's"):
        build(open_gguf(other))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"without": ["blk.1.ffn_up.weight"]}, r"no tensor for model.layers.1.mlp.up_proj.weight \(512, 256\)"),
        ({"settings": {"feed_forward_length": 256}}, r"'blk.0.ffn_gate.weight' \(512, 256\).* not fit .*\(256, 256"),
        ({"settings": {"attention.head_count_kv": 4}}, "does not fit"),
        ({"settings": {"vocab_size": 100}}, "Padding_idx"),
        ({"settings": {"block_count": 2**40}}, "tensors for 1099511627776 layers"),
        ({"settings": {"embedding_length": 2**40}}, "embedding_length"),
        ({"settings": {"rope.dimension_count": 2**62}}, "rope.dimension_count"),
        ({"settings": {"attention.head_count": 0}}, "ZeroDivisionError|describes no model"),
        ({"kind": {"ffn_up.weight": "I32", "": "Q4_0"}}, "'blk.0.ffn_up.weight' of a type .*I32.*Q4_K_M"),
        ({"more": {"blk.0.attn_q.bias": np.zeros(256, np.float32)}}, "'blk.0.attn_q.bias', for which"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    if "kind" in more:
        monkeypatch.setattr(
            "gguf_files.data_of", lambda shape, kind, _: np.ones(shape, "i4" if kind == "I32" else "f4")
        )
        more = {"kind": {"ffn_up.weight": "I32", "": "F32"}}
    path = write_model(tmp_path / "tiny.gguf", **more)
    monkeypatch.setattr(Blocks, "dequantise", None)
    with pytest.raises(ValueError, match=message) as raised:
        build(open_gguf(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value) and ": " in str(raised.value)


def test_unused_tensors_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model(tmp_path / "tiny.gguf", more={"blk.2.nextn.weight": np.zeros(3, np.float32)})
    build(open_gguf(path))
    assert "blk.2.nextn.weight" in caplog.text


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"drama"))
    with pytest.raises(ValueError, match="unknown architecture 'drama'"):
        build(open_gguf(path))
    path.write_bytes(path.read_bytes().replace(b"drama", b"mamba"))
    with pytest.raises(ValueError, match=r"tiny.gguf"):
        build(open_gguf(path))


def test_an_encoder_decoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    config = read_config(open_gguf(path))
    config.is_encoder_decoder = True
    monkeypatch.setattr(gguf_model, "read_config", lambda _: config)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        build(open_gguf(path))


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tokenizer=False)
    assert build(open_gguf(path)).config.vocab_size == len(TOKENS)
    with pytest.raises(ValueError, match=r"has no tokenizer: .*tokenizer="):
        load.load_target(str(path))


@pytest.mark.parametrize("error", [KeyError("gpt9"), OSError("no file"), ValueError("a\nb")])
def test_a_tokenizer_that_transformers_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    path = write_model(tmp_path / "tiny.gguf")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=re.escape(f"{path} has no tokenizer that transformers can build")):
        read_tokenizer(open_gguf(path))


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    file, seen = open_gguf(write_model(tmp_path / "tiny.gguf")), list[int]()
    build(file, progress=seen.append)
    assert sum(seen) == file.nbytes and len(seen) == len(shapes_of("llama", True))


def test_a_large_file_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)  # other tests switch the bars off
    path = write_model(tmp_path / "tiny.gguf")
    load.load_stock(str(path))
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr(load, "_LARGE", 0)
    load.load_stock(str(path))
    assert "reading tiny.gguf: 100%" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_model_has_the_bits_of_transformers() -> None:
    source = load.resolve(load.DEFAULT_MODEL)
    file = source.open_gguf()
    if file is None:
        pytest.skip("the default model is not a GGUF file here")
    expected = theirs(file.path)
    assert_same_bits(build(file), expected)
    ours, others = read_tokenizer(file), AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    pages = [each.read_text(encoding="utf-8") for each in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]
    for text in (*TEXTS, *pages, "<|im_start|>user\nHi<|im_end|>\n"):
        assert ours(text)["input_ids"] == others(text)["input_ids"]


_LOADING = """
import re, sys
from pathlib import Path
import torch
from haast.target.load import load_target
from haast.tree import DraftTree
target = load_target(sys.argv[1])
with torch.inference_mode():
    target.forward(DraftTree.chain(torch.arange(100, 108)[None]), target.new_cache(1, 64))
print(re.search("VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_the_peak_of_memory_is_bounded_by_the_file() -> None:
    """1.3 times the file and 0.5 GB, of which importing PyTorch and transformers takes 0.4."""
    file = load.resolve(load.DEFAULT_MODEL).open_gguf()
    if file is None or not native.available():
        pytest.skip("the default model is no GGUF file here, or its blocks can't be kept")
    command = [sys.executable, "-c", _LOADING, str(file.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1.3 * file.path.stat().st_size + 500e6
