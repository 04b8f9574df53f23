"""The command `haast train`: its flags, their checks, and the conversion of answers into examples."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Option

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption, LimitOption, Loading, check_at_least
from haast.files import check_writable, write_json
from haast.prompts import evenly, read_prompts
from haast.training.answers import read_answers, record_key
from haast.training.config import TrainConfig

if TYPE_CHECKING:
    from haast.target.target import Target
    from haast.training.batches import Example
    from haast.training.data import TokenSequence
    from haast.training.run import Run

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """Flags of the training and validation data."""

    answers: Annotated[Path | None, Option(metavar="FILE", help="Answers, as `haast regenerate` writes them.")] = None
    shards: Annotated[
        Path | None, Option(metavar="DIR", help="Feature shards; with --answers, only those of these answers are used.")
    ] = None
    valid_prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Prompts for measuring tau; without them tau is not measured.")
    ] = None
    valid_limit: Annotated[int, Option(metavar="N", help="Number of validation prompts.")] = 12
    valid_tokens: Annotated[int, Option(metavar="N", help="New tokens per validation prompt.")] = 64
    valid_nodes: Annotated[int, Option(metavar="N", help="Tree nodes per step on validation prompts.")] = 24
    topk: Annotated[int, Option(metavar="K", help="Number of the teacher's best tokens stored per position.")] = 16
    max_tokens: Annotated[int, Option(metavar="N", help="Cut longer sequences.")] = 2048
    max_gb: Annotated[float, Option(metavar="GB", help="Maximum size of all shards.")] = 20.0
    loops: Annotated[
        str, Option(metavar="keep|drop", help="Keep or drop answers in which over 30 % of the 8-grams repeat.")
    ] = "keep"

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed."""
        for name in ("valid_limit", "valid_tokens", "topk"):
            check_at_least(name, getattr(self, name))
        check_at_least("max_tokens", self.max_tokens, 3)
        check_at_least("valid_nodes", self.valid_nodes, 2)
        if not self.max_gb > 0:
            raise ValueError(f"max_gb={self.max_gb} is not allowed: give a size above 0")
        if self.loops not in ("keep", "drop"):
            raise ValueError(f"loops={self.loops!r} is unknown: choose keep or drop")
        if self.answers is None and self.shards is None:
            raise ValueError("train needs data: give --answers FILE or --shards DIR (`haast regenerate` makes both)")


