"""Acceptance rules: what they emit, by enumeration over every draft and every random decision, and in the engine."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from fakes import chi_square_p, collect, random_head, tiny_llama, tiny_target, vanilla
from torch import Tensor

from haast.bench.decoders import EngineDecoder, independent_text, lossy
from haast.core import RowVerdict, SamplingParams, StopParams, TokenChooser, Verdict
from haast.drafters import small_model as small_model_module
from haast.drafters.eagle import EagleDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine import rules as acceptance
from haast.engine.engine import Engine
from haast.engine.rules import AcceptanceRule, BlockRule, Draws, RejectionRule, TypicalRule, rule_named
from haast.engine.verify import Failures, verify
from haast.errors import HeadMismatchError
from haast.sampling import ACCEPT, DRAFT, RESIDUAL, Sampler, keyed_uniform
from haast.stats import Stats
from haast.target.target import Target
from haast.tree import DraftTree

ROOT = 0
Chances = dict[tuple[int, ...], float]
Table = Callable[[tuple[int, ...]], Tensor]


# ------------------------------------------------------------------ enumeration


class Scripted(Draws):
    """Follows a script of decisions, then the first possible one; notes every decision's options and their chances."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script
        self.met: list[list[float]] = []

    def _decide(self, chances: list[float]) -> int:
        place = len(self.met)
        self.met.append(chances)
        if place < len(self._script):
            return self._script[place]
        return next(i for i, chance in enumerate(chances) if chance > 0)

    def coin(self, chance: float, depth: int, turn: int = 0) -> bool:
        assert 0 <= chance <= 1
        return self._decide([chance, 1 - chance]) == 0

    def pick(self, probs: Tensor, depth: int) -> int:
        assert abs(float(probs.sum()) - 1) < 1e-9
        return self._decide(probs.tolist())


def outcomes(rule: AcceptanceRule, tree: DraftTree, logits: Tensor, sampler: Sampler) -> list[tuple[float, RowVerdict]]:
    """Every verdict the rule's own walk can reach, with its exact chance: all its decisions are tried both ways."""
    found, scripts = [], [list[int]()]
    while scripts:
        script = scripts.pop()
        draws = Scripted(script)
        rule.draws = lambda *_, own=draws: own  # type: ignore[method-assign]
        (verdict,) = rule.verify(tree, logits, [sampler], [[ROOT]]).rows
        assert verdict is not None
        taken = list(script)
        chance = 1.0
        for place, chances in enumerate(draws.met):
            if place >= len(script):
                first = next(i for i, c in enumerate(chances) if c > 0)
                scripts += [[*taken, i] for i, c in enumerate(chances) if i > first and c > 0]
                taken.append(first)
            chance *= chances[taken[place]]
        found.append((chance, verdict))
    assert abs(sum(chance for chance, _ in found) - 1) < 1e-12
    return found


def random_table(vocab: int, seed: int, sharp: float = 1.5, zeros: bool = False) -> Table:
    """A distribution per history, made when asked for; with `zeros` some tokens are impossible."""

    @cache
    def probs(history: tuple[int, ...]) -> Tensor:
        rng = random.Random(f"{seed} {history}")
        weights = [math.exp(sharp * rng.gauss(0, 1)) for _ in range(vocab)]
        if zeros:
            weights[rng.randrange(vocab)] = 0.0
        return torch.tensor(weights, dtype=torch.float64) / sum(weights)

    return probs


@dataclass(frozen=True)
class Case:
    """A vocabulary, a chain's depth, and both tables."""

    vocab: int
    depth: int
    target: Table
    draft: Table


def case(vocab: int, depth: int, seed: int) -> Case:
    return Case(
        vocab,
        depth,
        random_table(vocab, 2 * seed, zeros=seed % 3 == 1),
        random_table(vocab, 2 * seed + 1, sharp=0.8, zeros=seed % 4 == 2),
    )


CASES = [case(v, d, s) for s, (v, d) in enumerate([(3, 1), (5, 1), (3, 2), (4, 2), (5, 2), (3, 3), (4, 2), (3, 3)])]


