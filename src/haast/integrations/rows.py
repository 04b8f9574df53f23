"""The rows of one `generate` call: token choice as in stock `generate`, the end of each row, and the output.

Each row is its own request. Its text here has its left padding, since stock processors and stopping criteria see it;
the engine's text has none. Processors and criteria are called exactly once per emitted token, in order, and never after
a row's end, whatever is drafted. Does not know trees or models.

    text     pad pad  p0  p1  p2 | n0  n1 ...      callers get a view: nothing is copied per token
             begin=2             width

Stock `generate` runs a batch until all rows are done. If the criteria have an EOS criterion, a finished row is padded;
otherwise it continues with sampled tokens until the last row is done. Requests are independent here, so such a row
stops at the longest length that is certain so far, and a second request continues it once the final length of the
longest row is known.
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

# Processors of transformers that use only the scores, row by row, and never wait for values from the device.
# TopHLogitsWarper and EtaLogitsWarper wait: their torch.distributions validate their arguments.
_STATELESS = frozenset({
    stock.TemperatureLogitsWarper, stock.TopKLogitsWarper, stock.TopPLogitsWarper, stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper, stock.EpsilonLogitsWarper, stock.LogitNormalization,
    stock.InfNanRemoveLogitsProcessor, stock.SuppressTokensLogitsProcessor,
})  # fmt: skip
_CriteriaInputs = tuple[Tensor, tuple[Tensor, ...] | None]


class Ends:
    """The end of each row of a call, by the stopping criteria that `generate` prepared, called for one row at a time.

    Attributes:
        eos: tokens that end a text.
        max_new: maximum number of new tokens.
        custom: whether there are criteria other than EOS and length, which need the text.
        to_longest: whether a finished row continues until all rows are done.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int, max_new: int, to_longest: bool) -> None:
        # The two criteria of almost every call are checked without tensors.
        self.eos = frozenset(int(i) for each in criteria if type(each) is EosTokenCriteria for i in each.eos_token_id)
        plain = (EosTokenCriteria, MaxLengthCriteria)
        self._others = StoppingCriteriaList(each for each in criteria if type(each) not in plain)
        self.max_new, self.custom, self.to_longest = max_new, bool(self._others), to_longest
        self._counts = [0] * rows
        self._done: list[int | None] = [None] * rows

    def record(self, row: int, count: int, token: int, criteria_inputs: Callable[[], _CriteriaInputs]) -> None:
        """Check the criteria for a row with `count` new tokens, of which `token` is the last.

        `criteria_inputs` returns its ids and scores so far. Raises ValueError if a criterion returns values for more
        than one row.
        """
        done = token in self.eos or count >= self.max_new
        if self.custom:
            answer = self._others(*criteria_inputs())
            if answer.numel() != 1:
                names = [type(each).__name__ for each in self._others]
                raise ValueError(
                    f"the stopping criteria {names} answered for {answer.numel()} rows when called with one: rows of a "
                    f"batch differ in length here, so a criterion must return one value per row of its input"
                )
            done = bool(answer) or done
        self._counts[row] = count
        if done and self._done[row] is None:
            self._done[row] = count

    @property
    def longest(self) -> int:
        """Number of new tokens of the longest row: final once all rows are done, a lower bound before."""
        return max(n + 1 if done is None else done for n, done in zip(self._counts, self._done, strict=True))

    def stops(self, row: int, count: int) -> bool:
        """Whether a row with `count` new tokens stops."""
        done = self._done[row]
        if done is None or count >= self.max_new:
            return count >= self.max_new
        return count >= (self.longest if self.to_longest else done)


