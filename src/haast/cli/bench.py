"""`haast bench`. Owns its flags, progress and end; the work is `haast.bench`'s."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import check_writable, human_output, write_json
from haast.cli.loading import drawn_by, load_all, read_prompt_file
from haast.cli.settings import Drafting, JsonOption, Loading, PromptsOption, Sampling, SpreadLimitOption

if TYPE_CHECKING:
    from haast.acceptance import AcceptanceRule
    from haast.bench.arms import Arm
    from haast.bench.runner import BenchConfig, BenchPrompt, Record
    from haast.drafters.eagle import EagleDrafter
    from haast.sampling import SamplingConfig
    from haast.target import Target

_HISTORY_NODES = 4  # of the decoders that draft from the text alone: the fastest of 4, 6, 8 and 12 on two CPU cores


def bench(
    loading: Loading,
    drafting: Drafting,
    sampling: Sampling,
    prompts: PromptsOption = None,
    limit: SpreadLimitOption = None,
    decoders: Annotated[
        str,
        typer.Option(
            metavar="A,B,C", help="Of vanilla, eagle, eagle+suffix, small-model, lookahead, lookup, suffix, hf."
        ),
    ] = "vanilla,eagle",
    small_model: Annotated[str | None, typer.Option(metavar="NAME", help="The smaller model that drafts.")] = None,
    draft_sampling: Annotated[
        bool, typer.Option("--draft-sampling", help="The small model draws its drafts instead of taking the likeliest.")
    ] = False,
    acceptance: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="How drafts are judged: match (vanilla's own text), rejection or block (the same law, another text; "
            "meant for --draft-sampling), typical (LOSSY: another law).",
        ),
    ] = "match",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 128,
    rounds: Annotated[int, typer.Option(metavar="R", help="Timed rounds; the median per prompt counts.")] = 1,
    warmup: Annotated[int, typer.Option(metavar="N", help="Untimed tokens per decoder before.")] = 16,
    v_curve: Annotated[bool, typer.Option("--v-curve", help="Also measure forwards over 1 to 60 nodes.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Don't put prompts through the chat template.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Compare decoders, interleaved per prompt in one run. First turns only; prefill is not counted.

    hf is stock `model.generate` in float32 with its own attention.

    \b
    haast bench --prompts mt_bench.jsonl --limit 20 --decoders vanilla,eagle,hf --json bench.json
    haast bench --prompts mt_bench.jsonl --nodes 24 --rounds 3 --v-curve --json -
    """
    if prompts is None:
        raise ValueError("bench needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`)")
    chosen = read_prompt_file(prompts, limit)
    check_writable(json_out)
    drafting.check_shape(loading.device)

    from haast.bench.arms import HEADED, check_decoders, check_rule
    from haast.bench.runner import BenchConfig

    law = sampling.check()
    config = BenchConfig(max_new_tokens, rounds, warmup, law)
    names = check_decoders(decoders, drafting.head != "none", law.temperature, small_model is not None)
    rule = check_rule(names, acceptance, draft_sampling)
    if "hf" in names and (law.repetition_penalty != 1.0):
        raise ValueError("decoder 'hf' is greedy without penalties here: leave out --repetition-penalty, or hf")
    loading.check()
    if small_model is not None:
        replace(loading, model=small_model).check()
    shape = drafting.check(loading.model, loading.device) if set(names) & set(HEADED) else None
    target, drafter, encoded = load_all(loading, drafting, shape, chosen, raw)
    small = None if small_model is None else replace(loading, model=small_model).load()
    arms = _arms(names, target, drafter, loading, config, small, rule, law if draft_sampling else None)
    settings = {**drawn_by(drafter), **_plain(config), "raw": raw}
    settings |= {"acceptance": acceptance, "lossy": rule is not None and rule.lossy, "draft_sampling": draft_sampling}
    document = _bench(arms, encoded, config, target, loading.model, prompts, settings)
    if v_curve:
        from haast.bench.vcurve import measure_v_curve

        document["v_curve"] = measure_v_curve(target, drafter)
    _bench_end(document, json_out)


def _plain(config: BenchConfig) -> dict[str, Any]:
    values = asdict(config)
    values["sampling"].pop("processors")
    return values


def _arms(
    names: Sequence[str],
    target: Target,
    drafter: EagleDrafter | None,
    loading: Loading,
    config: BenchConfig,
    small: Target | None,
    rule: AcceptanceRule | None,
    draft_sampling: SamplingConfig | None,
) -> list[Arm]:
    from haast.bench.arms import UNDRAFTED, EngineArm, StockArm, drafter_for
    from haast.models import load_stock
    from haast.training.frozen import end_tokens

    ends = end_tokens(target)
    arms: list[Arm] = []
    for name in names:
        if name == "hf":
            stock = load_stock(loading.model)[0]
            stock.to(target.device)  # type: ignore[arg-type]
            arms.append(StockArm(stock, ends))
        else:
            own = drafter_for(name, target, drafter, _HISTORY_NODES, small, draft_sampling)
            judged = None if name in UNDRAFTED else rule
            arms.append(EngineArm(target, own, config.sampling, ends, judged))
    return arms


def _bench(
    arms: Sequence[Arm],
    encoded: Sequence[BenchPrompt],
    config: BenchConfig,
    target: Target,
    model: str,
    prompts: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from haast.bench import report, runner

    where = report.environment(target, model, prompts, len(encoded), settings)
    decoded, forwards = 0, 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=config.rounds * len(encoded) * len(arms))

        def progress(name: str, record: Record) -> None:
            nonlocal decoded, forwards
            stats = record.runs[-1].stats
            if name == "eagle" and stats is not None:
                decoded, forwards = decoded + stats.decoded_tokens, forwards + stats.target_forwards
            bar.update(task, advance=1, description=f"tau {decoded / forwards:.2f}" if forwards else "")

        records = runner.run_bench(arms, encoded, config, progress)
    found = runner.differences(records, encoded, target, config.sampling, [arm.name for arm in arms if arm.own_text])
    return {
        "rows": report.build_rows(records, encoded),
        "differences": report.describe_differences(found),
        "per_prompt": report.per_prompt(records, encoded),
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