def chain_of(own: Case, drafts: tuple[int, ...]) -> tuple[DraftTree, Tensor]:
    """The chain of these drafts with the distributions they were drawn from, and the target's logits over it."""
    prefixes = [drafts[:i] for i in range(own.depth + 1)]
    drawn_from = torch.stack([own.draft(()), *(own.draft(prefix) for prefix in prefixes[:-1])]).unsqueeze(0)
    tree = DraftTree.chain(torch.tensor([[ROOT, *drafts]]))
    return replace(tree, draft_probs=drawn_from), torch.stack([own.target(p) for p in prefixes]).log().unsqueeze(0)


def chance_of(table: Table, tokens: tuple[int, ...], after: tuple[int, ...] = ()) -> float:
    """The chance that a table says `tokens` after `after`."""
    return math.prod(float(table((*after, *tokens[:i]))[token]) for i, token in enumerate(tokens))


def emitted(own: Case, rule: AcceptanceRule) -> tuple[Chances, float]:
    """The chances of strings of depth + 1 tokens, and the expected number of drafts kept.

    Sums over all drafts and all decisions; what a verdict leaves short, the target itself continues.
    """
    chances: Chances = defaultdict(float)
    kept = 0.0
    sampler = Sampler(SamplingParams(temperature=1.0))
    for drafts in product(range(own.vocab), repeat=own.depth):
        drawn = chance_of(own.draft, drafts)
        if drawn == 0:
            continue
        for chance, verdict in outcomes(rule, *chain_of(own, drafts), sampler):
            kept += drawn * chance * (len(verdict.path) - 1)
            for rest in product(range(own.vocab), repeat=own.depth + 1 - len(verdict.tokens)):
                weight = drawn * chance * chance_of(own.target, rest, verdict.tokens)
                chances[(*verdict.tokens, *rest)] += weight
    return chances, kept


def distance(own: Case, chances: Chances) -> float:
    """Total variation between these chances and the target's, over strings of depth + 1 tokens."""
    strings = product(range(own.vocab), repeat=own.depth + 1)
    return sum(abs(chances.get(string, 0.0) - chance_of(own.target, string)) for string in strings) / 2


@pytest.mark.parametrize("own", CASES)
@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_what_is_emitted_is_distributed_as_the_targets_text(own: Case, make: type[AcceptanceRule]) -> None:
    assert distance(own, emitted(own, make())[0]) < 1e-12


def test_block_keeps_at_least_what_rejection_keeps_and_sometimes_more() -> None:
    gains = []
    for own in CASES:
        gain = emitted(own, BlockRule())[1] - emitted(own, RejectionRule())[1]
        assert gain > -1e-12
        if own.depth == 1:
            assert gain < 1e-12, "a chain of one token leaves nothing to gain"
        gains.append(gain)
    assert sum(gain > 1e-3 for gain in gains) >= 3


def test_rejection_keeps_the_overlap_of_both_distributions() -> None:
    own = CASES[1]
    overlap = float(torch.minimum(own.target(()), own.draft(())).sum())
    assert abs(emitted(own, RejectionRule())[1] - overlap) < 1e-12


def wrong_chance(target: Tensor, draft: Tensor, token: int) -> float:
    return float(target[token])  # the point mass's chance, for a token that was drawn


def no_excess(target: Tensor, draft: Tensor, weight: float = 1.0) -> Tensor:
    return target


def folded_excess(target: Tensor, draft: Tensor, weight: float = 1.0) -> Tensor:
    excess = (weight * target - draft).abs()  # negative parts folded in instead of cut off
    return excess / excess.sum()


def weightless_excess(target: Tensor, draft: Tensor, weight: float = 1.0) -> Tensor:
    return RESIDUAL_OF(target, draft)


def greedy_block(weights: Sequence[float], targets: object, drafts: object, kept: int) -> float:
    return weights[kept]  # the chance to keep so many, not that given no more are


RESIDUAL_OF = acceptance.residual


