"""The rows of one `generate` call: their texts as `generate` would have them, where they end, and what is returned.

Each row is a request of its own. Its text holds its left padding, since stock processors and stopping criteria see it;
the engine's does not. Processors and criteria are asked exactly once per emitted token, in order, and never after a
row's end, whatever is drafted. Knows neither trees nor models.

    text     pad pad  p0  p1  p2 | n0  n1 ...      a view for whoever asks: nothing is copied per token
             begin=2             width

Stock `generate` runs a batch until all rows are done. A row that is done is padded where an end-of-text criterion is
among the criteria; otherwise it goes on with true tokens until the last row is done. Requests run at their own pace:
such a row stops where it is as long as any row is known to become, and a second request continues it once the length of
the longest is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as stock
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from haast.core import Emission, SamplingParams, StopParams
from haast.sampling import Sampler, inverse_cdf, probabilities

# Those of transformers that look at scores alone, a row of them at a time, and never make the host wait for values.
# TopHLogitsWarper and EtaLogitsWarper do: their torch.distributions check what they are given.
_STATELESS = frozenset({
    stock.TemperatureLogitsWarper, stock.TopKLogitsWarper, stock.TopPLogitsWarper, stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper, stock.EpsilonLogitsWarper, stock.LogitNormalization,
    stock.InfNanRemoveLogitsProcessor, stock.SuppressTokensLogitsProcessor,
})  # fmt: skip
_Shown = tuple[Tensor, tuple[Tensor, ...] | None]


class Ends:
    """Where the rows of a call end, by the stopping criteria that `generate` prepared, asked for one row at a time.

    Attributes:
        eos: tokens that end a text.
        most: new tokens at most.
        look: whether there are criteria that look at the text.
        together: whether a row that is done goes on until all are.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int, most: int, together: bool) -> None:
        # The two that almost every call has are answered without tensors.
        self.eos = frozenset(int(i) for each in criteria if type(each) is EosTokenCriteria for i in each.eos_token_id)
        plain = (EosTokenCriteria, MaxLengthCriteria)
        self._others = StoppingCriteriaList(each for each in criteria if type(each) not in plain)
        self.most, self.look, self.together = most, bool(self._others), together
        self._counts = [0] * rows
        self._done: list[int | None] = [None] * rows

    def settle(self, row: int, count: int, token: int, shown: Callable[[], _Shown]) -> None:
        """A row has `count` new tokens, `token` is the last; `shown` are its ids and its scores so far.

        Raises ValueError where a criterion answers for other rows than the one that it was asked about.
        """
        done = token in self.eos or count >= self.most
        if self.look:
            answer = self._others(*shown())
            if answer.numel() != 1:
                names = [type(each).__name__ for each in self._others]
                raise ValueError(
                    f"the stopping criteria {names} answered for {answer.numel()} rows when asked about one: rows of a "
                    f"batch differ in length here, so a criterion must answer for the rows that it is given"
                )
            done = bool(answer) or done
        self._counts[row] = count
        if done and self._done[row] is None:
            self._done[row] = count

    @property
    def longest(self) -> int:
        """New tokens that the longest row will have: exactly so where all are done, at least so before."""
        return max(n + 1 if done is None else done for n, done in zip(self._counts, self._done, strict=True))

    def over(self, row: int, count: int) -> bool:
        """Whether a row stops that has `count` new tokens."""
        done = self._done[row]
        if done is None or count >= self.most:
            return count >= self.most
        return count >= (self.longest if self.together else done)


