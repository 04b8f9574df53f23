"""Counts and times of a run, and when a text loops. Owns tau's definition; knows neither models nor drafters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_FIRST_BUCKET = 256  # positions; every further bucket is as long as all before it
NGRAM, LOOP_SHARE = 8, 0.3  # a text loops when more than 30 % of its 8-grams were there before

TAU_CONVENTION = (
    "tau = tokens emitted per decoding target forward, the bonus token included; prefill and its one token excluded; "
    "tokens cut off by a stop rule not counted"
)


@dataclass
class Stats:
    """Counts and times of one run. Milliseconds are wall clock; prefill is apart, its first token is not in tau.

    tau = `decoded_tokens` / `target_forwards`: tokens emitted per decoding target forward and row, the bonus token
    included, prefill and its one token excluded, tokens cut off by a stop rule not counted.
    """

    prompt_tokens: int = 0
    recalled_tokens: int = 0  # of them, found in a past and not run again
    tokens: int = 0  # emitted, the prefill's token included
    decoded_tokens: int = 0
    target_forwards: int = 0  # decoding steps, counted per row that was still running
    nodes: int = 0  # that those forwards ran over, roots included
    accepted_by_depth: list[int] = field(default_factory=list)  # [d]: steps that accepted a node at depth d + 1
    reached_by_depth: list[int] = field(default_factory=list)  # [d]: steps that had drafts at depth d + 1 to try
    first_choice_by_depth: list[int] = field(default_factory=list)  # [d]: ... whose preferred draft was right
    # [b]: of the steps whose root stood in bucket b of the context, see `bucket_of`.
    forwards_by_length: list[int] = field(default_factory=list)
    decoded_by_length: list[int] = field(default_factory=list)  # tokens
    reached_by_length: list[int] = field(default_factory=list)  # steps that had drafts to try
    accepted_by_length: list[int] = field(default_factory=list)  # steps that accepted one
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
        """[d]: chance that some draft at depth d + 1 is right, given that depth d was."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_by_depth, self.reached_by_depth, strict=True)]

    @property
    def alpha_by_depth(self) -> list[float]:
        """[d]: chance that the preferred draft at depth d + 1 is right, given that depth d was (0-alpha first)."""
        return [a / r if r else 0.0 for a, r in zip(self.first_choice_by_depth, self.reached_by_depth, strict=True)]

    @property
    def by_length(self) -> list[dict[str, float]]:
        """How drafts fared by the length of the context: buckets from `begin` to below `end`, those with steps alone.

        tau; acceptance: the share that accepted a draft of the steps that had any (`drafted`).
        """
        counts = (self.forwards_by_length, self.decoded_by_length, self.reached_by_length, self.accepted_by_length)
        found = list[dict[str, float]]()
        for bucket, (forwards, decoded, reached, accepted) in enumerate(zip(*counts, strict=True)):
            if forwards:
                begin, end = bucket_bounds(bucket)
                told = {"begin": begin, "end": end, "target_forwards": forwards, "drafted": reached}
                rates = {"tau": decoded / forwards, "acceptance": accepted / reached if reached else 0.0}
                found.append(told | rates)
        return found

    def count(self, kept: int, first_choice: Sequence[bool], position: int, emitted: int) -> None:
        """Take in one request's verdict of one step.

        `kept` nodes, the root included; `first_choice`, for each visited node that has children, whether its preferred
        child was the right one; the `position` of the root; and the tokens `emitted` that the stop rules left.
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


def _add(counts: list[int], place: int, value: int) -> None:
    counts.extend([0] * (place + 1 - len(counts)))
    counts[place] += value


def bucket_of(position: int) -> int:
    """The bucket of a position: 0 below 256, 1 below 512, 2 below 1024, and so on, doubling."""
    return (position // _FIRST_BUCKET).bit_length()


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """First position of a bucket, and the first after it."""
    return (_FIRST_BUCKET << bucket >> 1 if bucket else 0), _FIRST_BUCKET << bucket


def loop_share(tokens: Sequence[int]) -> float:
    """Share of a text's 8-grams that occurred before in it; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text loops."""
    return loop_share(tokens) > LOOP_SHARE