@pytest.mark.parametrize(
    ("make", "name", "wrong"),
    [
        (RejectionRule, "accept_chance", wrong_chance),
        (RejectionRule, "residual", no_excess),
        (RejectionRule, "residual", folded_excess),
        (BlockRule, "residual", no_excess),
        (BlockRule, "residual", folded_excess),
        (BlockRule, "residual", weightless_excess),
        (BlockRule, "block_chance", greedy_block),
    ],
)
def test_wrong_rules_are_seen(
    monkeypatch: pytest.MonkeyPatch, make: type[AcceptanceRule], name: str, wrong: object
) -> None:
    monkeypatch.setattr(acceptance, name, wrong)
    assert distance(CASES[6], emitted(CASES[6], make())[0]) > 1e-3


@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_drafts_of_another_distribution_than_is_said_are_seen(make: type[AcceptanceRule]) -> None:
    own = CASES[3]
    chances: Chances = defaultdict(float)
    sampler = Sampler(SamplingParams(temperature=1.0))
    for drafts in product(range(own.vocab), repeat=own.depth):
        for chance, verdict in outcomes(make(), *chain_of(own, drafts), sampler):
            for rest in product(range(own.vocab), repeat=own.depth + 1 - len(verdict.tokens)):
                chances[(*verdict.tokens, *rest)] += (
                    own.vocab**-own.depth * chance * chance_of(own.target, rest, verdict.tokens)
                )  # drawn uniformly
    assert distance(own, chances) > 1e-2


@pytest.mark.parametrize("own", CASES[:4])
@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_given_drafts_are_point_masses_and_lossless_too(own: Case, make: type[AcceptanceRule]) -> None:
    chances: Chances = defaultdict(float)
    drafts = tuple(range(own.depth))
    tree, logits = chain_of(own, drafts)
    for chance, verdict in outcomes(
        make(), replace(tree, draft_probs=None), logits, Sampler(SamplingParams(temperature=1.0))
    ):
        for rest in product(range(own.vocab), repeat=own.depth + 1 - len(verdict.tokens)):
            chances[(*verdict.tokens, *rest)] += chance * chance_of(own.target, rest, verdict.tokens)
    assert distance(own, chances) < 1e-12


# ------------------------------------------------------------------ several children, in the order they were drawn


def siblings_distance(vocab: int, count: int, seed: int, replaced: bool, sort: bool = False) -> float:
    """Total variation of the first token's distribution from the target's, for `count` sampled children."""
    target, draft = random_table(vocab, seed)(()), random_table(vocab, seed + 1)(())
    found = torch.zeros(vocab, dtype=torch.float64)
    sampler, rule = Sampler(SamplingParams(temperature=1.0)), RejectionRule()
    for tokens in product(range(vocab), repeat=count):
        chance, drawn_from, left = 1.0, [draft], draft
        for token in tokens:
            drawn_from.append(left)
            chance *= float(left[token])
            if not replaced:
                left = left.clone()
                left[token] = 0.0
                left = left / left.sum() if float(left.sum()) > 0 else left
        if chance == 0:
            continue
        order = sorted(range(count), key=lambda i: -float(draft[tokens[i]])) if sort else list(range(count))
        chosen = [tokens[i] for i in order]
        probs = torch.stack([drawn_from[0], *(drawn_from[i + 1] for i in order)]).unsqueeze(0)
        tree = DraftTree.from_parents(torch.tensor([[ROOT, *chosen]]), torch.tensor([[-1, *[0] * count]]))
        logits = target.log().expand(1, count + 1, vocab)
        for weight, verdict in outcomes(rule, replace(tree, draft_probs=probs), logits, sampler):
            found[verdict.tokens[0]] += chance * weight
    return float((found - target).abs().sum()) / 2


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize(("vocab", "count", "replaced"), [(4, 2, True), (4, 2, False), (4, 3, False), (3, 3, True)])
def test_several_sampled_children_are_lossless(vocab: int, count: int, replaced: bool, seed: int) -> None:
    assert siblings_distance(vocab, count, seed, replaced) < 1e-12


def test_children_tried_in_another_order_than_drawn_are_seen() -> None:
    assert max(siblings_distance(4, 3, seed, replaced=True, sort=False) for seed in (0, 10)) < 1e-12
    assert siblings_distance(4, 3, 0, replaced=False, sort=True) > 1e-3


# ------------------------------------------------------------------ typical acceptance


