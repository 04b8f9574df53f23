"""The data that a step passes on: verdicts, what was accepted, parameters of sampling and stopping, requests.

Owns shapes and states. Computes nothing of a model: `verify` judges trees, the engine moves requests from state to
state, drafters make trees.
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
    """What one row keeps. `path` starts at node 0; `tokens[i]` follows node `path[i]`; the last token is the bonus."""

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    first_choice: tuple[bool, ...]  # per visited node that has children: was its preferred child the right one?


class Verdict:
    """What verification keeps of every row, in one tensor; `rows` reads it to the host, once.

    Attributes:
        packed: (rows, 1 + 3 * (depth + 1)) int64: what follows, row by row, and for each kept node whether its first
            child was right, -1 where it has none.
        counts: (rows,) int64: kept nodes; 0 for a row that failed.
        path: (rows, depth + 1) int64: the kept nodes in order; after the last, any.
        tokens: (rows, depth + 1) int64: the token that follows each; the last is the bonus.
    """

    def __init__(self, packed: Tensor, rows: Sequence[RowVerdict | None] | None = None) -> None:
        """`rows` says the same where it is known on the host already."""
        width = packed.shape[1] // 3
        self.packed, self.counts = packed, packed[:, 0]
        self.path, self.tokens = packed[:, 1 : 1 + width], packed[:, 1 + width : 1 + 2 * width]
        self._rows = None if rows is None else tuple(rows)

    @classmethod
    def of_rows(cls, rows: Sequence[RowVerdict | None], device: torch.device) -> Verdict:
        """From rows that were judged on the host; None is a row that keeps nothing."""
        longest = max((len(row.path) for row in rows if row is not None), default=1)
        said = []
        for row in rows:
            path, tokens, first = ((), (), ()) if row is None else (row.path, row.tokens, row.first_choice)
            parts = ((path, 0), (tokens, 0), (first, -1))
            padded = [[*part, *[rest] * (longest - len(part))] for part, rest in parts]
            said.append([len(path), *(int(each) for part in padded for each in part)])
        return cls(torch.tensor(said).to(device), rows)

    @property
    def rows(self) -> tuple[RowVerdict | None, ...]:
        """One `RowVerdict` per row; None for a row that failed. The step's one read from the device."""
        if self._rows is None:
            self._rows = tuple(map(_row_verdict, self.packed.tolist()))
        return self._rows


def _row_verdict(read: list[int]) -> RowVerdict | None:
    kept, width = read[0], len(read) // 3
    if not kept:
        return None
    path, tokens, preferred = (read[1 + part * width : 1 + part * width + kept] for part in range(3))
    return RowVerdict(tuple(path), tuple(tokens), tuple(flag == 1 for flag in preferred if flag >= 0))


@dataclass(frozen=True, eq=False)
class Accepted:
    """What one target forward settled, ragged rows padded to the longest. Filled by the engine.

    target ran on      root   a      b            tokens[i] is the token that FOLLOWS
    features           f_root f_a    f_b          the position that gave features[i]
    tokens             a      b      bonus
    """

    tokens: Tensor  # (rows, longest) int64: the token following each kept position
    features: Tensor  # (rows, longest, width): at the kept positions, what the drafter asked for (`target_layers`)
    counts: Tensor  # (rows,) int64: kept positions
    # (rows, nodes) int64: the target's likeliest token at every node of the last proposal, for drafters that want it
    # (`wants_choices`); None otherwise and after a prompt.
    choices: Tensor | None = None
    verdict: Verdict | None = None  # of a decoding step; None for positions of a prompt
    known: list[list[int]] | None = None  # per row what `said` gives, where it was on the host already: of a prompt

    def host_tokens(self) -> list[list[int]]:
        """The tokens that follow each row's kept positions, on the host; costs no read beside the step's own."""
        return self._host_tokens

    @cached_property
    def _host_tokens(self) -> list[list[int]]:
        if self.known is not None:
            return self.known
        if self.verdict is not None:
            return [[] if row is None else list(row.tokens) for row in self.verdict.rows]
        return [row[:count] for row, count in zip(self.tokens.tolist(), self.counts.tolist(), strict=True)]


