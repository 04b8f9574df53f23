"""Chi-square tests of the sampled distribution: are drafted samples the target's own samples?

Owns two experiments. `tiny_distribution`: a built-in random model in fp64, all strings of length 3, the whole engine,
and a biased control that must fail, so that the test is known to see. `sampled_distribution`: the user's model, one
drafted tree, verified with many seeds; its first token, and its second after the first one drafted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from haast.checking.divergence import logits_after
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Step, StopParams
from haast.engine.verify import verify
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.sampling import Sampler
from haast.target.target import Target
from haast.tree import DraftTree

_LEVEL = 1e-4  # p-values below it are taken for a wrong distribution; a right one gets there once in 10,000 tests
_FEWEST = 5.0  # expected count of a cell; smaller cells are merged into one
_TINY_SAMPLES = 1000  # fewer would not see the control's bias
_VOCAB, _LENGTH = 6, 3


@dataclass(frozen=True)
class DistributionTest:
    """One chi-square test."""

    name: str
    samples: int
    cells: int
    statistic: float
    p_value: float
    expected_to_fail: bool = False  # a control

    @property
    def passed(self) -> bool:
        """Whether the distribution came out as it should: right, or (a control) visibly wrong."""
        return (self.p_value < _LEVEL) == self.expected_to_fail

    @classmethod
    def of(cls, name: str, counts: Counter[int], probs: Tensor, expected_to_fail: bool = False) -> DistributionTest:
        """Of what was drawn, against the distribution it should follow; see `chi_square`."""
        statistic, cells, p_value = chi_square(counts, probs)
        return cls(name, counts.total(), cells, statistic, p_value, expected_to_fail)


def chi_square(counts: Mapping[int, int], probs: Tensor) -> tuple[float, int, float]:
    """Pearson's test of `counts` (index -> times seen) against `probs` (cells,) float64.

    Cells of small expectation are merged into one. A seen cell of probability zero gives an infinite statistic.

    Returns:
        The statistic, the number of cells and the p-value.
    """
    seen = torch.tensor([counts.get(index, 0) for index in range(len(probs))], dtype=probs.dtype)
    expected = probs * seen.sum()
    if bool(((seen > 0) & (expected == 0)).any()):
        return float("inf"), len(probs), 0.0
    small = expected < _FEWEST
    seen, expected = (torch.cat([each[~small], each[small].sum().reshape(1)]) for each in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    if freedom < 1:
        return statistic, len(expected), 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, len(expected), float(torch.special.gammaincc(half[0], half[1]))


def tiny_distribution(samples: int = 3000, seed: int = 0) -> list[DistributionTest]:
    """The whole engine on a tiny random model: the distribution over all strings of length 3, and a biased control.

    Args:
        samples: texts drawn for each of the two tests.
        seed: of model, head and draws.
    """
    target, drafter = _tiny(seed)
    probs = _string_probs(target)
    tests = []
    for name, processors in (("tiny model, strings of length 3", ()), ("control: one logit raised", (_raise_first,))):
        sampling = SamplingParams(temperature=1.0, seed=seed, processors=processors)
        counts = _draw_strings(target, drafter, sampling, samples)
        tests.append(DistributionTest.of(name, counts, probs, expected_to_fail=bool(processors)))
    return tests


def distribution_tests(
    target: Target, drafter: Drafter, prompt: Sequence[int], sampling: SamplingParams, samples: int
) -> list[DistributionTest]:
    """Both experiments; the second one needs a prompt of two tokens or more."""
    own = sampled_distribution(target, drafter, prompt, sampling, samples) if len(prompt) > 1 else []
    return tiny_distribution(max(samples, _TINY_SAMPLES), sampling.seed) + own


def sampled_distribution(
    target: Target, drafter: Drafter, prompt: Sequence[int], sampling: SamplingParams, samples: int = 1000
) -> list[DistributionTest]:
    """The user's model: the distribution of the tokens that one verified tree emits, over many seeds.

    One forward over the drafted tree, then verification with `samples` seeds. The first token is held against a plain
    forward after the prompt; the second, among texts that begin with the first token drafted, against a plain forward
    after that. Rare tokens are merged into one cell. The prompt has two tokens or more.
    """
    tree, logits = _one_tree(target, drafter, prompt)
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    favourite = next((int(tree.tokens[0, child]) for child in tree.children(0)[0]), -1)
    for seed in range(sampling.seed, sampling.seed + samples):
        row = verify(tree, logits, [Sampler(replace(sampling, seed=seed))], [prompt]).rows[0]
        if row is None:
            raise RuntimeError("verification gave no verdict on its one row")
        first[row.tokens[0]] += 1
        if row.tokens[0] == favourite and len(row.tokens) > 1:
            second[row.tokens[1]] += 1
    tests = []
    for name, counts, history in (
        ("first token", first, list(prompt)),
        ("second token after the drafted first", second, [*prompt, favourite]),
    ):
        if counts.total() >= 10 * _FEWEST:
            probs = Sampler(sampling).probs(history, logits_after(target, history)).cpu()
            tests.append(DistributionTest.of(name, counts, probs))
    return tests


class _Forced:
    """Says the last token of a prompt first, so that the engine's first tree hangs on it."""

    stateless = False

    def __init__(self, token: int) -> None:
        self._token = token

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        return self._token


