"""Logprobs of generated tokens, from the target's logits row at which each token is chosen.

Owns the sampler that records them. A verified tree holds the target's logits, and tokens are chosen once each, in order
and by the same code, so logprobs are the same with and without drafting. Knows no protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from haast.core import SamplingParams
from haast.device import exact
from haast.sampling import Sampler, inverse_cdf, probabilities


@dataclass(frozen=True)
class Logprob:
    """Logprob of a chosen token, and (id, logprob) of the likeliest tokens, best first; natural logarithms, fp64."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class RecordingSampler(Sampler):
    """A `Sampler` that records the logprobs of the tokens that it chooses.

    Args:
        params, choice: see `Sampler`.
        top: number of likeliest tokens to record, in addition to the chosen one.
        processed: take logprobs from the distribution that is sampled, after penalties, grammar, temperature, top-k,
            top-p and min-p (greedy: before temperature); else from the model's own.
    """

    def __init__(self, params: SamplingParams, choice: int, top: int, processed: bool) -> None:
        super().__init__(params, choice)
        self.stateless = False  # `choose` must be called for every token
        self._top, self._processed = top, processed
        self._recorded: dict[int, Logprob] = {}  # by position in the text

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        scores = self.scores(history, logits)
        if self.greedy:
            token = int(scores.argmax(-1))
        else:
            token = inverse_cdf(probabilities(scores, f"after {len(history)} tokens"), self.draw(len(history)))
        self._recorded[len(history)] = self._record(token, scores if self._processed else logits)
        return token

    def at(self, position: int) -> Logprob:
        """The logprob of the token at a position of the text, prompt included. Raises KeyError for others."""
        return self._recorded[position]

    def _record(self, token: int, scores: Tensor) -> Logprob:
        logprobs = torch.log_softmax(scores.to(exact(scores.device)), -1)
        best, ids = logprobs.topk(self._top) if self._top else (logprobs[:0], logprobs[:0].long())
        # JSON has no -inf: a token of probability 0 gets LEAST.
        top = tuple((each, max(value, LEAST)) for each, value in zip(ids.tolist(), best.tolist(), strict=True))
        return Logprob(token, max(float(logprobs[token]), LEAST), top)


LEAST = -9999.0  # OpenAI's value for tokens of probability 0
