"""The command `haast train`: its flags and their checks. `haast.training` does the work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption, LimitOption, Loading, check_at_least
from haast.files import check_writable, write_json
from haast.training.config import TrainConfig, TrainingData

if TYPE_CHECKING:
    from haast.target.target import Target
    from haast.training.run import Run


def train(
    loading: Loading,
    out: Annotated[
        Path, Option("--out", metavar="DIR", help="Folder for checkpoints, metrics, and the head in best/.")
    ],
    data: TrainingData,
    settings: TrainConfig,
    limit: LimitOption = None,
    resume: Annotated[bool, Option("--resume", help="Resume the run in --out.")] = False,
    start_from: Annotated[
        str | None, Option(metavar="HEAD", help="Start from a head's weights: a folder, or 'default'.")
    ] = None,
    show_data: Annotated[int, Option(metavar="N", help="Print N sequences, supervised tokens in green.")] = 0,
    self_test: Annotated[bool, Option("--self-test", help="Overfit one batch to check the data, then stop.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Train a head on the target's own answers; writes the best one by measured tau to OUT/best.

    The settings from --views to --seed are those of haast.training.config.TrainConfig. --views counts supervised
    tokens: a token that is trained on twice counts twice.

    \b
    haast train --answers answers.jsonl --out run/
    haast train --shards features/ --views 20000000 --out run/ --resume
    haast train --answers answers.jsonl --show-data 2 --out run/
    """
    loading.check()
    data.check()
    check_at_least("show_data", show_data, 0)
    from rich.console import Console

    from haast.drafters.factory import find_head
    from haast.heads.checkpoint import load_head
    from haast.training.dataset import read_inputs
    from haast.training.processes import is_main_process

    records, valid_prompts = read_inputs(data, limit)
    main = is_main_process(data, settings, loading.device == "cpu")
    _check_out(out, json_out, main, new_run=not (resume or show_data or self_test))
    folder = find_head(start_from, loading.model)
    initial = None if folder is None else load_head(folder)
    target = loading.load()
    if show_data:
        _show_sequences(target, records, data, show_data)
        return
    from haast.training.run import prepare

    command = shlex.join(["haast", *sys.argv[1:]])
    run = prepare(target, loading.model, data, settings, records, limit, initial, command, _report, out=out)
    if self_test:
        _self_test(run, out, json_out)
        return
    try:
        console = Console(file=human_output(json_out))
        result = run.train(out, valid_prompts, data.valid_tokens, data.valid_nodes, initial, resume, console)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped and saved; continue with --resume --out {out}", err=True)
        raise
    if main:
        typer.echo(f"the best head is in {out / 'best'}", err=True)
        _write_result(result, target, loading.model, data, len(valid_prompts), settings, json_out)


def _report(line: str) -> None:
    typer.echo(line, err=True)


def _check_out(out: Path, json_out: str | None, main: bool, new_run: bool) -> None:
    """Raise ValueError if the results cannot be written, or `out` has another run."""
    from haast.training.checkpoints import check_out

    check_out(out, new_run, main)
    if main:
        check_writable(json_out)


def _self_test(run: Run, out: Path, json_out: str | None) -> None:
    from haast.progress import Progress

    with Progress("self-test"):
        agreement = run.self_test(out)
    typer.echo(f"self-test passed: top-1 agreement {agreement:.3f} on one batch", err=True)
    write_json({"self_test": agreement}, json_out)


def _write_result(
    result: dict[str, Any],
    target: Target,
    name: str,
    data: TrainingData,
    prompts: int,
    settings: TrainConfig,
    json_out: str | None,
) -> None:
    if json_out is None:
        return
    from haast.bench.report import environment
    from haast.bench.runner import peak_rss_mb

    where = environment(target, name, data.valid_prompts, prompts, asdict(settings))
    write_json({"kind": "training", **result, "peak_rss_mb": peak_rss_mb(), "environment": where}, json_out)


def _show_sequences(target: Target, records: Sequence[dict[str, Any]], data: TrainingData, count: int) -> None:
    from rich.console import Console

    from haast.training.data import describe_supervised
    from haast.training.dataset import drop_loops, sequences_of

    sequences = drop_loops(sequences_of(target, records, data), attrgetter("answer"), data, _report)
    assert target.tokenizer is not None, "sequences_of has checked it"
    for sequence in sequences[:count]:
        Console().print(describe_supervised(target.tokenizer, sequence))
