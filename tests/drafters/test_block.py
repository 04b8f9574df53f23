"""Block heads and their drafter: the head against a plain reference, trees that follow their parents, exact text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from block_reference import Reference, captured_states
from fakes import block_head, decode, packed_target, random_head, tiny_target, vanilla
from test_medusa import medusa

from haast.core import Accepted, SamplingParams
from haast.drafters.block import BlockDrafter
from haast.drafters.candidates import Candidates
from haast.drafters.eagle import EagleDrafter
from haast.drafters.pending_features import EagleState
from haast.drafters.tree_shape import DraftShape, shape_for
from haast.errors import HeadMismatchError
from haast.heads.block import BlockConfig
from haast.heads.checkpoint import Head, load_head, save_head
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.target import Target
from haast.tree import DraftTree

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7]]
DRAFTED = tuple(range(1, 32, 2))
HEADS: dict[str, dict[str, Any]] = {
    "DSpark": {"confidence_markov": True},
    "gated": {"markov_kind": "gated", "qk_norm": True},
    "DFlash": {"sample_from_anchor": False, "markov_rank": 0, "confidence": False, "qk_norm": True},
    "causal": {"causal": True, "own_lm_head": True, "num_hidden_layers": 3},
    "mask token": {"mask_token_id": 30, "own_embedding": True, "qkv_bias": True, "o_bias": True},
}


@cache
def target() -> Target:
    return tiny_target()


class Watched(BlockDrafter):
    """Keeps the text before every proposal, and the proposed trees. For one request."""

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> EagleState:
        self.text = list(prompt[: reused + 1])
        return super().begin(prompt, kv, reused)

    def observe(self, states: Sequence[Any], accepted: Accepted) -> None:
        self.text.extend(accepted.host_tokens()[0])
        super().observe(states, accepted)

    def propose(
        self, states: Sequence[Any], budget: int | None = None, others: Sequence[Candidates] | None = None
    ) -> DraftTree:
        tree = super().propose(states, budget, others)
        self.proposals.append((list(self.text), tree))
        return tree

    def watch(self, prompt: Sequence[int], new: int, sampling: SamplingParams | None = None) -> list[int]:
        self.proposals = list[tuple[list[int], DraftTree]]()
        return decode(self._target, self, [prompt], new, sampling)[0]


def paths_of(tree: DraftTree) -> set[tuple[int, ...]]:
    """The paths of a tree's nodes below the root."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return set(paths[1:])


def reference_of(at: Target, head: Head) -> Reference:
    """The head as the reference reads it."""
    module: Any = head.module
    config, weights = module.config, {name: each.double() for name, each in module.state_dict().items()}
    table = at.embedding.weight.detach()  # type: ignore[operator]
    table = weights.get("embed_tokens.weight", table)
    mask = weights["mask_embedding"][0] if config.mask_token_id < 0 else table[config.mask_token_id]
    ids = torch.arange(at.vocab_size) if head.draft_vocab is None else head.draft_vocab
    rows = weights.get("lm_head.weight", at.head_rows(ids))
    return Reference(
        weights, table, rows, mask, config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps,
        config.rope_parameters["rope_theta"], config.block_size, config.sample_from_anchor, config.causal,
        None if head.draft_vocab is None else tuple(ids.tolist()),
    )  # fmt: skip


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_trees_are_those_of_the_reference(options: dict[str, Any]) -> None:
    at, head = target(), block_head(target(), None if options.get("causal") else DRAFTED, **options)
    reference = reference_of(at, head)
    shape = DraftShape(depth=8, top_k=3, width=3, nodes=9)
    drafter = Watched(at, head, shape)
    drafter.watch(PROMPTS[1], 7, SamplingParams(1.0, seed=3))
    assert len(drafter.proposals) > 3
    for text, tree in drafter.proposals:
        captured = captured_states(at.model, text[:-1], head.module.config.layer_ids)  # type: ignore[union-attr]
        assert paths_of(tree) == reference.tree(captured, text[-1], reference.depths, 3, 3, 9)


def test_a_chain_is_the_greedy_walk_of_the_reference() -> None:
    at, head = target(), block_head(target(), confidence=False)
    reference = reference_of(at, head)
    drafter = Watched(at, head, DraftShape("chain", depth=5))
    drafter.watch(PROMPTS[1], 6)
    for text, tree in drafter.proposals:
        captured = captured_states(at.model, text[:-1], head.module.config.layer_ids)  # type: ignore[union-attr]
        walked = [text[-1]]
        for state in reference.states(captured, text[-1]):
            walked.append(int(reference.children(state, walked[-1]).argmax()))
        assert tree.tokens[0].tolist() == walked


