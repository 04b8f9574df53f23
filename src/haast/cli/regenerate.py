"""`haast regenerate`. Owns its flags and their checks, before anything loads; no answering here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from haast.cli.settings import JsonOption, LimitOption, Loading, PromptsOption
from haast.files import check_writable, write_json
from haast.training.config import RegenerateConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from haast.prompts import Prompt
    from haast.training.endpoint import EndpointConfig
    from haast.training.generation_queue import Outcome


@dataclass(frozen=True)
class Serving:
    """A server that answers instead of this process."""

    endpoint: Annotated[str | None, Option(metavar="URL", help="An OpenAI-compatible server of the target.")] = None
    endpoint_model: Annotated[
        str | None, Option(metavar="NAME", help="The target's name there; needed where it serves several.")
    ] = None
    api_key_env: Annotated[str | None, Option(metavar="VAR", help="The environment variable with its key.")] = None
    concurrency: Annotated[int, Option(metavar="N", help="Requests in flight at a time.")] = 32
    rate: Annotated[float | None, Option(metavar="R", help="Requests a second, at most.")] = None

    def check(self) -> EndpointConfig | None:
        """The library's own configuration; None without --endpoint. Raises ValueError."""
        if self.endpoint is None:
            for name in ("endpoint_model", "api_key_env", "rate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} is for a server: give --endpoint URL too")
            return None
        from haast.training.endpoint import EndpointConfig, check_installed

        key = None if self.api_key_env is None else os.environ.get(self.api_key_env)
        if self.api_key_env is not None and not key:
            raise ValueError(f"--api-key-env {self.api_key_env}: there is no such environment variable, or it is empty")
        config = EndpointConfig(self.endpoint, self.endpoint_model, key, self.concurrency, self.rate)
        check_installed()
        return config


def regenerate(
    loading: Loading,
    out: Annotated[Path, Option("--out", metavar="FILE", help="Answers are appended; done ones are skipped.")],
    config: RegenerateConfig,
    serving: Serving,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    json_out: JsonOption = None,
) -> None:
    """Let the target answer prompts itself: the text a head is trained on. Run again to resume.

    With --endpoint a server that runs the target answers, and only the tokenizer of --model is loaded here.

    \b
    haast regenerate --prompts train_prompts.jsonl.gz --out answers.jsonl
    haast regenerate --prompts prompts.jsonl --limit 1000 --out answers.jsonl --shards features/
    haast regenerate --prompts prompts.jsonl --turns 3 --out answers.jsonl --endpoint http://localhost:8000/v1
    """
    from haast.prompts import read_prompts
    from haast.training.checkpoints import write_probe

    endpoint = serving.check()
    if endpoint is not None and config.shards is not None:
        raise ValueError("--shards stores features, which no endpoint tells: give --shards to `haast train` instead")
    loading.check()
    if prompts is None:
        raise ValueError("regenerate needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`)")
    chosen = read_prompts(prompts, limit)
    if out.is_dir():
        raise ValueError(f"cannot write {out}: it is a folder; give a file name in it")
    if out.suffix == ".gz":
        raise ValueError(f"cannot write {out}: answers are appended as plain text; give a name without .gz")
    for folder in (out.parent, *([config.shards] if config.shards else [])):
        write_probe(folder)
    check_writable(json_out)
    begun = time.monotonic()
    try:
        outcome = _run(loading, chosen, out, config, endpoint)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; finished answers are in {out}, the same command goes on from there", err=True)
        raise
    typer.echo(_summary(outcome, out), err=True)
    if json_out is not None:
        from haast.bench.report import machine
        from haast.bench.runner import peak_rss_mb

        seconds = time.monotonic() - begun  # loading included
        speed = {"tokens": outcome.tokens, "seconds": seconds, "tokens_per_s": outcome.tokens / seconds}
        counts: dict[str, Any] = {name: getattr(outcome, name) for name in ("added", "before", "left_out", "failed")}
        counts |= {"prompts": len(chosen), "answers": str(out), **speed, "peak_rss_mb": peak_rss_mb()}
        write_json({"kind": "regenerate", **counts, "environment": machine()}, json_out)


def _run(
    loading: Loading, prompts: Sequence[Prompt], out: Path, config: RegenerateConfig, endpoint: EndpointConfig | None
) -> Outcome:
    from haast.training.generation_queue import AnswerRun

    name = loading.model
    if endpoint is not None:
        from haast.target.load import load_tokenizer
        from haast.training.endpoint import regenerate_from_endpoint

        tokenizer, ends = load_tokenizer(name)
        return regenerate_from_endpoint(AnswerRun(tokenizer, prompts, out, config, name), ends, endpoint)
    from haast.training.regenerate import regenerate as run

    target = loading.load()
    if target.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot answer prompts")
    return run(target, AnswerRun(target.tokenizer, prompts, out, config, name))


def _summary(outcome: Outcome, out: Path) -> str:
    words = [f"{outcome.added} answers added to {out}"]
    if outcome.before:
        words.append(f"{outcome.before} were there before")
    if outcome.failed:
        words.append(f"{outcome.failed} got no answer, the last because: {outcome.complaint}")
    if outcome.left_out:
        words.append(f"{outcome.left_out} were left out (too long, or after a turn without an answer)")
    return "; ".join(words)
