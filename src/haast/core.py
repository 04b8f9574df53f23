"""Data classes of the engine: requests, sampling and stop parameters, verdicts, accepted tokens.

Owns their shapes and states. Runs no model: `verify` computes verdicts, the scheduler changes a request's state, and
drafters build trees.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor

from haast.stats import Stats


@dataclass(frozen=True)
class RowVerdict:
    """Accepted nodes of one row.

    `path` starts at the root, node 0; `tokens[i]` follows node `path[i]`; the last token is the bonus token.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    first_choice: tuple[bool, ...]  # per accepted node with children: whether the target chose its first child


class Verdict:
    """Accepted nodes of every row, in one tensor; `rows` copies it to the host once.

    Attributes:
        packed: (rows, 1 + 3 * (depth + 1)) int64: per row `counts`, `path`, `tokens`, and for each accepted node
            whether the target chose its first child (-1 where it has none).
        counts: (rows,) int64: accepted nodes, the root included; 0 for a row that failed.
        path: (rows, depth + 1) int64: the accepted nodes in order; entries after the last one are undefined.
        tokens: (rows, depth + 1) int64: the token that follows each; the last is the bonus token.
    """

    def __init__(self, packed: Tensor, rows: Sequence[RowVerdict | None] | None = None) -> None:
        """`rows` holds the same values, if they are on the host already."""
        width = packed.shape[1] // 3
        self.packed, self.counts = packed, packed[:, 0]
        self.path, self.tokens = packed[:, 1 : 1 + width], packed[:, 1 + width : 1 + 2 * width]
        self._rows = None if rows is None else tuple(rows)

    @classmethod
    def of_rows(cls, rows: Sequence[RowVerdict | None], device: torch.device) -> Verdict:
        """From rows that were verified on the host; None is a row that failed."""
        longest = max((len(row.path) for row in rows if row is not None), default=1)
        packed = []
        for row in rows:
            path, tokens, first = ((), (), ()) if row is None else (row.path, row.tokens, row.first_choice)
            parts = ((path, 0), (tokens, 0), (first, -1))
            padded = [[*part, *[filler] * (longest - len(part))] for part, filler in parts]
            packed.append([len(path), *(int(each) for part in padded for each in part)])
        return cls(torch.tensor(packed).to(device), rows)

    @property
    def rows(self) -> tuple[RowVerdict | None, ...]:
        """One `RowVerdict` per row; None for a row that failed. This is the step's only read from the device."""
        if self._rows is None:
            self._rows = tuple(map(_row_verdict, self.packed.tolist()))
        return self._rows


def _row_verdict(packed: list[int]) -> RowVerdict | None:
    count, width = packed[0], len(packed) // 3
    if not count:
        return None
    path, tokens, preferred = (packed[1 + part * width : 1 + part * width + count] for part in range(3))
    return RowVerdict(tuple(path), tuple(tokens), tuple(flag == 1 for flag in preferred if flag >= 0))


@dataclass(frozen=True, eq=False)
class Accepted:
    """Positions that one target forward committed, rows padded to the longest. The engine fills it for the drafter.

    target ran on      root   a      b            tokens[i] is the token that FOLLOWS
    features           f_root f_a    f_b          the position that gave features[i]
    tokens             a      b      bonus
    """

    tokens: Tensor  # (rows, longest) int64: the token following each committed position
    features: Tensor  # (rows, longest, width): target features at these positions, see `Drafter.target_layers`
    counts: Tensor  # (rows,) int64: committed positions
    # (rows, nodes) int64: the target's argmax at every node of the last proposal, for drafters with `wants_choices`;
    # None otherwise and in prefill.
    choices: Tensor | None = None
    verdict: Verdict | None = None  # of a decoding step; None in prefill
    tokens_on_host: list[list[int]] | None = None  # per row, in prefill: the prompt's tokens are on the host already

    def host_tokens(self) -> list[list[int]]:
        """The tokens that follow each row's committed positions, on the host; adds no read to that of the verdict."""
        return self._host_tokens

    @cached_property
    def _host_tokens(self) -> list[list[int]]:
        if self.tokens_on_host is not None:
            return self.tokens_on_host
        if self.verdict is not None:
            return [[] if row is None else list(row.tokens) for row in self.verdict.rows]
        return [row[:count] for row, count in zip(self.tokens.tolist(), self.counts.tolist(), strict=True)]