class RowChooser(Sampler):
    """Chooses the tokens of one row as stock `generate` would, and decides when it stops.

    If no processor reads the text and no scores are recorded, it is a stateless sampler.

    Args:
        row: index of the row in `ends`.
        ids: (width,), left-padded by `begin` tokens.
        processors: of this row, from `processors.for_rows`.
        ends: of the call.
        seed: of sampling; None is greedy.
        keep_scores, keep_logits: record the processed scores or the raw logits, (vocab,) fp32, of every emitted token.

    Attributes:
        stateless: whether no processor reads the text, and nothing is recorded.
        tokens: new tokens that the engine has emitted; with tensor parallelism every process has them.
        end: number of tokens that belong to the output; None while unknown.
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
        self._text, self._width = ids.unsqueeze(0), len(ids)  # grows when a new token is stored
        self._chosen: list[int] = []  # not used if stateless
        self._checked_count = 0  # number of new tokens at the last check of the criteria
        self._begin, self._stops_at = 0, -1  # of the current request: new tokens before it, and where it stops

    def start_request(self) -> StopParams:
        """The stop rules of a new request, whose prompt is the row's prompt and its new tokens so far."""
        self._begin, self._stops_at = len(self.tokens), -1
        needs_rule = self._ends.custom or not self.stateless or self._ends.to_longest
        max_new = self._ends.max_new if self.end is None else self.end
        return StopParams(max_new - self._begin, tuple(self._ends.eos), self._stop if needs_rule else None)

    def append(self, emission: Emission) -> None:
        """Add emitted tokens."""
        self.tokens.extend(emission.tokens)
        if emission.finished and not self._ends.to_longest:
            self.end = len(self.tokens)

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        """The token at position len(history); after the row's end any token, since the engine cuts there.

        Raises RuntimeError if an earlier token was not chosen here, PromptError if no token is possible.
        """
        if self.stateless:
            return super().choose(history, logits)
        count = len(history) - len(self.prompt)
        if count < len(self._chosen):
            return self._chosen[count]  # an interrupted step is repeated
        if self._request_stops(count):
            return 0
        if count > len(self._chosen):
            raise RuntimeError(f"row {self.row} has {count} new tokens, of which {len(self._chosen)} were chosen here")
        scores = self.scores(history, logits)
        if self.greedy:
            token = int(scores.argmax(-1))
        else:
            context = f"in row {self.row} after {len(history)} tokens"
            token = inverse_cdf(probabilities(scores, context), self.draw(len(history)))
        if self._keep_logits:
            self.kept_logits.append(self._raw(logits))
        if self._keep_scores:
            self.kept_scores.append(scores)
        self._chosen.append(token)
        self._check_criteria(count + 1, token)
        return token

    def scores(self, history: Sequence[int], logits: Tensor) -> Tensor:
        """Processed scores (vocab,) as in stock `generate`: processors see the text with its padding."""
        if self.stateless:
            return super().scores(history, logits)
        raw = self._raw(logits).unsqueeze(0)
        text = self._text[:, : self._width + len(history) - len(self.prompt)]
        scores: Tensor = self._processors_of_row(text, raw) if self._processors_of_row else raw  # type: ignore[arg-type]
        return scores[0]

    def _raw(self, logits: Tensor) -> Tensor:
        """A float32 copy, as stock `generate` makes: processors may write in place."""
        return logits.to(device=self._text.device, dtype=torch.float32, copy=True)

    def _stop(self, new: Sequence[int]) -> bool:
        """The engine's stop rule for the current request."""
        count = self._begin + len(new)
        self._check_criteria(count, new[-1])
        return self._request_stops(count)

    def _check_criteria(self, count: int, token: int) -> None:
        """Check the criteria for `count` new tokens, of which `token` is the last; once per token."""
        if count <= self._checked_count:
            return
        if self._ends.custom or not self.stateless:
            index = self._width + count - 1
            if index >= self._text.shape[1]:  # true for the first token: never write into the caller's ids
                self._text = pad(self._text, (0, self._text.shape[1]))
            self._text[0, index] = token

        def criteria_inputs() -> _CriteriaInputs:
            scores = tuple(each.unsqueeze(0) for each in self.kept_scores) if self._keep_scores else None
            return self._text[:, : self._width + count], scores

        self._ends.record(self.row, count, token, criteria_inputs)
        self._checked_count = count

    def _request_stops(self, count: int) -> bool:
        """Whether the request stops at `count` new tokens. The answer is stored, so other rows cannot change it."""
        if self._stops_at < 0 and self._ends.stops(self.row, count):
            self._stops_at = count
        return 0 <= self._stops_at <= count


class Rows:
    """The rows of a call in their order, and their streamer; `padding` is the token after a row's end."""

    def __init__(self, rows: Sequence[RowChooser], ends: Ends, streamer: BaseStreamer | None, padding: int) -> None:
        self._rows, self._ends, self._streamer, self._pad = list(rows), ends, streamer, padding
        self._sent = 0

    def unfinished(self) -> list[RowChooser]:
        """Rows that need a request: first all, then those that stopped before the longest row was done."""
        return [row for row in self._rows if row.end is None or len(row.tokens) < row.end]

    def fix_ends(self, broadcast: Callable[[int], int]) -> None:
        """Set the rows' final length after their requests have ended.

        `broadcast` returns the first process's number in all processes of a tensor-parallel model.
        """
        if self._ends.to_longest:
            longest = broadcast(self._ends.longest)
            for row in self._rows:
                row.end = longest

    def flush(self) -> None:
        """Send the streamer the next token of each row, as long as each row has one or has ended."""
        while self._streamer is not None:
            index = self._sent
            ended = [row.end is not None and index >= row.end for row in self._rows]
            each = list(zip(self._rows, ended, strict=True))
            if all(ended) or any(index >= len(row.tokens) for row, done in each if not done):
                return
            self._streamer.put(torch.tensor([self._pad if done else row.tokens[index] for row, done in each]))  # type: ignore[no-untyped-call]
            self._sent += 1

    def finish(self) -> None:
        """Flush and end the streamer after all rows have ended."""
        if self._streamer is not None:
            self.flush()
            self._streamer.end()  # type: ignore[no-untyped-call]

    def output(self, input_ids: Tensor, config: GenerationConfig) -> GenerateDecoderOnlyOutput | Tensor:
        """The sequences (rows, width + longest), padded after their ends; with scores and logits as set in `config`.

        After a row's end the pad token has score 0 and all others -inf.
        """
        generated = [row.tokens[: row.end] for row in self._rows]
        ends = [len(tokens) for tokens in generated]
        new = [tokens + [self._pad] * (max(ends) - len(tokens)) for tokens in generated]
        sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        scores, logits = (
            self._by_step([getattr(row, name) for row in self._rows], ends) if wanted else None
            for name, wanted in (("kept_scores", config.output_scores), ("kept_logits", config.output_logits))
        )
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)  # type: ignore[arg-type]

    def _by_step(self, kept: Sequence[Sequence[Tensor]], ends: Sequence[int]) -> tuple[Tensor, ...]:
        """Convert lists of (vocab,) per row to one (rows, vocab) tensor per step."""
        pad_scores = torch.full_like(kept[0][0], -torch.inf)
        if 0 <= self._pad < len(pad_scores):
            pad_scores[self._pad] = 0.0
        each = list(zip(kept, ends, strict=True))
        return tuple(
            torch.stack([row[step] if step < end else pad_scores for row, end in each]) for step in range(max(ends))
        )
