"""A block head against a one-layer EAGLE head: trained on the same shards for the same time, drafting the same prompts.

Each head's speed of training is measured first, so that the learning rate's schedule ends with the time. Then tau of
both at several tree sizes, and the time of a draft. The block head drafts twice: with children that depend on their
real parent, and with the same children for all nodes of a depth (those of the likeliest path).

    haast train --head eagle3 --answers answers.jsonl --shards features/ --out any --views 1     # writes the shards
    python benchmarks/block_drafter.py --shards features --prompts valid.jsonl --seconds 3600 --out runs \\
        --json results/block-drafter.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from haast.api import Haast
from haast.bench.report import environment
from haast.core import SamplingParams
from haast.drafters.block import BlockDrafter
from haast.drafters.calibrated import draft_ms
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.training import TrainConfig, TrainingData, train

_ARMS = {"EAGLE, 1 layer": "feat-extrapolator", "block": "block"}  # each with the recipe of docs/training.md


@dataclass(frozen=True)
class Row:
    """A tree size of one head. `draft_ms` is the minimum over a few drafts of two new tokens."""

    head: str
    branches: str
    nodes: int
    tau: float
    first: float
    draft_ms: float


def trained(name: str, target: Target, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one head for the given seconds; returns its folder, the views, and the time that they took."""
    data = TrainingData(shards=Path(arguments.shards))
    often: dict[str, Any] = {"evaluate_every": 2**40, "checkpoint_every": 2**40, "log_every": 2**40}
    often |= {"views": arguments.trial_views, "draft_vocab": arguments.draft_vocab}
    settings = TrainConfig(head=_ARMS[name], **often)
    folder = Path(arguments.out) / name.split(",")[0].lower()
    trial = train(target, data, folder.with_name(f"{folder.name}-trial"), settings, limit=arguments.limit)
    views = max(int(arguments.trial_views * arguments.seconds / trial["seconds"]), 1)
    found = train(target, data, folder, replace(settings, views=views), limit=arguments.limit)
    return {
        "head": name, "views": views, "seconds": found["seconds"], "ce": found.get("valid_ce"),
        "settings": {key: str(value) for key, value in asdict(replace(settings, views=views)).items()},
        "folder": found["head"],
    }  # fmt: skip


def measured(
    name: str, branches: str, drafter: EagleDrafter, target: Target, prompts: list[list[int]], new: int
) -> Row:
    """Greedy tau on the prompts, and the time of a draft."""
    stats = Stats()
    stop = StopParams(new, Haast(target, drafter).eos_ids())
    Engine(target, drafter).complete(prompts, SamplingParams(), stop, stats)
    first = stats.acceptance_by_depth[0] if stats.acceptance_by_depth else 0.0
    return Row(name, branches, drafter.nodes, stats.tau, first, draft_ms(target, drafter))


def rows_of(
    name: str, folder: str, target: Target, prompts: list[list[int]], arguments: argparse.Namespace
) -> list[Row]:
    """All tree sizes of one head."""
    rows = []
    for nodes in arguments.nodes:
        for conditioned in (True, False):
            head = load_head(Path(folder))
            if name == "block":
                drafter: Any = BlockDrafter(target, head, conditioned=conditioned)
                drafter.reshape(drafter.suited(shape_for(nodes)))
                branches = "by parent" if conditioned else "by depth"
            elif conditioned:
                drafter, branches = head_drafter(target, head, shape_for(nodes)), "by parent"
            else:
                continue
            rows.append(measured(name, branches, drafter, target, prompts, arguments.tokens))
    return rows


def main() -> None:
    """Train, measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--shards", required=True, help="with the states that EAGLE-3 heads read")
    parser.add_argument("--prompts", required=True, help="validation prompts, never trained on")
    parser.add_argument("--seconds", type=float, required=True, help="of training, for each head")
    parser.add_argument("--trial-views", type=int, default=20_000, help="for measuring the speed of training")
    parser.add_argument("--limit", type=int, help="most sequences that are trained on")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--valid-limit", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--nodes", type=int, nargs="+", default=[6, 12, 60])
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    target = load_target(arguments.model)
    encoder = Haast(target, VanillaDrafter())
    prompts = [encoder.encode(prompt.turns[0]) for prompt in read_prompts(arguments.prompts, arguments.valid_limit)]
    runs = [trained(name, target, arguments) for name in _ARMS]
    with Progress("tau", "heads", len(runs)) as progress:
        rows = list[Row]()
        for run in runs:
            rows += rows_of(run["head"], run["folder"], target, prompts, arguments)
            progress.step()
    settings = {key: str(value) for key, value in vars(arguments).items()}
    document = {
        "kind": "block-drafter", "rows": [asdict(row) for row in rows], "training": runs,
        "environment": environment(target, arguments.model, Path(arguments.prompts), len(prompts), settings),
    }  # fmt: skip
    write_json(document, arguments.json)


if __name__ == "__main__":
    main()
