"""Sampling: logits processors in the order of `generate`, and one keyed random draw per position.

Owns how the target's logits become a token, for one node with its history (`Sampler.choose`) and for all nodes of a
batch at once (`choose_nodes`); both give the same token. Knows nothing of drafters. A draw depends on (request seed,
choice, position) only, so a request gets the same text with every drafter, alone or in any batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as stock

from haast.core import Processor, SamplingParams
from haast.device import exact, to_device
from haast.errors import PromptError

DRAFT, ACCEPT, RESIDUAL = 1, 2, 3  # random streams in addition to the target's own, see `keyed_uniform`
_NO_HISTORY = torch.zeros(1, 0, dtype=torch.long)  # passed to warpers, which read scores only


class Sampler:
    """Samples a request's tokens: greedy at temperature 0, otherwise the inverse CDF at a keyed draw.

    Args:
        params: temperature, processors, seed.
        choice: index of the continuation, if a prompt gets several.
        warpers: applied in this order instead of the params' temperature, top-k, top-p and min-p, to float32 scores
            (n, vocab), as transformers' `generate` does; they read scores only. Temperature 0 then only means that the
            argmax is taken.

    Attributes:
        greedy: whether the argmax is chosen.
        stateless: whether a choice depends on logits and position only, so that all nodes can be sampled in one call.
    """

    def __init__(self, params: SamplingParams, choice: int = 0, warpers: Sequence[Processor] | None = None) -> None:
        self.params, self.choice = params, choice
        self._custom_warpers = warpers is not None
        chain: list[Processor] = []
        if params.repetition_penalty != 1.0:
            chain.append(stock.RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty)))
        self._processors: tuple[Processor, ...] = (*chain, *params.processors)
        self._warpers = tuple(_own_warpers(params) if warpers is None else warpers)
        self._key = _keyed(0, params.seed, choice)
        self.greedy, self.stateless = params.temperature == 0, not self._processors

    @property
    def warp_key(self) -> tuple[Hashable, ...]:
        """Stateless samplers of equal key are warped in one call."""
        if self._custom_warpers:
            return self.greedy, *self._warpers
        return self.params.temperature, self.params.top_k, self.params.top_p, self.params.min_p

    @property
    def temperature_only(self) -> float | None:
        """The temperature, if a stateless choice from float32 logits depends on it and the draw only; else None."""
        if self._custom_warpers:
            return 0.0 if self.greedy and not self._warpers else None
        return None if self._warpers else self.params.temperature

    def takes_argmax(self, dtype: torch.dtype) -> bool:
        """Whether a stateless choice is the argmax of raw logits of `dtype`; rounding float64 to float32 may tie."""
        return self.greedy and not (self._custom_warpers and (self._warpers or dtype is torch.float64))

    def draw(self, position: int) -> float:
        """The uniform draw in [0, 1) for the token at `position`."""
        return _uniform(_keyed(self._key, position))

    def scores(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Processed logits (vocab,) for one position; `history` holds all tokens before it, the prompt included."""
        scores = _at_least_float32(logits.unsqueeze(0))  # (1, vocab)
        if self._processors:
            scores = scores.clone()  # processors may write in place, which must not change the target's logits
            ids = torch.tensor([list(history)], dtype=torch.long, device=logits.device)
            for process in self._processors:
                scores = process(ids, scores)
        return self.warped(scores)[0]

    def warped(self, scores: Tensor) -> Tensor:
        """Scores (n, vocab) after temperature, top-k, top-p and min-p, or after `warpers`."""
        if self._custom_warpers:
            scores = scores.float()
        elif self.greedy:
            return scores
        else:
            scores = _at_least_float32(scores) / self.params.temperature
        for warp in self._warpers:
            scores = warp(_NO_HISTORY, scores)
        return scores

    def probs(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Target probabilities (vocab,) in float64 at one position (one-hot when greedy)."""
        scores = self.scores(history, logits)
        if self.greedy:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(exact(scores.device))
        return probabilities(scores, f"after {len(history)} tokens")

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        """The token at position len(history): the argmax, or the inverse CDF of that position's own draw."""
        if self.greedy:
            return int(self.scores(history, logits).argmax(-1))
        return inverse_cdf(self.probs(history, logits), self.draw(len(history)))


def _own_warpers(params: SamplingParams) -> list[Processor]:
    warpers: list[Any] = []  # transformers' type annotations do not match `Processor`
    if params.temperature > 0:
        if params.top_k > 0:
            warpers.append(stock.TopKLogitsWarper(top_k=params.top_k))
        if params.top_p < 1.0:
            warpers.append(stock.TopPLogitsWarper(top_p=params.top_p))
        if params.min_p > 0.0:
            warpers.append(stock.MinPLogitsWarper(min_p=params.min_p))
    return warpers


def choose_nodes(
    logits: Tensor, samplers: Sequence[Sampler], lengths: Sequence[int], depths: Tensor, height: int
) -> Tensor:
    """Sample a token at every node with each row's stateless sampler. Reads nothing from the device.

    Args:
        logits: (rows, nodes, vocab) raw.
        samplers: one per row.
        lengths: tokens of each row up to and including the root; the token after a node at depth d has position
            length + d.
        depths: (rows, nodes).
        height: upper bound of all depths.

    Returns:
        (rows, nodes) int64; -1 where the distribution has no possible token.
    """
    if all(sampler.takes_argmax(logits.dtype) for sampler in samplers):
        return argmax(logits)
    rows, nodes, vocab = logits.shape
    points = torch.tensor(draws(samplers, lengths, height), dtype=exact(logits.device))
    uniform = to_device(points, logits.device).gather(1, depths)
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.warp_key, []).append(row)
    chosen = torch.empty(rows, nodes, dtype=torch.long, device=logits.device)
    for members in groups.values():
        sampler, subset = samplers[members[0]], len(members) < rows
        group_logits = logits[members] if subset else logits
        if sampler.takes_argmax(logits.dtype):
            tokens = argmax(group_logits)
        elif sampler.greedy:
            tokens = argmax(sampler.warped(group_logits.reshape(-1, vocab)).view(-1, nodes, vocab))
        else:
            scores = sampler.warped(group_logits.reshape(-1, vocab))
            points = uniform[members] if subset else uniform
            tokens = _sample(scores, points.reshape(-1)).view(-1, nodes)
        if not subset:
            return tokens
        chosen[members] = tokens
    return chosen