def train(
    loading: Loading,
    out: Annotated[
        Path, Option("--out", metavar="DIR", help="Folder for checkpoints, metrics, and the head in best/.")
    ],
    data: TrainingData,
    settings: TrainConfig,
    limit: LimitOption = None,
    resume: Annotated[bool, Option("--resume", help="Resume the run in --out.")] = False,
    start_from: Annotated[Path | None, Option(metavar="HEAD", help="Start from this head's weights.")] = None,
    show_data: Annotated[int, Option(metavar="N", help="Print N sequences, supervised tokens in green.")] = 0,
    self_test: Annotated[bool, Option("--self-test", help="Overfit one batch to check the data, then stop.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Train a head on the target's own answers; writes the best one by measured tau to OUT/best.

    The settings from --views to --seed are those of haast.training.config.TrainConfig. --views counts supervised
    tokens: a token that is trained on twice counts twice.

    \b
    haast train --answers answers.jsonl --valid-prompts valid.jsonl --out run/
    haast train --shards features/ --views 20000000 --out run/ --resume
    haast train --answers answers.jsonl --show-data 2 --out run/
    """
    loading.check()
    data.check()
    check_at_least("show_data", show_data, 0)
    from rich.console import Console

    from haast.heads.checkpoint import load_head

    records = _read_records(data, limit)
    valid = [] if data.valid_prompts is None else read_prompts(data.valid_prompts, data.valid_limit)
    valid_prompts = [prompt.turns[0] for prompt in valid]
    main = _main_process(data, settings, loading)
    _check_out(out, json_out, main, new_run=not (resume or show_data or self_test))
    initial = None if start_from is None else load_head(start_from)
    target = loading.load()
    if show_data:
        _show_sequences(target, records, data, show_data)
        return
    from haast.training import run as runs

    if initial is not None:  # check it before the features are extracted
        runs.start_parts(initial, runs.head_config(settings, target))
    examples, sources = _examples(target, loading.model, records, data, limit, runs.layer_ids(settings, target))
    _warn_of_foreign_answers(sources, loading.model)
    run = runs.Run(target, loading.model, settings, examples, sources, shlex.join(["haast", *sys.argv[1:]]))
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
        result["head"] = str(out / "best")
        _write_result(result, target, loading.model, data, len(valid_prompts), settings, json_out)


def _check_out(out: Path, json_out: str | None, main: bool, new_run: bool) -> None:
    """Raise ValueError if the results cannot be written, or `out` has another run."""
    from haast.training.checkpoints import write_probe

    if main:
        write_probe(out)
        check_writable(json_out)
    if new_run and any(out.glob("state-*.pt")):
        raise ValueError(f"{out} has a training run: continue it with --resume, or choose another folder")


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


def _main_process(data: TrainingData, settings: TrainConfig, loading: Loading) -> bool:
    """Whether this is the main process of a distributed run; the only process of other runs is.

    Raises:
        ValueError: several processes would extract features into the same folder; or `shard` with a single process.
    """
    from haast.training.processes import Processes

    processes = Processes(settings.mixed_precision, settings.shard, on_cpu=loading.device == "cpu")
    if processes.count > 1 and data.answers is not None:
        raise ValueError(
            f"{processes.count} processes cannot extract the features of --answers {data.answers} at once: make shards "
            f"with one process first (--answers ... --shards DIR --self-test), then give --shards DIR alone"
        )
    return processes.main


def _warn_of_foreign_answers(records: Sequence[dict[str, Any]], model: str) -> None:
    others = [str(record["model"]) for record in records if record.get("model", model) != model]
    given_text = sum(not record.get("response_ids") for record in records if "prompt" in record or "messages" in record)
    made_by = f"are from {', '.join(sorted(set(others)))}, not from {model}"
    for count, problem in ((len(others), made_by), (given_text, "are given text")):
        if count:
            typer.echo(
                f"warning: {count} of {len(records)} answers {problem}: a head learns best from its own target's "
                f"answers (`haast regenerate`)",
                err=True,
            )


def _read_records(data: TrainingData, limit: int | None) -> list[dict[str, Any]]:
    if limit is not None:
        check_at_least("limit", limit)
    if data.answers is not None:
        return read_answers(data.answers)[:limit]
    assert data.shards is not None, "TrainingData.check requires --answers or --shards"
    if not any(data.shards.glob("*.safetensors")):
        raise ValueError(f"{data.shards} has no feature shards (*.safetensors): give --answers to make them")
    return []


def _sequences(target: Target, records: Sequence[dict[str, Any]], data: TrainingData) -> list[TokenSequence]:
    from haast.training.data import encode_answers

    if target.tokenizer is None:
        raise ValueError("the target has no tokenizer, so its chat template cannot be applied to answers")
    if not records:
        raise ValueError("--show-data needs answers: give --answers FILE")
    longest = min(data.max_tokens, target.context_length or data.max_tokens)
    return encode_answers(target.tokenizer, records, longest, target.vocab_size)


def _drop_loops(items: list[T], answer: Callable[[T], Sequence[int]], data: TrainingData) -> list[T]:
    """With --loops drop, the items whose answers do not loop; otherwise all."""
    from haast.stats import loops

    if data.loops == "keep":
        return items
    kept = [item for item in items if not loops(answer(item))]
    typer.echo(f"{len(items) - len(kept)} of {len(items)} answers left out, since they loop", err=True)
    if not kept:
        raise ValueError("all answers loop, so there is nothing to train on: give --loops keep, or other answers")
    return kept


def _show_sequences(target: Target, records: Sequence[dict[str, Any]], data: TrainingData, count: int) -> None:
    from rich.console import Console

    from haast.training.data import describe_supervised

    sequences = _drop_loops(_sequences(target, records, data), attrgetter("answer"), data)
    assert target.tokenizer is not None, "_sequences has checked it"
    for sequence in sequences[:count]:
        Console().print(describe_supervised(target.tokenizer, sequence))


def _examples(
    target: Target,
    name: str,
    records: Sequence[dict[str, Any]],
    data: TrainingData,
    limit: int | None,
    layers: tuple[int, ...],
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Examples and their answer records, extracted in memory or read from shards (missing ones are written first).

    Shards store looping answers too; --loops filters them in each run. With --answers only their examples are used.
    """
    from haast.training.diagnostics import check_features
    from haast.training.features import extract, in_memory
    from haast.training.shards import ShardIdentity, read_shards

    identity = ShardIdentity.of(target, name, data.topk, layers)
    if data.shards is None:
        sequences = _drop_loops(_sequences(target, records, data), attrgetter("answer"), data)
        sequences = [s for s in sequences if len(s.tokens) >= 3]
        return in_memory(target, sequences, data.topk, layers), [sequence.record for sequence in sequences]
    if records:
        extract(target, _sequences(target, records, data), data.shards, identity, max_gb=data.max_gb)
    examples, sources = read_shards(data.shards, identity)
    check_features(target, examples, str(data.shards))
    pairs = list(zip(examples, sources, strict=True))
    if records:
        keys = {record_key(record) for record in records}
        pairs = [pair for pair in pairs if record_key(pair[1]) in keys]
    elif limit is not None:  # evenly, since a shard is in order of length
        pairs = evenly(pairs, limit)
    pairs = _drop_loops(pairs, lambda pair: pair[0].tokens[pair[0].supervised.bool()].tolist(), data)
    return [example for example, _ in pairs], [source for _, source in pairs]
