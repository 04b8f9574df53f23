"""Targets spread over a CPU and a disk by accelerate: the text of one device, through every door.

Two real devices need two accelerators; what a CPU shows is all that differs in kind: weights that are not there until
a module is called, and hooks that move inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import cpu_offload
from fakes import VOCAB, commit, decode, random_head, tiny_llama, vanilla
from test_text import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging
from typer.testing import CliRunner

import haast
from haast.cli import app
from haast.core import SamplingParams
from haast.drafters.calibrated import identity
from haast.drafters.eagle import EagleDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.tree_shape import DraftShape
from haast.errors import HeadMismatchError, UnsupportedModelError
from haast.heads.checkpoint import Head
from haast.target.device_map import Placement, dispatched, execution_device, layer_devices
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import KVPool
from haast.target.target import Target
from haast.tree import DraftTree

IN_MEMORY = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
ENDS = {"model.embed_tokens": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
SPLITS: dict[str, dict[str, str]] = {
    "a layer on disk": {**IN_MEMORY, "model.layers.0": "cpu", "model.layers.1": "disk"},
    "both ends on disk": {**ENDS, "model.layers": "cpu"},
    "all but a layer on disk": {**ENDS, "model.layers.0": "cpu", "model.layers.1": "disk"},
}
PROMPTS = [[1, 2, 3, 4], [5, 6, 7], [9]]
TREE = DraftShape("dynamic", depth=3, top_k=8, width=4, nodes=20)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
splits = pytest.mark.parametrize("split", sorted(SPLITS))


@pytest.fixture(autouse=True)
def silent() -> None:
    cast(Any, logging).disable_progress_bar()


def saved(folder: Path, tied: bool = False, vocab: int = VOCAB) -> tuple[Path, LlamaForCausalLM]:
    """A tiny model, in a folder and in one piece."""
    model = tiny_llama(vocab)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, model


def spread(folder: Path, **settings: Any) -> PreTrainedModel:
    model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float64, **settings)
    assert dispatched(model) and any(weight.is_meta for weight in model.parameters())
    return model


def runs(model: PreTrainedModel) -> bool:
    """Whether the model answers at all, without Haast."""
    try:
        cast(Any, model)(input_ids=torch.tensor([[1, 2]]))
    except KeyError:
        return False
    return True


@pytest.mark.parametrize(
    ("split", "tied"), [*((split, False) for split in sorted(SPLITS)), ("both ends on disk", True)]
)
def test_a_split_model_says_what_it_says_in_one_piece(tmp_path: Path, split: str, tied: bool) -> None:
    folder, model = saved(tmp_path, tied)
    given = spread(folder, device_map=SPLITS[split])
    if not runs(given):
        with pytest.raises(UnsupportedModelError, match="can't take a tree"):
            Target(given)
        pytest.skip("this transformers, with this accelerate, cannot page in tied weights itself")
    whole, target = Target(model), Target(given)
    assert target.device == torch.device("cpu") and target.dtype is torch.float64 and "device_map" in target.spread
    greedy, drawn = vanilla(whole, PROMPTS, 16), vanilla(whole, PROMPTS, 16, SAMPLED)
    assert vanilla(target, PROMPTS, 16) == greedy
    for draft_vocab in (None, range(0, VOCAB, 2)):
        eagle = EagleDrafter(target, random_head(target, draft_vocab), TREE)
        assert decode(target, eagle, PROMPTS, 16) == greedy
        assert decode(target, eagle, PROMPTS, 16, SAMPLED) == drawn
    assert decode(target, LookaheadDrafter(VOCAB), PROMPTS, 16) == greedy


def test_a_plan_by_memory_says_the_same(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    compared = 0
    for room in (25_000, 60_000, 110_000, 150_000):
        plan: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": room}, "dtype": torch.float64}
        try:
            given: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_pretrained(folder, **plan)
        except ValueError as error:  # by older accelerate
            assert "offload the whole model to the disk" in str(error)
            continue
        if not dispatched(given):  # so do older transformers where nothing fits into memory
            with pytest.raises(UnsupportedModelError, match="has no weights"):
                Target(given)
            continue
        target = Target(given)
        eagle = EagleDrafter(target, random_head(target), TREE)
        assert decode(target, eagle, PROMPTS, 16) == vanilla(Target(model), PROMPTS, 16)
        compared += 1
    assert compared >= 2


def test_weights_kept_in_memory_and_paged_in_say_the_same() -> None:
    whole, paged = Target(tiny_llama()), tiny_llama()
    cpu_offload(paged, torch.device("cpu"))
    target = Target(paged)
    eagle = EagleDrafter(target, random_head(target), TREE)
    assert decode(target, eagle, PROMPTS, 16) == vanilla(whole, PROMPTS, 16)
    assert all(weight.is_meta for weight in paged.parameters()), "paged out again"


@splits
def test_features_and_both_ends_are_those_of_one_piece(tmp_path: Path, split: str) -> None:
    folder, model = saved(tmp_path)
    whole, target = Target(model), Target(spread(folder, device_map=SPLITS[split]))
    ids = torch.tensor([7, 0, 31])
    assert torch.equal(target.embed(ids), whole.embed(ids)) and torch.equal(target.head_rows(ids), whole.head_rows(ids))
    assert target.head_bias(ids) is None
    tree = DraftTree.from_parents(torch.tensor([[1, 2, 3, 4]] * 2), torch.tensor([[-1, 0, 0, 1]] * 2))
    mine, theirs = (each.forward(tree, each.new_cache(2), hidden_layers=(0, 1, 2)) for each in (target, whole))
    assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.features, theirs.features)
    assert all(torch.equal(mine.hidden[layer], theirs.hidden[layer]) for layer in (0, 1, 2))
    assert torch.equal(target.head_logits(mine.features), mine.logits)


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # by older transformers, since weights are paged in
def test_every_door_takes_a_split_model(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, vocab=len(byte_tokenizer()))
    split, ids = SPLITS["all but a layer on disk"], torch.tensor([[1, 2, 3]])
    new = vanilla(Target(model), ids.tolist(), 16)[0]
    own = haast.Haast.from_pretrained(str(folder), head=None, dtype="float64", device_map=split)
    assert own.target.packing == "off" and list(own.generate([1, 2, 3], max_new_tokens=16, eos=()).tokens) == new
    given = spread(folder, device_map=split)
    assert haast.Haast.from_pretrained(given, head=None, compile="auto").target.compiling == "off"
    decoders = [haast.custom_generate, haast.Decoder(given, head=random_head(Target(given)), shape=TREE)]
    for decoder in decoders:
        text = cast(Any, given).generate(ids, max_new_tokens=16, do_sample=False, custom_generate=decoder)
        assert text[0, 3:].tolist() == new


def test_the_command_line_spreads(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, vocab=len(byte_tokenizer()))
    common = ["generate", "hello", "--model", str(folder), "--head", "none", "--dtype", "float64", "--raw"]
    done = CliRunner().invoke(app, [*common, "--device-map", "auto", "--max-new-tokens", "8", "--json", "-"])
    assert done.exit_code == 0, done.output
    prompt = list(byte_tokenizer()("hello")["input_ids"])
    assert json.loads(done.stdout)["tokens"] == vanilla(Target(model), [prompt], 8)[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device_map": "auto", "packing": "f16"}, "packing='f16' works on one device"),
        ({"device_map": "auto", "compile": "on", "packing": "off"}, "compile='on' works on one device"),
        ({"device_map": "auto", "device": "cpu:0"}, "names one device"),
        ({"device_map": "everywhere"}, "device_map='everywhere' is unknown"),
        ({"max_memory": {"cpu": 1}}, "belong to a device_map"),
        ({"offload_folder": "x"}, "belong to a device_map"),
        ({"tensor_parallel": True}, "torchrun"),
        ({"tensor_parallel": True, "device_map": "auto"}, "give one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        haast.Haast.from_pretrained(head=None, **asked)
    if "tensor_parallel" not in asked:
        return
    with pytest.raises(ValueError, match="models given by name"):
        haast.Haast.from_pretrained(tiny_llama(), head=None, **asked)


def test_a_chat_is_of_one_process() -> None:
    done = CliRunner().invoke(app, ["chat", "--tensor-parallel"])
    assert done.exit_code == 2 and "haast generate" in done.output


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no weights: model.embed_tokens.weight is"):
        Target(cast(Any, empty))


def test_a_calibration_is_of_one_device(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    known = []
    for target in (Target(model), Target(spread(folder, device_map=SPLITS["a layer on disk"]))):
        known.append(identity(target, EagleDrafter(target, random_head(target), TREE)))
    assert known[1].pop("spread") and known[0] == known[1]


def test_layers_of_a_split_model_are_not_compiled(tmp_path: Path) -> None:
    target = Target(spread(saved(tmp_path)[0], device_map=SPLITS["a layer on disk"]))
    with pytest.raises(ValueError, match="spread over devices"):
        target.use_compiled_layers()


def test_a_head_is_moved_to_its_target_and_a_head_without_weights_is_refused() -> None:
    target = Target(tiny_llama())
    expected = vanilla(target, PROMPTS, 16)
    head = random_head(target)
    half = Head(head.module.half(), None, {})
    assert decode(target, EagleDrafter(target, half, TREE), PROMPTS, 16) == expected
    assert next(half.module.parameters()).dtype is torch.float64
    with pytest.raises(HeadMismatchError, match="meta device"):
        EagleDrafter(target, Head(head.module.to("meta"), None, {}), TREE)


def test_every_layer_is_cached_where_it_computes() -> None:
    """The meta device stands for a second accelerator: shapes and places without numbers."""
    places = [torch.device("cpu")] * 2 + [torch.device("meta")]
    pool = KVPool(128)
    cache = KVCache(pool, 3, torch.device("cpu"), devices=places).bind([pool.sequence() for _ in range(2)])
    cache.begin(4)
    for layer, place in enumerate(places):
        keys = torch.ones(2, 2, 4, 8, device=place)
        assert cache.update(keys, keys, layer)[0].device == place
    commit(cache, [[0, 2, 3], [0, 1]])
    assert cache.lengths == [3, 2]
    assert cache.bytes_per_token == 3 * 2 * (2 * 8 * 4), "no slot for a layer elsewhere"


def test_where_layers_compute_is_asked_of_their_hooks(tmp_path: Path) -> None:
    model = spread(saved(tmp_path)[0], device_map=SPLITS["both ends on disk"])
    layers = list(cast(Any, model).model.layers)
    assert execution_device(model) == execution_device(layers[0]) == torch.device("cpu")
    assert layer_devices(layers) is None and not dispatched(tiny_llama())
    layers[1]._hf_hook.execution_device = "meta"
    assert layer_devices(layers) == [torch.device("cpu"), torch.device("meta")]


def test_a_placement_is_something() -> None:
    assert not Placement() and Placement("auto") and Placement({"": "cpu"}) and Placement(tensor_parallel=True)
