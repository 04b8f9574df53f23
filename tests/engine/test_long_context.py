"""Long texts: prompts in chunks of any size, nothing quadratic in memory, acceptance by length, the warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import random_head, tiny_target, vanilla
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import DRAFTERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from haast import native
from haast.bench.aggregate import pooled
from haast.bench.tables import markdown
from haast.cli.settings import PREFILL_CHUNK as TOLD_CHUNK
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import PREFILL_CHUNK, Engine, Stats, StopParams
from haast.errors import HeadMismatchError, LongContextWarning
from haast.heads.checkpoint import Head, load_head, save_head
from haast.stats import bucket_bounds, bucket_of
from haast.target.fusing import fuse_small_modules
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.training.data import TokenSequence
from haast.training.features import stream_examples

SHAPE = DraftShape(depth=3, top_k=3, width=3, nodes=8)
LONG = [(7 * i * i + 3 * i) % 31 for i in range(600)]

# ------------------------------------------------------------------ chunks


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_says_the_same_for_any_chunk(llama: Target, name: str) -> None:
    prompts = [LONG[:45], LONG[50:57], LONG[60:61]]
    law = SamplingParams(0.7, seed=2)
    expected = vanilla(llama, prompts, 12, law)
    counts = []
    for chunk in (1, 8, 45, PREFILL_CHUNK):
        stats = Stats()
        engine = Engine(llama, DRAFTERS[name](llama), prefill_chunk=chunk)
        assert engine.complete(prompts, law, StopParams(12), stats) == expected
        counts.append((stats.target_forwards, stats.accepted_by_depth))
    assert all(each == counts[0] for each in counts), "a chunk decides nothing that a drafter sees"


@settings(max_examples=12)
@given(
    st.lists(st.lists(st.integers(0, 31), min_size=1, max_size=40), min_size=1, max_size=3),
    st.integers(1, 50),
    st.sampled_from([None, 1, 3, 20]),
)
def test_chunks_windows_and_ragged_batches(llama: Target, prompts: list[list[int]], chunk: int, window: Any) -> None:
    drafter = EagleDrafter(llama, random_head(llama), SHAPE, window)
    said = Engine(llama, drafter, prefill_chunk=chunk).complete(prompts, SamplingParams(), StopParams(8))
    assert said == vanilla(llama, prompts, 8)


def test_a_chunk_below_one_is_refused(llama: Target) -> None:
    with pytest.raises(ValueError, match="prefill_chunk=0 is not allowed: give 1 or more"):
        Engine(llama, VanillaDrafter(), prefill_chunk=0)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor that an operator gives, but for parts of the caches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() == each.numel() * each.element_size():
                self.elements = max(self.elements, each.numel())
        return result


def packed(target: Target) -> Target:
    model: Any = target.model
    pack_linears(model.float())
    fuse_small_modules(model)
    made = Target(model)
    assert made.use_one_call()
    return made


QUICK = ("vanilla", "eagle", "small-model")


@pytest.mark.parametrize("path", ["modules", "native"])
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in DRAFTERS if name not in QUICK)]
)
def test_nothing_is_as_large_as_the_prompt_squared(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows fastest is scores of a chunk over the prompt: heads * chunk * positions."""
    monkeypatch.setattr("haast.target.kv_budget._MOST_TOKENS", 1024)  # the KV pool is one tensor, whatever it holds
    if path == "native" and not native.available():
        pytest.skip(native.why_not())
    found = []
    for length in (300, 600):
        target = tiny_target(layers=2 if name == "eagle3" else 1, context=1024)  # it reads three states
        target = packed(target) if path == "native" else target
        drafter = DRAFTERS[name](target)
        with Largest() as largest:
            Engine(target, drafter, prefill_chunk=8).complete([LONG[:length]], SamplingParams(), StopParams(6))
        found.append(largest.elements)
    assert found[0] < 300 * 300 and found[1] < 600 * 600
    assert found[1] <= 2.6 * found[0], "twice the prompt takes twice the memory, four times would be quadratic"


def test_the_measure_of_size_sees_a_prompt_run_whole() -> None:
    with Largest() as largest:
        Engine(tiny_target(context=1024), VanillaDrafter(), prefill_chunk=600).complete(
            [LONG], SamplingParams(), StopParams(2)
        )
    assert largest.elements >= 600 * 600


def test_features_are_made_in_chunks_too(llama: Target) -> None:
    tokens, supervised = [t % 31 for t in LONG] * 3, [False] * 900 + [True] * 900
    (_, example), *_ = stream_examples(tiny_target(context=2048), [TokenSequence(tokens, supervised, {})], topk=4)
    with Largest() as largest:
        pairs = [TokenSequence(tokens[:1700], supervised[:1700], {}), TokenSequence(tokens[:9], supervised[1791:], {})]
        made = dict(stream_examples(tiny_target(context=2048), pairs, 4, 4000, layer_ids=(0, 1)))
    assert made[0].tokens.shape == (1700,) and made[0].hidden.shape == (1700, 64)
    torch.testing.assert_close(made[0].features, example.features[:1700], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made[1].features, example.features[:9], rtol=1e-3, atol=1e-3)
    assert largest.elements < 2 * 4 * 1700 * 1700


# ------------------------------------------------------------------ by length


