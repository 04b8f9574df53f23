"""The probe at load time: which masks, positions and models it lets through, in every precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
import zoo_sizes
from fakes import tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from haast.errors import UnsupportedModelError
from haast.target import attention, probe
from haast.target.hf import ModuleForward
from haast.target.kv_cache import KVCache
from haast.target.probe import Gap, gaps
from haast.target.support import choose_attention
from haast.target.target import Target
from haast.tree import DraftTree

HELD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "results/zoo.json").read_text(encoding="utf-8"))
_mask, _positions = attention.tree_mask, ModuleForward.positions
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _shows_neighbours(seen: Tensor, *where: Any, **more: Any) -> Tensor:
    """Every node sees all slots before its own: a chain's mask."""
    before = torch.ones(seen.shape[1:], dtype=torch.bool).tril()
    return _mask(seen | before, *where, **more)


def _hides_the_first(seen: Tensor, lengths: Tensor, *where: Any, **more: Any) -> Tensor:
    """The first token of the past is not seen."""
    bias = _mask(seen, lengths, *where, **more).clone()
    if bool(lengths.any()):
        bias[..., 0] = torch.finfo(bias.dtype).min
    return bias


def _wider(*where: Any, window: int | None = None, chunk: int | None = None, **more: Any) -> Tensor:
    """The sliding window, or each chunk, is one position too wide."""
    window, chunk = (None if size is None else size + 1 for size in (window, chunk))
    return _mask(*where, window=window, chunk=chunk, **more)


def _by_slot(self: ModuleForward, tree: DraftTree, cache: KVCache) -> Tensor:
    """Nodes stand where their slots are, not where their depths are."""
    slots = torch.arange(tree.nodes) - tree.depths
    return _positions(self, tree, cache) + slots.clamp_min(0)


FAULTS: dict[str, tuple[Any, str, Callable[..., Tensor]]] = {
    "neighbours": (attention, "tree_mask", _shows_neighbours),
    "first": (attention, "tree_mask", _hides_the_first),
    "window": (attention, "tree_mask", _wider),
    "slots": (ModuleForward, "positions", _by_slot),
}
# Models that a fault moves little: less than a fifth of the largest logit, in 16 bits, at the nodes of the tree.
FAINT = {
    "neighbours": ["llama", "nemotron", "gpt_neox_japanese"],
    "first": ["llama", "gemma2", "deepseek_v2"],
    "window": ["mistral", "gemma2", "cwm", "llama4_text"],
    "slots": ["llama", "gemma2", "gemma3_text"],
}


SAME = sorted({row["type"] for row in HELD["types"] if row["outcome"] == "same text" and not row["is_decoder"]})


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("kind", SAME)
def test_every_fault_is_found_in_every_class(kind: str, dtype: torch.dtype) -> None:
    if kind not in zoo.CLASSES:
        pytest.skip("this transformers has none")
    model = zoo.build(kind, dtype=dtype)
    Target(model)
    window = ModuleForward(model).window
    for fault in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*FAULTS[fault])
            if fault != "window" or window is not None:
                with pytest.raises(UnsupportedModelError):
                    Target(model)