@pytest.mark.parametrize("conditioned", [True, False])
def test_children_depend_on_their_parent_if_they_are_conditioned(conditioned: bool) -> None:
    at, shape = target(), DraftShape(depth=2, top_k=3, width=3, nodes=13)
    drafter, differ = Watched(at, block_head(at), shape, conditioned=conditioned), list[bool]()
    drafter.watch(PROMPTS[0], 8)
    for _, tree in drafter.proposals:
        paths = paths_of(tree)
        first = [path for path in paths if len(path) == 1]
        below = {frozenset(path[1] for path in paths if path[:-1] == parent) for parent in first}
        differ.append(len(below) > 1)
    assert any(differ) == conditioned


STATIC = DraftShape("static", nodes=7, depth=3)
SHAPES = [shape_for(12), DraftShape("chain", depth=4), STATIC, shape_for(2), shape_for(32)]


@pytest.mark.parametrize(("options", "shape"), [*zip(HEADS.values(), SHAPES, strict=True)], ids=HEADS)
def test_the_text_is_vanillas(options: dict[str, Any], shape: DraftShape) -> None:
    at, penalise = target(), lambda history, scores: scores - 0.5 * (torch.arange(scores.shape[1]) == history[0, -1])
    laws = [SamplingParams(), SamplingParams(0.8, top_p=0.9, repetition_penalty=1.2, seed=7, processors=(penalise,))]
    drafter = BlockDrafter(at, block_head(at, **options), shape)
    for law in laws:
        assert decode(at, drafter, PROMPTS, 16, law) == vanilla(at, PROMPTS, 16, law)


def test_a_window_and_long_texts_keep_the_text() -> None:
    at, head = target(), block_head(target())
    drafter, prompt = BlockDrafter(at, head, shape_for(8), window=4), [[1 + i % 29 for i in range(40)]]
    assert decode(at, drafter, prompt, 24) == vanilla(at, prompt, 24)


def test_drafts_do_not_depend_on_the_batch_the_cache_or_the_draws() -> None:
    at, trees = target(), dict[tuple[int, ...], list[Any]]()
    drafter = Watched(at, block_head(at), shape_for(8))
    for seed in (1, 2, 1):
        drafter.watch(PROMPTS[0], 10, SamplingParams(1.0, seed=seed))
        for text, tree in drafter.proposals:
            trees.setdefault(tuple(text), []).append((tree.tokens.tolist(), tree.parents.tolist()))
    assert any(len(each) > 1 for each in trees.values())
    assert all(each == each[:1] * len(each) for each in trees.values())


def test_packed_targets_draft_the_same_text() -> None:
    at = packed_target()
    other: Any = tiny_target().model
    plain = Target(other.float())
    native, modules = (Watched(each, block_head(each), shape_for(8)) for each in (at, plain))
    assert native.watch(PROMPTS[0], 16) == vanilla(at, PROMPTS[:1], 16)[0]
    modules.watch(PROMPTS[0], 2)
    (text, tree), (first, expected) = native.proposals[0], modules.proposals[0]
    assert text == first and native._forward.stack is not None
    assert len(paths_of(tree) & paths_of(expected)) >= tree.nodes - 3  # equal but for weights rounded to 16 bits


def test_a_head_lies_in_its_own_files(tmp_path: Any) -> None:
    head = block_head(target(), DRAFTED, confidence_markov=True, markov_kind="gated")
    config: Any = head.module.config
    save_head(tmp_path, config, dict(head.module.state_dict()), head.draft_vocab, {}, torch.float32)
    again = load_head(tmp_path)
    assert again.module.config == config and torch.equal(again.draft_vocab, head.draft_vocab)  # type: ignore[arg-type]
    for name, tensor in head.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor)


def test_kinds_of_heads_are_told_apart() -> None:
    at = target()
    with pytest.raises(HeadMismatchError, match="BlockHead can't draft as EAGLE"):
        EagleDrafter(at, block_head(at))
    for head in (random_head(at), medusa(at)):
        with pytest.raises(HeadMismatchError, match="can't draft a block: give a block head"):
            BlockDrafter(at, head)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 1, "sample_from_anchor": False}, "block_size=1"),
        ({"markov_kind": "rnn"}, "markov_kind='rnn'"),
        ({"confidence_markov": True, "markov_rank": 0}, "confidence_markov=True"),
        ({"confidence_markov": True, "confidence": False}, "confidence_markov=True"),
        ({"target_hidden_size": 64, "own_embedding": True}, "LM head doesn't fit"),
        ({"layer_ids": ()}, r"layer_ids=\[\]"),
    ],
)
def test_impossible_heads_are_refused(options: dict[str, Any], words: str) -> None:
    wanted: dict[str, Any] = {"layer_ids": (0, 1), "markov_rank": 4, "confidence": True}
    with pytest.raises(ValueError, match=words):
        BlockConfig.for_target(target().config, **(wanted | options))
