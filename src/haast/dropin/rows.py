"""The rows of one `generate` call: their texts as `generate` would have them, their processors, and where they end.

Owns the choice of a token. A row's text holds its left padding, since stock processors and stopping criteria see it;
the engine's does not. Processors and criteria are asked exactly once per emitted token, in order, with the text up to
it, and never behind a row's end, whatever is drafted. Knows neither trees nor models.

    buffer   pad pad  p0  p1  p2 | n0  n1 ...      one line a row, so a text is a view and nothing is copied per token
             begins=2            width

Stock `generate` runs a batch until all rows are done. A row that is done is padded where an end-of-text criterion is
among the criteria; otherwise it goes on with true tokens until the last row is done, and so it does here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from haast.sampling import Sampler, SamplingConfig, inverse_cdf, keyed_uniform, law


class Ends:
    """Where each row ends, by the stopping criteria that `generate` prepared.

    Args:
        criteria: in their order.
        rows: of the batch.
        most: new tokens at most.
        padded: whether a row that is done is padded while others go on.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int, most: int, padded: bool) -> None:
        # The two that almost every call has are answered without tensors.
        self._eos = {int(i) for each in criteria if type(each) is EosTokenCriteria for i in each.eos_token_id}
        plain = (EosTokenCriteria, MaxLengthCriteria)
        self._others = StoppingCriteriaList(each for each in criteria if type(each) not in plain)
        self._most, self._alone = most, padded or rows == 1
        self._done: list[int | None] = [None] * rows
        self.ends: list[int | None] = [None] * rows  # new tokens of each row; None while it runs

    def take(
        self,
        row: int,
        count: int,
        token: int,
        text: Tensor,
        scores: tuple[Tensor, ...] | None,
        decide: Callable[[int], int],
    ) -> None:
        """A row has `count` new tokens, `token` is the last, `text` (1, length) holds it too.

        What the criteria say goes through `decide`: some look at a clock, and processes may have to agree.
        """
        done = token in self._eos or count >= self._most
        if self._others:
            done = bool(decide(self._ask(text, scores))) or done
        if done and self._done[row] is None:
            self._done[row] = count
            if self._alone:
                self.ends[row] = count
        if not self._alone and all(self._done):
            self.ends = [max(count for count in self._done if count)] * len(self._done)

    def over(self, row: int, count: int) -> bool:
        """Whether `count` new tokens are all that the row says."""
        end = self.ends[row]
        return count >= self._most or (end is not None and count >= end)

    def _ask(self, text: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
        answer = self._others(text, scores)
        if answer.numel() != 1:
            names = [type(each).__name__ for each in self._others]
            raise ValueError(
                f"the stopping criteria {names} answered for {answer.numel()} rows when asked about one: rows of a "
                f"batch differ in length here, so a criterion must answer for the rows that it is given"
            )
        return bool(answer)


class Rows(Sampler):
    """Chooses every row's tokens as `generate` would.

    Args:
        input_ids: (rows, width), left-padded.
        begins: padding tokens per row.
        processors: per row, from `processors.for_rows`.
        ends: where rows end.
        room: new tokens that a row's buffer holds.
        seed: of the draws; None is greedy.
        keep_scores, keep_logits: record the processed scores or the raw logits of every emitted token.
    """

    def __init__(
        self,
        input_ids: Tensor,
        begins: Sequence[int],
        processors: Sequence[LogitsProcessorList],
        ends: Ends,
        *,
        room: int,
        seed: int | None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        super().__init__(SamplingConfig(temperature=0.0 if seed is None else 1.0, seed=seed or 0))
        rows, self._width = input_ids.shape
        self._texts = torch.cat([input_ids, input_ids.new_zeros(rows, room)], dim=1)
        self._begins, self._processors, self._ends = list(begins), processors, ends
        self.prompts: list[list[int]] = [
            line[begin:] for line, begin in zip(input_ids.tolist(), self._begins, strict=True)
        ]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.kept_scores: list[list[Tensor]] = [[] for _ in range(rows)]  # (vocab,) fp32 each
        self.kept_logits: list[list[Tensor]] = [[] for _ in range(rows)]
        self._keep_scores, self._keep_logits = keep_scores, keep_logits

    @property
    def plain(self) -> bool:
        """Never: the choice is also noted."""
        return False

    @property
    def ended(self) -> list[int | None]:
        """New tokens of each row that has ended; None while it runs."""
        return self._ends.ends

    def choose(self, row: int, history: Sequence[int], logits: Tensor) -> int:
        """The token at position len(history) of `row`; any token behind the row's end, where the engine cuts."""
        count = len(history) - len(self.prompts[row])
        if self._ends.over(row, count):
            return 0
        assert count == len(self.tokens[row]), "every emitted token was chosen here, once"
        raw = logits.unsqueeze(0).to(device=self._texts.device, dtype=torch.float32, copy=True)  # as `generate` does
        if self._keep_logits:
            self.kept_logits[row].append(raw[0].clone())  # processors may write in place
        text = self._texts[row : row + 1, : self._width + count]
        scores: Tensor = self._processors[row](text, raw) if self._processors[row] else raw  # type: ignore[arg-type]
        if self._keep_scores:
            self.kept_scores[row].append(scores[0])
        token = self.decide(self._pick(row, len(history), scores[0]))
        self.tokens[row].append(token)
        self._texts[row, self._width + count] = token
        seen = tuple(each.unsqueeze(0) for each in self.kept_scores[row]) if self._keep_scores else None
        text = self._texts[row : row + 1, : self._width + count + 1]
        self._ends.take(row, count + 1, token, text, seen, self.decide)
        return token

    def stop(self, row: int, new: Sequence[int]) -> bool:
        """The engine's stop rule."""
        return self._ends.over(row, len(new))

    def column(self, place: int, pad: int) -> Tensor | None:
        """New token number `place` of every row (rows,), as `generate` streams it; None if not yet there."""
        if all(self._ends.over(row, place) for row in range(len(self.tokens))):
            return None
        said = []
        for row, tokens in enumerate(self.tokens):
            if self._ends.over(row, place):
                said.append(pad)
            elif place < len(tokens):
                said.append(tokens[place])
            else:
                return None
        return torch.tensor(said)

    def _pick(self, row: int, position: int, scores: Tensor) -> int:
        if self.config.temperature == 0:
            return int(scores.argmax(-1))
        probs = law(scores, f"in row {row} behind {position} tokens")
        return inverse_cdf(probs, keyed_uniform(self.config.seed, row, position))