def _one_tree(target: Target, drafter: Drafter, prompt: Sequence[int]) -> tuple[DraftTree, Tensor]:
    """The tree drafted after `prompt` (its last token is the root), and the target's logits over it."""
    seen: list[tuple[DraftTree, Tensor]] = []

    def watch(step: Step) -> None:
        seen.append((step.tree, step.logits.clone()))

    choosers, stop = [_Forced(prompt[-1])], StopParams(max_new_tokens=2)
    for _ in Engine(target, drafter).run([prompt[:-1]], SamplingParams(), stop, watch=watch, choosers=choosers):
        continue
    return seen[0]


def _tiny(seed: int) -> tuple[Target, EagleDrafter]:
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = Target(LlamaForCausalLM(config).double())
        module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(config)).double().eval().requires_grad_(False)
    shape = DraftShape(depth=2, top_k=2, width=2, nodes=5)
    return target, EagleDrafter(target, Head(module, None, {}), shape)


def _string_probs(target: Target) -> Tensor:
    """The exact distribution over all strings after the one-token prompt 0. (vocab ** length,), first token first."""
    strings = torch.cartesian_prod(*[torch.arange(_VOCAB)] * _LENGTH)  # (strings, length)
    tokens = torch.cat([torch.zeros(len(strings), 1, dtype=torch.long), strings], dim=1)
    logits = target.forward(DraftTree.chain(tokens), target.new_cache(len(tokens), tokens.shape[1])).logits
    logprobs = logits[:, :-1].double().log_softmax(-1).gather(2, strings.unsqueeze(2))  # (strings, length, 1)
    return logprobs.sum((1, 2)).exp()


def _draw_strings(target: Target, drafter: Drafter, sampling: SamplingParams, samples: int) -> Counter[int]:
    """Strings as numbers, drawn by the real engine, each with a seed of its own."""
    texts: list[list[int]] = [[] for _ in range(samples)]
    stop = StopParams(max_new_tokens=_LENGTH)
    seeds = [replace(sampling, seed=sampling.seed + number) for number in range(samples)]
    for emission in Engine(target, drafter).run([[0]] * samples, seeds, stop):
        texts[emission.row].extend(emission.tokens)
    return Counter(sum(token * _VOCAB ** (_LENGTH - 1 - i) for i, token in enumerate(text)) for text in texts)


def _raise_first(_history: Tensor, scores: Tensor) -> Tensor:
    """The control's bias: token 0's odds times 2.7, which 1000 strings are enough to see."""
    biased = scores.clone()
    biased[:, 0] += 1.0
    return biased
