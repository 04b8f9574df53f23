"""`haast bench`. Owns its flags, progress and end; the work is `haast.bench`'s."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import human_output
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
    SuiteOptions,
)
from haast.cli.suite import Plan, Whereabouts, bench_suite, plan_suite, refuse_suite_options, telling
from haast.files import check_writable, write_json

if TYPE_CHECKING:
    from haast.bench.decoders import Decoder
    from haast.bench.runner import BenchConfig, BenchPrompt
    from haast.core import SamplingParams
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.medusa import MedusaDrafter
    from haast.target.target import Target


def bench(
    loading: Loading,
    drafting: Drafting,
    sampling: Sampling,
    suite: SuiteOptions,
    prompts: PromptsOption = None,
    limit: SpreadLimitOption = None,
    decoders: Annotated[
        str,
        typer.Option(
            metavar="A,B,C",
            help="Of vanilla, eagle, eagle+suffix, medusa, medusa-typical (LOSSY), small-model, small-model-rejection, "
            "small-model-block, lookahead, lookup, suffix, hf.",
        ),
    ] = "vanilla,eagle",
    medusa_head: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Medusa heads (`haast train --head medusa`).")
    ] = None,
    medusa_nodes: Annotated[int, typer.Option(metavar="N", help="Nodes of their tree, the root included.")] = 6,
    small_model: Annotated[str | None, typer.Option(metavar="NAME", help="The smaller model that drafts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 128,
    rounds: Annotated[
        int | None, typer.Option(metavar="R", help="Timed rounds, by default 1, with --suite 2; medians count.")
    ] = None,
    warmup: Annotated[int, typer.Option(metavar="N", help="Untimed tokens per decoder before.")] = 16,
    v_curve: Annotated[bool, typer.Option("--v-curve", help="Also measure forwards over 1 to 60 nodes.")] = False,
    prefill_chunk: ChunkOption = PREFILL_CHUNK,
    raw: Annotated[bool, typer.Option("--raw", help="Don't put prompts through the chat template.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Compare decoders, interleaved per prompt in one run. First turns only; prefill is not counted.

    hf is stock `model.generate` in float32 with its own attention. With --suite, every prompt file of a folder at
    every temperature, in a random but seeded order; a run that was stopped goes on with --resume.

    \b
    haast bench --prompts mt_bench.jsonl --limit 20 --decoders vanilla,eagle,hf --json bench.json
    haast bench --prompts mt_bench.jsonl --nodes 24 --rounds 3 --v-curve --json -
    haast bench --suite prompts/ --limit 20 --decoders vanilla,eagle,lookup,hf --out results/suite
    """
    params = sampling.check()
    plan = _plan(prompts, suite, limit, params, extras=v_curve or json_out is not None)
    chosen = read_prompt_file(prompts, limit) if plan is None else plan.prompts
    check_writable(json_out)
    drafting.check_shape(loading.device)

    from haast.bench.decoders import HEADED, check_decoders
    from haast.bench.runner import BenchConfig

    usual = 1 if plan is None else 2
    config = BenchConfig(max_new_tokens, usual if rounds is None else rounds, warmup, params, prefill_chunk)
    headed, given = drafting.head != "none", (small_model is not None, medusa_head is not None)
    names = check_decoders(decoders, headed, params.temperature, *given)
    if "hf" in names and (params.repetition_penalty != 1.0):
        raise ValueError("decoder 'hf' is greedy without penalties here: leave out --repetition-penalty, or hf")
    if plan is not None:
        plan.decoders(names)  # its own check
    loading.check()
    if small_model is not None:
        replace(loading, model=small_model).check()
    shape = drafting.check(loading.model, loading.device) if set(names) & set(HEADED) else None
    target, loaded, encoded = load_all(loading, drafting, shape, chosen, raw)
    drafter = as_eagle(loaded)
    medusa = None if medusa_head is None else load_medusa(medusa_head, target, loading.model, medusa_nodes)
    small = None if small_model is None else replace(loading, model=small_model).load()

    def arms_at(temperature: float, own: Sequence[str]) -> list[Decoder]:
        there = replace(config, sampling=replace(params, temperature=temperature))
        return _arms(own, target, drafter, loading, drafting, there, small, medusa)

    settings = {**drawn_by(drafter), **_plain(config), "raw": raw}
    if plan is not None:
        known = _drafting(loading, drafting, drafter, medusa, medusa_head, small_model, small)
        where = Whereabouts(loading.model, settings, known, drafting.calibrated(target, drafter))
        bench_suite(plan, names, encoded, arms_at, config, target, where)
        return
    assert prompts is not None, "checked above"
    arms = arms_at(params.temperature, names)
    document = _bench(arms, encoded, config, target, loading.model, prompts, settings)
    if v_curve:
        from haast.bench.forward_latency import measure_v_curve
        from haast.progress import Progress

        with Progress("v curve"):
            document["v_curve"] = measure_v_curve(target, drafter)
    _bench_end(document, json_out)


