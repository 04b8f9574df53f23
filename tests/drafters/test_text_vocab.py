"""Tokens of the text, added to a reduced draft vocabulary: what is drafted with them, and whose they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import block_head, collect, packed_target, random_head, tiny_target, vanilla
from test_medusa import medusa
from torch import nn

from haast import native
from haast.core import SamplingParams
from haast.drafters import text_vocab
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.text_vocab import Rare, TextVocab
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, StopParams
from haast.engine.step import Step
from haast.heads.checkpoint import Head
from haast.heads.eagle3 import Eagle3Config, Eagle3Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.target.packing import PackedLinear
from haast.target.precision import reads_rows
from haast.target.target import Target

COMMON = list(range(0, 32, 2))
SHAPE = DraftShape("dynamic", 3, 4, 4, 10)
PROMPTS = [[3, 4, 9, 4, 3], [8, 6], [21, 2, 23, 25]]
LAWS = [SamplingParams(), SamplingParams(temperature=1.0, seed=4)]


def eagle(target: Target, vocab: list[int]) -> EagleDrafter:
    return EagleDrafter(target, random_head(target, vocab), SHAPE)


def added(drafter: EagleDrafter) -> list[int]:
    """What it drafts over now in addition to the common tokens."""
    assert drafter._vocab is not None
    return drafter._vocab.tolist()[len(COMMON) :]


def trees(target: Target, drafter: EagleDrafter, prompt: list[int], law: SamplingParams) -> tuple[list[int], list[Any]]:
    """What is said, and the tree of every step."""
    seen = list[Step]()
    target.pool.clear()
    said = collect(Engine(target, drafter).run([prompt], law, StopParams(24), watch=seen.append), 1)[0]
    return said, [(step.tree.tokens.tolist(), step.tree.parents.tolist()) for step in seen]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [tiny_target, packed_target])
def test_a_text_is_drafted_over_its_own_tokens_too(
    make: Callable[[], Target], law: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly as by a drafter whose vocabulary has had them from the start."""
    target = make()
    for prompt in PROMPTS:
        drafter = eagle(target, COMMON)
        said, drawn = trees(target, drafter, prompt, law)
        rare = {token for token in [*prompt, *said] if token % 2}
        assert set(added(drafter)) <= rare and (not rare or any(rare & set(tokens[0][1:]) for tokens, _ in drawn))
        # If all of the text's are known from the start, every step can be compared.
        drafter, knowing = eagle(target, COMMON), eagle(target, sorted({*COMMON, *rare}))
        assert drafter._text_vocab is not None
        monkeypatch.setattr(drafter._text_vocab, "note", lambda texts, _, all=rare: texts.update(dict.fromkeys(all)))
        assert trees(target, drafter, prompt, law) == trees(target, knowing, prompt, law)


@pytest.mark.skipif(not native.available(), reason="needs the native code")
def test_one_call_and_modules_draft_the_same_trees() -> None:
    target = packed_target()
    one_call, by_modules = eagle(target, COMMON), eagle(target, COMMON)
    by_modules._native, by_modules._forward.stack = False, None
    for prompt in PROMPTS:
        assert trees(target, one_call, prompt, LAWS[0]) == trees(target, by_modules, prompt, LAWS[0])
        assert added(one_call) == added(by_modules) != []
    assert one_call._prepared(one_call.configs[1], None).one_call is not None  # type: ignore[union-attr]
    assert by_modules._prepared(by_modules.configs[1], None).one_call is None  # type: ignore[union-attr]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make", [tiny_target, packed_target])
@pytest.mark.parametrize("wrap", [lambda each: each, HybridDrafter])
def test_texts_are_vanillas(make: Callable[[], Target], wrap: Any, law: SamplingParams) -> None:
    target = make()
    drafter = wrap(eagle(target, COMMON))
    ends = [StopParams(30), StopParams(7), StopParams(18)]
    said = collect(Engine(target, drafter).run(PROMPTS, law, ends), 3)
    assert said == [
        whole[: end.max_new_tokens] for whole, end in zip(vanilla(target, PROMPTS, 30, law), ends, strict=True)
    ]


