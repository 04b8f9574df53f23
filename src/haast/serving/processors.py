"""Logits processors for server requests: penalties, logit bias, minimum length. Each sees one request's own tokens.

Each is a function (history (1, length) int64, scores (1, vocab)) -> scores, as in transformers, and is called once per
chosen token, drafted or not. Counts therefore follow the accepted path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NewTokenPenalties:
    """Presence and frequency penalties on the tokens generated after the prompt, as OpenAI defines them.

    Args:
        prompt_length: tokens of the prompt, which are not counted.
        presence: subtracted from the score of every token that was generated before.
        frequency: subtracted once per earlier occurrence.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = torch.unique(history[0, self._prompt_length :], return_counts=True)
        penalty = self._presence + self._frequency * counts.to(scores.dtype)
        return scores.index_add(1, tokens, -penalty.unsqueeze(0))


class TokenBias:
    """Adds a fixed bias to the scores of given token ids (OpenAI's `logit_bias`)."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self._tokens.to(scores.device), self._values.to(scores).unsqueeze(0))


class MinimumLength:
    """Masks the end tokens until a request has `least` new tokens (`min_tokens`)."""

    def __init__(self, prompt_length: int, least: int, ends: Sequence[int]) -> None:
        self._until, self._ends = prompt_length + least, torch.tensor(list(ends), dtype=torch.long)

    def __call__(self, history: Tensor, scores: Tensor) -> Tensor:
        if history.shape[1] >= self._until:
            return scores
        return scores.index_fill(1, self._ends.to(scores.device), -torch.inf)
