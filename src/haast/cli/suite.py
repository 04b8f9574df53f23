"""`haast bench --suite`. Owns its files, progress and end; the work is `haast.bench`'s."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from haast.cli.settings import SuiteOptions
from haast.files import write_json, write_text

if TYPE_CHECKING:
    from haast.bench.decoders import Decoder
    from haast.bench.runner import Answer, BenchConfig, BenchPrompt, Suite
    from haast.core import SamplingParams
    from haast.progress import Progress
    from haast.prompts import Prompt
    from haast.target.target import Target
    from haast.tuning.calibration import Calibration

JOURNAL = "journal.jsonl"
_HF_SKIPPED = "hf draws its own random numbers, so its text cannot be compared there"


@dataclass(frozen=True)
class Plan:
    """What a suite run was asked for, checked."""

    files: dict[Path, list[Prompt]]
    temperatures: tuple[float, ...]
    out: Path
    resume: bool

    @property
    def prompts(self) -> list[Prompt]:
        """Of all suites, one after the other."""
        return [prompt for own in self.files.values() for prompt in own]

    def decoders(self, names: Sequence[str]) -> dict[float, list[str]]:
        """Who runs at each temperature. Raises ValueError where nobody does."""
        found = {t: [name for name in names if name != "hf" or t == 0] for t in self.temperatures}
        for temperature, own in found.items():
            if not own:
                raise ValueError(
                    f"no decoder is left at temperature {temperature:g} ({_HF_SKIPPED}): give more decoders"
                )
        return found


@dataclass(frozen=True)
class Whereabouts:
    """What a document says of the run besides the machine."""

    model: str
    settings: dict[str, Any]
    drafting: dict[str, dict[str, Any]]  # decoder -> what it drafts with, where it has a head or model of its own
    calibration: Calibration | None


def refuse_suite_options(options: SuiteOptions) -> None:
    """Raises ValueError where an option of --suite stands without it."""
    for field in fields(options):
        if getattr(options, field.name) != field.default:
            raise ValueError(f"--{field.name} belongs to --suite DIR: give that, or leave it out")


def plan_suite(options: SuiteOptions, limit: int | None, params: SamplingParams) -> Plan:
    """Read and check all that needs no model.

    Raises:
        ValueError: no suites, an impossible temperature, no --out, or a journal there that was not asked for.
    """
    from haast.bench.journal import check_absent
    from haast.prompts import read_suites
    from haast.training.checkpoints import write_probe

    assert options.suite is not None, "asked for"
    if params.temperature != 0:
        given = f"{params.temperature:g}"
        raise ValueError(f"--temperature {given} is not for --suite: give --temperatures {given}")
    only = None if options.only is None else [name.strip() for name in options.only.split(",") if name.strip()]
    files = read_suites(options.suite, only, limit)
    temperatures = _temperatures("0,1" if options.temperatures is None else options.temperatures)
    for temperature in temperatures:
        replace(params, temperature=temperature)  # its own check
    if options.out is None:
        raise ValueError("--suite needs --out FOLDER, where journal and results go")
    if options.out.resolve() == options.suite.resolve():
        raise ValueError(f"--out {options.out} is the suites' own folder: its journal would be taken for a suite")
    check_absent(options.out / JOURNAL, options.resume)
    write_probe(options.out)
    return Plan(files, temperatures, options.out, options.resume)


def _temperatures(words: str) -> tuple[float, ...]:
    try:
        found = [float(word) for word in words.split(",")]
    except ValueError as error:
        raise ValueError(f"temperatures={words!r} is no list of numbers: give 0,1 say") from error
    if len(set(found)) < len(found):
        raise ValueError(f"temperatures={words!r} names one twice: name each once")
    return tuple(sorted(found))


def bench_suite(
    plan: Plan,
    names: Sequence[str],
    encoded: Sequence[BenchPrompt],
    arms_at: Callable[[float, Sequence[str]], list[Decoder]],
    config: BenchConfig,
    target: Target,
    where: Whereabouts,
) -> None:
    """Run, or go on with, a suite; write its documents; exit with 1 where a text differs that must not.

    Args:
        plan: what was asked for.
        names: the decoders.
        encoded: `plan.prompts`, encoded.
        arms_at: decoders at a temperature.
        config: of every answer.
        target: the model.
        where: for the document.
    """
    from haast.bench.document import build_document
    from haast.bench.journal import Journal
    from haast.bench.runner import gather, run_suite, turns_of
    from haast.progress import Progress

    suites = _suites(plan, encoded)
    by_temperature = plan.decoders(names)
    arms = {temperature: arms_at(temperature, own) for temperature, own in by_temperature.items()}
    turns = turns_of(arms, suites, config)
    path = plan.out / JOURNAL
    header = _header(plan, suites, arms, config, target, where)
    if "hf" in names:
        skipped = [t for t, own in by_temperature.items() if "hf" not in own]
        header["environment"]["skipped"] = [{"decoder": "hf", "temperature": t, "why": _HF_SKIPPED} for t in skipped]
    with Journal(path, header, plan.resume) as journal:
        try:
            with Progress("bench", "answers", len(turns), len(journal.answers), rate="tokens") as progress:
                told = telling(progress)

                def keep(answer: Answer) -> None:
                    journal.add(answer)
                    told(answer)

                run_suite(arms, suites, config, journal.answers, keep)
        except KeyboardInterrupt:
            done = f"{len(journal.answers)} of {len(turns)} answers are in {path}"
            typer.echo(f"\nstopped; {done}, the same command with --resume goes on from there", err=True)
            raise
        cells = gather(journal.answers, turns, names)
        document = build_document(journal.header, cells, suites, target, config.sampling)
    _end(document, plan.out)


def _suites(plan: Plan, encoded: Sequence[BenchPrompt]) -> dict[str, Suite]:
    from haast.bench.runner import Suite

    suites, begin = dict[str, Suite](), 0
    for path, prompts in plan.files.items():
        own = tuple(encoded[begin : begin + len(prompts)])
        suites[path.stem] = Suite(path.stem, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), own)
        begin += len(prompts)
    return suites


def _header(
    plan: Plan,
    suites: Mapping[str, Suite],
    arms: Mapping[float, Sequence[Decoder]],
    config: BenchConfig,
    target: Target,
    where: Whereabouts,
) -> dict[str, Any]:
    """What the journal fixes, and the document repeats."""
    from haast.bench.decoders import rule_of
    from haast.bench.report import environment, sources_sha256, weights_sha256

    settings = {**where.settings, "sampling": {**where.settings["sampling"]}}
    del settings["sampling"]["temperature"]  # each cell has its own
    own = environment(target, where.model, None, sum(len(s.prompts) for s in suites.values()), settings)
    del own["prompts_file"], own["prompts_sha256"]
    own["sources_sha256"], own["weights_sha256"] = sources_sha256(), weights_sha256(target)
    found = {arm.name: arm for each in arms.values() for arm in each}
    hashes = {name: _tokens_sha256(suite) for name, suite in suites.items()}
    calibration = where.calibration
    return {
        "environment": own,
        "suites": {n: {"file": s.file, "sha256": s.sha256, "tokens_sha256": hashes[n]} for n, s in suites.items()},
        "decoders": {
            name: {"lossy": arm.lossy, "rule": rule_of(name), "settings": _settings(arm, where)}
            for name, arm in found.items()
        },
        "temperatures": list(plan.temperatures),
        "rounds": config.rounds,
        "calibration": None if calibration is None else calibration.document(),
    }


def _tokens_sha256(suite: Suite) -> str:
    """Of the prompts as the model sees them: other tokens of the same file are another run."""
    tokens = [(prompt.id, prompt.tokens) for prompt in suite.prompts]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _settings(arm: Decoder, where: Whereabouts) -> dict[str, Any]:
    from haast.bench.decoders import EngineDecoder

    if not isinstance(arm, EngineDecoder):
        return {"dtype": "float32"}
    return {"nodes": arm.nodes, **where.drafting.get(arm.name, {})}


def telling(progress: Progress) -> Callable[[Answer], None]:
    """Tells the progress of every answer, and EAGLE's tau so far."""
    decoded = forwards = 0

    def tell(answer: Answer) -> None:
        nonlocal decoded, forwards
        stats = answer.run.stats
        if answer.turn.decoder == "eagle" and stats is not None:
            decoded, forwards = decoded + stats.decoded_tokens, forwards + stats.target_forwards
        words = f"eagle's tau {decoded / forwards:.2f}" if forwards else ""
        progress.step(counted=len(answer.run.tokens), words=words)

    return tell


def _end(document: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from haast.bench.aggregate import bugs
    from haast.bench.report import show_table
    from haast.bench.tables import suite_markdown

    write_json(document, str(out / "suite.json"))
    write_text(out / "suite.md", suite_markdown(document))
    console = Console(width=None if sys.stdout.isatty() else 120)
    for temperature in document["temperatures"]:
        rows = [row for row in document["rows"] if (row["suite"], row["temperature"]) == ("all", temperature)]
        found = [
            {**each, "prompt": f"{each['suite']} {each['prompt']}"}
            for each in document["differences"]
            if each["temperature"] == temperature
        ]
        console.print(f"temperature {temperature:g}, {', '.join(document['suites'])}", highlight=False)
        show_table({"environment": document["environment"], "rows": rows, "differences": found}, console)
    typer.echo(f"written: {out / 'suite.json'}, {out / 'suite.md'}")
    if bugs(document):
        words = f"{bugs(document)} outputs differ, and not by a floating-point tie: run `haast verify`"
        print(f"haast: {words}", file=sys.stderr)
        raise typer.Exit(1)
