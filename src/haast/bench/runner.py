"""Runs decoders over the prompts of one file, or of several suites and temperatures, and collects their answers.

Owns order, warm-up, rounds and the comparison of outputs. The order is a pure function of the seed, so a resumed run
keeps it. Within a round, temperatures, suites and prompts are shuffled, and so are the decoders of each prompt, so that
a machine that slows down for some minutes slows all decoders equally. Knows neither the terminal nor files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from haast.bench.decoders import Decoder, DecoderRun, independent_text
from haast.checking.divergence import diagnose
from haast.core import SamplingParams
from haast.engine.engine import PREFILL_CHUNK
from haast.errors import check_at_least
from haast.target.kv_pool import common_length
from haast.target.target import Target


@dataclass(frozen=True)
class BenchConfig:
    """Settings of a bench run."""

    max_new_tokens: int = 128
    rounds: int = 1
    warmup_tokens: int = 16
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 2), ("rounds", 1), ("warmup_tokens", 0), ("prefill_chunk", 1)):
            check_at_least(name, getattr(self, name), least)


@dataclass(frozen=True)
class BenchPrompt:
    """One encoded prompt."""

    id: str
    category: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Two decoders generated different tokens for one prompt, first at `index`."""

    prompt: str
    decoder: str
    reference: str
    index: int
    kind: str  # tie, bug, or precision (hf computes in another precision: reported, not judged)
    gap: float | None  # see `Divergence`


@dataclass(frozen=True)
class Suite:
    """The encoded prompts of one file."""

    file: str  # file name without its folder
    sha256: str
    prompts: tuple[BenchPrompt, ...]

    @property
    def tokens_sha256(self) -> str:
        """Hash of the encoded prompts: with another tokenizer or template, the same file is another run."""
        tokens = [(prompt.id, prompt.tokens) for prompt in self.prompts]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """One scheduled answer: which decoder answers which prompt, in which round."""

    round: int
    temperature: float
    suite: str
    place: int  # index of the prompt in its suite
    decoder: str


Record = list[DecoderRun]  # the answers of one decoder to one prompt, one per round
Records = dict[str, list[Record]]  # decoder -> one record per prompt
Cells = dict[tuple[float, str], Records]  # (temperature, suite) -> records


def order(seed: int, rounds: int, sizes: Mapping[str, int], decoders: Mapping[float, Sequence[str]]) -> list[Turn]:
    """All turns, round by round; they depend on the names, not on the order in which they are passed.

    Args:
        seed: of the shuffling.
        rounds: answers per prompt and decoder.
        sizes: suite -> number of prompts.
        decoders: temperature -> names.
    """
    generator, turns = random.Random(seed), list[Turn]()
    for number in range(rounds):
        prompts = [(t, suite, i) for t in sorted(decoders) for suite in sorted(sizes) for i in range(sizes[suite])]
        generator.shuffle(prompts)
        for temperature, suite, place in prompts:
            names = sorted(decoders[temperature])
            generator.shuffle(names)
            turns += [Turn(number, temperature, suite, place, name) for name in names]
    return turns


def run_suite(
    decoders_at: Mapping[float, Sequence[Decoder]],
    suites: Mapping[str, Suite],
    config: BenchConfig,
    answers: dict[Turn, DecoderRun],
    keep: Callable[[Turn, DecoderRun], None] = lambda turn, run: None,
) -> Cells:
    """Run every turn that has no answer yet.

    Args:
        decoders_at: temperature -> decoders.
        suites: by name.
        config: rounds, tokens, warm-up, and the seed of the order; its temperature is not used.
        answers: those of an earlier run; the new answers are added.
        keep: called with each new answer as soon as it is complete.

    Returns:
        All answers: suites and prompts in the order of the files, decoders in the order given. A decoder that does
        not run at a temperature has no records there.
    """
    by_name = {(temperature, decoder.name): decoder for temperature, own in decoders_at.items() for decoder in own}
    sizes = {name: len(suite.prompts) for name, suite in suites.items()}
    decoders = {temperature: [decoder.name for decoder in own] for temperature, own in decoders_at.items()}
    turns = order(config.sampling.seed, config.rounds, sizes, decoders)
    pending = [turn for turn in turns if turn not in answers]
    if pending and config.warmup_tokens:
        first = next(iter(suites.values())).prompts[0]
        for decoder in by_name.values():
            decoder.run(first.tokens, config.warmup_tokens)
    for turn in pending:
        reset_peak_rss()
        decoder, prompt = by_name[turn.temperature, turn.decoder], suites[turn.suite].prompts[turn.place]
        answer = replace(decoder.run(prompt.tokens, config.max_new_tokens), peak_rss_mb=peak_rss_mb())
        keep(turn, answer)
        answers[turn] = answer
    cells: Cells = {}
    name_order = [name for _, name in by_name]
    for turn in sorted(turns, key=lambda turn: (turn.round, turn.place, name_order.index(turn.decoder))):
        own = cells.setdefault((turn.temperature, turn.suite), {}).setdefault(turn.decoder, [])
        if turn.round == 0:
            own.append([])
        own[turn.place].append(answers[turn])
    return cells


def differences(
    records: Records, prompts: Sequence[BenchPrompt], target: Target, sampling: SamplingParams
) -> list[Difference]:
    """The first difference of each decoder from the reference decoder, or between its own rounds, per prompt.

    The reference is vanilla if it ran, else the first engine decoder. Engine decoders share one target, so a difference
    between them is classified as tie or bug. Decoders with an independent text are not compared.
    """
    records = {name: own for name, own in records.items() if not independent_text(name, sampling.temperature)}
    if not records:
        return []
    reference = "vanilla" if "vanilla" in records else next((name for name in records if name != "hf"), "hf")
    found = []
    for place, prompt in enumerate(prompts):
        expected = records[reference][place][0].tokens
        for name, own in records.items():
            other = next((run.tokens for run in own[place] if run.tokens != expected), None)
            if other is not None:
                same_target = "hf" not in (name, reference)
                diagnosis = diagnose(target, prompt.tokens, expected, other, sampling) if same_target else None
                kind, gap = ("precision", None) if diagnosis is None else (diagnosis.kind, diagnosis.gap)
                found.append(Difference(prompt.id, name, reference, common_length(expected, other), kind, gap))
    return found


def reset_peak_rss() -> None:
    """Reset the kernel's peak of resident memory (Linux only; elsewhere the peak is that of the whole process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_mb() -> float:
    """Peak resident memory of this process since the last reset, in MB; 0 if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024 / 1e6
