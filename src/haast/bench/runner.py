"""Runs decoders over prompts, of one file or of many suites at many temperatures, and gathers what they did.

Owns the order, warm-up, rounds and the comparison of outputs. The order is a pure function of the seed, so that a run
that was interrupted goes on in it. Within a round temperatures, suites and prompts are mixed, and each prompt meets the
decoders in an order of its own: a machine that slows down for some minutes then slows all of them alike. Knows no
terminal and no files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from haast.bench.decoders import Decoder, DecoderRun, own_text
from haast.checking.divergence import diagnose
from haast.core import SamplingParams
from haast.engine.engine import PREFILL_CHUNK
from haast.errors import check_at_least
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
            check_at_least(name, getattr(self, name), least)


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt, encoded."""

    id: str
    category: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Two decoders said different things to one prompt."""

    prompt: str
    decoder: str
    reference: str
    index: int
    kind: str  # tie, bug, or precision (another arithmetic, hf's: reported, not judged)
    gap: float | None  # see `Divergence`


@dataclass(frozen=True)
class Suite:
    """A file of prompts, encoded."""

    file: str  # its name without a folder
    sha256: str
    prompts: tuple[BenchPrompt, ...]

    @property
    def tokens_sha256(self) -> str:
        """Of the prompts as the model sees them: other tokens of the same file are another run."""
        tokens = [(prompt.id, prompt.tokens) for prompt in self.prompts]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """One answer to give: who answers what, when."""

    round: int
    temperature: float
    suite: str
    place: int  # of the prompt in its suite
    decoder: str


Record = list[DecoderRun]  # what one decoder did with one prompt, round by round
Records = dict[str, list[Record]]  # decoder -> one record per prompt
Cells = dict[tuple[float, str], Records]  # (temperature, suite) -> what each decoder did


def order(seed: int, rounds: int, sizes: Mapping[str, int], decoders: Mapping[float, Sequence[str]]) -> list[Turn]:
    """All turns, round by round; the same for the same names, in whichever order they are given.

    Args:
        seed: decides the order.
        rounds: how often each prompt is answered.
        sizes: suite -> number of prompts.
        decoders: temperature -> names.
    """
    generator, turns = random.Random(seed), list[Turn]()
    for number in range(rounds):
        places = [(t, suite, i) for t in sorted(decoders) for suite in sorted(sizes) for i in range(sizes[suite])]
        generator.shuffle(places)
        for temperature, suite, place in places:
            names = sorted(decoders[temperature])
            generator.shuffle(names)
            turns += [Turn(number, temperature, suite, place, name) for name in names]
    return turns


def run_suite(
    arms: Mapping[float, Sequence[Decoder]],
    suites: Mapping[str, Suite],
    config: BenchConfig,
    answers: dict[Turn, DecoderRun],
    keep: Callable[[Turn, DecoderRun], None] = lambda turn, run: None,
) -> Cells:
    """Give every answer that is not there yet.

    Args:
        arms: temperature -> decoders.
        suites: by name.
        config: rounds, tokens, warm-up, and the seed of the order; the temperature is the arms' own.
        answers: of an earlier run; the new ones join them.
        keep: is handed each new answer at once.

    Returns:
        All answers: suites and prompts in the files' order, decoders in the order given; one that did not run at a
        temperature is left out there.
    """
    by_name = {(temperature, arm.name): arm for temperature, own in arms.items() for arm in own}
    sizes = {name: len(suite.prompts) for name, suite in suites.items()}
    decoders = {temperature: [arm.name for arm in own] for temperature, own in arms.items()}
    turns = order(config.sampling.seed, config.rounds, sizes, decoders)
    left = [turn for turn in turns if turn not in answers]
    if left and config.warmup_tokens:
        first = next(iter(suites.values())).prompts[0]
        for arm in by_name.values():
            arm.run(first.tokens, config.warmup_tokens)
    for turn in left:
        reset_peak_rss()
        arm, prompt = by_name[turn.temperature, turn.decoder], suites[turn.suite].prompts[turn.place]
        answer = replace(arm.run(prompt.tokens, config.max_new_tokens), peak_rss_mb=peak_rss_mb())
        keep(turn, answer)
        answers[turn] = answer
    cells: Cells = {}
    given = [name for _, name in by_name]
    for turn in sorted(turns, key=lambda turn: (turn.round, turn.place, given.index(turn.decoder))):
        own = cells.setdefault((turn.temperature, turn.suite), {}).setdefault(turn.decoder, [])
        if turn.round == 0:
            own.append([])
        own[turn.place].append(answers[turn])
    return cells


def differences(
    records: Records, prompts: Sequence[BenchPrompt], target: Target, sampling: SamplingParams
) -> list[Difference]:
    """Where decoders' outputs part from the first engine decoder's (vanilla where it ran), and between rounds.

    Engine decoders share one target, so a difference between them is judged: tie or bug. Those whose
    acceptance rule uses randomness of its own are not compared.
    """
    records = {name: own for name, own in records.items() if not own_text(name, sampling.temperature)}
    if not records:
        return []
    reference = "vanilla" if "vanilla" in records else next((name for name in records if name != "hf"), "hf")
    found = []
    for place, prompt in enumerate(prompts):
        wanted = records[reference][place][0].tokens
        for name, own in records.items():
            other = next((run.tokens for run in own[place] if run.tokens != wanted), None)
            if other is not None:
                alike = "hf" not in (name, reference)
                judged = diagnose(target, prompt.tokens, wanted, other, sampling) if alike else None
                kind, gap = ("precision", None) if judged is None else (judged.kind, judged.gap)
                found.append(Difference(prompt.id, name, reference, common_length(wanted, other), kind, gap))
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
