"""The law of the next token: processors in vanilla's order, and one keyed draw per emitted position.

Owns how logits become a token. Knows nothing of trees or drafters: it is given the logits at one node and the token
history of that node's own path. A draw depends on (seed, row, position) alone, so every drafter that walks the same
text consumes the same randomness: same seed, same text as vanilla (DESIGN, decision 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from haast.errors import PromptError

_LEAST = 1e-6  # a smaller divisor would make fp32 scores overflow
DRAFT, ACCEPT, RESIDUAL = 1, 2, 3  # streams of draws beside the target's own, see `keyed_uniform`
Processor = Callable[[Tensor, Tensor], Tensor]  # (history (1, length) int64, scores (1, vocab)) -> scores (1, vocab)


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen. Temperature 0 is greedy; the defaults change nothing but the temperature.

    `processors` are any transformers `LogitsProcessor` (or callable of that shape). They run where `generate` runs
    them: after the repetition penalty, before temperature, top-k, top-p and min-p. They are called exactly once per
    chosen token, in order, with that token's own history (a stop rule may cut off the last tokens chosen).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    processors: tuple[LogitsProcessor | Processor, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, kind in (
            ("temperature", Real),
            ("top_p", Real),
            ("min_p", Real),
            ("repetition_penalty", Real),
            ("top_k", Integral),
            ("seed", Integral),
        ):
            if not isinstance(getattr(self, name), kind):
                wanted = "a number" if kind is Real else "a whole number"
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: give {wanted}")
        for process in self.processors:
            if not callable(process):
                raise ValueError(f"processors holds {process!r}: give functions (history, scores) -> scores")
        checks = (
            (
                self.temperature == 0 or _LEAST <= self.temperature < math.inf,
                "temperature",
                f"0 (greedy), or {_LEAST:g} or above",
            ),
            (self.top_k >= 0, "top_k", "0 (off) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)"),
            (0 <= self.min_p < 1, "min_p", "0 (off) or above, below 1"),
            (
                _LEAST <= self.repetition_penalty < math.inf,
                "repetition_penalty",
                f"{_LEAST:g} or above and finite (1 is off)",
            ),
            (0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1"),
        )
        for ok, name, wanted in checks:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give a value {wanted}")


class Sampler:
    """Chooses a token from one position's logits: greedy at temperature 0, else the inverse CDF of a keyed draw."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        # Every choice goes through it: processes that hold a model together replace theirs by the first one's.
        self.decide: Callable[[int], int] = int
        chain: list[LogitsProcessor | Processor] = []
        if config.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty)))
        chain.extend(config.processors)
        if config.temperature > 0:
            if config.top_k > 0:
                chain.append(TopKLogitsWarper(top_k=config.top_k))
            if config.top_p < 1.0:
                chain.append(TopPLogitsWarper(top_p=config.top_p))
            if config.min_p > 0.0:
                chain.append(MinPLogitsWarper(min_p=config.min_p))
        self._before_temperature = len(config.processors) + (config.repetition_penalty != 1.0)
        self._chain = chain

    @property
    def plain(self) -> bool:
        """True when the choice needs no history: greedy without any processor."""
        return self.config.temperature == 0 and not self._chain

    def scores(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Processed logits (vocab,) for one position; `history` holds all tokens before it, the prompt included."""
        scores = logits.unsqueeze(0)  # (1, vocab)
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        if self._chain:
            scores = scores.clone()  # processors may write in place, and the target's logits are not theirs
            ids = torch.tensor([list(history)], dtype=torch.long, device=logits.device)
            for i, process in enumerate(self._chain):
                if i == self._before_temperature and self.config.temperature > 0:
                    scores = scores / self.config.temperature
                scores = process(ids, scores)
        if self.config.temperature > 0 and len(self._chain) == self._before_temperature:
            scores = scores / self.config.temperature
        return scores[0]

    def probs(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Target probabilities (vocab,) in float64 at one position (one-hot when greedy)."""
        scores = self.scores(history, logits)
        if self.config.temperature == 0:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).double()
        return law(scores, f"behind {len(history)} tokens")

    def choose(self, row: int, history: Sequence[int], logits: Tensor) -> int:
        """The token at position len(history) of `row`: the argmax, or the inverse CDF of that position's own draw."""
        if self.plain:
            return self.decide(int(logits.argmax(-1)))
        if self.config.temperature == 0:
            return self.decide(int(self.scores(history, logits).argmax(-1)))
        draw = keyed_uniform(self.config.seed, row, len(history))
        return self.decide(inverse_cdf(self.probs(history, logits), draw))


def law(scores: Tensor, where: str) -> Tensor:
    """Probabilities (vocab,) in float64 of processed scores; `where` is for the message.

    Raises:
        PromptError: no token is possible.
    """
    probs = scores.double().softmax(-1)
    if math.isnan(float(probs[0])):  # then all are: the sum is
        raise PromptError(
            f"no token is possible {where}: the processors allow none, or the model answered with nan or inf (a "
            f"half-precision overflow?)"
        )
    return probs


def inverse_cdf(probs: Tensor, uniform: float) -> int:
    """The token that a draw in [0, 1) falls on; `probs` (vocab,) need not sum to exactly 1."""
    cumulative = probs.cumsum(-1)
    point = uniform * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, cumulative.new_tensor(point), right=True))
    if index < cumulative.shape[-1]:
        return index
    # Rounding put the point on the very end of the scale: take the last token that has any probability.
    return int((cumulative < cumulative[-1]).sum())


def keyed_uniform(seed: int, row: int, position: int, *stream: int) -> float:
    """A uniform draw in [0, 1) with 53 random bits, a pure function of its keys.

    One round of the SplitMix64 finaliser (Steele et al., OOPSLA 2014) per key, so that neighbouring keys give
    unrelated draws. Without `stream` it is the target's own draw for a position; drafters and acceptance rules that
    need randomness add a stream number (`DRAFT`, `ACCEPT`, `RESIDUAL`) and further keys.
    """
    state = 0
    for key in (seed, row, position, *stream):
        state = _mix((state ^ key) + 0x9E3779B97F4A7C15)
    return (state >> 11) / float(1 << 53)


def _mix(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
