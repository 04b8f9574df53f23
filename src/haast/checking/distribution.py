"""Chi-square tests of the sampled distribution: does drafting change it?

Owns two experiments. `tiny_distribution`: a built-in random model in fp64, all strings of length 3, the whole engine,
and a biased control that must fail, which proves that the test detects a bias. `sampled_distribution`: the user's
model, one drafted tree, verified with many seeds; tests the first token, and the second after the first drafted one.
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

_SIGNIFICANCE = 1e-4  # smaller p-values count as a wrong distribution; a correct one fails once in 10,000 tests
_MIN_EXPECTED = 5.0  # expected count of a cell; smaller cells are merged into one
_MIN_TINY_SAMPLES = 1000  # fewer would not detect the control's bias
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
        """Whether the result is as expected: the distribution is correct, or (for a control) wrong."""
        return (self.p_value < _SIGNIFICANCE) == self.expected_to_fail

    @classmethod
    def of(cls, name: str, counts: Counter[int], probs: Tensor, expected_to_fail: bool = False) -> DistributionTest:
        """Test counts of samples against the expected distribution; see `chi_square`."""
        statistic, cells, p_value = chi_square(counts, probs)
        return cls(name, counts.total(), cells, statistic, p_value, expected_to_fail)


def chi_square(counts: Mapping[int, int], probs: Tensor) -> tuple[float, int, float]:
    """Pearson's test of `counts` (index -> number of samples) against `probs` (cells,) float64.

    Cells with a small expected count are merged into one. A sample in a cell of probability zero gives an infinite
    statistic.

    Returns:
        The statistic, the number of cells and the p-value.
    """
    observed = torch.tensor([counts.get(index, 0) for index in range(len(probs))], dtype=probs.dtype)
    expected = probs * observed.sum()
    if bool(((observed > 0) & (expected == 0)).any()):
        return float("inf"), len(probs), 0.0
    small = expected < _MIN_EXPECTED
    observed, expected = (torch.cat([each[~small], each[small].sum().reshape(1)]) for each in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    if freedom < 1:
        return statistic, len(expected), 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, len(expected), float(torch.special.gammaincc(half[0], half[1]))


def tiny_distribution(samples: int = 3000, seed: int = 0) -> list[DistributionTest]:
    """The whole engine on a tiny random model: the distribution over all strings of length 3, and a biased control.

    Args:
        samples: texts sampled for each of the two tests.
        seed: of model, head and sampling.
    """
    target, drafter = _tiny_model(seed)
    probs = _string_probs(target)
    tests = []
    for name, processors in (
        ("tiny model, strings of length 3", ()),
        ("control: one logit raised", (_raise_first_logit,)),
    ):
        sampling = SamplingParams(temperature=1.0, seed=seed, processors=processors)
        counts = _draw_strings(target, drafter, sampling, samples)
        tests.append(DistributionTest.of(name, counts, probs, expected_to_fail=bool(processors)))
    return tests


def distribution_tests(
    target: Target, drafter: Drafter, prompt: Sequence[int], sampling: SamplingParams, samples: int
) -> list[DistributionTest]:
    """Run both experiments; the one on `target` needs a prompt of at least two tokens and is skipped otherwise."""
    tests = sampled_distribution(target, drafter, prompt, sampling, samples) if len(prompt) > 1 else []
    return tiny_distribution(max(samples, _MIN_TINY_SAMPLES), sampling.seed) + tests


def sampled_distribution(
    target: Target, drafter: Drafter, prompt: Sequence[int], sampling: SamplingParams, samples: int = 1000
) -> list[DistributionTest]:
    """Test the user's model: the distribution over seeds of the tokens that one verified tree emits.

    One forward over the drafted tree, then verification with `samples` seeds. The first token is tested against a plain
    forward after the prompt; the second token, of texts that begin with the first drafted token, against a plain
    forward after that. Rare tokens are merged into one cell. The prompt has at least two tokens.
    """
    tree, logits = _one_tree(target, drafter, prompt)
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    first_drafted = next((int(tree.tokens[0, child]) for child in tree.children(0)[0]), -1)
    for seed in range(sampling.seed, sampling.seed + samples):
        row = verify(tree, logits, [Sampler(replace(sampling, seed=seed))], [prompt]).rows[0]
        if row is None:
            raise RuntimeError("verification returned no verdict for its only row")
        first[row.tokens[0]] += 1
        if row.tokens[0] == first_drafted and len(row.tokens) > 1:
            second[row.tokens[1]] += 1
    tests = []
    for name, counts, history in (
        ("first token", first, list(prompt)),
        ("second token after the drafted first", second, [*prompt, first_drafted]),
    ):
        if counts.total() >= 10 * _MIN_EXPECTED:
            probs = Sampler(sampling).probs(history, logits_after(target, history)).cpu()
            tests.append(DistributionTest.of(name, counts, probs))
    return tests


class _ForcedFirstToken:
    """Chooses a given token first: the prompt's last one, so that it is the root of the engine's first tree."""

    stateless = False

    def __init__(self, token: int) -> None:
        self._token = token

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        return self._token


def _one_tree(target: Target, drafter: Drafter, prompt: Sequence[int]) -> tuple[DraftTree, Tensor]:
    """The tree drafted after `prompt` (its last token is the root), and the target's logits over it."""
    steps: list[tuple[DraftTree, Tensor]] = []

    def watch(step: Step) -> None:
        steps.append((step.tree, step.logits.clone()))

    choosers, stop = [_ForcedFirstToken(prompt[-1])], StopParams(max_new_tokens=2)
    for _ in Engine(target, drafter).run([prompt[:-1]], SamplingParams(), stop, watch=watch, choosers=choosers):
        continue
    return steps[0]


def _tiny_model(seed: int) -> tuple[Target, EagleDrafter]:
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
    """Counts of strings (encoded as numbers) sampled by the real engine, each with its own seed."""
    texts: list[list[int]] = [[] for _ in range(samples)]
    stop = StopParams(max_new_tokens=_LENGTH)
    seeds = [replace(sampling, seed=sampling.seed + number) for number in range(samples)]
    for emission in Engine(target, drafter).run([[0]] * samples, seeds, stop):
        texts[emission.row].extend(emission.tokens)
    return Counter(sum(token * _VOCAB ** (_LENGTH - 1 - i) for i, token in enumerate(text)) for text in texts)


def _raise_first_logit(_history: Tensor, scores: Tensor) -> Tensor:
    """The control's bias: multiplies the odds of token 0 by 2.7, which 1000 strings are enough to detect."""
    biased = scores.clone()
    biased[:, 0] += 1.0
    return biased
