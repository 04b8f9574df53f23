"""Heads of other trainers: each layout, written by hand, drafts as the very head does; what is open is measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from fakes import VOCAB, decode, tiny_target, vanilla
from safetensors.torch import load_file, save_file
from torch import Tensor

from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.formats import probe
from haast.formats.opened import OpenedHead, open_head
from haast.heads.checkpoint import Head, load_head, save_head
from haast.target.target import Target

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7, 7, 2])


@pytest.fixture(scope="module")
def target() -> Target:
    """Eight layers, so that low, middle and high are three."""
    return tiny_target(layers=8, std=0.3)


def drafts(target: Target, head: Head | OpenedHead) -> tuple[list[list[int]], list[tuple[Tensor, Tensor]]]:
    """What is said, and every tree that was proposed for it."""
    drafter: Drafter = head_drafter(target, head, DraftShape(nodes=8, depth=3, top_k=3, width=3))
    trees, propose = [], drafter.propose

    def spied(*given: Any) -> Any:
        tree = propose(*given)
        trees.append((tree.tokens, tree.parents))
        return tree

    drafter.propose = spied  # type: ignore[method-assign, assignment]
    return decode(target, drafter, PROMPTS, 12), trees


EAGLE1 = {
    "plain": {},
    "fc bias": {"fc_bias": True},
    "fc and qkv biases (Qwen2)": {"fc_bias": True, "qkv_bias": True},
    "a table of its own": {"own_embedding": True},
    "two layers": {"num_hidden_layers": 2},
}
EAGLE3: dict[str, tuple[others.Writer, dict[str, Any]]] = {
    "official": (others.official_eagle3, {}),
    "official, whole vocabulary": (others.official_eagle3, {"drafted": None}),
    "official, other sizes": (others.official_eagle3, {"own_embedding": True, "hidden_size": 16, "head_dim": 8}),
    "AngelSlim": (others.angelslim, {}),
    "SpecForge": (others.specforge, {"ids": (1, 4, 7)}),
    "SpecForge, normed features": (others.specforge, {"fc_norm": True}),
    "SpecForge, no last norm": (others.specforge, {"last_norm": False}),
    "ModelOpt": (others.modelopt, {"ids": (2, 4, 6)}),
    "speculators, llama": (others.speculators, {"ids": (1, 3, 6)}),
    "speculators, qwen3": (others.speculators, {"qk_norm": True}),
    "speculators, EAGLE-3.1": (others.speculators, {"fc_norm": True, "norm_output": True}),
    "speculators, one norm before fc": (others.speculators, {"input_norm": True, "norm_before_residual": True}),
    "speculators, three layers": (others.speculators, {"num_hidden_layers": 3}),
    "speculators, biases": (others.speculators, {"qkv_bias": True, "o_bias": True}),
    "DeepSpec": (others.deepspec, {"drafted": None, "qk_norm": True, "ids": (0, 2, 4, 6, 8)}),
    "DeepSpec, two layers": (
        others.deepspec,
        {
            "drafted": None,
            "qk_norm": True,
            "ids": (1, 2, 4, 6, 8),
            "num_hidden_layers": 2,
            "embedding_everywhere": True,
        },
    ),
    "P-EAGLE": (others.p_eagle, {"mask_token_id": 30, "own_embedding": True, "num_hidden_layers": 4}),
    "P-EAGLE, amazon": (others.amazon_p_eagle, {"mask_token_id": 30, "own_embedding": True}),
    "GGUF": (others.gguf_eagle3, {"ids": (1, 4, 6)}),
    "GGUF, normed residual": (others.gguf_eagle3, {"norm_before_residual": True}),
}


def same(target: Target, native: Head, place: Path) -> OpenedHead:
    """The head that lies there drafts as `native`: the same trees, and the target's own text."""
    found = open_head(place)
    assert isinstance(found, OpenedHead)
    fitted, _ = found.fitted(target, probe=False)
    for name, tensor in native.module.state_dict().items():
        assert torch.equal(fitted.module.state_dict()[name], tensor), name
    said, trees = drafts(target, native)
    again, theirs = drafts(target, fitted)
    assert said == again == vanilla(target, PROMPTS, 12)
    assert len(trees) == len(theirs)
    for (tokens, parents), (other, above) in zip(trees, theirs, strict=True):
        assert torch.equal(tokens, other) and torch.equal(parents, above)
    return found


@pytest.mark.parametrize("form", EAGLE1.values(), ids=EAGLE1)
def test_official_eagle1_heads(target: Target, tmp_path: Path, form: dict[str, Any]) -> None:
    native = others.eagle1(target, **form)
    found = same(target, native, others.official_eagle1(tmp_path, native, target, qkv_bias=bool(form.get("qkv_bias"))))
    assert (found.kind, found.format.name) == ("eagle", "official")
    assert "pickle" in found.summary


