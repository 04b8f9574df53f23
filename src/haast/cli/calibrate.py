"""`haast calibrate` and `haast plan`. Owns their flags and what they show; the work is `haast.bench`'s."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from haast.cli.boundary import human_output
from haast.cli.loading import OWN_PROMPTS, as_eagle, load_all, read_prompt_file
from haast.cli.settings import Drafting, JsonOption, Loading, PromptsOption, SpreadLimitOption, check_at_least
from haast.files import check_writable, write_json


def calibrate(
    loading: Loading,
    drafting: Drafting,
    prompts: PromptsOption = None,
    limit: SpreadLimitOption = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens per prompt to learn from.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="R", help="Timed rounds; medians count.")] = 11,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to keep it; by default where it is found.")
    ] = (None),
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the costs over the roofline.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Measure what a step costs here, and choose the drafting that is fastest. Takes a minute or two.

    Later runs with the same machine, model and head use what was found, unless they name a shape. Give prompts like
    those that will be asked; never those of an evaluation. It looks for the shape itself. With --head none it measures
    forwards alone, for drafters that read the text.

    \b
    haast calibrate
    haast calibrate --prompts my_prompts.jsonl --limit 20 --png calibration.png
    haast calibrate --model my-model --head none --packing off
    """
    check_at_least("max_new_tokens", max_new_tokens, 16)
    check_at_least("rounds", rounds)
    _check_options(drafting, (prompts, limit, out, png))
    chosen = read_prompt_file(prompts, limit if prompts is not None or limit is not None else len(OWN_PROMPTS))
    check_writable(json_out)
    _check_files(out, png)
    loading.check()
    if drafting.head == "none":
        _forwards_alone(loading, rounds, json_out)
        return
    shape = drafting.check(loading.model, loading.device)
    target, loaded, encoded = load_all(loading, replace(drafting, calibration="off"), shape, chosen)
    drafter = as_eagle(loaded)
    assert drafter is not None, "a head was asked for"

    from haast.bench.calibrate import calibrate as measure
    from haast.bench.calibrate import draw
    from haast.bench.report import environment
    from haast.bench.tables import text
    from haast.drafters.calibrated import default_path
    from haast.progress import Progress
    from haast.tuning.latency import Latency, keep, smoothed

    with Progress("calibrating") as progress:
        texts = [prompt.tokens for prompt in encoded]
        found = measure(target, drafter, texts, tokens=max_new_tokens, rounds=rounds, say=progress.say)
    path = default_path(found.identity) if out is None else out
    found.save(path)
    if out is None:
        keep(target, Latency(smoothed(found.forward_ms)))  # for drafters without a head
    print(f"{text('calibration.txt', found=found)}\nkept in {path}", file=human_output(json_out))
    if png is not None:
        draw(found, png)
    settings = {"max_new_tokens": max_new_tokens, "rounds": rounds}
    where = environment(target, loading.model, prompts, len(encoded), settings)
    write_json({"kind": "calibration", **found.document(), "environment": where}, json_out)


def _check_options(drafting: Drafting, of_heads: tuple[object, ...]) -> None:
    if drafting.shaped or drafting.calibration != "auto":
        raise ValueError(
            "calibrate looks for the best shape itself: leave out --shape, --nodes, --depth, --calibration"
        )
    if drafting.head == "none" and any(given is not None for given in of_heads):
        raise ValueError("--prompts, --limit, --out and --png are for a head's drafts: leave them out, or give a head")


def _check_files(out: Path | None, png: Path | None) -> None:
    for path in (out, png):
        check_writable(None if path is None else str(path))
    if png is not None and png.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--png {png} is no picture: give a name that ends in .png, .svg or .pdf")


def _forwards_alone(loading: Loading, rounds: int, json_out: str | None) -> None:
    """What a forward costs by its nodes, for drafters without a head."""
    from haast.tuning.latency import Latency, keep, measurable, measure_forwards, target_identity

    target = loading.load()
    if not measurable(target):
        raise ValueError("compiled layers are compiled for every size, which is not measured: leave out --compile")
    found = Latency(measure_forwards(target, math.inf, rounds=rounds))
    path, out = keep(target, found), human_output(json_out)
    for nodes, ms in found.forward_ms.items():
        print(f"{nodes:>4} nodes {ms:9.2f} ms, v(n) {ms / found.forward_ms[1]:.2f}", file=out)
    print(f"kept in {path}", file=out)
    write_json({"forward_ms": found.forward_ms, "identity": target_identity(target)}, json_out)


def plan(
    calibration: Annotated[
        Path | None, typer.Argument(help="What `haast calibrate` wrote; the kept one if absent.")
    ] = (None),
    machine: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="From the table (`--list`); may be repeated.")
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option("--hardware", metavar="NAME:GB/S:TFLOPS[:LAUNCH_US]", help="Figures of your own machine."),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(metavar="BILLIONS", help="Of another model with a head as good; this one's if absent."),
    ] = None,
    bytes_per_weight: Annotated[float, typer.Option(metavar="B", help="2 for 16 bits, 1 for 8, 0.5 for 4.")] = 2.0,
    listing: Annotated[bool, typer.Option("--list", help="Show the table of machines and end.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Project this head's speed-up to other hardware: a projection from a roofline, not a measurement.

    \b
    haast plan --list
    haast plan --machine h100 --machine rtx4090
    haast plan --hardware mybox:200:10 --parameters 8
    """
    from dataclasses import asdict

    from haast.bench.plan import MACHINES, kept_calibration, parse_machine, project
    from haast.bench.tables import text

    if listing:
        row, out = "{:<14} {:<62} {:>5} {:>8}", human_output(json_out)
        print(row.format("name", "what", "GB/s", "TFLOP/s"), file=out)
        for each in MACHINES.values():
            figures = (f"{each.bandwidth / 1e9:.0f}", f"{each.peak / 1e12:g}")
            print(row.format(each.name, each.about, *figures), file=out)
        print("the makers' peak figures; a projection takes them as reachable, so it is an upper bound", file=out)
        return
    check_writable(json_out)
    unknown = [name for name in machine or () if name not in MACHINES]
    if unknown:
        raise ValueError(f"unknown machines {unknown}: `haast plan --list` shows the table, --hardware takes your own")
    chosen = [MACHINES[name] for name in machine or ()] + [parse_machine(figures) for figures in own or ()]
    for name, value in (("parameters", parameters), ("bytes_per_weight", bytes_per_weight)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not allowed: give a number above 0")
    found = kept_calibration(calibration)
    rows = project(found, chosen or list(MACHINES.values()), parameters, bytes_per_weight)
    print(text("plan.txt", found=found, rows=rows), file=human_output(json_out))
    write_json([asdict(row) for row in rows], json_out)