def draws(samplers: Sequence[Sampler], lengths: Sequence[int], height: int) -> list[list[float]]:
    """Each row's uniform draws for the tokens after nodes at depth 0 to `height`; 0 for greedy rows."""
    return [
        [0.0 if sampler.greedy else sampler.draw(length + depth) for depth in range(height + 1)]
        for sampler, length in zip(samplers, lengths, strict=True)
    ]


def argmax(logits: Tensor) -> Tensor:
    """Argmax over the last dimension of (rows, nodes, vocab), the first one on ties.

    In two stages, since torch's max without the index is several times faster (CPU, 6 rows of 49,152: 31 us instead of
    130).
    """
    rows, nodes, vocab = logits.shape
    parts = next((count for count in (256, 128, 64) if vocab % count == 0 and vocab > 32 * count), 1)
    if parts == 1:
        return logits.argmax(-1)
    split = logits.reshape(rows, nodes, parts, vocab // parts)
    part = split.amax(-1).argmax(-1)  # (rows, nodes): the first part with the maximum
    index = part.view(rows, nodes, 1, 1).expand(-1, -1, 1, vocab // parts)
    return part * (vocab // parts) + split.gather(2, index).squeeze(2).argmax(-1)


def probabilities(scores: Tensor, where: str) -> Tensor:
    """Probabilities (vocab,) in float64 of processed scores; `where` goes into the error message.

    Raises:
        PromptError: no token is possible.
    """
    probs = scores.to(exact(scores.device)).softmax(-1)
    if bool(probs[0].isnan()):  # a NaN sum makes all entries NaN
        raise impossible(where)
    return probs


def impossible(where: str) -> PromptError:
    """The error for a distribution without any possible token."""
    return PromptError(
        f"no token is possible {where}: the processors allow none, or the model's logits are nan or inf (a "
        f"half-precision overflow?)"
    )


def inverse_cdf(probs: Tensor, uniform: float) -> int:
    """The token at a draw in [0, 1); `probs` (vocab,) need not sum to exactly 1."""
    draw = torch.full((1,), uniform, dtype=probs.dtype, device=probs.device)
    return int(_search_cdf(probs.unsqueeze(0).cumsum(-1), draw))


def _sample(scores: Tensor, uniform: Tensor) -> Tensor:
    """The inverse CDF of processed scores (n, vocab) at draws (n,) -> (n,) int64; -1 where no token is possible.

    In place: for all nodes of a tree, allocation costs more than the arithmetic.
    """
    weights = scores.to(exact(scores.device), copy=True)
    return _search_cdf(weights.sub_(weights.amax(-1, keepdim=True)).exp_().cumsum_(-1), uniform)


def _search_cdf(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Token indices of draws (n,) in [0, 1) by cumulative weights (n, vocab); -1 where the sum is NaN."""
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)[:, 0]
    # Rounding may put the point at the end of the scale: take the last token that has any probability.
    last = torch.searchsorted(cumulative, total)[:, 0]
    index = torch.where(index < cumulative.shape[-1], index, last)
    return index.masked_fill(total[:, 0].isnan(), -1)


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def keyed_uniform(seed: int, choice: int, position: int, *stream: int) -> float:
    """A uniform draw in [0, 1) with 53 random bits, a pure function of its keys.

    One round of the SplitMix64 finaliser (Steele et al., OOPSLA 2014) per key, so that neighbouring keys give
    unrelated draws. Without `stream` it is the target's draw for a position; drafters and acceptance rules add a stream
    number (`DRAFT`, `ACCEPT`, `RESIDUAL`) and further keys.
    """
    return _uniform(_keyed(0, seed, choice, position, *stream))


def _uniform(state: int) -> float:
    return (state >> 11) / float(1 << 53)


def _keyed(state: int, *keys: int) -> int:
    for key in keys:
        state = _mix((state ^ key) + 0x9E3779B97F4A7C15)
    return state


def _mix(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
