"""Tiny models and fake drafters: never right, always right, sometimes right, and trees of any shape."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from haast import native
from haast.core import Accepted, SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Emission, Engine, Stats, StopParams
from haast.heads.block import BlockConfig, BlockHead
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.heads.module import DraftModule
from haast.sampling import keyed_uniform
from haast.target.fusing import fuse_small_modules
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.tree import DraftTree

VOCAB = 32


def tiny_llama(
    vocab: int = VOCAB, hidden: int = 32, layers: int = 2, context: int = 512, std: float = 0.4, seed: int = 0
) -> LlamaForCausalLM:
    """A random llama in fp64. A large `std` makes the text wander instead of repeating one token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    tiny: LlamaForCausalLM = model.double().eval()
    return tiny


def tiny_target(vocab: int = VOCAB, layers: int = 2, context: int = 512, std: float = 0.4, seed: int = 0) -> Target:
    """`tiny_llama` as a Target."""
    return Target(tiny_llama(vocab, layers=layers, context=context, std=std, seed=seed))


def packed_target(vocab: int = VOCAB) -> Target:
    """`tiny_target` in fp32 with packed and fused layers, run in one native call where there is native code."""
    model: Any = tiny_llama(vocab)
    model.float()
    pack_linears(model)
    fuse_small_modules(model)
    target = Target(model)
    assert target.use_one_call() == native.available()
    return target


def random_head(target: Target, draft_vocab: Sequence[int] | None = None, seed: int = 1) -> Head:
    """An untrained head that fits `target`, optionally over a reduced draft vocabulary (ascending ids)."""
    return head_for(target.config, draft_vocab, seed)


def head_for(config: PretrainedConfig, draft_vocab: Sequence[int] | None = None, seed: int = 1) -> Head:
    """`random_head` for a target's (text) configuration."""
    torch.manual_seed(seed)
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(config))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    vocab = None if draft_vocab is None else torch.tensor(draft_vocab)
    return Head(module.eval().requires_grad_(False), vocab, {})