@dtypes
@pytest.mark.parametrize(("fault", "kind"), [(fault, kind) for fault, kinds in FAINT.items() for kind in kinds])
def test_a_fault_is_found_in_every_precision(
    fault: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(kind, dtype=dtype)
    Target(model)  # without the fault nothing is found
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(UnsupportedModelError, match=f"^{type(model).__name__} can't (be drafted for|verify a tree)"):
        Target(model)


def _found(*faults: dict[tuple[str, int], Gap]) -> Callable[..., tuple[dict[tuple[str, int], Gap], float]]:
    return lambda _forward, number: (faults[number], 1.0)


def test_in_16_bits_a_fault_has_to_show_in_three_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router near a tie sends a token to another expert then; in float32 one text is enough."""
    wrong, nothing = {("path", 2): Gap(1.0, 1.0, 1.0), ("own", 0): Gap(1.0, 1.0, 1.0)}, dict[tuple[str, int], Gap]()
    exact, half = zoo.build("llama"), zoo.build("llama", dtype=torch.bfloat16)
    monkeypatch.setattr(probe, "_run_trial", _found(wrong, {("path", 1): Gap(1.0, 1.0, 1.0)}, nothing))
    Target(half)
    with pytest.raises(UnsupportedModelError):
        Target(exact)
    monkeypatch.setattr(probe, "_run_trial", _found(wrong, {("path", 2): Gap(1.0, 1.0, 1.0)}, wrong))
    with pytest.raises(UnsupportedModelError, match="can't verify a tree"):
        Target(half)


@dtypes
@pytest.mark.parametrize("kind", ["phimoe", "glm4_moe", "flex_olmo"])
def test_what_rounds_much_is_taken_up(kind: str, dtype: torch.dtype) -> None:
    Target(zoo.build(kind, dtype=dtype))


# ------------------------------------------------------------------ windows


def test_a_wide_window_is_reached_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo_sizes.MORE, "mistral", {"sliding_window": 4096})
    model, seen = zoo.build("mistral"), set[int | None]()

    def noted(*where: Any, window: int | None = None, **more: Any) -> Tensor:
        seen.add(window)
        return _mask(*where, window=window, **more)

    monkeypatch.setattr(attention, "tree_mask", noted)
    Target(model)
    assert min(each for each in seen if each is not None) < 8, "the probe's texts are ten tokens long"
    assert model.config.sliding_window == 4096


@pytest.mark.skipif(transformers.__version__ < "5.1", reason="transformers 5.0 builds no tiny Moshi")
def test_a_window_that_the_model_itself_does_not_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moshi's masks have none, only its cache forgets: stock's text depends on how long the prompt was."""
    monkeypatch.setitem(zoo_sizes.MORE, "moshi", {"sliding_window": 3000})
    model = zoo.build("moshi")
    with pytest.raises(UnsupportedModelError, match=r"^MoshiForCausalLM .* no sliding window of 3000"):
        Target(model)
    assert model.config.sliding_window == 3000


# ------------------------------------------------------------------ models


class Bidirectional(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Looks at the tokens behind: what it says at a token depends on the last one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits[:, -1:]
        return output


class Shifted(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Gives its forward other tokens than the text's, in `generate` alone."""

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        prepared: Any = super()
        return prepared.prepare_inputs_for_generation(input_ids.roll(1, 1), *args, **kwargs)


class Helpless(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Can't go without a cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("use_cache"):
            raise AssertionError("no cache")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Bidirectional, "is not causal: .* use a causal LM"),
        (Shifted, "prepares input_ids of its own"),
        (Helpless, "can't be compared with stock: .* AssertionError: no cache; use stock generate"),
    ],
)
def test_such_models_are_refused(kind: Any, why: str) -> None:
    model = kind(tiny_llama().config).double().eval()
    with pytest.raises(UnsupportedModelError, match=f"^{kind.__name__} {why}"):
        Target(model)


def test_a_causal_model_that_may_look_ahead_is_refused_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo_sizes.MORE, "gemma3_text", {"use_bidirectional_attention": True})
    with pytest.raises(UnsupportedModelError, match=r"^Gemma3ForCausalLM is not causal"):
        Target(zoo.build("gemma3_text"))


def test_the_attention_is_haasts_again_after_the_probe() -> None:
    model = tiny_llama()
    choose_attention(model)
    chosen = model.config._attn_implementation
    Target(model)
    assert model.config._attn_implementation == chosen == attention.NAME


# ------------------------------------------------------------------ gaps


def test_gaps_are_what_they_say() -> None:
    expected = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [3.0, 1.0, -torch.inf]])
    found = torch.tensor([[2.0, 3.0, 5.0], [1.0, 0.0, 0.0], [1.0, 3.0, -torch.inf]])
    shifted, flat, swapped = gaps(found, expected)
    assert shifted == Gap(0.0, 0.0, 0.0), "the softmax knows no shift"
    law = torch.tensor([1.0, 0.0, 0.0]).double().softmax(0)
    assert flat.kl == pytest.approx(float((-(3 * law).log() / 3).sum())) and flat.top == 0
    assert flat.spread > 1e5, "a constant has no spread"
    assert swapped.top == pytest.approx(2.0) and 1 < swapped.spread < 3
    assert 0 < swapped.kl < 2


@dtypes
def test_what_is_no_number_is_not_within_rounding(dtype: torch.dtype) -> None:
    wrong = torch.full((1, 3), torch.nan)
    assert not gaps(wrong, torch.arange(3.0)[None])[0].within(dtype)
    assert gaps(torch.arange(3.0)[None], torch.arange(3.0)[None])[0].within(dtype)
