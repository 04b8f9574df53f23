"""`haast calibrate` and `haast plan`. Owns their flags and output; `haast.bench` does the measuring."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haast.cli.boundary import human_output
from haast.cli.loading import OWN_PROMPTS, as_eagle, load_all, read_prompt_file
from haast.cli.settings import Drafting, JsonOption, Loading, PromptsOption, SpreadLimitOption, check_at_least
from haast.files import check_writable, write_json

if TYPE_CHECKING:
    from haast.target.target import Target
    from haast.tuning.calibration import Calibration


def calibrate(
    loading: Loading,
    drafting: Drafting,
    prompts: PromptsOption = None,
    limit: SpreadLimitOption = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="R", help="Timed rounds, of which medians are used.")] = 11,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to save it; the cache, where runs find it, if absent.")
    ] = (None),
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot the measured costs against the roofline.")
    ] = None,
    json_out: JsonOption = None,
) -> None:
    """Measure the cost of a step on this machine, and choose the fastest draft tree. Takes a minute or two.

    Later runs with the same machine, model and head use the result, unless they set a tree shape. Give prompts like
    those of your application, but not those of an evaluation. With --head none, it only measures target forwards, for
    drafters without a head.

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
    assert drafter is not None, "the head is not none"

    from haast.bench.calibrate import calibrate as measure
    from haast.bench.calibrate import draw
    from haast.bench.report import environment
    from haast.bench.tables import text
    from haast.progress import Progress

    with Progress("calibrating") as progress:
        texts = [prompt.tokens for prompt in encoded]
        result = measure(target, drafter, texts, tokens=max_new_tokens, rounds=rounds, say=progress.set_status)
    path = _save(result, target, out)
    print(f"{text('calibration.txt', found=result)}\nsaved in {path}", file=human_output(json_out))
    if png is not None:
        draw(result, png)
    settings = {"max_new_tokens": max_new_tokens, "rounds": rounds}
    machine = environment(target, loading.model, prompts, len(encoded), settings)
    write_json({"kind": "calibration", **result.document(), "environment": machine}, json_out)


def _check_options(drafting: Drafting, head_options: tuple[object, ...]) -> None:
    if drafting.shaped or drafting.calibration != "auto":
        raise ValueError("calibrate chooses the shape itself: leave out --shape, --nodes, --depth, --calibration")
    if drafting.head == "none" and any(option is not None for option in head_options):
        raise ValueError("--prompts, --limit, --out and --png need a head: leave them out, or give a head")


def _check_files(out: Path | None, png: Path | None) -> None:
    for path in (out, png):
        check_writable(None if path is None else str(path))
    if png is not None and png.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--png {png} is not an image file: give a name that ends in .png, .svg or .pdf")


def _save(result: Calibration, target: Target, out: Path | None) -> Path:
    """Save a calibration in a file, or in the cache if it is None; returns where it is."""
    from haast.drafters.calibrated import default_path
    from haast.tuning.latency import Latency, keep, smoothed

    path = default_path(result.identity) if out is None else out
    result.save(path)
    if out is None:
        keep(target, Latency(smoothed(result.forward_ms)))  # for drafters without a head
    return path


def _forwards_alone(loading: Loading, rounds: int, json_out: str | None) -> None:
    """Measure the time of a target forward by its number of nodes, for drafters without a head."""
    from haast.bench.report import environment
    from haast.tuning.latency import Latency, keep, measurable, measure_forwards, target_identity

    target = loading.load()
    if not measurable(target):
        raise ValueError(
            "calibrate can't measure compiled layers, which compile again for every size: leave out --compile"
        )
    latency = Latency(measure_forwards(target, math.inf, rounds=rounds))
    path, out = keep(target, latency), human_output(json_out)
    for nodes, ms in latency.forward_ms.items():
        print(f"{nodes:>4} nodes {ms:9.2f} ms, v(n) {ms / latency.forward_ms[1]:.2f}", file=out)
    print(f"saved in {path}", file=out)
    machine = environment(target, loading.model, None, 0, {"rounds": rounds})
    found = {"forward_ms": latency.forward_ms, "identity": target_identity(target)}
    write_json({"kind": "forwards", **found, "environment": machine}, json_out)


def plan(
    calibration: Annotated[
        Path | None, typer.Argument(help="A file of `haast calibrate`; the saved one of this machine if absent.")
    ] = (None),
    machine: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A machine of `--list`; may be repeated.")
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option("--hardware", metavar="NAME:GB/S:TFLOPS[:LAUNCH_US]", help="Peak figures of another machine."),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            metavar="BILLIONS",
            help="Parameters of another model, with the same accepted lengths; the calibrated one's if absent.",
        ),
    ] = None,
    bytes_per_weight: Annotated[float, typer.Option(metavar="B", help="2 for 16 bits, 1 for 8, 0.5 for 4.")] = 2.0,
    listing: Annotated[bool, typer.Option("--list", help="Show the table of machines and exit.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Estimate the speed-up of a calibrated head on other hardware: a roofline projection, not a measurement.

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
        print(row.format("name", "description", "GB/s", "TFLOP/s"), file=out)
        for each in MACHINES.values():
            figures = (f"{each.bandwidth / 1e9:.0f}", f"{each.peak / 1e12:g}")
            print(row.format(each.name, each.about, *figures), file=out)
        print("the vendors' peak figures; projections assume that they are reached, and are upper bounds", file=out)
        return
    check_writable(json_out)
    unknown = [name for name in machine or () if name not in MACHINES]
    if unknown:
        raise ValueError(f"unknown machines {unknown}: choose from `haast plan --list`, or give --hardware")
    chosen = [MACHINES[name] for name in machine or ()] + [parse_machine(figures) for figures in own or ()]
    for name, value in (("parameters", parameters), ("bytes_per_weight", bytes_per_weight)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not allowed: give a number above 0")
    measured = kept_calibration(calibration)
    rows = project(measured, chosen or list(MACHINES.values()), parameters, bytes_per_weight)
    print(text("plan.txt", found=measured, rows=rows), file=human_output(json_out))
    write_json([asdict(row) for row in rows], json_out)
