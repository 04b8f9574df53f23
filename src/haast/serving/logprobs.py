"""Logprobs of an answer's tokens: of the target's own row, taken where the token is chosen.

Owns the chooser that writes them down. A verified tree's logits are the target's, so with drafting on they are what
they are without: a choice is made once per emitted token, in order, by the same code. Knows no protocol.
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
    """Of one chosen token, and of the likeliest ones, the best first; natural logarithms, fp64."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class RecordingSampler(Sampler):
    """A `Sampler` that writes down the logprobs of what it chooses.

    Args:
        params, choice: see `Sampler`.
        top: how many of the likeliest tokens are written down beside the chosen one.
        processed: logprobs of the distribution that is sampled, after penalties, grammar, temperature, top-k, top-p
            and min-p (greedy: before temperature); else those of the model as it is.
    """

    def __init__(self, params: SamplingParams, choice: int, top: int, processed: bool) -> None:
        super().__init__(params, choice)
        self.stateless = False  # every choice is made in `choose`
        self._top, self._processed = top, processed
        self._found: dict[int, Logprob] = {}  # by position

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        scores = self.scores(history, logits)
        if self.greedy:
            token = int(scores.argmax(-1))
        else:
            token = inverse_cdf(probabilities(scores, f"after {len(history)} tokens"), self.draw(len(history)))
        self._found[len(history)] = self._record(token, scores if self._processed else logits)
        return token

    def at(self, position: int) -> Logprob:
        """Of the token at a position of the text, prompt included."""
        return self._found[position]

    def _record(self, token: int, scores: Tensor) -> Logprob:
        logprobs = torch.log_softmax(scores.to(exact(scores.device)), -1)
        best, ids = logprobs.topk(self._top) if self._top else (logprobs[:0], logprobs[:0].long())
        # Python's floats have no -inf in JSON: a token that can't come is told as the least that can be said.
        top = tuple((each, max(value, LEAST)) for each, value in zip(ids.tolist(), best.tolist(), strict=True))
        return Logprob(token, max(float(logprobs[token]), LEAST), top)


LEAST = -9999.0  # OpenAI's own number for tokens that can't come