LEAST_DIVISOR = 1e-6  # a smaller divisor would make fp32 scores overflow
Processor = Callable[[Tensor, Tensor], Tensor]  # (history (1, length) int64, scores (1, vocab)) -> scores (1, vocab)
# What a setting of `SamplingParams` may be: its kind, its range, and that in words.
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
    processors: tuple[Processor, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, (kind, allows, wanted) in _ALLOWED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not allowed: give a {'' if kind is Real else 'whole '}number")
            if not isinstance(value, float | int):  # numpy's, fractions, ...
                object.__setattr__(self, name, float(value) if kind is Real else int(value))
            if not allows(value):
                raise ValueError(f"{name}={value} is not allowed: give a value {wanted}")
        if not isinstance(self.processors, Iterable):
            raise ValueError(f"processors={self.processors!r} is not allowed: give a tuple of functions")
        for process in self.processors:
            if not callable(process):
                raise ValueError(f"processors holds {process!r}: give functions (history, scores) -> scores")


@dataclass(frozen=True)
class StopParams:
    """When a request ends: after `max_new_tokens`, after an end token, or when `stop` says so of its new tokens."""

    max_new_tokens: int = 256
    eos_ids: tuple[int, ...] = ()
    stop: Callable[[Sequence[int]], bool] | None = None  # its new tokens so far -> end here?

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r} is not allowed: give 1 or more")
        whole = isinstance(self.eos_ids, Iterable) and all(isinstance(end, Integral) for end in self.eos_ids)
        if not whole or isinstance(self.eos_ids, str):
            raise ValueError(f"eos_ids={self.eos_ids!r} is not allowed: give token ids, (2,) say, or () for none")
        if self.stop is not None and not callable(self.stop):
            raise ValueError(f"stop={self.stop!r} is not allowed: give a function (new tokens) -> bool, or None")


class TokenChooser(Protocol):
    """Chooses a request's tokens from the target's logits; see `engine.sampler`."""

    @property
    def stateless(self) -> bool:
        """Whether a choice depends on logits and position alone, so that all nodes can be chosen for at once."""

    def choose(self, history: Sequence[int], logits: Tensor) -> int:
        """The token after `history`, of raw logits (vocab,). Called once per emitted token, in order."""


@dataclass(frozen=True)
class Emission:
    """Tokens a request emitted in one step; all but the last of a full step were drafted, the last is the bonus."""

    row: int  # the request's place in its call
    tokens: tuple[int, ...]
    drafted: int  # how many of them, from the front, were drafted
    finished: bool


class Guide(Protocol):
    """What a request's own rules say of its next tokens: drafts get better by it, and no token is decided by it."""

    def paths(self, history: Sequence[int], drafted: Sequence[Sequence[int]], most: int) -> Sequence[Sequence[int]]:
        """Where a text can go on.

        Args:
            history: all tokens so far, prompt included.
            drafted: paths that the drafter proposes, the likeliest first.
            most: tokens that may be added to a path, or to the text where nothing is drafted.

        Returns:
            each path, cut before its first token that can't come, and lengthened by tokens that must.
        """


@dataclass(frozen=True)
class DraftHints:
    """What a request says about its drafts. Its text does not depend on it.

    Attributes:
        guide: cuts drafts that can't come and adds what must.
        foreseen: text that may come again, for drafters that draft from what was said before: as if it stood before
            the prompt.
        max_nodes: nodes of its trees at most, root included; None is up to the drafter.
    """

    guide: Guide | None = None
    foreseen: tuple[int, ...] = ()
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        if self.max_nodes is not None and (not isinstance(self.max_nodes, Integral) or self.max_nodes < 1):
            raise ValueError(f"max_nodes={self.max_nodes!r} is not allowed: give 1 (no drafts) or more, or None")


class RequestState(enum.Enum):
    """Where a request stands. A preempted one waits again, and goes on where it was."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"


class Request:
    """One text being generated: its tokens, parameters, state and statistics. Depends on nothing but itself.

    Attributes:
        tokens: prompt and new tokens, which the engine appends.
        prompt_length: tokens of the prompt.
        limit: new tokens at most, by `stop` and the target's context.
        state: see `RequestState`.
        finish_reason: "" while it runs, then "stop" (an end token or stop rule), "length", "cancelled", "deadline" or
            "error".
        error: what ended it, where that was an exception of its own.
        emissions: what nobody has taken yet, oldest first.
        stats: counts and times.
        kv: its KV cache in the target's pool while it runs.
        draft_state: what its drafter keeps of it while it runs.
        deadline: on `time.monotonic`'s clock; None for none.
        hints: what it says about its drafts.
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
    ) -> None:
        self.tokens = [int(token) for token in prompt]
        self.prompt_length = len(self.tokens)
        self.sampling, self.stop, self.chooser, self.drafter = sampling, stop, chooser, drafter
        self.row, self.stats, self.prefill_chunk = row, stats or Stats(), prefill_chunk
        self.deadline, self.watch, self.hints = deadline, watch, hints or DraftHints()
        self.limit = stop.max_new_tokens
        self.state = RequestState.WAITING
        self.finish_reason = ""
        self.error: BaseException | None = None
        self.emissions: deque[Emission] = deque()
        self.kv: Any = None
        self.draft_state: Any = None
        self.draft_policy: Any = None
        self.prefill_end = self.prompt_length  # positions to compute before it decodes; more after a preemption

    @property
    def new_tokens(self) -> list[int]:
        """Tokens after the prompt, a copy."""
        return self.tokens[self.prompt_length :]

    def fail(self, error: BaseException) -> None:
        """End it with the running step, which goes on for the others."""
        self.finish_reason, self.error = "error", error

    @property
    def finished(self) -> bool:
        """Whether nothing will be emitted any more."""
        return self.state in (RequestState.DONE, RequestState.CANCELLED)