def _plan(
    prompts: Path | None, suite: SuiteOptions, limit: int | None, params: SamplingParams, extras: bool
) -> Plan | None:
    """What --suite asks for; None for --prompts. Raises ValueError for both, neither, or options of the other."""
    if (prompts is None) == (suite.suite is None):
        raise ValueError(
            "bench needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`), or --suite DIR, not both"
        )
    if suite.suite is None:
        refuse_suite_options(suite)
        return None
    if extras:
        raise ValueError("--v-curve and --json belong to --prompts: with --suite, results go to the folder --out")
    return plan_suite(suite, limit, params)


def _drafting(
    loading: Loading,
    drafting: Drafting,
    eagle: EagleDrafter | None,
    medusa: MedusaDrafter | None,
    medusa_head: Path | None,
    small_model: str | None,
    small: Target | None,
) -> dict[str, dict[str, Any]]:
    """What the decoders draft with that have a head or a model of their own: settings, and the head's digest."""
    from haast.bench.decoders import HEADED, RULED
    from haast.bench.report import folder_sha256, weights_sha256
    from haast.drafters.factory import find_head

    found: dict[str, dict[str, Any]] = {}
    folder = None if eagle is None else drafting.folder(loading.model)
    if folder is not None:
        found |= {name: {**drawn_by(eagle), "head_sha256": folder_sha256(folder)} for name in HEADED}
    folder = None if medusa_head is None else find_head(medusa_head, loading.model)
    if folder is not None:
        found["medusa"] = {**drawn_by(medusa), "head_sha256": folder_sha256(folder)}
    if small_model is not None:
        assert small is not None, "it was named"
        found["small-model"] = {"model": small_model, "weights_sha256": weights_sha256(small)}
    return found | {name: found[base] for name, (base, _) in RULED.items() if base in found}


def _plain(config: BenchConfig) -> dict[str, Any]:
    values = asdict(config)
    values["sampling"].pop("processors")
    return values


def _arms(
    names: Sequence[str],
    target: Target,
    drafter: EagleDrafter | None,
    loading: Loading,
    drafting: Drafting,
    config: BenchConfig,
    small: Target | None,
    medusa: MedusaDrafter | None,
) -> list[Decoder]:
    from haast.bench.decoders import EngineDecoder, StockDecoder, drafter_for
    from haast.target.load import end_tokens, load_stock

    ends = end_tokens(target.model.generation_config, target.config)
    arms: list[Decoder] = []
    for name in names:
        if name == "hf":
            stock = load_stock(loading.model)[0]
            stock.to(target.device)  # type: ignore[arg-type]
            arms.append(StockDecoder(stock, ends))
        else:
            own = drafter_for(
                name,
                target,
                drafter,
                small,
                medusa,
                config.sampling,
                shaped=drafting.shaped,
                calibration=drafting.calibration,
            )
            arms.append(EngineDecoder(target, own, config.sampling, ends, name, config.prefill_chunk))
    return arms


def _bench(
    arms: Sequence[Decoder],
    encoded: Sequence[BenchPrompt],
    config: BenchConfig,
    target: Target,
    model: str,
    prompts: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from haast.bench import aggregate, report, runner
    from haast.progress import Progress

    where = report.environment(target, model, prompts, len(encoded), settings)
    with Progress("bench", "answers", config.rounds * len(encoded) * len(arms), rate="tokens") as progress:
        records = runner.run_bench(arms, encoded, config, telling(progress))
    own_text = [arm.name for arm in arms if arm.own_text]
    found = runner.differences(records, encoded, target, config.sampling, own_text)
    return {
        "rows": aggregate.build_rows(records, encoded),
        "differences": aggregate.describe_differences(found),
        "per_prompt": aggregate.per_prompt(records, encoded),
        "environment": where,
    }


def _bench_end(document: dict[str, Any], json_out: str | None) -> None:
    from rich.console import Console

    from haast.bench.report import show_table

    wide = None if sys.stdout.isatty() else 120
    show_table(document, Console(file=human_output(json_out), width=wide))
    write_json(document, json_out)
    bugs = [each for each in document["differences"] if each["kind"] == "bug"]
    if bugs:
        print(
            f"haast: {len(bugs)} outputs differ, and not by a floating-point tie: run `haast verify`", file=sys.stderr
        )
        raise typer.Exit(1)
