"""Every causal LM class of transformers: the same text as stock `generate`, or refused by name. `zoo` builds them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
import zoo_sizes
from torch import Tensor

import haast
from haast.errors import UnsupportedArgumentError, UnsupportedModelError
from haast.target.probe import ProbeResult
from haast.target.target import Target
from haast.tree import DraftTree

ROOT = Path(__file__).parents[2]
HELD: dict[str, Any] = json.loads((ROOT / "results/zoo.json").read_text(encoding="utf-8"))
NEW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20)
new = pytest.mark.skipif(not NEW, reason="in older transformers these take no 4-D mask, or positions from the cache")
OLDEST: dict[str, Any] = json.loads((ROOT / "results/zoo-oldest.json").read_text(encoding="utf-8"))
RECORDED = transformers.__version__ == HELD["environment"]["versions"]["transformers"]
# What has been reported to say another text without a word, or to end in an assertion, and what it comes to.
REPORTED = {
    "megatron-bert": "is not causal: .* load it with is_decoder=True",
    "xlm-roberta-xl": "is not causal: .* load it with is_decoder=True",
    "cpmant": "stores 6 positions where the forward has 2",
    "whisper": None,
}
GOOD = [("megatron-bert", True), ("xlm-roberta-xl", True), ("mistral", False), ("gemma2", False), ("mixtral", False)]
# By what is of their own: positions from the cache's length, chunks, an indexer's keys, shared keys, masks per head.
OWN = ("bart", "bigbird_pegasus", "llama4", "deepseek_v32", "gemma3n_text", "doge", "qwen2_vl+images")


@pytest.mark.parametrize("kind", REPORTED)
def test_what_was_reported(kind: str) -> None:
    row, why = zoo.outcome(kind), REPORTED[kind]
    if why is None and NEW:
        assert row["outcome"] == "same text", row
    else:
        reason = why if why and NEW else "use stock generate"
        assert row["outcome"] == "refused" and re.search(f"^{row['class']} .*{reason}", row["why"]), row


@pytest.mark.parametrize(("kind", "decodes"), [*GOOD, *(pytest.param(kind, False, marks=new) for kind in OWN)])
def test_good_ones_say_the_same_text(kind: str, decodes: bool) -> None:
    row = zoo.outcome(kind, decodes)
    if row["outcome"] == "refused" and not NEW:
        pytest.skip("it takes no 4-D mask in an older transformers")
    assert row["outcome"] == "same text", row
    assert row["distinct"] >= zoo.WANDERS, "a constant text would show little"
    assert row["tau"]["trees"] > 1, "no draft was right, so that no tree was needed"
    assert "head" in row["tau"]


@pytest.mark.parametrize(
    "kind", ["xlm-roberta-xl", pytest.param("megatron-bert", marks=new), pytest.param("moshi", marks=new)]
)
def test_the_survey_sees_another_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is probed, these do say something else."""
    monkeypatch.setattr("haast.target.target.probe", lambda _forward: ProbeResult(False, 1.0, widths=(32, 32)))
    row = zoo.outcome(kind)
    assert row["outcome"] == "other text", row


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(zoo.CLASSES))
def test_every_class_says_the_same_text_or_is_refused_by_name(kind: str) -> None:
    for decodes in (False, True) if zoo.may_decode(kind) else (False,):
        row = zoo.outcome(kind, decodes)
        assert row["outcome"] in ("same text", "refused", "not built"), row
        if row["outcome"] == "refused":
            assert row["why"].startswith(f"{row['class']} "), row
        if row["outcome"] == "same text":
            assert row["distinct"] >= zoo.WANDERS and row["tau"]["trees"] > 1, row
        if RECORDED and not kind.endswith(zoo.IMAGES):
            assert (row["outcome"] == "not built") == (kind in zoo_sizes.NOT_BUILT), row
            held = next(each for each in HELD["types"] if each["type"] == kind)
            assert row["outcome"] == held["outcome"] or row["is_decoder"] != held["is_decoder"], (
                f"run tests/zoo.py again: {row}"
            )


def test_what_is_recorded_has_nothing_else_in_it() -> None:
    for row in [*HELD["types"], *HELD["images"], *OLDEST["types"], *OLDEST["images"]]:
        assert row["outcome"] in ("same text", "refused", "not built"), row
    number = zoo.counts(HELD["types"])
    assert number["same text"] >= 130 and number["same text"] + number["refused"] >= 150
    assert {row["type"] for row in HELD["types"] if row["outcome"] == "not built"} == set(zoo_sizes.NOT_BUILT)
    if RECORDED:
        assert {row["type"] for row in HELD["types"]} == {kind for kind in zoo.CLASSES if not kind.endswith(zoo.IMAGES)}


def test_the_pages_say_what_is_recorded() -> None:
    number = zoo.counts(HELD["types"])
    for page in ("README.md", "docs/limits.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"{number.total()} types" in text, page
        assert f"{number['same text']} give the same text, {number['refused']} are refused" in text, page
        assert f"{number['not built']} could not be built" in text, page


@new
def test_the_last_logits_of_a_model_that_knows_no_logits_to_keep() -> None:
    target, text = Target(zoo.build("whisper")), torch.tensor([[5, 6, 7, 9], [8, 4, 0, 0]])
    live = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    whole = target.forward(DraftTree.chain(text, live), target.new_cache(2))
    last = target.forward(DraftTree.chain(text, live), target.new_cache(2), last_only=True)
    assert torch.allclose(last.logits[:, 0], whole.logits[[0, 1], [3, 1]], atol=1e-5)
    assert not torch.allclose(last.logits[:, 0], whole.logits[:, 0], atol=1e-1), "the first ones are others"


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("whisper", {"encoder_outputs": (torch.zeros(1, 3, 32),)}),
        ("bert", {"encoder_hidden_states": torch.zeros(1, 3, 32)}),
    ],
)
def test_what_an_encoder_has_made_is_refused_by_name(kind: str, given: dict[str, Tensor]) -> None:
    model = zoo.build(kind, decodes=kind == "bert")
    with pytest.raises(UnsupportedArgumentError, match=next(iter(given))):
        zoo.said(model, custom_generate=haast.custom_generate, **given)


def test_a_cross_attention_without_encoder_states_is_left_out_as_stock_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(zoo_sizes.MORE, "bert", {"add_cross_attention": True})
    assert any("crossattention" in name for name, _ in zoo.build("bert", decodes=True).named_modules())
    assert zoo.outcome("bert", decodes=True)["outcome"] == "same text"


def test_a_configuration_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^BltForCausalLM is no single stack .* num_hidden_layers"):
        Target(zoo.build("blt"))