def test_a_text_keeps_its_latest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    target, rare = tiny_target(), Rare()
    words = eagle(target, COMMON)._text_vocab
    assert words is not None
    words.note(rare, [1, 2, 3, 5, 2, 1])
    assert list(rare) == [3, 5, 1], "by their last place"
    monkeypatch.setattr(text_vocab, "MOST", 4)
    words.note(rare, [7, 9])
    assert list(rare) == [5, 1, 7, 9], "the oldest goes"


def test_rows_of_a_batch_share_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_vocab, "MOST", 4)
    target = tiny_target()
    drafter = eagle(target, COMMON)
    words = drafter._text_vocab
    assert words is not None
    one, two = dict.fromkeys([1, 3, 5, 7]), dict.fromkeys([9, 5])
    head, ids = words.over([one])
    assert ids.tolist() == [*COMMON, 1, 3, 5, 7] and words.over([one])[0] is head, "made once"
    features = torch.randn(3, 32, dtype=torch.float64)
    assert torch.allclose(head(features), target.head_logits(features)[:, ids], atol=1e-12)
    assert words.over([one, two])[1].tolist() == [*COMMON, 5, 7, 9], "the latest two of each"
    assert words.over([one] * 9)[1].tolist() == [*COMMON, 7], "one at least"
    bare = words.over([{}])
    assert bare[0] is words._lm_head and bare[1] is words._vocab


def test_a_text_alone_has_only_its_own() -> None:
    target = tiny_target()
    drafter = eagle(target, COMMON)
    for prompt in PROMPTS:
        said, _ = trees(target, drafter, prompt, LAWS[0])
        assert set(added(drafter)) <= {*prompt, *said}


def test_sizes_are_those_of_the_head_alone() -> None:
    """Calibrations are kept by them."""
    target = tiny_target()
    drafter = eagle(target, COMMON)
    before = drafter.parameters
    trees(target, drafter, PROMPTS[2], LAWS[0])
    assert added(drafter) and drafter.parameters == before


def test_a_vocabulary_smaller_than_the_children_of_a_node() -> None:
    """Shapes are planned for the vocabulary alone, whatever the text at hand adds."""
    target = tiny_target()
    drafter = eagle(target, [4, 6])
    for prompt in ([3, 9, 21, 23], [4, 6], [3, 4]):
        assert trees(target, drafter, prompt, LAWS[0])[0] == vanilla(target, [prompt], 24)[0]


def test_heads_with_rows_of_their_own_keep_their_vocabulary() -> None:
    target = tiny_target()
    module = Eagle3Head(Eagle3Config.for_target(target.config, layer_ids=(0, 1, 2), draft_vocab_size=len(COMMON)))
    vocab = torch.tensor(COMMON)
    sizes = FeatExtrapolatorConfig.for_target(target.config, markov_rank=2)
    block = block_head(target, COMMON)
    for each in (Head(module.double(), vocab, {}), Head(FeatExtrapolator(sizes, len(COMMON)).double(), vocab, {})):
        assert EagleDrafter(target, each, SHAPE)._text_vocab is None
    assert EagleDrafter(target, random_head(target), SHAPE)._text_vocab is None, "all tokens are drafted"
    lm_head = target.lm_head
    assert TextVocab.of(target, block.module, vocab, lm_head) is None  # type: ignore[arg-type]
    assert isinstance(MedusaDrafter(target, medusa(target), 6), MedusaDrafter)


def test_rows_are_read_where_that_reads_no_others() -> None:
    plain = nn.Linear(32, 16, bias=False)
    rounded = copy.deepcopy(plain)
    rounded.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    packed = PackedLinear(plain.weight.detach())
    assert reads_rows(plain) and reads_rows(packed)
    assert not reads_rows(rounded) and not reads_rows(packed.followed_by(packed)) and not reads_rows(nn.Identity())


def test_a_layer_that_follows_another_shares_its_memory() -> None:
    first, second = (PackedLinear(torch.randn(16, 32), form="int8") for _ in range(2))
    both, x = first.followed_by(second), torch.randn(3, 32)
    assert torch.equal(both(x), torch.cat([first(x), second(x)], -1))
    assert both.packed.data_ptr() == first.packed.data_ptr() and both.out_features == 32