class RowChooser(Sampler):
    """One row: chooses its tokens as `generate` would, and says when it stops.

    Without processors that look at the text, and where no scores are recorded, it is a stateless sampler.

    Args:
        ids: (width,), left-padded by `begin` tokens.
        processors: its own, from `processors.for_rows`.
        ends: of the call; `row` is its number there.
        seed: of its draws; None is greedy.
        keep_scores, keep_logits: record the processed scores or the raw logits, (vocab,) fp32, of every emitted token.

    Attributes:
        stateless: whether no processor looks at the text, and nothing is recorded.
        tokens: new tokens, as the engine has emitted them: processes that serve a model together all have them.
        end: how many of them count; None while that is not known.
    """

    def __init__(
        self,
        row: int,
        ids: Tensor,
        begin: int,
        processors: LogitsProcessorList,
        ends: Ends,
        *,
        seed: int | None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        params = SamplingParams(temperature=0.0 if seed is None else 1.0, seed=seed or 0)
        super().__init__(params, warpers=list(processors))
        self.row, self.prompt = row, [int(token) for token in ids[begin:].tolist()]
        self.tokens: list[int] = []
        self.end: int | None = None
        self.kept_scores: list[Tensor] = []
        self.kept_logits: list[Tensor] = []
        self._keep_scores, self._keep_logits = keep_scores, keep_logits
        self._processors_of_row, self._ends = processors, ends
        plain = all(type(each) in _STATELESS for each in processors)
        self.stateless = plain and not (keep_scores or keep_logits)
        self._text, self._width = ids.unsqueeze(0), len(ids)  # with room for new ones once there is one
        self._chosen: list[int] = []  # where processors look at the text
        self._asked = 0  # new tokens after which the criteria were asked
        self._begin, self._stops_at = 0, -1  # of the request that runs: new tokens before it, and where it stops

    def begun(self) -> StopParams:
        """A request begins, over the prompt and the new tokens so far: when it stops."""
        self._begin, self._stops_at = len(self.tokens), -1
        asks = self._ends.look or not self.stateless or self._ends.together
        most = self._ends.most if self.end is None else self.end
        return StopParams(most - self._begin, tuple(self._ends.eos), self._stop if asks else None)

    def take(self, emission: Emission) -> None:
        """Tokens were emitted."""
        self.tokens.extend(emission.tokens)
        if emission.finished and not self._ends.together:
            self.end = len(self.tokens)

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        """The token at position len(history); any token after the row's end, where the engine cuts.

        Raises RuntimeError where a token before it was not chosen here, PromptError where no token is possible.
        """
        if self.stateless:
            return super().choose(history, logits)
        count = len(history) - len(self.prompt)
        if count < len(self._chosen):
            return self._chosen[count]  # a step that was interrupted is taken again
        if self._over(count):
            return 0
        if count > len(self._chosen):
            raise RuntimeError(f"row {self.row} has {count} new tokens, of which {len(self._chosen)} were chosen here")
        scores = self.scores(history, logits)
        if self.greedy:
            token = int(scores.argmax(-1))
        else:
            where = f"in row {self.row} after {len(history)} tokens"
            token = inverse_cdf(probabilities(scores, where), self.draw(len(history)))
        if self._keep_logits:
            self.kept_logits.append(self._raw(logits))
        if self._keep_scores:
            self.kept_scores.append(scores)
        self._chosen.append(token)
        self._settle(count + 1, token)
        return token

    def scores(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Scores (vocab,) as `generate` has them: processors see the text with its padding."""
        if self.stateless:
            return super().scores(history, logits)
        raw = self._raw(logits).unsqueeze(0)
        text = self._text[:, : self._width + len(history) - len(self.prompt)]
        scores: Tensor = self._processors_of_row(text, raw) if self._processors_of_row else raw  # type: ignore[arg-type]
        return scores[0]

    def _raw(self, logits: Tensor) -> Tensor:
        """A copy in float32, as `generate` makes it: processors may write in place."""
        return logits.to(device=self._text.device, dtype=torch.float32, copy=True)

    def _stop(self, new: Sequence[int]) -> bool:
        """The engine's stop rule for the request that runs."""
        count = self._begin + len(new)
        self._settle(count, new[-1])
        return self._over(count)

    def _settle(self, count: int, token: int) -> None:
        """There are `count` new tokens, `token` is the last: ask the criteria, once."""
        if count <= self._asked:
            return
        if self._ends.look or not self.stateless:
            place = self._width + count - 1
            if place >= self._text.shape[1]:  # the first time too: the ids are the caller's
                self._text = pad(self._text, (0, self._text.shape[1]))
            self._text[0, place] = token

        def shown() -> _Shown:
            scores = tuple(each.unsqueeze(0) for each in self.kept_scores) if self._keep_scores else None
            return self._text[:, : self._width + count], scores

        self._ends.settle(self.row, count, token, shown)
        self._asked = count

    def _over(self, count: int) -> bool:
        """Whether the request stops at `count` new tokens. Once said it stays so, whatever other rows do meanwhile."""
        if self._stops_at < 0 and self._ends.over(self.row, count):
            self._stops_at = count
        return 0 <= self._stops_at <= count


class Rows:
    """The rows of a call in their order, and who listens to their new tokens; `padding` stands after a row's end."""

    def __init__(self, rows: Sequence[RowChooser], ends: Ends, streamer: BaseStreamer | None, padding: int) -> None:
        self._rows, self._ends, self._streamer, self._pad = list(rows), ends, streamer, padding
        self._sent = 0

    def unfinished(self) -> list[RowChooser]:
        """Rows that need a request: at first all, then those that stopped before the longest was done."""
        return [row for row in self._rows if row.end is None or len(row.tokens) < row.end]

    def settle(self, agreed: Callable[[int], int]) -> None:
        """The requests have ended. `agreed` makes one process's number that of all that serve the model together."""
        if self._ends.together:
            longest = agreed(self._ends.longest)
            for row in self._rows:
                row.end = longest

    def flush(self) -> None:
        """Hand the streamer what is settled: the next token of every row, as long as each has one or has ended."""
        while self._streamer is not None:
            place = self._sent
            ended = [row.end is not None and place >= row.end for row in self._rows]
            each = list(zip(self._rows, ended, strict=True))
            if all(ended) or any(place >= len(row.tokens) for row, over in each if not over):
                return
            self._streamer.put(torch.tensor([self._pad if over else row.tokens[place] for row, over in each]))  # type: ignore[no-untyped-call]
            self._sent += 1

    def finish(self) -> None:
        """All rows have ended; the streamer is told."""
        if self._streamer is not None:
            self.flush()
            self._streamer.end()  # type: ignore[no-untyped-call]

    def output(self, input_ids: Tensor, config: GenerationConfig) -> GenerateDecoderOnlyOutput | Tensor:
        """The sequences (rows, width + longest), padded after their ends; with scores and logits if asked for.

        A row that has ended has the pad token for certain: score 0 there and -inf elsewhere.
        """
        said = [row.tokens[: row.end] for row in self._rows]
        ends = [len(tokens) for tokens in said]
        new = [tokens + [self._pad] * (max(ends) - len(tokens)) for tokens in said]
        sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        scores, logits = (
            self._by_step([getattr(row, name) for row in self._rows], ends) if wanted else None
            for name, wanted in (("kept_scores", config.output_scores), ("kept_logits", config.output_logits))
        )
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)  # type: ignore[arg-type]

    def _by_step(self, kept: Sequence[Sequence[Tensor]], ends: Sequence[int]) -> tuple[Tensor, ...]:
        """Rows of (vocab,) per step -> one (rows, vocab) per step."""
        certain = torch.full_like(kept[0][0], -torch.inf)
        if 0 <= self._pad < len(certain):
            certain[self._pad] = 0.0
        each = list(zip(kept, ends, strict=True))
        return tuple(
            torch.stack([row[step] if step < end else certain for row, end in each]) for step in range(max(ends))
        )