def test_typical_acceptance_is_biased_and_says_so() -> None:
    assert min(distance(own, emitted(own, TypicalRule())[0]) for own in CASES) > 0.09
    assert TypicalRule.lossy and "lossy" in TypicalRule().label
    assert not RejectionRule.lossy and not BlockRule.lossy and "lossy" not in BlockRule().label
    assert "LOSSY" in (TypicalRule.__doc__ or "")


def walked(rule: AcceptanceRule, tree: DraftTree, probs: Tensor, temperature: float = 1.0) -> RowVerdict:
    (row,) = rule.verify(tree, probs.log().unsqueeze(0), [Sampler(SamplingParams(temperature))], [[ROOT]]).rows
    assert row is not None
    return row


#      0          distributions at the nodes decide which of its children are typical
#     / \
#    1   2
#   / \   \
#  3   4   5
TREE = DraftTree.from_parents(torch.tensor([[ROOT, 1, 2, 3, 1, 0]]), torch.tensor([[-1, 0, 0, 1, 1, 2]]))
FLAT = torch.full((4,), 0.25, dtype=torch.float64)


def probs_of(*probs: float) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64)


def test_typical_keeps_the_longest_then_the_likeliest_path_and_a_greedy_token() -> None:
    probs = torch.stack([FLAT, probs_of(0.0, 0.5, 0.1, 0.4), probs_of(0.97, 0.01, 0.01, 0.01), FLAT, FLAT, FLAT])
    probs[5] = probs_of(0.1, 0.2, 0.6, 0.1)
    assert walked(TypicalRule(), TREE, probs) == RowVerdict((0, 2, 5), (2, 0, 2), (False, True))
    probs[0] = probs_of(0.0, 0.98, 0.02, 0.0)  # node 2 is now too unlikely
    probs[4] = probs_of(0.2, 0.3, 0.1, 0.4)
    assert walked(TypicalRule(), TREE, probs) == RowVerdict((0, 1, 4), (1, 1, 3), (True, False))
    probs[0] = probs_of(0.97, 0.01, 0.01, 0.01)
    assert walked(TypicalRule(), TREE, probs) == RowVerdict((0,), (0,), (False,))


@pytest.mark.parametrize(
    ("probs", "epsilon", "delta", "typical"),
    [
        # entropy ln 4, exp(-entropy) = 1/4: the threshold is min(epsilon, delta / 4)
        ((0.25, 0.25, 0.25, 0.25), 0.9, 0.99, True),
        ((0.25, 0.25, 0.25, 0.25), 0.9, 1.01, False),
        ((0.25, 0.25, 0.25, 0.25), 0.24, 9.0, True),
        ((0.25, 0.25, 0.25, 0.25), 0.26, 9.0, False),
        ((0.0, 1.0, 0.0, 0.0), 0.09, 0.3, False),  # no NaN from 0 log 0
        ((1.0, 0.0, 0.0, 0.0), 0.09, 0.3, True),
    ],
)
def test_the_typical_threshold(probs: tuple[float, ...], epsilon: float, delta: float, typical: bool) -> None:
    assert acceptance.is_typical(probs_of(*probs), 0, epsilon, delta) == typical


# ------------------------------------------------------------------ guards


def test_rounding_that_leaves_no_excess_falls_back_to_the_targets_argmax() -> None:
    probs = probs_of(0.2, 0.5, 0.3)
    assert acceptance.residual(probs, probs).tolist() == [0.0, 1.0, 0.0]
    assert acceptance.residual(probs, probs, weight=0.5).tolist() == [0.0, 1.0, 0.0]
    assert acceptance.block_chance([1.0, 1.0], [probs, probs, probs], [probs, probs], 1) == 1.0


