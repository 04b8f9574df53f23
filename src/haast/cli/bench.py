"""`haast bench`: decoders over one file of prompts, or over a folder of them at many temperatures.

Owns its flags, progress, files and end; the work is `haast.bench`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from haast.cli.loading import as_eagle, drawn_by, load_all, load_medusa, read_prompt_file
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

_OF_SUITES = ("only", "temperatures", "out", "resume")


@dataclass(frozen=True)
class BenchOptions:
    """Who answers what, how often, and where results go."""

    prompts: PromptsOption = None
    limit: SpreadLimitOption = None
    suite: Annotated[Path | None, Option(metavar="DIR", help="Bench all prompt files (*.jsonl) of a folder.")] = None
    only: Annotated[str | None, Option(metavar="A,B", help="With --suite: these files, without .jsonl.")] = None
    temperatures: Annotated[str | None, Option(metavar="T,T", help="With --suite; 0,1 if this is absent.")] = None
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="With --suite: where journal.jsonl, suite.json, suite.md go.")
    ] = None
    resume: Annotated[bool, Option("--resume", help="With --suite: go on with the journal in --out.")] = False
    decoders: Annotated[
        str,
        Option(
            metavar="A,B,C",
            help="Of vanilla, eagle, eagle+suffix, medusa, medusa-typical (LOSSY), small-model, small-model-rejection, "
            "small-model-block, lookahead, lookup, suffix, hf.",
        ),
    ] = "vanilla,eagle"
    medusa_head: Annotated[Path | None, Option(metavar="DIR", help="Of `haast train --head medusa`.")] = None
    medusa_nodes: Annotated[int, Option(metavar="N", help="Nodes of their tree, the root included.")] = 6
    small_model: Annotated[str | None, Option(metavar="NAME", help="The smaller model that drafts.")] = None
    max_new_tokens: Annotated[int, Option(metavar="N", help="New tokens per prompt.")] = 128
    rounds: Annotated[int | None, Option(metavar="R", help="Timed rounds (1, with --suite 2); medians count.")] = None
    warmup: Annotated[int, Option(metavar="N", help="Untimed tokens per decoder before.")] = 16
    v_curve: Annotated[bool, Option("--v-curve", help="Also measure forwards over 1 to 60 nodes.")] = False
    prefill_chunk: ChunkOption = PREFILL_CHUNK
    raw: Annotated[bool, Option("--raw", help="Don't put prompts through the chat template.")] = False
    json_out: JsonOption = None

    def plan(self, params: SamplingParams) -> Plan:
        """Read and check all that needs no model.

        Raises:
            ValueError: no prompts, or both kinds; options of the other kind; an impossible temperature; with --suite no
                --out, or a journal there that was not asked for.
        """
        if (self.prompts is None) == (self.suite is None):
            raise ValueError(
                "bench needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`), or --suite DIR, not "
                "both"
            )
        if self.suite is not None:
            return self._suites(self.suite, params)
        given = next((name for name in _OF_SUITES if getattr(self, name) not in (None, False)), None)
        if given is not None:
            raise ValueError(f"--{given} belongs to --suite DIR: give that, or leave it out")
        assert self.prompts is not None, "one of both is given"
        return Plan({self.prompts: read_prompt_file(self.prompts, self.limit)}, (params.temperature,), None)

    def _suites(self, folder: Path, params: SamplingParams) -> Plan:
        from haast.bench.journal import JOURNAL, check_absent
        from haast.prompts import read_suites
        from haast.training.checkpoints import write_probe

        if self.v_curve or self.json_out is not None:
            raise ValueError("--v-curve and --json belong to --prompts: with --suite, results go to the folder --out")
        if params.temperature != 0:
            given = f"{params.temperature:g}"
            raise ValueError(f"--temperature {given} is not for --suite: give --temperatures {given}")
        only = None if self.only is None else [name.strip() for name in self.only.split(",") if name.strip()]
        files = read_suites(folder, only, self.limit)
        temperatures = _temperatures("0,1" if self.temperatures is None else self.temperatures)
        for temperature in temperatures:
            replace(params, temperature=temperature)  # its own check
        if self.out is None:
            raise ValueError("--suite needs --out FOLDER, where journal and results go")
        if self.out.resolve() == folder.resolve():
            raise ValueError(f"--out {self.out} is the suites' own folder: its journal would be taken for a suite")
        check_absent(self.out / JOURNAL, self.resume)
        write_probe(self.out)
        return Plan(files, temperatures, self.out)


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    files: dict[Path, list[Prompt]]
    temperatures: tuple[float, ...]
    out: Path | None  # of a suite's results

    @property
    def prompts(self) -> list[Prompt]:
        """Of all files, one after the other."""
        return [prompt for own in self.files.values() for prompt in own]

    def decoders(self, names: Sequence[str]) -> dict[float, list[str]]:
        """Who runs at each temperature. Raises ValueError where nobody does."""
        from haast.bench.decoders import HF_SKIPPED

        found = {t: [name for name in names if name != "hf" or t == 0] for t in self.temperatures}
        for temperature, own in found.items():
            if not own:
                raise ValueError(
                    f"no decoder is left at temperature {temperature:g} ({HF_SKIPPED}): give more decoders"
                )
        return found


def bench(loading: Loading, drafting: Drafting, sampling: Sampling, options: BenchOptions) -> None:
    """Compare decoders, interleaved per prompt in one run. First turns only; prefill is not counted.

    hf is stock `model.generate` in float32 with its own attention. With --suite, every prompt file of a folder at
    every temperature, in a random but seeded order; a run that was stopped goes on with --resume.

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
    given = (options.small_model is not None, options.medusa_head is not None)
    names = check_decoders(options.decoders, drafting.head != "none", params.temperature, *given)
    if "hf" in names and params.repetition_penalty != 1.0:
        raise ValueError("decoder 'hf' is greedy without penalties here: leave out --repetition-penalty, or hf")
    plan.decoders(names)  # its own check
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
    settings = {**drawn_by(eagle), **asdict(config), "raw": options.raw}
    settings["sampling"].pop("processors")
    run = Run(plan, suites_of(plan, encoded), names, config, target, loading, parts)
    if plan.out is None:
        bench_file(run, options, settings)
    else:
        bench_suites(run, plan.out, options, drafting, settings)


def _temperatures(words: str) -> tuple[float, ...]:
    try:
        found = [float(word) for word in words.split(",")]
    except ValueError as error:
        raise ValueError(f"temperatures={words!r} is no list of numbers: give 0,1 say") from error
    if len(set(found)) < len(found):
        raise ValueError(f"temperatures={words!r} names one twice: name each once")
    return tuple(sorted(found))