def block_head(target: Target, draft_vocab: Sequence[int] | None = None, seed: int = 2, **options: Any) -> Head:
    """An untrained block head with two layers, a Markov head and a confidence head, unless `options` say otherwise."""
    wanted: dict[str, Any] = {
        "layer_ids": (0, 1, 2), "num_hidden_layers": 2, "block_size": 5, "markov_rank": 4, "confidence": True,
        "draft_vocab_size": len(draft_vocab or ()),
    }  # fmt: skip
    module = BlockHead(BlockConfig.for_target(target.config, **(wanted | options)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = drawn + 1 if "norm" in name else drawn
    vocab = None if draft_vocab is None else torch.tensor(draft_vocab)
    return Head(module.eval().requires_grad_(False), vocab, {})


def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    eos: tuple[int, ...] = (),
    stop: Callable[[Sequence[int]], bool] | None = None,
    stats: Stats | None = None,
) -> list[list[int]]:
    """The new tokens of every row; `sampling` is for all rows, or one a row."""
    rules = StopParams(max_new, eos, stop)
    return collect(Engine(target, drafter).run(prompts, sampling or SamplingParams(), rules, stats), len(prompts))


def collect(emissions: Iterable[Emission], rows: int) -> list[list[int]]:
    """Emissions put together per row; nothing may follow a row's end."""
    texts: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    for emission in emissions:
        assert not ended[emission.row], "a row that ended must stay silent"
        texts[emission.row].extend(emission.tokens)
        ended[emission.row] = emission.finished
    assert all(ended), "every row must say that it ended"
    return texts


def vanilla(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
) -> list[list[int]]:
    """What the target says by itself."""
    return decode(target, VanillaDrafter(), prompts, max_new, sampling)


def full_texts(target: Target, prompts: Sequence[Sequence[int]], max_new: int) -> list[list[int]]:
    """Prompt and greedy continuation per row: what an oracle knows."""
    return [[*prompt, *new] for prompt, new in zip(prompts, vanilla(target, prompts, max_new), strict=True)]


@dataclass(frozen=True)
class Node:
    """One drafted node; `parent` counts the root as 0."""

    token: int
    parent: int
    live: bool = True
    placeholder: bool = False


@dataclass
class FakeState:
    """A request as a fake drafter knows it: its tokens up to the root, and its place among the texts of the test."""

    history: list[int]
    row: int


class FakeDrafter(Drafter):
    """Keeps each request's history from what the engine tells it, and asks `draft` for the nodes under the root.

    Args:
        nodes: of every tree.
        texts: what the requests say, prompts included, where the test knows it: a request is the first text that
            begins as it does. Without them every request is number 0.
    """

    def __init__(self, nodes: int, texts: Sequence[Sequence[int]] = ()) -> None:
        self._nodes, self._texts = nodes, [list(text) for text in texts]

    @property
    def nodes(self) -> int:
        return self._nodes

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> FakeState:
        known = (row for row, text in enumerate(self._texts) if text[: len(prompt)] == list(prompt))
        return FakeState(list(prompt[: reused + 1]), next(known, 0))

    def observe(self, states: Sequence[FakeState], accepted: Accepted) -> None:
        assert accepted.tokens.shape == accepted.features.shape[:2], "one feature per kept position"
        told = zip(accepted.tokens.tolist(), accepted.counts.tolist(), strict=True)
        assert [row[:count] for row, count in told] == accepted.host_tokens(), (
            "what is on the host is what the tensors hold"
        )
        for state, said in zip(states, accepted.host_tokens(), strict=True):
            state.history.extend(said)

    def propose(self, states: Sequence[FakeState], budget: int | None = None) -> DraftTree:
        drafts = [self.draft(state.row, state.history) for state in states]
        assert all(len(draft) == self._nodes - 1 for draft in drafts), "a drafter's trees have one size"
        roots = [Node(state.history[-1], -1) for state in states]
        trees = [[root, *draft][:budget] for root, draft in zip(roots, drafts, strict=True)]
        return DraftTree.from_parents(
            torch.tensor([[node.token for node in tree] for tree in trees]),
            torch.tensor([[node.parent for node in tree] for tree in trees]),
            torch.tensor([[node.live for node in tree] for tree in trees]),
            torch.tensor([[node.placeholder for node in tree] for tree in trees]),
        )

    def draft(self, row: int, history: list[int]) -> list[Node]:
        """The nodes under the root, parents first."""
        raise NotImplementedError


class OracleChain(FakeDrafter):
    """A chain that knows the text: the token at position p is right where `right(row, p)` says so, else off by one."""

    name = "oracle"

    def __init__(
        self, texts: Sequence[Sequence[int]], depth: int, right: Callable[[int, int], bool], vocab: int = VOCAB
    ) -> None:
        super().__init__(depth + 1, texts)
        self._depth, self._right, self._vocab = depth, right, vocab

    def draft(self, row: int, history: list[int]) -> list[Node]:
        text, begin = self._texts[row], len(history)
        tokens = [
            ((text[p] if p < len(text) else 0) + (not self._right(row, p))) % self._vocab
            for p in range(begin, begin + self._depth)
        ]
        return [Node(token, parent) for parent, token in enumerate(tokens)]


def never(texts: Sequence[Sequence[int]], depth: int = 3) -> OracleChain:
    """Every draft is wrong."""
    return OracleChain(texts, depth, lambda row, position: False)


def always(texts: Sequence[Sequence[int]], depth: int = 3) -> OracleChain:
    """Every draft is right."""
    return OracleChain(texts, depth, lambda row, position: True)


def sometimes(texts: Sequence[Sequence[int]], depth: int = 3, rate: float = 0.6, seed: int = 0) -> OracleChain:
    """A seeded mix of both."""
    return OracleChain(texts, depth, lambda row, position: keyed_uniform(seed, row, position) < rate)


class RandomTrees(FakeDrafter):
    """Random parents and tokens, twin siblings, dead nodes and placeholders; a node is right with chance `rate`.

    The tree is a function of the seed and the text up to its root, so it depends on the prefix only.
    """

    name = "random"

    def __init__(
        self,
        nodes: int,
        seed: int,
        texts: Sequence[Sequence[int]] = (),
        *,
        rate: float = 0.5,
        dead: float = 0.0,
        probes: float = 0.0,
        vocab: int = VOCAB,
    ) -> None:
        super().__init__(nodes, texts)
        self._seed, self._vocab = seed, vocab
        self._rate, self._dead, self._probes = rate, dead, probes

    def draft(self, row: int, history: list[int]) -> list[Node]:
        rng = random.Random(f"{self._seed} {history}")
        text = self._texts[row] if self._texts else []
        made, depths = [Node(history[-1], -1)], [0]
        for number in range(1, self._nodes):
            parent = rng.randrange(number)
            depth = depths[parent] + 1
            place = len(history) + depth - 1
            right = rng.random() < self._rate and place < len(text)
            token = text[place] if right else rng.randrange(self._vocab)
            live = made[parent].live and rng.random() >= self._dead
            made.append(Node(token, parent, live, rng.random() < self._probes))
            depths.append(depth)
        return made[1:]


def chi_square_p(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Chance of a chi-square at least as large under the expected counts; cells below 5 are pooled into one."""
    cells = [(o, e) for o, e in zip(observed, expected, strict=True) if e >= 5]
    rest = [(o, e) for o, e in zip(observed, expected, strict=True) if e < 5]
    pooled = (sum(o for o, _ in rest), sum(e for _, e in rest))
    if pooled[1] == 0 and pooled[0] > 0:
        return 0.0  # something that cannot happen did
    if pooled[1] > 0:
        cells.append(pooled)
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))


def drafted(module: DraftModule, embedded: Tensor, known: Tensor, count: int) -> Tensor:
    """The state (hidden,) after `known` (n, hidden), after `count` states of the module's own, by brute force.

    `embedded` (n + count at least, hidden) are the pairs' embeddings; positions count from 0.
    """
    own = known
    for _ in range(count + 1):
        places = torch.arange(len(own)).unsqueeze(0)
        grown = module(embedded[: len(own)].unsqueeze(0), own.unsqueeze(0), places)[0, -1:]
        own = torch.cat([own, grown])
    return own[-1]


def dies_after(append: Callable[..., None], count: int, tail: bytes = b"") -> Callable[..., None]:
    """Stands in for `jsonl_log.append`: after `count` records a kill, in the middle of the line `tail`."""
    left = iter(range(count))

    def dying(file: Any, record: dict[str, Any], path: Path, synced: bool) -> None:
        if next(left, None) is None:
            file.write(tail)
            raise KeyboardInterrupt
        append(file, record, path, synced)

    return dying


def commit(cache: KVCache, paths: Sequence[Sequence[int] | None]) -> None:
    """`keep` and `advance` by paths on the host; None (or an empty path) keeps nothing of that row.

    Raises:
        ValueError: a path does not fit the nodes of the last forward.
    """
    if len(paths) != cache.rows:
        raise ValueError(f"commit needs one path per row: {cache.rows} rows, {len(paths)} paths")
    for row, path in enumerate(paths):
        if path and (min(path) < 0 or max(path) >= cache._nodes):
            raise ValueError(f"row {row}: path {list(path)} does not fit the {cache._nodes} nodes of the forward")
    counts = [len(path) if path else 0 for path in paths]
    if any(list(path) != list(range(len(path))) for path in paths if path):
        padded = [[*(path or ()), *[0] * (max(counts) - count)] for path, count in zip(paths, counts, strict=True)]
        cache.keep(torch.tensor(padded, device=cache.device), torch.tensor(counts, device=cache.device))
    cache.advance(counts)
    cache._nodes = 0


def states_of(drafter: Any) -> list[Any]:
    """The states that `begin` makes from here on, in the order of the requests."""
    states, begin = list[Any](), drafter.begin

    def begins(prompt: Sequence[int], kv: Any, reused: int) -> Any:
        states.append(begin(prompt, kv, reused))
        return states[-1]

    drafter.begin = begins
    return states