FAIR = torch.full((3,), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ((math.nan, 0.5, 0.5), "NaN"),
        ((-0.5, 1.0, 0.5), "negative"),
        ((0.2, 0.2, 0.2), "sum to 1"),
        ((0.5, 0.0, 0.5), "cannot have been drawn"),
    ],
)
@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_impossible_draft_probs_are_refused(probs: tuple[float, ...], message: str, make: type[AcceptanceRule]) -> None:
    both = torch.stack([probs_of(*probs)] * 2).unsqueeze(0)
    tree = replace(DraftTree.chain(torch.tensor([[ROOT, 1]])), draft_probs=both)
    with pytest.raises(ValueError, match=message):
        make().verify(tree, torch.zeros(1, 2, 3), [Sampler(SamplingParams(1.0))], [[ROOT]])
    failures: Failures = {}
    two = replace(DraftTree.chain(torch.tensor([[ROOT, 1]] * 2)), draft_probs=torch.cat([both, FAIR.expand(1, 2, 3)]))
    samplers = [Sampler(SamplingParams(1.0))] * 2
    verdict = make().verify(two, torch.zeros(2, 2, 3), samplers, [[ROOT]] * 2, failures)
    assert list(failures) == [0] and verdict.rows[0] is None and verdict.rows[1] is not None


class Oracle:
    """Chooses without a distribution."""

    stateless = False

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        return 0


@pytest.mark.parametrize("make", [RejectionRule, BlockRule, TypicalRule])
def test_what_a_rule_can_not_judge_is_refused(make: type[AcceptanceRule]) -> None:
    tree, logits, sampler = DraftTree.chain(torch.tensor([[ROOT, 1]])), torch.zeros(1, 2, 3), Sampler(SamplingParams())
    with pytest.raises(ValueError, match="needs the target's distribution, and a Oracle only chooses"):
        make().verify(tree, logits, [Oracle()], [[ROOT]])
    with pytest.raises(ValueError, match="cover different nodes"):
        make().verify(tree, logits[:, :1], [sampler], [[ROOT]])
    with pytest.raises(RuntimeError, match="the root is token 0, the last emitted one 2"):
        make().verify(tree, logits, [sampler], [[2]])


def test_draws_depend_on_seed_choice_and_position_alone() -> None:
    probs, keys = torch.full((64,), 1 / 64), [(3, 0, 5), (4, 0, 5), (3, 1, 5), (3, 0, 6)]
    picked = [tuple(Draws(*key).pick(probs, depth) for depth in range(9)) for key in keys]
    assert len(set(picked)) == len(keys) and picked[0] == tuple(Draws(3, 0, 5).pick(probs, d) for d in range(9))
    sampler = Sampler(SamplingParams(1.0, seed=3), choice=1)
    assert RejectionRule().draws(sampler, [0] * 5).pick(probs, 0) == Draws(3, 1, 5).pick(probs, 0)


def test_block_takes_chains_only() -> None:
    with pytest.raises(ValueError, match="'block' takes chains"):
        walked(BlockRule(), TREE, torch.stack([FLAT] * 6))


@pytest.mark.parametrize(
    ("epsilon", "delta", "name"), [(0.0, 1.0, "epsilon"), (1.0, 1.0, "epsilon"), (0.1, 0.0, "delta")]
)
def test_impossible_thresholds_are_refused(epsilon: float, delta: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TypicalRule(epsilon, delta)


def test_rules_are_named() -> None:
    assert rule_named("match") is None
    made = [rule_named(name) for name in acceptance.RULES[1:]]
    assert [rule.name for rule in made if rule is not None] == ["rejection", "block", "typical"]
    with pytest.raises(ValueError, match="unknown acceptance rule 'best'"):
        rule_named("best")


# ------------------------------------------------------------------ through the engine

SMALL, DEPTH, LENGTH, ROWS, RUNS = 4, 2, 4, 250, 8
PARAMS = SamplingParams(temperature=0.9, top_p=0.97, repetition_penalty=1.1)
PROMPT = [1, 3]


@cache
def target() -> Target:
    return tiny_target(vocab=SMALL, layers=1, std=0.12, seed=3)


@cache
def drafting() -> Target:
    return tiny_target(vocab=SMALL, layers=1, std=0.15, seed=8)


@cache
def exact() -> Chances:
    """P(string) of all strings of length LENGTH, from the stock model's logits over every prefix."""
    model, sampler = tiny_llama(vocab=SMALL, layers=1, std=0.12, seed=3), Sampler(PARAMS)

    @cache
    def probs(after: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*PROMPT, *after]])).logits[0, -1]
        return sampler.probs([*PROMPT, *after], logits)

    return {string: chance_of(probs, string) for string in product(range(SMALL), repeat=LENGTH)}


