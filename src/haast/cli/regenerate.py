"""The command `haast regenerate`: its flags, their checks before anything loads, and its summary."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from haast.cli.settings import JsonOption, KVDtypeOption, LimitOption, Loading, PromptsOption
from haast.files import check_writable, write_json
from haast.training.config import RegenerateConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from haast.prompts import Prompt
    from haast.training.endpoint import EndpointConfig
    from haast.training.generation_queue import Outcome


@dataclass(frozen=True)
class EndpointOptions:
    """Flags of a server that generates the answers instead of this process."""

    endpoint: Annotated[str | None, Option(metavar="URL", help="An OpenAI-compatible server that runs the target.")] = (
        None
    )
    endpoint_model: Annotated[
        str | None, Option(metavar="NAME", help="The target's name on the server; needed if it serves several models.")
    ] = None
    api_key_env: Annotated[str | None, Option(metavar="VAR", help="Environment variable with the server's key.")] = None
    concurrency: Annotated[int, Option(metavar="N", help="Maximum requests in flight.")] = 32
    rate: Annotated[float | None, Option(metavar="R", help="Maximum requests per second.")] = None

    def check(self) -> EndpointConfig | None:
        """The `EndpointConfig` of these flags; None without --endpoint. Raises ValueError."""
        if self.endpoint is None:
            for name in ("endpoint_model", "api_key_env", "rate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} needs a server: give --endpoint URL too")
            return None
        from haast.training.endpoint import EndpointConfig, check_installed

        key = None if self.api_key_env is None else os.environ.get(self.api_key_env)
        if self.api_key_env is not None and not key:
            raise ValueError(f"--api-key-env {self.api_key_env}: this environment variable is not set, or is empty")
        config = EndpointConfig(self.endpoint, self.endpoint_model, key, self.concurrency, self.rate)
        check_installed()
        return config


def regenerate(
    loading: Loading,
    out: Annotated[
        Path, Option("--out", metavar="FILE", help="Answers file; appends, and skips prompts with an answer.")
    ],
    config: RegenerateConfig,
    serving: EndpointOptions,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    kv_dtype: KVDtypeOption = "auto",
    json_out: JsonOption = None,
) -> None:
    """Generate the target's answers to prompts: the text that a head is trained on. Run again to resume.

    With --endpoint a server that runs the target generates the answers, and only the tokenizer of --model is loaded.

    \b
    haast regenerate --prompts train_prompts.jsonl.gz --out answers.jsonl
    haast regenerate --prompts prompts.jsonl --limit 1000 --out answers.jsonl --shards features/
    haast regenerate --prompts prompts.jsonl --turns 3 --out answers.jsonl --endpoint http://localhost:8000/v1
    """
    from haast.prompts import read_prompts
    from haast.target.kv_budget import KVBudget
    from haast.training.checkpoints import write_probe

    endpoint = serving.check()
    if endpoint is not None and config.shards is not None:
        raise ValueError(
            "--shards stores features, which an endpoint does not return: give --shards to `haast train` instead"
        )
    if endpoint is not None and kv_dtype != "auto":
        raise ValueError(f"--kv-dtype {kv_dtype} is for a target in this process: leave it out with --endpoint")
    KVBudget(kv_dtype=kv_dtype)
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
    start = time.monotonic()
    try:
        outcome = _run(loading, chosen, out, config, endpoint, kv_dtype)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; finished answers are in {out}, the same command resumes from there", err=True)
        raise
    typer.echo(_summary(outcome, out), err=True)
    if json_out is not None:
        from haast.bench.report import machine
        from haast.bench.runner import peak_rss_mb

        seconds = time.monotonic() - start  # loading included
        speed = {"tokens": outcome.tokens, "seconds": seconds, "tokens_per_s": outcome.tokens / seconds}
        names = ("added", "before", "left_out", "failed", "looped", "duplicates")
        counts: dict[str, Any] = {name: getattr(outcome, name) for name in names}
        counts |= {"prompts": len(chosen), "answers": str(out), **speed, "peak_rss_mb": peak_rss_mb()}
        write_json({"kind": "regenerate", **counts, "environment": machine()}, json_out)


def _run(
    loading: Loading,
    prompts: Sequence[Prompt],
    out: Path,
    config: RegenerateConfig,
    endpoint: EndpointConfig | None,
    kv_dtype: str,
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
    target.use_pool(kv_dtype=kv_dtype)
    if target.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot answer prompts")
    return run(target, AnswerRun(target.tokenizer, prompts, out, config, name))


def _summary(outcome: Outcome, out: Path) -> str:
    parts = [f"{outcome.added} answers added to {out}"]
    if outcome.before:
        parts.append(f"{outcome.before} were there before")
    if outcome.failed:
        parts.append(f"{outcome.failed} got no answer, the last because: {outcome.last_error}")
    if outcome.left_out:
        parts.append(f"{outcome.left_out} were left out (too long, or after a turn without an answer or with a loop)")
    if outcome.looped:
        parts.append(f"{outcome.looped} of them were cut where they began to repeat themselves")
    if outcome.duplicates:
        parts.append(f"{outcome.duplicates} prompts were left out, since they say nearly the same as another")
    return "; ".join(parts)
