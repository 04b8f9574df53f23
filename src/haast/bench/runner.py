"""Runs decoders interleaved over prompts and gathers what they did.

Owns the order (seeded and rotating, so that no decoder always runs first or on a warmer machine), warm-up, rounds and
the comparison of outputs. Knows no terminal and no files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from haast.bench.decoders import Decoder, DecoderRun
from haast.checking.divergence import Divergence, diagnose
from haast.core import SamplingParams
from haast.engine.engine import PREFILL_CHUNK
from haast.target.kv_pool import common_length
from haast.target.target import Target


@dataclass(frozen=True)
class BenchConfig:
    """How a bench runs."""

    max_new_tokens: int = 128
    rounds: int = 1
    warmup_tokens: int = 16
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 2), ("rounds", 1), ("warmup_tokens", 0), ("prefill_chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed in a bench: give {least} or more")


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt, encoded."""

    id: str
    category: str
    tokens: tuple[int, ...]


@dataclass
class Record:
    """What one decoder did with one prompt, over all rounds."""

    runs: list[DecoderRun] = field(default_factory=list)
    peak_rss_mb: float = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The output (of the first round)."""
        return self.runs[0].tokens

    @property
    def decoded(self) -> int:
        """Tokens that decode time stands for: all but the prefill's one."""
        return max(len(self.tokens) - 1, 0)

    @property
    def ms_decode(self) -> float:
        """Median over rounds."""
        return median(run.ms_decode for run in self.runs)

    @property
    def ms_whole(self) -> float:
        """Median over rounds, prefill included."""
        return median(run.ms_prefill + run.ms_decode for run in self.runs)

    def ms_part(self, name: str) -> float:
        """Median over rounds of a field of `Stats`; 0 outside the engine."""
        return median(0.0 if run.stats is None else float(getattr(run.stats, name)) for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """Two decoders said different things to one prompt. `verdict` is None where their arithmetic differs (hf)."""

    prompt: str
    decoder: str
    reference: str
    index: int
    verdict: Divergence | None


Records = dict[str, list[Record]]  # decoder -> one record per prompt


def run_bench(
    arms: Sequence[Decoder],
    prompts: Sequence[BenchPrompt],
    config: BenchConfig,
    progress: Callable[[str, Record], None] | None = None,
) -> Records:
    """Answer every prompt with every arm, `rounds` times, interleaved.

    Args:
        arms: the decoders.
        prompts: encoded.
        config: settings.
        progress: called after each answer with the decoder's name and its record so far.
    """
    if config.warmup_tokens:
        for arm in arms:
            arm.run(prompts[0].tokens, config.warmup_tokens)
    records: Records = {arm.name: [Record() for _ in prompts] for arm in arms}
    for round_number in range(config.rounds):
        for place, prompt in enumerate(prompts):
            for arm in rotated(arms, config.sampling.seed, round_number * len(prompts) + place):
                reset_peak_rss()
                record = records[arm.name][place]
                record.runs.append(arm.run(prompt.tokens, config.max_new_tokens))
                record.peak_rss_mb = max(record.peak_rss_mb, peak_rss_mb())
                if progress is not None:
                    progress(arm.name, record)
    return records


def rotated(arms: Sequence[Decoder], seed: int, turn: int) -> list[Decoder]:
    """A seeded order of the arms, one place further each turn."""
    order = list(arms)
    random.Random(seed).shuffle(order)
    turn %= len(order)
    return order[turn:] + order[:turn]


def differences(
    records: Records,
    prompts: Sequence[BenchPrompt],
    target: Target,
    sampling: SamplingParams,
    own_text: Collection[str] = (),
) -> list[Difference]:
    """Where decoders' outputs part from the first engine decoder's (vanilla where it ran), and between rounds.

    Engine decoders share one target, so a difference between them is judged: tie or bug. Those in `own_text` are
    not compared: their acceptance rule uses randomness of its own.
    """
    records = {name: own for name, own in records.items() if name not in own_text}
    if not records:
        return []
    reference = "vanilla" if "vanilla" in records else next((name for name in records if name != "hf"), "hf")
    found = []
    for place, prompt in enumerate(prompts):
        wanted = records[reference][place].tokens
        for name, own in records.items():
            for run in own[place].runs:
                if run.tokens == wanted:
                    continue
                judged = None
                if "hf" not in (name, reference):
                    judged = diagnose(target, prompt.tokens, wanted, run.tokens, sampling)
                found.append(Difference(prompt.id, name, reference, common_length(wanted, run.tokens), judged))
                break
    return found


def reset_peak_rss() -> None:
    """Let the kernel count the peak of resident memory anew (Linux; elsewhere the peak is the process's own)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_mb() -> float:
    """Peak resident memory of this process since the last reset, in MB; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024 / 1e6
