"""Block heads of other trainers: DFlash, DSpark and P-EAGLE files draft what a plain reference computes from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from block_reference import Reference, captured_states
from fakes import decode, tiny_target, vanilla
from safetensors.torch import load_file
from test_block import Watched, paths_of
from torch import Tensor
from torch.nn.functional import silu

from haast.core import Accepted
from haast.drafters.block import BlockDrafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.errors import HeadMismatchError
from haast.formats import probe
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, facts_of, open_head
from haast.heads.checkpoint import Head, load_head, save_head
from haast.target.target import Target
from haast.tree import DraftTree

MASK = 30
SPARK = {"mask_token_id": MASK, "markov_rank": 4, "confidence": True, "confidence_markov": True, "own_lm_head": True}
QWEN = {"qk_norm": True, "num_hidden_layers": 2, "block_size": 5}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DFlash, z-lab": (others.dflash, {**QWEN, "drafted": None, "mask_token_id": MASK, "sample_from_anchor": False}),
    "DSpark, DeepSpec": (others.deepspec_dspark, {**QWEN, **SPARK, "drafted": None, "ids": (0, 2, 4, 6, 8)}),
    "DSpark, DeepSpec, gated": (others.deepspec_dspark, {**QWEN, **SPARK, "drafted": None, "markov_kind": "gated"}),
    "DSpark, ModelOpt": (others.modelopt_dspark, {**QWEN, **SPARK, "drafted": None, "own_lm_head": False}),
    "DSpark, speculators": (others.speculators_dspark, {**QWEN, **SPARK}),
    "DSpark, speculators, llama": (others.speculators_dspark, {**SPARK, "num_hidden_layers": 3}),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=8, std=0.3)


def reference_of_files(folder: Path, target: Target, layers: int) -> Reference:
    """What the files say, read without Haast."""
    document = json.loads((folder / "config.json").read_text())
    document |= document.get("transformer_layer_config", {}) | document.get("dflash_config", {})
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    offsets, table = tensors.pop("d2t", None), target.embedding.weight.detach()  # type: ignore[operator]
    weights = {}
    for name, tensor in tensors.items():
        name = f"markov_head.{name}" if name.startswith(("markov_w", "gate_proj")) else name
        weights[name.replace("confidence_proj", "confidence_head.proj")] = tensor.double()
    drafted = None if offsets is None else tuple((offsets + torch.arange(len(offsets))).tolist())
    theta = document.get("rope_theta") or document["rope_parameters"]["rope_theta"]
    spark = "markov_head.markov_w1.weight" in weights
    return Reference(
        weights, table, weights.get("lm_head.weight", target.head_rows(torch.arange(target.vocab_size))), table[MASK],
        document["num_attention_heads"], document["num_key_value_heads"], document["rms_norm_eps"], theta,
        document["block_size"], spark, drafted=drafted,
    )  # fmt: skip


@pytest.mark.parametrize(("write", "form"), LAYOUTS.values(), ids=LAYOUTS)
def test_others_heads_draft_what_their_files_say(
    target: Target, tmp_path: Path, write: Any, form: dict[str, Any]
) -> None:
    native = others.block(target, **form)
    folder = write(tmp_path, native, target)
    found = open_head(folder)
    assert isinstance(found, OpenedHead) and found.drafter_kind == "block"
    head, _ = found.fitted(target, probe=False)
    config: Any = head.module.config
    assert config.layer_ids == form.get("ids", others.IDS)
    reference = reference_of_files(folder, target, config.num_hidden_layers)
    assert reference.depths == config.depths
    drafter = Watched(target, head, DraftShape(depth=8, top_k=3, width=3, nodes=9))
    assert drafter.watch([7, 3], 5) == vanilla(target, [[7, 3]], 5)[0]
    for text, tree in drafter.proposals:
        captured = captured_states(target.model, text[:-1], config.layer_ids)
        assert paths_of(tree) == reference.tree(captured, text[-1], reference.depths, 3, 3, 9)


def test_they_lie_in_haasts_own_files_too(target: Target, tmp_path: Path) -> None:
    native = others.block(target, **LAYOUTS["DSpark, speculators"][1])
    fitted, _ = open_head(others.speculators_dspark(tmp_path / "theirs", native, target)).fitted(target, probe=False)  # type: ignore[union-attr]
    config = fitted.module.config
    save_head(tmp_path / "ours", config, dict(fitted.module.state_dict()), fitted.draft_vocab, {}, torch.float32)
    again = load_head(tmp_path / "ours")
    assert again.module.config == config
    one, two = (Watched(target, head, DraftShape(nodes=9, depth=5, top_k=3, width=3)) for head in (fitted, again))
    assert one.watch([3, 4], 6) == two.watch([3, 4], 6)
    assert [paths_of(tree) for _, tree in one.proposals] == [paths_of(tree) for _, tree in two.proposals]
    with pytest.raises(ValueError, match="can't export block heads"):
        export_head(again, "vllm", "someone/tiny", target.config, tmp_path / "out")


def test_the_anchor_and_the_layers_are_measured(target: Target, tmp_path: Path) -> None:
    """The probe's chains are those of the drafter, for each reading of the files."""
    native = others.block(target, **LAYOUTS["DSpark, DeepSpec"][1])
    found = open_head(others.deepspec_dspark(tmp_path, native, target))
    assert isinstance(found, OpenedHead)
    reading, questions = found.read(facts_of(target))
    names = {question.name: [option.label for option in question.options] for question in questions}
    assert names["a slot drafts"] == ["the token after it (DSpark)", "the token at its own place (DFlash)"]
    assert names["a slot sees"] == ["all slots", "those before it"]
    texts = probe.own_text(target, range(9), tokens=24)
    for option in next(each for each in questions if each.name == "a slot drafts").options:
        read = option.change(reading)
        measured = probe.agreement(target, read, texts[:1])
        module: Any = probe.module_of(target, read).double()
        drafter = BlockDrafter(target, Head(module, read.draft_vocab, {}), DraftShape("chain", depth=probe.DEPTHS))
        counted = [_accepted(drafter, texts[0].tokens.tolist(), place) for place in range(texts[0].pairs)]
        kept = probe._distinct_positions(texts[:1])
        assert measured.accepted.tolist() == [counted[place] for place in kept]