@pytest.mark.parametrize(("write", "form"), EAGLE3.values(), ids=EAGLE3)
def test_eagle3_heads(target: Target, tmp_path: Path, write: others.Writer, form: dict[str, Any]) -> None:
    more = {key: value for key, value in form.items() if key != "hidden_size"}
    if "hidden_size" in form:  # a head that is narrower than its target
        more |= {"target_hidden_size": target.hidden_size}
        native = _narrow(target, form["hidden_size"], **more)
        place = others.official_eagle3(tmp_path, native, target, target_hidden_size=target.hidden_size, head_dim=8)
    else:
        native = others.eagle3(target, **more)
        place = write(tmp_path, native, target)
    same(target, native, place)


def _narrow(target: Target, hidden: int, **more: Any) -> Head:
    from dataclasses import replace

    from haast.heads.checkpoint import build_module

    head: Any = others.eagle3(target, own_embedding=True)
    config = replace(head.module.config, hidden_size=hidden, num_attention_heads=2, num_key_value_heads=2, **more)
    module: Any = others.random_weights(build_module(config, None))
    return Head(module, head.draft_vocab, {})


@pytest.mark.parametrize("norms", [False, True])
def test_the_first_speculators_heads(target: Target, tmp_path: Path, norms: bool) -> None:
    native = others.eagle1(target, norms=norms, fc_bias=True)
    same(target, native, others.speculators_first(tmp_path, native, target))


@pytest.mark.parametrize(("heads", "blocks"), [(3, 1), (5, 2)])
def test_medusa_heads(target: Target, tmp_path: Path, heads: int, blocks: int) -> None:
    native = others.medusa(target, heads, blocks)
    same(target, native, others.official_medusa(tmp_path, native, target))


@pytest.mark.parametrize("form", [EAGLE3["speculators, EAGLE-3.1"], EAGLE3["P-EAGLE"], EAGLE3["DeepSpec, two layers"]])
def test_they_lie_in_haasts_own_files_too(target: Target, tmp_path: Path, form: Any) -> None:
    write, more = form
    fitted, _ = open_head(write(tmp_path / "theirs", others.eagle3(target, **more), target)).fitted(target, probe=False)  # type: ignore[union-attr]
    save_head(
        tmp_path / "ours", fitted.module.config, fitted.module.state_dict(), fitted.draft_vocab, {}, torch.float32
    )
    again = load_head(tmp_path / "ours")
    assert again.module.config == fitted.module.config
    one, other = drafts(target, fitted), drafts(target, again)
    assert one[0] == other[0] and all(torch.equal(a[0], b[0]) for a, b in zip(one[1], other[1], strict=True))


# What files leave open, of a head that has learnt the target's own text by heart.
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # how the head was trained, what its config.json says, the question, and the answer
    "layer ids + 1": ({"ids": (1, 4, 6)}, {"eagle_aux_hidden_state_layer_ids": [2, 5, 7]}, "layer ids", "1, 4, 6"),
    "layer ids - 1": ({"ids": (2, 4, 5)}, {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "layer ids", "2, 4, 5"),
    "residual": ({"norm_before_residual": True}, {}, "residual", "the normed state"),
    "not residual": ({}, {"norm_before_residual": True}, "residual", "the state"),
    "fed back": ({"norm_output": True}, {}, "fed back", "the normed state"),
    "rope": ({"attentive": True}, {"rope_theta": 3.0}, "rope", "the target's, base 10000"),
    "rope style": ({"attentive": True}, {"interleaved": True}, "rope style", "interleaved pairs"),
}
QUICK = ("layer ids + 1", "residual", "rope style")
EARLY = (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 15, 16)  # absolute ids that make a vocabulary as offsets too


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Each learns a head of its own by heart; the default suite has one of each kind of question."""
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.fixture(scope="module")
def texts(target: Target) -> list[probe.Text]:
    return probe.own_text(target, range(target.layers + 1))


@pytest.fixture(scope="module")
def learnt(target: Target, texts: list[probe.Text]) -> Any:
    """Heads that draft the target's own text, by their conventions; each is trained once."""
    known: dict[str, Head] = {}

    def head(attentive: bool = False, **form: Any) -> Head:
        if (key := f"{attentive} {form}") not in known:
            begun: Any = others.eagle3(target, **form)
            for name in ("q_proj", "k_proj", "o_proj") if attentive else ():  # so that positions matter
                begun.module.midlayer.self_attn.get_submodule(name).weight.data *= 4
            known[key] = _by_heart(target, begun, texts)
        return known[key]

    return head


