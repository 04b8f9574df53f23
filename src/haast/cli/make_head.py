"""The command `haast make-head`: its flags, their checks before anything loads, and the plan that it prints."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption, KVDtypeOption, Loading, PromptsOption, check_at_least
from haast.files import check_writable, write_json
from haast.training.config import RegenerateConfig, TrainConfig


@dataclass(frozen=True)
class Making:
    """What `haast make-head` lets one choose; `haast regenerate` and `haast train` have all settings."""

    answers: Annotated[int | None, Option(metavar="N", help="Number of answers; all prompts if absent.")] = None
    minutes: Annotated[
        float | None, Option(metavar="M", help="Take as many answers as fit into M minutes, training included.")
    ] = None
    head: Annotated[str, Option(help="Kind of head: feat-extrapolator, eagle3 or medusa.")] = "feat-extrapolator"
    views: Annotated[int | None, Option(metavar="N", help="Length of training; by the answers if absent.")] = None
    batch: Annotated[int, Option(metavar="N", help="Answers generated at a time.")] = 64
    lengths: Annotated[str, Option(help="Maximum lengths of answers and their shares.")] = RegenerateConfig.lengths
    temperatures: Annotated[str, Option(help="Temperatures and their shares.")] = RegenerateConfig.temperatures
    mix: Annotated[str, Option(help="Weights of the prompts' categories.")] = RegenerateConfig.mix
    valid_limit: Annotated[int, Option(metavar="N", help="Most held-out prompts for measuring tau.")] = 12
    max_gb: Annotated[float, Option(metavar="GB", help="Maximum size of the features.")] = 20.0
    seed: Annotated[int, Option(metavar="S", help="Seed of answers and training.")] = 0

    def check(self) -> tuple[RegenerateConfig, TrainConfig]:
        """The settings of both stages. Raises ValueError."""
        check_at_least("valid_limit", self.valid_limit)
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes={self.minutes} is not allowed: give a value above 0")
        answering = RegenerateConfig(
            batch=self.batch, lengths=self.lengths, temperatures=self.temperatures, mix=self.mix,
            answers=self.answers, max_gb=self.max_gb, seed=self.seed,
        )  # fmt: skip
        length: dict[str, Any] = {} if self.views is None else {"views": self.views}
        return answering, TrainConfig(head=self.head, seed=self.seed, **length)


def make_head(
    loading: Loading,
    out: Annotated[Path, Option("--out", metavar="DIR", help="Folder for everything; the head is in DIR/best.")],
    making: Making,
    name: Annotated[str | None, Argument(metavar="[MODEL]", help="The target; the same as --model.")] = None,
    prompts: PromptsOption = None,
    plan: Annotated[bool, Option("--plan", help="Only measure this machine and print the plan.")] = False,
    kv_dtype: KVDtypeOption = "auto",
    json_out: JsonOption = None,
) -> None:
    """Make a head for a model: answers, features, training and model card. Run again to resume.

    \b
    haast make-head Qwen/Qwen3-0.6B --prompts prompts.jsonl --out my-head
    haast make-head smollm2-135m-instruct --prompts prompts.jsonl --minutes 120 --out my-head
    """
    from haast.prompts import read_prompts
    from haast.target.kv_budget import KVBudget

    loading = loading if name is None else replace(loading, model=name)
    answering, settings = making.check()
    loading.check()
    if prompts is None:
        raise ValueError("make-head needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`)")
    chosen = read_prompts(prompts)
    check_writable(json_out)
    KVBudget(kv_dtype=kv_dtype)
    from haast.training.make_head import make_head as run
    from haast.training.make_head import plan_head, read_plan, settings_of

    shared = settings_of(loading.model, chosen, answering, settings, making.valid_limit, making.minutes)
    planned = read_plan(out, shared)
    target = loading.load()
    target.use_pool(kv_dtype=kv_dtype)
    if planned is None:
        _report("measuring this machine ...")
        planned = plan_head(target, chosen, answering, settings, making.minutes)
    for line in planned.lines():
        print(line, file=human_output(json_out), flush=True)
    if plan:
        return
    command = shlex.join(["haast", *sys.argv[1:]])
    try:
        result = run(
            target, loading.model, chosen, out, planned, shared, answering, settings,
            valid_limit=making.valid_limit, command=command, report=_report,
        )  # fmt: skip
    except KeyboardInterrupt:
        _report(f"\nstopped; what is finished is in {out}, the same command resumes from there")
        raise
    _report(f"the best head is in {out / 'best'}")
    write_json({"kind": "make-head", **result}, json_out)


def _report(line: str) -> None:
    typer.echo(line, err=True)