def _accepted(drafter: BlockDrafter, text: list[int], place: int) -> int:
    """How many drafts of the chain after `text[place + 1]` the text follows."""
    target = drafter._target
    kv = target.pool.sequence()
    kv.reserve(place + 1 + drafter.room + drafter.nodes)
    tree = DraftTree.chain(torch.tensor([text[: place + 1]]))
    output = target.forward(tree, target.cache.bind([kv]), hidden_layers=drafter.target_layers)
    target.cache.advance([place + 1])
    features = torch.cat([output.hidden[layer] for layer in drafter.target_layers], dim=-1)
    state = drafter.begin(text[: place + 1], kv, 0)
    following = torch.tensor([text[1 : place + 2]])
    drafter.observe(
        [state], Accepted(following, features, torch.tensor([place + 1]), tokens_on_host=following.tolist())
    )
    drafts = drafter.propose([state]).tokens[0, 1:].tolist()
    kv.release()
    right = [draft == token for draft, token in zip(drafts, text[place + 2 :], strict=False)]
    return right.index(False) if False in right else len(right)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no block size": ({"block_size": None}, "block_size=None"),
    "no mask token": ({"mask_token_id": None}, "mask_token_id=None"),
    "sliding layers": ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "layers that do not fit": ({"target_layer_ids": [1, 2]}, "fc.weight has"),
    "layers beyond": ({"target_layer_ids": [1, 3, 40]}, "the target has only 8"),
}


