"""`haast regenerate` and `haast train`. Owns their flags and the joining of trainer and engine; no training here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import check_writable, write_json
from haast.cli.settings import JsonOption, LimitOption, Loading, PromptsOption, check_at_least
from haast.training.config import TrainConfig

if TYPE_CHECKING:
    from haast.heads.checkpoint import Head
    from haast.target import Target
    from haast.training.batches import Example
    from haast.training.data import TokenSequence


@dataclass(frozen=True)
class TrainingData:
    """What a head is trained on."""

    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answers, as `haast regenerate` writes them.")
    ] = None
    shards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Feature shards; with --answers, missing ones are made first.")
    ] = None
    valid_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts on which tau is measured; none: no tau.")
    ] = None
    valid_limit: Annotated[int, typer.Option(metavar="N", help="How many of them.")] = 12
    valid_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens on each.")] = 64
    valid_nodes: Annotated[int, typer.Option(metavar="N", help="Tree budget there.")] = 24
    topk: Annotated[int, typer.Option(metavar="K", help="The teacher's best tokens kept per position.")] = 16
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Cut longer sequences.")] = 2048
    max_gb: Annotated[float, typer.Option(metavar="GB", help="Most that shards may take.")] = 20.0


def regenerate(
    loading: Loading,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Answers are appended; done ones are skipped.")],
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Answers in the making at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(metavar="N")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Longer prompts are left out.")] = 1024,
    temperatures: Annotated[str, typer.Option(metavar="T:SHARE,...", help="Each prompt draws one.")] = (
        "0:0.5,0.7:0.25,1:0.25"
    ),
    seed: Annotated[int, typer.Option(metavar="S")] = 0,
    shards: Annotated[Path | None, typer.Option(metavar="DIR", help="Also store features there.")] = None,
    topk: Annotated[int, typer.Option(metavar="K", help="The teacher's best tokens kept per position.")] = 16,
    max_gb: Annotated[float, typer.Option(metavar="GB", help="Most that shards may take.")] = 20.0,
    json_out: JsonOption = None,
) -> None:
    """Let the target answer prompts itself: the text a head is trained on. Run again to resume.

    \b
    haast regenerate --prompts train_prompts.jsonl.gz --out answers.jsonl
    haast regenerate --prompts prompts.jsonl --limit 1000 --out answers.jsonl --shards features/
    """
    from haast.prompts import read_prompts
    from haast.training.checkpoints import write_probe
    from haast.training.regenerate import RegenerateConfig
    from haast.training.regenerate import regenerate as run

    config = RegenerateConfig(
        batch, max_new_tokens, max_prompt_tokens, _temperatures(temperatures), seed, shards, topk, max_gb
    )
    loading.check()
    if prompts is None:
        raise ValueError("regenerate needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`)")
    chosen = read_prompts(prompts, limit)
    if out.is_dir():
        raise ValueError(f"cannot write {out}: it is a folder; give a file name in it")
    for folder in (out.parent, *([shards] if shards else [])):
        write_probe(folder)
    check_writable(json_out)
    target = loading.load()
    if target.tokenizer is None:
        raise ValueError(f"{loading.model} has no tokenizer, so it cannot answer prompts")
    try:
        added = run(target, target.tokenizer, chosen, out, config, name=loading.model, quiet=not sys.stderr.isatty())
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; finished answers are in {out}, the same command goes on from there", err=True)
        raise
    left_out = len(chosen) - added
    words = f"; {left_out} prompts were answered there before, or are too long" if left_out else ""
    typer.echo(f"{added} answers added to {out}{words}", err=True)
    write_json({"added": added, "left_out": left_out, "prompts": len(chosen), "answers": str(out)}, json_out)


def _temperatures(words: str) -> tuple[tuple[float, float], ...]:
    try:
        pairs = [pair.split(":") for pair in words.split(",")]
        return tuple((float(temperature), float(share)) for temperature, share in pairs)
    except ValueError as error:
        raise ValueError(f"temperatures={words!r} is not of the form 0:0.5,0.7:0.25,1:0.25") from error


def train(
    loading: Loading,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Checkpoints, metrics, and the head in best/.")],
    data: TrainingData,
    settings: TrainConfig,
    limit: LimitOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    start_from: Annotated[Path | None, typer.Option(metavar="HEAD", help="Begin with this head's weights.")] = None,
    show_data: Annotated[int, typer.Option(metavar="N", help="Print N sequences, what is supervised in green.")] = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Overfit one batch and stop: is all in order?")
    ] = False,
    json_out: JsonOption = None,
) -> None:
    """Train a head on the target's own answers; the best one by measured tau lies in OUT/best.

    The settings from --views to --seed are those of haast.training.config.TrainConfig; a view is one supervised
    position seen once.

    \b
    haast train --answers answers.jsonl --valid-prompts valid.jsonl --out run/
    haast train --shards features/ --views 20000000 --out run/ --resume
    haast train --answers answers.jsonl --show-data 2 --out run/
    """
    from haast.prompts import read_prompts
    from haast.training.checkpoints import write_probe

    loading.check()
    for name in ("valid_limit", "valid_tokens", "topk"):
        check_at_least(name, getattr(data, name))
    check_at_least("max_tokens", data.max_tokens, 3)
    if not data.max_gb > 0:
        raise ValueError(f"max_gb={data.max_gb} is not allowed: give a size above 0")
    check_at_least("valid_nodes", data.valid_nodes, 2)
    check_at_least("show_data", show_data, 0)
    if data.answers is None and data.shards is None:
        raise ValueError("train needs data: give --answers FILE or --shards DIR (`haast regenerate` makes both)")
    records = _read_records(data, limit)
    prompts = [] if data.valid_prompts is None else read_prompts(data.valid_prompts, data.valid_limit)
    write_probe(out)
    check_writable(json_out)
    begin = _start_head(start_from)
    target = loading.load()
    if show_data:
        _show(target, _sequences(target, records, data)[:show_data])
        return
    from haast.cli.trainrun import Run, layer_ids

    layers = layer_ids(settings, target)
    examples, sources = _examples(target, loading.model, records, data, limit, layers)
    _warn_of_others(sources, loading.model)
    run = Run(target, loading.model, settings, examples, sources, shlex.join(["haast", *sys.argv[1:]]))
    if self_test:
        reached = run.self_test(out)
        typer.echo(f"self-test passed: top-1 agreement {reached:.3f} on one batch", err=True)
        write_json({"self_test": reached}, json_out)
        return
    turns = [prompt.turns[0] for prompt in prompts]
    try:
        result = run.train(out, turns, data.valid_tokens, data.valid_nodes, begin, resume, quiet=json_out == "-")
    except KeyboardInterrupt:
        typer.echo(f"\nstopped and saved; go on with --resume --out {out}", err=True)
        raise
    typer.echo(f"the best head is in {out / 'best'}", err=True)
    write_json({**result, "head": str(out / "best")}, json_out)


def _warn_of_others(records: Sequence[dict[str, Any]], model: str) -> None:
    others = [str(record["model"]) for record in records if record.get("model", model) != model]
    if others:
        typer.echo(
            f"warning: {len(others)} of {len(records)} answers were made by {', '.join(sorted(set(others)))}, not by "
            f"{model}: a head learns best from its own target's answers (`haast regenerate`)",
            err=True,
        )


def _read_records(data: TrainingData, limit: int | None) -> list[dict[str, Any]]:
    from haast.training.data import read_answers

    if limit is not None:
        check_at_least("limit", limit)
    if data.answers is not None:
        return read_answers(data.answers)[:limit]
    assert data.shards is not None, "one of both was given"
    if not any(data.shards.glob("*.safetensors")):
        raise ValueError(f"{data.shards} holds no feature shards (*.safetensors): give --answers to make them")
    return []


def _start_head(folder: Path | None) -> Head | None:
    if folder is None:
        return None
    from haast.heads.checkpoint import load_head

    return load_head(folder)


def _sequences(target: Target, records: Sequence[dict[str, Any]], data: TrainingData) -> list[TokenSequence]:
    from haast.training.data import encode_answer

    if target.tokenizer is None:
        raise ValueError("the target has no tokenizer, so answers cannot be put through its chat template")
    if not records:
        raise ValueError("--show-data shows answers: give --answers FILE")
    known = max(target.vocab_size, len(target.tokenizer))
    return [encode_answer(target.tokenizer, record, data.max_tokens, known) for record in records]


def _show(target: Target, sequences: Sequence[TokenSequence]) -> None:
    from rich.console import Console

    from haast.training.data import describe_supervised

    assert target.tokenizer is not None, "_sequences refuses a target without one"
    console = Console()
    for sequence in sequences:
        console.print(describe_supervised(target.tokenizer, sequence))


def _examples(
    target: Target,
    name: str,
    records: Sequence[dict[str, Any]],
    data: TrainingData,
    limit: int | None,
    layers: tuple[int, ...],
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Examples and the records they came from: from shards (made where missing), or in memory."""
    from haast.training.features import ShardIdentity, extract, read_shards, stream_examples

    identity = ShardIdentity.of(target, name, data.topk, layers)
    if data.shards is not None:
        if records:
            extract(
                target,
                _sequences(target, records, data),
                data.shards,
                identity,
                max_gb=data.max_gb,
                quiet=not sys.stderr.isatty(),
            )
        examples, sources = read_shards(data.shards, identity)
        return examples[:limit], sources[:limit]
    sequences = [s for s in _sequences(target, records, data) if len(s.tokens) >= 3]
    made = dict(stream_examples(target, sequences, data.topk, layer_ids=layers))
    return [made[i] for i in range(len(sequences))], [sequence.record for sequence in sequences]
