"""Many prompts of many suites, answered by every decoder at every temperature. Owns the order, and nothing about files.

The order is a pure function of the seed, so that a run that was interrupted goes on in it. Within a round temperatures,
suites and prompts are mixed, and each prompt meets the decoders in an order of its own: a machine that slows down for
some minutes then slows all of them alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from haast.bench.decoders import Decoder, DecoderRun
from haast.bench.runner import BenchConfig, BenchPrompt, Record, Records, peak_rss_mb, reset_peak_rss


@dataclass(frozen=True)
class Suite:
    """A named file of prompts, encoded."""

    name: str
    file: str  # its name without a folder
    sha256: str
    prompts: tuple[BenchPrompt, ...]


@dataclass(frozen=True)
class Turn:
    """One answer to give: who answers what, when."""

    round: int
    temperature: float
    suite: str
    place: int  # of the prompt in its suite
    decoder: str


@dataclass(frozen=True)
class Answer:
    """One answer given."""

    turn: Turn
    run: DecoderRun
    peak_rss_mb: float


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
    done: Container[Turn],
    keep: Callable[[Answer], None],
) -> None:
    """Give every answer that is not done yet.

    Args:
        arms: temperature -> decoders.
        suites: by name.
        config: rounds, tokens, warm-up, and the seed of the order; the temperature is the arms' own.
        done: turns of an earlier run.
        keep: is handed each answer at once.
    """
    by_name = {(temperature, arm.name): arm for temperature, own in arms.items() for arm in own}
    left = [turn for turn in turns_of(arms, suites, config) if turn not in done]
    if left and config.warmup_tokens:
        first = next(iter(suites.values())).prompts[0]
        for arm in by_name.values():
            arm.run(first.tokens, config.warmup_tokens)
    for turn in left:
        prompt = suites[turn.suite].prompts[turn.place]
        reset_peak_rss()
        run = by_name[turn.temperature, turn.decoder].run(prompt.tokens, config.max_new_tokens)
        keep(Answer(turn, run, peak_rss_mb()))


def turns_of(arms: Mapping[float, Sequence[Decoder]], suites: Mapping[str, Suite], config: BenchConfig) -> list[Turn]:
    """The order of a run."""
    sizes = {name: len(suite.prompts) for name, suite in suites.items()}
    decoders = {temperature: [arm.name for arm in own] for temperature, own in arms.items()}
    return order(config.sampling.seed, config.rounds, sizes, decoders)


def gather(answers: Mapping[Turn, Answer], turns: Sequence[Turn], decoders: Sequence[str]) -> Cells:
    """Records of a finished run: suites and prompts in the files' order, decoders in the order given.

    Args:
        answers: one for every turn.
        turns: all of them.
        decoders: all of them; one that did not run at a temperature is left out there.
    """
    cells: Cells = {}
    rank = {name: number for number, name in enumerate(decoders)}
    for turn in sorted(turns, key=lambda turn: (turn.round, turn.place, rank[turn.decoder])):
        own = cells.setdefault((turn.temperature, turn.suite), {}).setdefault(turn.decoder, [])
        if turn.round == 0:
            own.append(Record())
        answer, record = answers[turn], own[turn.place]
        record.runs.append(answer.run)
        record.peak_rss_mb = max(record.peak_rss_mb, answer.peak_rss_mb)
    return cells
