"""From prompts to a measured head: answers, features, training, in one folder that every run continues.

Owns the order of the stages, and the settings that a later run must share. Each stage finds its own unfinished output,
so after Ctrl-C, SIGKILL or a full disk the same call goes on where it was.

    OUT/make-head.json   settings and plan, written before the first stage
    OUT/answers.jsonl    see `regenerate`
    OUT/features/        see `features`
    OUT/best/            the head; checkpoints and metrics in OUT, see `trainer`
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from haast.files import write_json
from haast.prompts import Prompt
from haast.target.target import Target
from haast.training.checkpoints import write_probe
from haast.training.config import RegenerateConfig, TrainConfig, TrainingData
from haast.training.dataset import Report, read_inputs
from haast.training.generation_queue import AnswerRun
from haast.training.plan import Plan, make_plan, measure_rates
from haast.training.regenerate import regenerate
from haast.training.run import layer_ids, prepare

_LOG = logging.getLogger("haast.training")


def settings_of(
    model: str,
    prompts: Sequence[Prompt],
    answering: RegenerateConfig,
    settings: TrainConfig,
    valid_limit: int,
    minutes: float | None,
) -> dict[str, Any]:
    """The settings that all runs in a folder share."""
    kept = [[prompt.id, prompt.turns, prompt.category] for prompt in prompts]
    texts = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    own = {name: value for name, value in asdict(answering).items() if name not in ("batch", "shards", "max_gb")}
    return {
        "model": model,
        "prompts": f"{len(prompts)} prompts, {texts}",
        "minutes": minutes,
        "valid_limit": valid_limit,
        "answering": own,
        "training": asdict(settings),
    }


def read_plan(out: Path, shared: dict[str, Any]) -> Plan | None:
    """The plan of an earlier run in `out`; None if there is none.

    Raises:
        ValueError: `out` cannot be written, or was begun with other settings (the message names them).
    """
    write_probe(out)
    path = out / "make-head.json"
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        then, plan = document["settings"], document["plan"]
        then["training"] = asdict(TrainConfig()) | then["training"]  # folders of before some settings existed
        if shared["training"]["mixed_precision"] == "auto":  # training goes on in the precision it began with
            then["training"]["mixed_precision"] = "auto"
        then_flat, now_flat = _flat(then), _flat(shared)
        found = Plan(**plan | {"minutes": tuple(plan["minutes"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start again, the answers are kept") from error
    names = sorted({*then_flat, *now_flat})
    changed = {n[-1]: (then_flat.get(n), now_flat.get(n)) for n in names if then_flat.get(n) != now_flat.get(n)}
    if changed:
        raise ValueError(
            f"{out} was begun with other settings; (then, now): {changed}. Use the same settings, or another folder"
        )
    return found


def _flat(settings: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Settings by their path: answering and training have some of the same names."""
    flat = dict[tuple[str, ...], Any]()
    for name, value in settings.items():
        flat |= {(name, own): each for own, each in value.items()} if isinstance(value, dict) else {(name,): value}
    return flat


def plan_head(
    target: Target,
    prompts: Sequence[Prompt],
    answering: RegenerateConfig,
    settings: TrainConfig,
    minutes: float | None = None,
) -> Plan:
    """Measure this machine's rates, and plan. Nothing is written. Raises ValueError if `minutes` are too few."""
    return make_plan(measure_rates(target, prompts, answering, settings), prompts, answering, settings, minutes)


def make_head(
    target: Target,
    name: str,
    prompts: Sequence[Prompt],
    out: Path,
    plan: Plan,
    shared: dict[str, Any],
    answering: RegenerateConfig,
    settings: TrainConfig,
    *,
    valid_limit: int = 12,
    command: str = "",
    report: Report = _LOG.info,
) -> dict[str, Any]:
    """Run the stages, or go on with them.

    Args:
        target: the model.
        name: its name.
        prompts: of the whole file.
        out: folder of everything.
        plan: from `plan_head`, or `read_plan` of an earlier run.
        shared: from `settings_of`; stored, and compared by `read_plan`.
        answering: how answers are generated; `plan` has their number.
        settings: of the trainer; `plan` has the views if these do not.
        valid_limit: most held-out prompts for measuring tau.
        command: for the model card.
        report: called with one line per stage, and with warnings.

    Returns:
        See `haast.training.train`.

    Raises:
        ValueError: an error of a stage; what is finished is kept.
    """
    if target.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot answer prompts")
    write_json({"settings": shared, "plan": asdict(plan)}, out / "make-head.json")
    report("1 of 3: answers")
    answers, features = out / "answers.jsonl", out / "features"
    # A head that reads features alone gets them from the generation itself; others need more states of the text.
    shards = None if layer_ids(settings, target) else features
    answering = replace(answering, answers=plan.answers, shards=shards)
    outcome = regenerate(target, AnswerRun(target.tokenizer, prompts, answers, answering, name))
    left = f"{outcome.looped} cut at a loop, {outcome.duplicates} near-duplicate prompts, {outcome.left_out} left out"
    report(f"{outcome.before + outcome.added} answers ({left})")
    report("2 of 3: features")
    data = TrainingData(answers=answers, shards=features, valid_limit=valid_limit, max_gb=answering.max_gb)
    records, valid = read_inputs(data, None)
    run = prepare(target, name, data, settings, records, command=command, report=report)
    run.plan = {"answers": plan.answers, **{each: shared["answering"][each] for each in ("mix", "lengths", "turns")}}
    run.plan |= {"temperatures": answering.temperatures, "estimated_minutes": round(sum(plan.minutes), 1)}
    report("3 of 3: training")
    resume = any(out.glob("state-*.pt"))
    return run.train(out, valid, data.valid_tokens, data.valid_nodes, None, resume, Console(stderr=True))