def engine_p_value(
    rule: AcceptanceRule, stats: Stats | None = None, small: Target | None = None, runs: int = RUNS
) -> float:
    seen: Counter[tuple[int, ...]] = Counter()
    engine = Engine(target(), SmallModelDrafter(target(), small or drafting(), DEPTH, PARAMS), rule)
    for run in range(runs):
        every = [replace(PARAMS, seed=run * ROWS + row) for row in range(ROWS)]
        seen.update(map(tuple, engine.complete([PROMPT] * ROWS, every, StopParams(LENGTH), stats)))
    strings = sorted(exact())
    return chi_square_p([seen[s] for s in strings], [exact()[s] * ROWS * runs for s in strings])


@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_the_engines_text_is_distributed_as_the_targets(make: type[AcceptanceRule]) -> None:
    stats = Stats()
    assert engine_p_value(make(), stats) > 1e-3
    assert 0.3 < stats.accepted_by_depth[0] / stats.reached_by_depth[0] < 0.97, "both verdicts must occur"


def test_a_biased_rule_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "accept_chance", wrong_chance)
    assert engine_p_value(RejectionRule()) < 1e-9


@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_no_draw_serves_twice(monkeypatch: pytest.MonkeyPatch, make: type[AcceptanceRule]) -> None:
    # Block's verdict depends on drafts it throws away: if the next step drew with their numbers, it would be biased.
    keyed, asked = keyed_uniform, list[tuple[int, ...]]()

    def noting(*keys: int) -> float:
        asked.append(keys)
        return keyed(*keys)

    monkeypatch.setattr(acceptance, "keyed_uniform", noting)
    monkeypatch.setattr(small_model_module, "keyed_uniform", noting)
    engine = Engine(target(), SmallModelDrafter(target(), drafting(), 3, PARAMS), make())
    stats = Stats()
    prompts, choosers = [PROMPT] * 4, [Sampler(replace(PARAMS, seed=seed), c) for seed in (0, 1) for c in (0, 1)]
    for _ in engine.run(prompts, PARAMS, StopParams(20), stats, choosers=choosers):
        pass
    assert stats.accepted_by_depth[0] < stats.reached_by_depth[0], "some drafts must be thrown away"
    assert len(asked) > 100 and len(set(asked)) == len(asked)
    assert {keys[3] for keys in asked} == {DRAFT, ACCEPT, RESIDUAL}
    assert {keys[:2] for keys in asked} == {(0, 0), (0, 1), (1, 0), (1, 1)}, "requests share no draw"


@pytest.mark.slow
def test_draws_that_serve_twice_bias_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why the test above matters: the same engine, once with its keys and once with a token's own position as the key.
    far = tiny_target(vocab=SMALL, layers=1, std=0.5, seed=2)
    assert engine_p_value(BlockRule(), small=far, runs=40) > 1e-3

    def by_position(seed: int, choice: int, position: int, kind: int, depth: int, *turn: int) -> float:
        return keyed_uniform(seed, choice, position + depth + (kind == DRAFT), kind, *turn)

    monkeypatch.setattr(acceptance, "keyed_uniform", by_position)
    monkeypatch.setattr(small_model_module, "keyed_uniform", by_position)
    assert engine_p_value(BlockRule(), small=far, runs=40) < 1e-9


def wandering(seed: int) -> Target:
    return tiny_target(vocab=16, layers=1, seed=seed)


@pytest.mark.parametrize("make", [RejectionRule, BlockRule, TypicalRule])
@pytest.mark.parametrize("drawn", [False, True])
def test_at_temperature_0_every_rule_says_what_vanilla_says(make: type[AcceptanceRule], drawn: bool) -> None:
    at, prompts, params = wandering(0), [[1, 2, 3], [4]], SamplingParams()
    for small in (wandering(0), wandering(5)):
        drafter = SmallModelDrafter(at, small, 3, params if drawn else None)
        assert Engine(at, drafter, make()).complete(prompts, params, StopParams(20)) == vanilla(at, prompts, 20, params)


