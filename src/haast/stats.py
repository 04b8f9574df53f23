"""Counts and times of a run, and a test for looping texts. Owns the definition of tau; knows no models or drafters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_FIRST_BUCKET = 256  # positions; each further bucket is as long as all before it
NGRAM, LOOP_SHARE = 8, 0.3  # a text loops if more than 30 % of its 8-grams are repeats
_LONGEST_PERIOD, _LEAST_REPEATED = 128, 24  # tokens; of a loop at the end of a text

TAU_CONVENTION = (
    "tau = tokens emitted per decoding target forward, the bonus token included; prefill and its one token excluded; "
    "tokens cut off by a stop rule not counted"
)


@dataclass
class Stats:
    """Counts and times of one run. Milliseconds are wall clock; prefill and its token are counted apart.

    tau = `decoded_tokens` / `target_forwards`: tokens emitted per decoding target forward and row, the bonus token
    included, prefill and its one token excluded, tokens cut off by a stop rule not counted.
    """

    prompt_tokens: int = 0
    recalled_tokens: int = 0  # prompt tokens found in the prefix cache, not prefilled again
    tokens: int = 0  # emitted, the prefill's token included
    decoded_tokens: int = 0
    target_forwards: int = 0  # decoding steps, counted per running row
    nodes: int = 0  # tree nodes of those forwards, roots included
    accepted_by_depth: list[int] = field(default_factory=list)  # [d]: steps that accepted a node at depth d + 1
    reached_by_depth: list[int] = field(
        default_factory=list
    )  # [d]: steps whose accepted path had drafts at depth d + 1
    first_choice_by_depth: list[int] = field(default_factory=list)  # [d]: ... and whose first draft was right
    # [b]: over the steps whose root's position is in bucket b of the context, see `bucket_of`.
    forwards_by_length: list[int] = field(default_factory=list)
    decoded_by_length: list[int] = field(default_factory=list)  # tokens
    reached_by_length: list[int] = field(default_factory=list)  # steps that had drafts
    accepted_by_length: list[int] = field(default_factory=list)  # steps that accepted one or more
    ms_prefill: float = 0.0
    ms_draft: float = 0.0
    ms_verify: float = 0.0  # target forward
    ms_overhead: float = 0.0  # acceptance, commit, stop rules

    @property
    def tau(self) -> float:
        """Tokens per decoding target forward; 0 before the first."""
        return self.decoded_tokens / self.target_forwards if self.target_forwards else 0.0

    @property
    def ms_decode(self) -> float:
        """Decoding time without prefill."""
        return self.ms_draft + self.ms_verify + self.ms_overhead

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, prefill and its token excluded."""
        return 1e3 * self.decoded_tokens / self.ms_decode if self.ms_decode else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """[d]: probability that a draft at depth d + 1 is accepted, given that depth d was."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_by_depth, self.reached_by_depth, strict=True)]

    @property
    def alpha_by_depth(self) -> list[float]:
        """[d]: probability that the first draft at depth d + 1 is right, given that depth d was (0-alpha first)."""
        return [a / r if r else 0.0 for a, r in zip(self.first_choice_by_depth, self.reached_by_depth, strict=True)]

    @property
    def by_length(self) -> list[dict[str, float]]:
        """tau and acceptance by context length, per bucket of positions `begin` to `end` - 1 that has steps.

        Acceptance is the share of steps with drafts (`drafted`) that accepted one or more.
        """
        counts = (self.forwards_by_length, self.decoded_by_length, self.reached_by_length, self.accepted_by_length)
        buckets = list[dict[str, float]]()
        for bucket, (forwards, decoded, reached, accepted) in enumerate(zip(*counts, strict=True)):
            if forwards:
                begin, end = bucket_bounds(bucket)
                totals = {"begin": begin, "end": end, "target_forwards": forwards, "drafted": reached}
                rates = {"tau": decoded / forwards, "acceptance": accepted / reached if reached else 0.0}
                buckets.append(totals | rates)
        return buckets

    def count(self, kept: int, first_choice: Sequence[bool], position: int, emitted: int) -> None:
        """Add one request's verdict of one step.

        Args:
            kept: accepted nodes, the root included.
            first_choice: for each accepted node with children, whether the target chose its first child.
            position: position of the root.
            emitted: tokens emitted after stop rules were applied.
        """
        self.target_forwards += 1
        self.decoded_tokens += emitted
        by_length = {
            "forwards_by_length": 1,
            "decoded_by_length": emitted,
            "reached_by_length": int(bool(first_choice)),
            "accepted_by_length": int(kept > 1),
        }
        for name, value in by_length.items():
            _add(getattr(self, name), bucket_of(position), value)
        for depth, preferred in enumerate(first_choice):
            _add(self.reached_by_depth, depth, 1)
            _add(self.accepted_by_depth, depth, int(kept > depth + 1))
            _add(self.first_choice_by_depth, depth, int(preferred))


def _add(counts: list[int], index: int, value: int) -> None:
    counts.extend([0] * (index + 1 - len(counts)))
    counts[index] += value


def bucket_of(position: int) -> int:
    """The bucket of a position: 0 below 256, 1 below 512, 2 below 1024, and so on, doubling."""
    return (position // _FIRST_BUCKET).bit_length()


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """First position of a bucket, and the first position after it."""
    return (_FIRST_BUCKET << bucket >> 1 if bucket else 0), _FIRST_BUCKET << bucket


def loop_share(tokens: Sequence[int]) -> float:
    """Share of a text's 8-grams that occur earlier in it; 0 for texts of fewer than 8 tokens."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text loops."""
    return loop_share(tokens) > LOOP_SHARE


def tail_loops(tokens: Sequence[int]) -> int:
    """How many of the last tokens repeat those before them: at least 24, and their period at least twice more.

    Periods of up to 128 tokens count. 0 if the text's end does not repeat.
    """
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 3) + 1):
        if tokens[-1 - period] == tokens[-1]:
            repeats = max(2 * period, _LEAST_REPEATED)
            if repeats + period <= len(tokens) and tokens[-repeats:] == tokens[-repeats - period : -period]:
                return repeats
    return 0


def loop_start(tokens: Sequence[int]) -> int | None:
    """The first token of a text that only repeats what is before it in a loop; None if the text does not loop."""
    for length in range(_LEAST_REPEATED, len(tokens) + 1):
        repeats = tail_loops(tokens[:length])
        if repeats:
            return length - repeats
    return None