def test_buckets_double() -> None:
    for bucket in range(8):
        begin, end = bucket_bounds(bucket)
        assert {bucket_of(begin), bucket_of(end - 1)} == {bucket} and bucket_of(end) == bucket + 1
    assert bucket_bounds(0) == (0, 256) and bucket_bounds(3) == (1024, 2048)


def test_steps_are_counted_where_their_root_stands() -> None:
    target = tiny_target(context=1024)
    stats = Stats()
    drafter = EagleDrafter(target, random_head(target), SHAPE)
    Engine(target, drafter).complete([LONG[:500], LONG[:250], LONG[:3]], SamplingParams(), StopParams(30), stats)
    assert [(each["begin"], each["end"]) for each in stats.by_length] == [(0, 256), (256, 512), (512, 1024)]
    assert sum(stats.forwards_by_length) == stats.target_forwards
    assert sum(stats.decoded_by_length) == stats.decoded_tokens == 3 * 29
    assert sum(stats.accepted_by_length) == stats.accepted_by_depth[0] > 0
    alone = Stats()
    Engine(target, VanillaDrafter()).complete([LONG[:250]], SamplingParams(), StopParams(20), alone)
    # The prefill gives token 250; roots 250 .. 268 are run, six of them below 256.
    assert alone.forwards_by_length == [6, 13] and alone.by_length[1]["acceptance"] == 0.0


def test_rows_of_several_suites_add_their_buckets() -> None:
    def row(*buckets: tuple[int, int, float]) -> dict[str, Any]:
        counts = ("tokens", "decoded_tokens", "prompts", "target_forwards")
        parts = ("ms_draft", "ms_verify", "ms_overhead", "nodes_per_forward", "peak_rss_mb", "tau")
        return {
            "decoder": "eagle", **dict.fromkeys(counts, 1), **dict.fromkeys(parts, 1.0), "reached_by_depth": [],
            "alpha_by_depth": [], "acceptance_by_depth": [], "by_length": [
                {"begin": b, "end": 2 * b or 256, "target_forwards": n, "drafted": n, "tau": t, "acceptance": t / 4}
                for b, n, t in buckets
            ],
        }  # fmt: skip

    answer = {"category": "", "looping": False, "tokens": 2, "ms_prefill": [1.0], "ms_decode": [1.0]}
    told = [{**answer, "target_forwards": 1, "tau": 1.0}]
    old = row()
    del old["by_length"]
    found = pooled([row((0, 1, 2.0), (256, 3, 1.0)), row((0, 3, 4.0)), old], told)["by_length"]
    assert [(each["begin"], each["target_forwards"], each["tau"]) for each in found] == [(0, 4, 3.5), (256, 3, 1.0)]
    assert found[0]["acceptance"] == 3.5 / 4
    table = markdown("suite.md", "lengths", {"eagle": found, "hf": []})
    assert table.splitlines()[0] == "| decoder | 0 to 255 | 256 to 511 |" and "| eagle | 3.50 | 1.00 |" in table
    assert markdown("suite.md", "lengths", {"eagle": found[:1]}) == ""


# ------------------------------------------------------------------ past a head's training


def trained_head(target: Target, length: Any) -> Head:
    head = random_head(target)
    return Head(head.module, None, {"trained_length": length})


def test_a_text_past_the_heads_training_is_told_once(llama: Target) -> None:
    drafter = EagleDrafter(llama, trained_head(llama, 40), SHAPE)
    engine = Engine(llama, drafter)
    engine.complete([LONG[:20]], SamplingParams(), StopParams(15))  # warnings are errors here
    with pytest.warns(LongContextWarning, match=r"has 4\d tokens, the head was trained on at most 40.*draft_window=40"):
        said = engine.complete([LONG[:20]], SamplingParams(), StopParams(40))
    assert said == vanilla(llama, [LONG[:20]], 40)
    engine.complete([LONG[:80]], SamplingParams(), StopParams(5))  # once for a drafter
    with pytest.warns(LongContextWarning, match="has 80 tokens"):
        Engine(llama, EagleDrafter(llama, trained_head(llama, 40), SHAPE, 41)).complete(
            [LONG[:80]], SamplingParams(), StopParams(5)
        )


@pytest.mark.parametrize(("length", "window"), [(40, 40), (40, 1), (None, None), (200, None)])
def test_nothing_is_told_where_nothing_is_known_to_be_wrong(llama: Target, length: Any, window: Any) -> None:
    drafter = EagleDrafter(llama, trained_head(llama, length), SHAPE, window)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(llama, drafter).complete([LONG[:80]], SamplingParams(), StopParams(5))


@pytest.mark.parametrize("length", [0, -3, 4.5, "long", True])
def test_a_length_that_is_none_is_refused(llama: Target, length: Any) -> None:
    with pytest.raises(HeadMismatchError, match=f"trained_length={length!r} .*remove the entry"):
        EagleDrafter(llama, trained_head(llama, length), SHAPE)


def test_files_keep_the_length(llama: Target, tmp_path: Path) -> None:
    head = random_head(llama)
    save_head(tmp_path, head.module.config, dict(head.module.state_dict()), None, {"trained_length": 77}, torch.float32)
    assert load_head(tmp_path).trained_length == 77
    save_head(tmp_path, head.module.config, dict(head.module.state_dict()), None, dtype=torch.float32)
    assert load_head(tmp_path).trained_length is None


# ------------------------------------------------------------------ settings


def test_the_command_line_names_the_librarys_default() -> None:
    assert TOLD_CHUNK == PREFILL_CHUNK