def test_sampled_drafts_with_sample_and_match_say_what_vanilla_says() -> None:
    at, prompts = wandering(0), [[1, 2, 3], [4], [9, 9]]
    for seed in range(3):
        params = SamplingParams(temperature=1.1, top_k=9, repetition_penalty=1.2, seed=seed)
        stats = Stats()
        drafter = SmallModelDrafter(at, wandering(5), 3, params)
        texts = Engine(at, drafter).complete(prompts, params, StopParams(24), stats)
        assert texts == vanilla(at, prompts, 24, params)
    assert stats.accepted_by_depth[0] > 0


@pytest.mark.parametrize("make", [RejectionRule, BlockRule])
def test_a_small_model_that_is_the_target_is_always_right(make: type[AcceptanceRule]) -> None:
    # Its distribution is the target's to the bit only if it sees the same history, warpers and positions.
    at, stats = wandering(0), Stats()
    params = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.3, seed=2)
    Engine(at, SmallModelDrafter(at, at, 4, params), make()).complete([[1, 2, 3], [4]], params, StopParams(41), stats)
    assert stats.accepted_by_depth == stats.reached_by_depth and stats.tau == 5


def test_the_same_seed_gives_the_same_text_again_and_rows_stand_alone() -> None:
    at, params = wandering(0), SamplingParams(temperature=1.0, seed=7)
    for rule in (RejectionRule(), BlockRule(), TypicalRule()):
        engine = Engine(at, SmallModelDrafter(at, wandering(5), 3, params), rule)
        texts = engine.complete([[1, 2, 3], [4, 5]], params, StopParams(20))
        assert texts == engine.complete([[1, 2, 3], [4, 5]], params, StopParams(20))
        assert texts[:1] == engine.complete([[1, 2, 3]], params, StopParams(20))
        assert texts[1:] == engine.complete([[4, 5]], params, StopParams(20))


def test_the_small_model_says_which_distribution_it_drew_from() -> None:
    at, params = wandering(0), SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.4, seed=3)
    seen: list[tuple[DraftTree, list[list[int]]]] = []

    class Spy(RejectionRule):
        def verify(
            self,
            tree: DraftTree,
            logits: Tensor,
            choosers: Sequence[TokenChooser],
            histories: Sequence[Sequence[int]],
            failures: Failures | None = None,
        ) -> Verdict:
            seen.append((tree, [list(history) for history in histories]))
            return super().verify(tree, logits, choosers, histories, failures)

    small, model = wandering(5), tiny_llama(16, layers=1, seed=5)
    Engine(at, SmallModelDrafter(at, small, 3, params), Spy()).complete([[1, 2], [7, 7, 7, 3]], params, StopParams(12))
    assert len(seen) >= 3
    for tree, histories in seen:
        assert tree.draft_probs is not None and tree.draft_probs.shape == (len(histories), 4, 16)
        for row, history in enumerate(histories):
            for node in range(1, 4):
                text = [*history, *tree.tokens[row, 1:node].tolist()]
                with torch.inference_mode():
                    logits = model(input_ids=torch.tensor([text])).logits[0, -1]
                torch.testing.assert_close(
                    tree.draft_probs[row, node], Sampler(params).probs(text, logits), rtol=0, atol=1e-10
                )


def test_processors_of_the_target_are_not_asked_about_drafts() -> None:
    at, calls = wandering(0), list[int]()

    def counting(history: Tensor, scores: Tensor) -> Tensor:
        calls.append(history.shape[1])
        return scores

    params = SamplingParams(temperature=1.0, processors=(counting,))
    (text,) = Engine(at, SmallModelDrafter(at, wandering(5), 2, params)).complete([[1]], params, StopParams(12))
    assert calls[: len(text)] == list(range(1, len(text) + 1))


