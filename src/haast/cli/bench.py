"""`haast bench`: compares decoders on one prompt file, or on a folder of them at several temperatures.

Owns the flags and the checks before loading; `cli.bench_run` runs the plan, and `haast.bench` does the measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from haast.cli.loading import as_eagle, draft_settings, load_all, load_medusa, read_prompt_file
from haast.cli.settings import (
    PREFILL_CHUNK,
    ChunkOption,
    Drafting,
    JsonOption,
    Loading,
    PromptsOption,
    Sampling,
    SpreadLimitOption,
)
from haast.files import check_writable

if TYPE_CHECKING:
    from haast.core import SamplingParams
    from haast.prompts import Prompt

_SUITE_OPTIONS = ("only", "temperatures", "out", "resume")


@dataclass(frozen=True)
class BenchOptions:
    """Prompts, decoders, rounds and result files of a benchmark."""

    prompts: PromptsOption = None
    limit: SpreadLimitOption = None
    suite: Annotated[Path | None, Option(metavar="DIR", help="Run all prompt files (*.jsonl) of a folder.")] = None
    only: Annotated[str | None, Option(metavar="A,B", help="With --suite: only these files (without .jsonl).")] = None
    temperatures: Annotated[str | None, Option(metavar="T,T", help="With --suite: temperatures; 0,1 if absent.")] = None
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="With --suite: folder for journal.jsonl, suite.json, suite.md.")
    ] = None
    resume: Annotated[bool, Option("--resume", help="With --suite: continue the journal in --out.")] = False
    decoders: Annotated[
        str,
        Option(
            metavar="A,B,C",
            help="Any of vanilla, eagle, eagle+suffix, block, block+suffix, medusa, medusa-typical (LOSSY), "
            "small-model, small-model-rejection, small-model-block, lookahead, lookup, suffix, hf.",
        ),
    ] = "vanilla,eagle"
    medusa_head: Annotated[Path | None, Option(metavar="DIR", help="Folder of Medusa heads.")] = None
    medusa_nodes: Annotated[int, Option(metavar="N", help="Nodes per Medusa tree, root included.")] = 6
    small_model: Annotated[str | None, Option(metavar="NAME", help="Draft model for the small-model decoders.")] = None
    max_new_tokens: Annotated[int, Option(metavar="N", help="New tokens per prompt.")] = 128
    rounds: Annotated[int | None, Option(metavar="R", help="Timed rounds; 1 if absent, 2 with --suite.")] = None
    warmup: Annotated[int, Option(metavar="N", help="Untimed warm-up tokens per decoder.")] = 16
    v_curve: Annotated[bool, Option("--v-curve", help="Also time target forwards of 1 to 60 nodes.")] = False
    prefill_chunk: ChunkOption = PREFILL_CHUNK
    raw: Annotated[bool, Option("--raw", help="Don't apply the chat template.")] = False
    json_out: JsonOption = None

    def plan(self, params: SamplingParams) -> Plan:
        """Read the prompts and check all options that need no model.

        Raises:
            ValueError: neither or both of --prompts and --suite; an option that belongs to the other; an impossible
                temperature; --suite without --out, or with a journal there but without --resume.
        """
        if (self.prompts is None) == (self.suite is None):
            raise ValueError(
                "bench needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`), or --suite DIR, not "
                "both"
            )
        if self.suite is not None:
            return self._suites(self.suite, params)
        misplaced = next((name for name in _SUITE_OPTIONS if getattr(self, name) not in (None, False)), None)
        if misplaced is not None:
            raise ValueError(f"--{misplaced} needs --suite DIR: give --suite, or leave it out")
        assert self.prompts is not None, "checked above"
        return Plan({self.prompts: read_prompt_file(self.prompts, self.limit)}, (params.temperature,), None)

    def _suites(self, folder: Path, params: SamplingParams) -> Plan:
        from haast.bench.journal import JOURNAL, check_absent
        from haast.prompts import read_suites
        from haast.training.checkpoints import write_probe

        if self.v_curve or self.json_out is not None:
            raise ValueError("--v-curve and --json need --prompts: with --suite, results go to the folder --out")
        if params.temperature != 0:
            value = f"{params.temperature:g}"
            raise ValueError(f"--temperature {value} does not work with --suite: give --temperatures {value}")
        only = None if self.only is None else [name.strip() for name in self.only.split(",") if name.strip()]
        files = read_suites(folder, only, self.limit)
        temperatures = _temperatures("0,1" if self.temperatures is None else self.temperatures)
        for temperature in temperatures:
            replace(params, temperature=temperature)  # the constructor checks it
        if self.out is None:
            raise ValueError("--suite needs --out FOLDER for the journal and results")
        if self.out.resolve() == folder.resolve():
            raise ValueError(
                f"--out {self.out} is the folder of --suite, whose *.jsonl files are prompts: give another folder"
            )
        check_absent(self.out / JOURNAL, self.resume)
        write_probe(self.out)
        return Plan(files, temperatures, self.out)


@dataclass(frozen=True)
class Plan:
    """The checked options of a benchmark."""

    files: dict[Path, list[Prompt]]
    temperatures: tuple[float, ...]
    out: Path | None  # folder for a suite's results

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all files, in order."""
        return [prompt for prompts in self.files.values() for prompt in prompts]

    def decoders(self, names: Sequence[str]) -> dict[float, list[str]]:
        """The decoders that run at each temperature. Raises ValueError if there are none at one of them."""
        from haast.bench.decoders import HF_SKIPPED

        by_temperature = {t: [name for name in names if name != "hf" or t == 0] for t in self.temperatures}
        for temperature, left in by_temperature.items():
            if not left:
                raise ValueError(
                    f"no decoder is left at temperature {temperature:g} ({HF_SKIPPED}): give more decoders"
                )
        return by_temperature