@pytest.mark.parametrize(("changed", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(target: Target, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    form: dict[str, Any] = {**QWEN, **SPARK, "drafted": None}
    folder = others.deepspec_dspark(tmp_path, others.block(target, **form), target)
    document = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(HeadMismatchError, match=words):
        open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]


def test_a_mask_embedding_beside_the_head_is_used(target: Target, tmp_path: Path) -> None:
    native = others.block(target, **LAYOUTS["DFlash, z-lab"][1])
    folder = others.dflash(tmp_path, native, target)
    embedding = torch.arange(target.hidden_size).float()
    torch.save({"mask_token_id": MASK, "embedding": embedding}, folder / "mask_embedding.pt")
    head, _ = open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]
    module: Any = head.module
    assert module.config.mask_token_id == -1 and torch.equal(module.mask_embedding[0], embedding)
    torch.save([1], folder / "mask_embedding.pt")
    with pytest.raises(HeadMismatchError, match=r"mask_embedding\.pt holds no tensor"):
        open_head(folder).fitted(target, probe=False)  # type: ignore[union-attr]


# ------------------------------------------------------------------ P-EAGLE: all depths in one pass of an EAGLE-3 head


def p_eagle_states(
    tensors: dict[str, Tensor], sizes: Any, captured: Tensor, text: list[int], depths: int
) -> list[Tensor]:
    """States of the depths before the last norm: pairs of the text, then mask pairs after the last of them."""
    heads, kv_heads, eps, theta = sizes
    helper = Reference(tensors, Tensor(), Tensor(), Tensor(), heads, kv_heads, eps, theta, 1)
    table = tensors["embed_tokens.weight"]
    inputs = [*captured, *[tensors["mask_hidden"][0, 0]] * (depths - 1)]
    tokens = [*text[1:], *[MASK] * (depths - 1)]
    stream = [helper.linear(each, "fc") for each in inputs]
    embedded = [table[token] for token in tokens]
    number = 0
    while f"layers.{number}.self_attn.q_proj.weight" in tensors:
        name = f"layers.{number}"
        if number:
            read = [helper.rms(each, f"{name}.input_layernorm") for each in stream]
        else:
            tokens_read = [helper.rms(each, f"{name}.input_layernorm") for each in embedded]
            states_read = [helper.rms(each, f"{name}.hidden_norm") for each in stream]
            read = [torch.cat(pair) for pair in zip(tokens_read, states_read, strict=True)]
        keys = [helper.projected(x, name, "k", kv_heads, place) for place, x in enumerate(read)]
        values = [helper.projected(x, name, "v", kv_heads, place) for place, x in enumerate(read)]
        following = []
        for place, (x, residual) in enumerate(zip(read, stream, strict=True)):
            outputs = []
            for head, query in enumerate(helper.projected(x, name, "q", heads, place)):
                shared = head // (heads // kv_heads)
                scores = torch.stack([query @ keys[j][shared] for j in range(place + 1)]) / math.sqrt(len(query))
                outputs.append(sum(p * values[j][shared] for j, p in enumerate(scores.softmax(0))))
            residual = residual + helper.linear(torch.cat(outputs), f"{name}.self_attn.o_proj")
            inner = helper.rms(residual, f"{name}.post_attention_layernorm")
            gated = silu(helper.linear(inner, f"{name}.mlp.gate_proj")) * helper.linear(inner, f"{name}.mlp.up_proj")
            following.append(residual + helper.linear(gated, f"{name}.mlp.down_proj"))
        stream, number = following, number + 1
    return stream[len(captured) - 1 :]


@pytest.mark.parametrize("write", [others.p_eagle, others.amazon_p_eagle])
def test_p_eagle_heads_draft_what_their_files_say(target: Target, tmp_path: Path, write: Any) -> None:
    more: dict[str, Any] = {"num_hidden_layers": 4 if write is others.p_eagle else 1}
    native = others.eagle3(target, mask_token_id=MASK, own_embedding=True, **more)
    head, _ = open_head(write(tmp_path, native, target)).fitted(target, probe=False)  # type: ignore[union-attr]
    config: Any = head.module.config
    names = others.layer_names(config, "layers.0.")
    tensors = {name: tensor.double() for name, tensor in others.renamed(native, names).items()}
    theta = config.rope_parameters["rope_theta"]
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps, theta)
    drafter: Any = head_drafter(target, head, DraftShape("chain", depth=4))
    seen: list[Tensor] = []
    propose = drafter.propose

    def spied(*given: Any) -> Any:
        tree = propose(*given)
        seen.append(tree.tokens[0])
        return tree

    drafter.propose = spied
    said = decode(target, drafter, [[7, 3]], 5)[0]
    assert said == vanilla(target, [[7, 3]], 5)[0]
    text = [7, 3, said[0]]
    captured = captured_states(target.model, text[:-1], config.layer_ids)
    helper = Reference(tensors, Tensor(), Tensor(), Tensor(), *sizes, 1)
    expected = [text[-1]]
    for state in p_eagle_states(tensors, sizes, captured, text, 4):
        row = int((tensors["lm_head.weight"] @ helper.rms(state, "norm")).argmax())
        expected.append(others.DRAFTED[row])
    assert seen[0].tolist() == expected
