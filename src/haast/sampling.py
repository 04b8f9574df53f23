"""From logits to tokens: processors in vanilla's order, and one keyed draw per emitted position.

Owns how the target's logits become a token, for one node with its history (`Sampler.choose`) and for all nodes of a
batch at once (`choose_nodes`); both give the same token. Knows nothing of drafters. A draw depends on (request seed,
choice, position) alone, so a request says the same with every drafter, alone or in any batch.
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

DRAFT, ACCEPT, RESIDUAL = 1, 2, 3  # streams of draws beside the target's own, see `keyed_uniform`
_NO_HISTORY = torch.zeros(1, 0, dtype=torch.long)  # what warpers, which look at scores alone, get for one


class Sampler:
    """Chooses a request's tokens: greedy at temperature 0, else the inverse CDF of a keyed draw.

    Args:
        params: temperature, processors, seed.
        choice: number of the continuation, where several are made of one prompt.
        warpers: applied in this order instead of the params' temperature, top-k, top-p and min-p, to float32 scores
            (n, vocab), as transformers' `generate` does; they look at scores alone. Temperature 0 then only means that
            the likeliest token is taken.

    Attributes:
        greedy: whether the likeliest token is chosen.
        stateless: whether a choice depends on logits and position alone, so that all nodes can be chosen for at once.
    """

    def __init__(self, params: SamplingParams, choice: int = 0, warpers: Sequence[Processor] | None = None) -> None:
        self.params, self.choice = params, choice
        self._given = warpers is not None
        chain: list[Processor] = []
        if params.repetition_penalty != 1.0:
            chain.append(stock.RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty)))
        self._processors: tuple[Processor, ...] = (*chain, *params.processors)
        self._warpers = tuple(_own_warpers(params) if warpers is None else warpers)
        self._key = _keyed(0, params.seed, choice)
        self.greedy, self.stateless = params.temperature == 0, not self._processors

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Requests of one kind, stateless ones, are warped in one call."""
        if self._given:
            return self.greedy, *self._warpers
        return self.params.temperature, self.params.top_k, self.params.top_p, self.params.min_p

    @property
    def plain(self) -> float | None:
        """The temperature, where it is all that a stateless choice from float32 logits depends on beside the draw."""
        if self._given:
            return 0.0 if self.greedy and not self._warpers else None
        return None if self._warpers else self.params.temperature

    def takes_likeliest(self, dtype: torch.dtype) -> bool:
        """Whether a stateless choice is the argmax of raw logits of `dtype`; float32 may round float64 to a tie."""
        return self.greedy and not (self._given and (self._warpers or dtype is torch.float64))

    def draw(self, position: int) -> float:
        """The uniform draw in [0, 1) for the token at `position`."""
        return _uniform(_keyed(self._key, position))

    def scores(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Processed logits (vocab,) for one position; `history` holds all tokens before it, the prompt included."""
        scores = _wide(logits.unsqueeze(0))  # (1, vocab)
        if self._processors:
            scores = scores.clone()  # processors may write in place, and the target's logits are not theirs
            ids = torch.tensor([list(history)], dtype=torch.long, device=logits.device)
            for process in self._processors:
                scores = process(ids, scores)
        return self.warped(scores)[0]

    def warped(self, scores: Tensor) -> Tensor:
        """Scores (n, vocab) after temperature, top-k, top-p and min-p, or after the given warpers."""
        if self._given:
            scores = scores.float()
        elif self.greedy:
            return scores
        else:
            scores = _wide(scores) / self.params.temperature
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
    warpers: list[Any] = []  # of transformers, whose types are wider in one place and narrower in another
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
    """What each row's stateless sampler chooses at every node; -1 where no token is possible. Reads nothing back.

    Args:
        logits: (rows, nodes, vocab) raw.
        samplers: one per row.
        lengths: tokens of each row up to the root; the token that follows a node at depth d stands at length + d.
        depths: (rows, nodes).
        height: no depth is greater.

    Returns:
        (rows, nodes) int64.
    """
    if all(sampler.takes_likeliest(logits.dtype) for sampler in samplers):
        return likeliest(logits)
    rows, nodes, vocab = logits.shape
    points = torch.tensor(draws(samplers, lengths, height), dtype=exact(logits.device))
    uniform = to_device(points, logits.device).gather(1, depths)
    kinds: dict[tuple[Hashable, ...], list[int]] = {}
    for row, sampler in enumerate(samplers):
        kinds.setdefault(sampler.kind, []).append(row)
    chosen = torch.empty(rows, nodes, dtype=torch.long, device=logits.device)
    for members in kinds.values():
        sampler, some = samplers[members[0]], len(members) < rows
        picked = logits[members] if some else logits
        if sampler.takes_likeliest(logits.dtype):
            found = likeliest(picked)
        elif sampler.greedy:
            found = likeliest(sampler.warped(picked.reshape(-1, vocab)).view(-1, nodes, vocab))
        else:
            scores = sampler.warped(picked.reshape(-1, vocab))
            points = uniform[members] if some else uniform
            found = _drawn(scores, points.reshape(-1)).view(-1, nodes)
        if not some:
            return found
        chosen[members] = found
    return chosen


def draws(samplers: Sequence[Sampler], lengths: Sequence[int], height: int) -> list[list[float]]:
    """Each row's draws for the tokens that follow nodes at depth 0 to `height`; 0 where nothing is drawn."""
    return [
        [0.0 if sampler.greedy else sampler.draw(length + depth) for depth in range(height + 1)]
        for sampler, length in zip(samplers, lengths, strict=True)
    ]


def likeliest(logits: Tensor) -> Tensor:
    """argmax over the last dimension of (rows, nodes, vocab), the first of equals.

    In two stages, since torch finds a maximum several times sooner than its place (CPU, 6 rows of 49,152: 31 us
    instead of 130).
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
    """Probabilities (vocab,) in float64 of processed scores; `where` is for the message.

    Raises:
        PromptError: no token is possible.
    """
    probs = scores.to(exact(scores.device)).softmax(-1)
    if bool(probs[0].isnan()):  # then all are: the sum is
        raise impossible(where)
    return probs


def impossible(where: str) -> PromptError:
    """What is raised where the distribution holds no token."""
    return PromptError(
        f"no token is possible {where}: the processors allow none, or the model answered with nan or inf (a "
        f"half-precision overflow?)"
    )


def inverse_cdf(probs: Tensor, uniform: float) -> int:
    """The token that a draw in [0, 1) falls on; `probs` (vocab,) need not sum to exactly 1."""
    return int(_at(probs.unsqueeze(0).cumsum(-1), torch.full((1,), uniform, dtype=probs.dtype, device=probs.device)))


def _drawn(scores: Tensor, uniform: Tensor) -> Tensor:
    """The inverse CDF of processed scores (n, vocab) at draws (n,) -> (n,) int64; -1 where no token is possible.

    In place: at every node of a tree, new memory costs more than the arithmetic.
    """
    weights = scores.to(exact(scores.device), copy=True)
    return _at(weights.sub_(weights.amax(-1, keepdim=True)).exp_().cumsum_(-1), uniform)


def _at(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Where draws (n,) in [0, 1) fall on the scales (n, vocab); -1 where the scale is NaN."""
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)[:, 0]
    # Where rounding put the point on the very end of the scale: the last token that has any probability.
    last = torch.searchsorted(cumulative, total)[:, 0]
    index = torch.where(index < cumulative.shape[-1], index, last)
    return index.masked_fill(total[:, 0].isnan(), -1)


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def keyed_uniform(seed: int, choice: int, position: int, *stream: int) -> float:
    """A uniform draw in [0, 1) with 53 random bits, a pure function of its keys.

    One round of the SplitMix64 finaliser (Steele et al., OOPSLA 2014) per key, so that neighbouring keys give
    unrelated draws. Without `stream` it is the target's own draw for a position; drafters and acceptance rules that
    need randomness add a stream number (`DRAFT`, `ACCEPT`, `RESIDUAL`) and further keys.
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