def bench(loading: Loading, drafting: Drafting, sampling: Sampling, options: BenchOptions) -> None:
    """Compare the speed and output of decoders, interleaved per prompt. First turns only; prefill is not timed.

    hf is stock `model.generate` in float32 with its own attention. With --suite, runs every prompt file of a folder at
    every temperature, in a seeded random order; --resume continues an interrupted run.

    \b
    haast bench --prompts mt_bench.jsonl --limit 20 --decoders vanilla,eagle,hf --json bench.json
    haast bench --prompts mt_bench.jsonl --nodes 24 --rounds 3 --v-curve --json -
    haast bench --suite prompts/ --limit 20 --decoders vanilla,eagle,lookup,hf --out results/suite
    """
    params = sampling.check()
    plan = options.plan(params)
    check_writable(options.json_out)
    drafting.check_shape(loading.device)

    from haast.bench.decoders import HEADED, Parts, check_decoders
    from haast.bench.runner import BenchConfig
    from haast.cli.bench_run import Run, bench_file, bench_suites, suites_of

    rounds = options.rounds if options.rounds is not None else 1 if plan.out is None else 2
    config = BenchConfig(options.max_new_tokens, rounds, options.warmup, params, options.prefill_chunk)
    available = (options.small_model is not None, options.medusa_head is not None)
    names = check_decoders(options.decoders, drafting.head != "none", params.temperature, *available)
    if "hf" in names and params.repetition_penalty != 1.0:
        raise ValueError("decoder 'hf' supports no penalties here: leave out --repetition-penalty, or hf")
    plan.decoders(names)  # raises if none is left at a temperature
    loading.check()
    smaller = None if options.small_model is None else replace(loading, model=options.small_model)
    if smaller is not None:
        smaller.check()
    shape = drafting.check(loading.model, loading.device) if set(names) & set(HEADED) else None
    target, loaded, encoded = load_all(loading, drafting, shape, plan.prompts, options.raw)
    eagle, folder = as_eagle(loaded), options.medusa_head
    medusa = None if folder is None else load_medusa(folder, target, loading.model, options.medusa_nodes)
    small = None if smaller is None else smaller.load()
    parts = Parts(eagle, medusa, small, drafting.shaped, drafting.calibration)
    settings = {**draft_settings(eagle), **asdict(config), "raw": options.raw}
    settings["sampling"].pop("processors")
    run = Run(plan, suites_of(plan, encoded), names, config, target, loading, parts)
    if plan.out is None:
        bench_file(run, options, settings)
    else:
        bench_suites(run, plan.out, options, drafting, settings)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"temperatures={text!r} is not a list of numbers: give 0,1 for example") from error
    if len(set(values)) < len(values):
        raise ValueError(f"temperatures={text!r} has a duplicate: list each temperature once")
    return tuple(sorted(values))