LEAST_DIVISOR = 1e-6  # a smaller divisor would make fp32 scores overflow
Processor = Callable[[Tensor, Tensor], Tensor]  # (history (1, length) int64, scores (1, vocab)) -> scores (1, vocab)
# Per field of `SamplingParams`: its type, its range, and the range in words for error messages.
_ALLOWED: dict[str, tuple[Any, Callable[[float], bool], str]] = {
    "temperature": (
        Real,
        lambda t: t == 0 or LEAST_DIVISOR <= t < math.inf,
        f"0 (greedy), or {LEAST_DIVISOR:g} or above",
    ),
    "top_p": (Real, lambda p: 0 < p <= 1, "above 0 and at most 1 (off)"),
    "min_p": (Real, lambda p: 0 <= p <= 1, "between 0 (off) and 1"),
    "repetition_penalty": (
        Real,
        lambda r: LEAST_DIVISOR <= r < math.inf,
        f"{LEAST_DIVISOR:g} or above and finite (1 is off)",
    ),
    "top_k": (Integral, lambda k: k >= 0, "0 (off) or above"),
    "seed": (Integral, lambda seed: 0 <= seed < 2**63, "between 0 and 2**63 - 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. Temperature 0 is greedy; all other settings are off by default.

    `processors` are transformers `LogitsProcessor`s, or callables with the same signature. They run where `generate`
    runs them: after the repetition penalty, before temperature, top-k, top-p and min-p. Each is called exactly once per
    sampled token, in order, with the tokens before it (a stop rule may cut off the last tokens sampled).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    processors: tuple[Processor, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, (kind, in_range, range_text) in _ALLOWED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not allowed: give a {'' if kind is Real else 'whole '}number")
            if not isinstance(value, float | int):  # numpy's, fractions, ...
                object.__setattr__(self, name, float(value) if kind is Real else int(value))
            if not in_range(value):
                raise ValueError(f"{name}={value} is not allowed: give a value {range_text}")
        if not isinstance(self.processors, Iterable):
            raise ValueError(f"processors={self.processors!r} is not allowed: give a tuple of functions")
        for process in self.processors:
            if not callable(process):
                raise ValueError(f"processors holds {process!r}: give functions (history, scores) -> scores")


@dataclass(frozen=True)
class StopParams:
    """When a request ends: after `max_new_tokens`, after an end token, or when `stop` returns True."""

    max_new_tokens: int = 256
    eos_ids: tuple[int, ...] = ()
    stop: Callable[[Sequence[int]], bool] | None = None  # called with the new tokens so far

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r} is not allowed: give 1 or more")
        integers = isinstance(self.eos_ids, Iterable) and all(isinstance(end, Integral) for end in self.eos_ids)
        if not integers or isinstance(self.eos_ids, str):
            raise ValueError(
                f"eos_ids={self.eos_ids!r} is not allowed: give token ids, for example (2,), or () for none"
            )
        if self.stop is not None and not callable(self.stop):
            raise ValueError(f"stop={self.stop!r} is not allowed: give a function (new tokens) -> bool, or None")


class TokenChooser(Protocol):
    """Chooses a request's tokens from the target's logits; see `haast.sampling.Sampler`."""

    @property
    def stateless(self) -> bool:
        """Whether a choice depends on logits and position only, so that all nodes can be sampled in one call."""

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        """The token after `history`, from raw logits (vocab,). Called once per emitted token, in order."""


@dataclass(frozen=True)
class Emission:
    """Tokens that a request emitted in one step: accepted drafts, then the bonus token (unless a stop rule cut it)."""

    row: int  # the request's index in its call
    tokens: tuple[int, ...]
    drafted: int  # the first `drafted` tokens were drafted
    finished: bool


class Guide(Protocol):
    """Edits a request's drafts by its constraints, a grammar for example. It changes drafts only, never the text."""

    def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> Sequence[Sequence[int]]:
        """Edit drafted paths.

        Args:
            history: all tokens so far, prompt included.
            drafted: paths that the drafter proposes, the most likely first.
            most: number of tokens that may be added to a path, or to the text if nothing is drafted.

        Returns:
            each path, cut before the first token that the constraint forbids, and extended by tokens that it forces.
        """


@dataclass(frozen=True)
class DraftHints:
    """Per-request options for drafting. The text does not depend on them.

    Attributes:
        guide: removes forbidden drafts and adds forced tokens.
        prediction: expected text, as tokens. Drafters that copy from the text read it as if it preceded the prompt.
        max_nodes: maximum nodes of its trees, root included; None leaves that to the drafter.
    """

    guide: Guide | None = None
    prediction: tuple[int, ...] = ()
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        if self.max_nodes is not None and (not isinstance(self.max_nodes, Integral) or self.max_nodes < 1):
            raise ValueError(f"max_nodes={self.max_nodes!r} is not allowed: give 1 (no drafts) or more, or None")


class RequestState(enum.Enum):
    """State of a request. A preempted request returns to WAITING and later continues with the tokens that it has."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"


class Request:
    """One text being generated: tokens, parameters, state and statistics.

    Attributes:
        tokens: prompt and new tokens; the engine appends to it.
        prompt_length: number of prompt tokens.
        limit: maximum new tokens, from `stop` and the target's context length.
        state: see `RequestState`.
        finish_reason: "" while it runs, then "stop" (an end token or stop rule), "length", "cancelled", "deadline" or
            "error".
        error: the exception that ended it, if any.
        emissions: emitted tokens that the caller has not read yet, oldest first.
        stats: counts and times.
        kv: its KV cache in the target's pool while it runs.
        draft_state: its drafter's state while it runs.
        deadline: on `time.monotonic`'s clock; None for none.
        hints: options for drafting.
        inputs: the prompt's `PromptInputs`, if it has more than tokens. Its keys and values belong to it alone, so
            other requests don't share them.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop: StopParams,
        chooser: TokenChooser,
        drafter: Any,
        *,
        row: int = 0,
        stats: Stats | None = None,
        prefill_chunk: int = 512,
        deadline: float | None = None,
        watch: Callable[[Any], None] | None = None,
        hints: DraftHints | None = None,
        inputs: Any = None,
    ) -> None:
        self.tokens = [int(token) for token in prompt]
        self.prompt_length = len(self.tokens)
        self.sampling, self.stop, self.chooser, self.drafter = sampling, stop, chooser, drafter
        self.row, self.stats, self.prefill_chunk = row, stats or Stats(), prefill_chunk
        self.deadline, self.watch, self.hints = deadline, watch, hints or DraftHints()
        self.inputs = inputs
        self.limit = stop.max_new_tokens
        self.state = RequestState.WAITING
        self.finish_reason = ""
        self.error: BaseException | None = None
        self.emissions: deque[Emission] = deque()
        self.kv: Any = None
        self.draft_state: Any = None
        self.draft_policy: Any = None
        self.prefill_end = self.prompt_length  # positions to prefill before decoding; more after a preemption

    @property
    def whole_prompt(self) -> bool:
        """Whether its next prefill is its whole prompt, alone in a forward."""
        return self.inputs is not None and (self.kv is None or self.kv.length == 0)

    @property
    def new_tokens(self) -> list[int]:
        """A copy of the tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    def fail(self, error: BaseException) -> None:
        """End this request with the running step; the other requests continue."""
        self.finish_reason, self.error = "error", error

    @property
    def finished(self) -> bool:
        """Whether the request has ended: nothing more will be emitted."""
        return self.state in (RequestState.DONE, RequestState.CANCELLED)
