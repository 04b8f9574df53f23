"""Heads of other trainers: each layout, written by hand, drafts as the very head does; what is open is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import heads_of_others as others
import pytest
import torch
from fakes import decode, tiny_target, vanilla
from torch import Tensor

from haast.drafters.base import Drafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
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

    drafter.propose = spied  # type: ignore[method-assign]
    return decode(target, drafter, PROMPTS, 12), trees


EAGLE1 = {
    "plain": {},
    "fc bias": {"fc_bias": True},
    "fc and qkv biases (Qwen2)": {"fc_bias": True, "qkv_bias": True},
    "a table of its own": {"own_embedding": True},
    "two layers": {"num_hidden_layers": 2},
}
EAGLE3 = {
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

    head = others.eagle3(target, own_embedding=True)
    config = replace(head.module.config, hidden_size=hidden, num_attention_heads=2, num_key_value_heads=2, **more)
    return Head(others.random_weights(build_module(config, None)), head.draft_vocab, {})  # type: ignore[arg-type]


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
    save_head(tmp_path / "ours", fitted.module.config, fitted.module.state_dict(), fitted.draft_vocab, {}, torch.float32)
    again = load_head(tmp_path / "ours")
    assert again.module.config == fitted.module.config
    one, other = drafts(target, fitted), drafts(target, again)
    assert one[0] == other[0] and all(torch.equal(a[0], b[0]) for a, b in zip(one[1], other[1], strict=True))