class Words:
    """A tokenizer as far as a drafter asks."""

    def __init__(self, count: int, first: str = "a") -> None:
        self._vocab = {f"{first}{i}": i for i in range(count)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


@pytest.mark.parametrize("sizes", [(16, 13), (13, 16)])
def test_embeddings_padded_to_different_sizes_are_one_vocabulary(sizes: tuple[int, int]) -> None:
    big, little = (tiny_target(vocab=size, layers=1, seed=size) for size in sizes)
    with pytest.raises(HeadMismatchError, match="vocabulary of"):
        SmallModelDrafter(big, little)
    own: Any = Words(12)
    big.tokenizer = little.tokenizer = own
    params = SamplingParams(temperature=1.2, repetition_penalty=1.1, seed=3)
    prompts = [[1, sizes[0] - 1, 3], [5]]  # a padding token is no word, but must do no harm
    for drawn in (None, params):
        drafter = SmallModelDrafter(big, little, 3, drawn)
        assert Engine(big, drafter).complete(prompts, params, StopParams(30)) == vanilla(big, prompts, 30, params)
    for rule in (RejectionRule(), BlockRule()):
        texts = Engine(big, SmallModelDrafter(big, little, 3, params), rule).complete(prompts, params, StopParams(30))
        assert [len(text) for text in texts] == [30, 30]


def test_a_small_model_of_another_tokenizer_is_refused() -> None:
    at, other = wandering(0), tiny_target(vocab=16, layers=1, seed=5)
    mine: Any = Words(16)
    theirs: Any = Words(16, "b")
    at.tokenizer, other.tokenizer = mine, theirs
    with pytest.raises(HeadMismatchError, match="another tokenizer"):
        SmallModelDrafter(at, other)


def test_a_small_context_ends_the_drafts_and_not_the_text() -> None:
    at, small, params = wandering(0), tiny_target(vocab=16, layers=1, context=8, seed=5), SamplingParams(1.0, seed=1)
    for rule in (RejectionRule(), BlockRule()):
        (text,) = Engine(at, SmallModelDrafter(at, small, 4, params), rule).complete([[1, 2]], params, StopParams(20))
        assert len(text) == 20


def test_a_dialogue_is_drafted_for_with_draws_of_its_own() -> None:
    """With a prefix that is there already, draws and so the text are those from scratch: never an earlier turn's."""
    params = SamplingParams(1.0, seed=3, repetition_penalty=1.3)
    for rule in (RejectionRule(), BlockRule()):
        at, text, stats = wandering(0), [1, 2], Stats()
        drafter = SmallModelDrafter(at, wandering(1), 3, params)
        for turn in range(4):
            new = wandering(0)
            scratch = Engine(new, SmallModelDrafter(new, wandering(1), 3, params), rule)
            (fresh,) = scratch.complete([text], params, StopParams(6))
            (said,) = Engine(at, drafter, rule).complete([text], params, StopParams(6), stats)
            assert said == fresh
            assert (stats.recalled_tokens > 0) == (turn > 0)
            text = [*text, *said, 3]


def test_rules_judge_the_trees_of_a_head_too() -> None:
    at, params = wandering(0), SamplingParams(temperature=0.8, seed=2)
    eagle = EagleDrafter(at, random_head(at), DraftShape(depth=3, top_k=3, width=3, nodes=9))
    for rule in (RejectionRule(), TypicalRule()):
        texts = collect(Engine(at, eagle, rule).run([[1, 2], [3]], params, StopParams(16)), 2)
        assert [len(text) for text in texts] == [16, 16]


def test_a_bench_arm_says_what_its_rule_keeps() -> None:
    at, params = wandering(0), SamplingParams(temperature=1.0)
    drafter: Any = SmallModelDrafter(at, at, 2, params)
    arm = EngineDecoder(at, drafter, params, (), "medusa-typical")
    assert arm.name == "medusa-typical" and independent_text(arm.name, 1.0) and lossy(arm.name)
    block = EngineDecoder(at, drafter, params, (), "small-model-block")
    assert independent_text(block.name, 1.0) and not lossy(block.name)
    assert not independent_text(block.name, 0.0)  # greedy: vanilla's text
    plain = EngineDecoder(at, drafter, params, ())
    assert plain.name == "small-model" and not independent_text(plain.name, 1.0)
    assert len(arm.run([1, 2], 9).tokens) == 9


def test_the_rules_keep_the_default_apart() -> None:
    tree, logits = chain_of(CASES[2], (0, 1))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5))
    bare = replace(tree, draft_probs=None)
    assert verify(tree, logits, [sampler], [[ROOT]]).rows == verify(bare, logits, [sampler], [[ROOT]]).rows