def _by_heart(target: Target, head: Head, texts: list[probe.Text], steps: int = 60, rate: float = 1e-2) -> Head:
    """Train a head on the chains that `probe` counts."""
    module: Any = head.module.double().requires_grad_(True)
    vocab = torch.arange(VOCAB) if head.draft_vocab is None else head.draft_vocab
    places = torch.full((VOCAB,), -100).index_put((vocab,), torch.arange(len(vocab)))
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for text in texts:
            pairs = len(text.tokens) - 1 - probe.DEPTHS
            captured = [text.hidden[i][:pairs].clone() for i in module.target_layers]
            states, embedded = module.fuse(torch.cat(captured, -1)[None]), []
            found = states[:, :0]
            for depth in range(probe.DEPTHS):
                embedded.append(target.embed(text.tokens[depth + 1 : depth + 1 + pairs])[None].clone())
                states = torch.cat([states, found[:, -pairs:]], 1) if depth else states
                found = probe._draft_states(module, torch.cat(embedded, 1), states, depth + 1, pairs)
                logits = module.lm_input(found[:, -pairs:], text.tokens)[0] @ module.lm_head.weight.T
                wanted = places[text.tokens[depth + 2 : depth + 2 + pairs]]
                loss = loss + torch.nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Head(module.float().requires_grad_(False), head.draft_vocab, {})


def _paired(head: Head) -> Head:
    """The head as one that rotates neighbouring pairs has it."""
    module: Any = copy.deepcopy(head.module)
    for name in ("q_proj", "k_proj"):
        linear = module.midlayer.self_attn.get_submodule(name)
        halves = linear.weight.data.view(-1, 2, module.config.head_dim // 2, linear.in_features)
        linear.weight.data = halves.transpose(1, 2).reshape(linear.weight.shape).contiguous()
    return Head(module, head.draft_vocab, {})


@pytest.mark.parametrize("wrong", [pytest.param(each, id=name, marks=marks(name)) for name, each in WRONG.items()])
def test_a_wrong_convention_is_caught(
    target: Target, tmp_path: Path, learnt: Any, texts: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "own_text", lambda *_, **__: texts)  # generated anew below
    form, said, question, answer = wrong
    document = dict(said)
    native = learnt(drafted=None, **form)
    written = _paired(native) if document.pop("interleaved", False) else native
    place = others.official_eagle3(tmp_path, written, target, **document)
    fitted, settled = open_head(place).fitted(target)  # type: ignore[union-attr]
    assert settled is not None
    assert [(each.question, each.answer) for each in settled.changed] == [(question, answer)]
    assert settled.agreement.first > (0.4 if form.get("attentive") else 0.8)
    said_as_written = next(each for each in settled.tried if each.question == question and not each.kept)
    assert said_as_written.agreement.tau < settled.agreement.tau
    assert drafts(target, fitted)[1][1][0].equal(drafts(target, native)[1][1][0])
    assert fitted.about["probed"][question] == answer


def test_absolute_ids_are_caught(target: Target, tmp_path: Path, learnt: Any) -> None:
    native = learnt(drafted=EARLY)
    place = others.modelopt(tmp_path, native, target)
    (right, unasked) = open_head(place).fitted(target)  # type: ignore[union-attr]
    assert unasked is not None and not unasked.changed
    tensors = load_file(place / "model.safetensors")
    assert native.draft_vocab is not None
    save_file({**tensors, "d2t": native.draft_vocab.clone()}, place / "model.safetensors")
    fitted, settled = open_head(place).fitted(target)  # type: ignore[union-attr]
    assert settled is not None and [each.answer for each in settled.changed] == ["absolute ids"]
    assert fitted.draft_vocab is not None and fitted.draft_vocab.tolist() == list(EARLY)
    assert torch.equal(fitted.module.state_dict()["lm_head.weight"], right.module.state_dict()["lm_head.weight"])


def test_a_right_reading_stays_and_what_drafts_alike_is_said(target: Target, tmp_path: Path, learnt: Any) -> None:
    native = learnt(drafted=None)
    _, settled = open_head(others.official_eagle3(tmp_path / "a", native, target)).fitted(target)  # type: ignore[union-attr]
    assert settled is not None and settled.changed == []
    random = others.eagle3(target)  # it agrees with nothing, so that every reading is as good
    _, settled = open_head(others.official_eagle3(tmp_path / "b", random, target)).fitted(target)  # type: ignore[union-attr]
    assert settled is not None and settled.changed == [] and any("draft alike" in each for each in settled.unsure)


@pytest.mark.parametrize("form", ["P-EAGLE", "DeepSpec, two layers", "speculators, EAGLE-3.1", "GGUF"])
def test_sampled_text_is_vanillas_with_any_of_them(target: Target, tmp_path: Path, form: str) -> None:
    write, more = EAGLE3[form]
    found = open_head(write(tmp_path, others.eagle3(target, **more), target))
    assert isinstance(found, OpenedHead)
    fitted, _ = found.fitted(target, probe=False)
    drafter = head_drafter(target, fitted, DraftShape(nodes=8, depth=3, top_k=3, width=3))
    sampling = [SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=0.7, top_p=0.9, seed=4)]
    assert decode(target, drafter, PROMPTS, 12, sampling) == decode(target, VanillaDrafter(), PROMPTS, 12, sampling)
