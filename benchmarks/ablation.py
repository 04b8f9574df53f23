"""Ablation of training settings: the quality and speed of a head per setting, with equal data and equal training time.

    python benchmarks/ablation.py --shards features/ --valid-prompts valid.jsonl --json results/ablation.json

Each row changes one part of the base. Its training speed is measured first, and it trains on as many tokens as fit into
--seconds, so a setting that costs twice as much per supervised token sees half the tokens. Rows that are in the JSON
are kept, so the same command resumes. tau and times are measured with the engine on validation prompts.

Data: --shards hold the target's own answers with the states of several layers (`haast train --head eagle3 --shards`
writes them); --more-shards more answers, for the rows with 2x and 4x data; --given-shards text that the target did not
generate. The rows by temperature have equally many supervised tokens, from --shards first, then --more-shards.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from haast.api import Haast
from haast.bench.report import environment
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.files import write_json
from haast.heads.checkpoint import Head, build_module
from haast.heads.config import HeadConfig
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import load_target
from haast.target.target import Target
from haast.training.answers import record_key
from haast.training.batches import Example
from haast.training.config import TrainConfig
from haast.training.initialise import last_layer_weights
from haast.training.optimizer import matmul_precision
from haast.training.run import head_config
from haast.training.shards import read_shards
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

_PROBE_SECONDS = 8.0  # of training, to measure the speed of a row
_VANILLA_PROMPTS = 4  # prompts that time a one-token forward, together with each head
# (nodes, number of prompts; None: all, temperature)
_TREES = {"small": (6, None, 0.0), "large": (60, 10, 0.0), "sampled": (60, 10, 1.0)}


@dataclass(frozen=True)
class Row:
    """One row: the settings that differ from the base."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Callable[[HeadConfig], Any]] = field(default_factory=dict)  # of the head, from the usual ones
    data: str = "own"
    times: int = 1  # amount of data, as a multiple of the base


ROWS = (
    Row("base"),
    Row("alignment, 2 steps", {"alignment_steps": 2}),
    Row("alignment, 3 steps", {"alignment_steps": 3}),
    Row("alignment, 2 steps, after 70 %", {"alignment_steps": 2, "align_after": 0.7}),
    Row("alignment, 2 steps, weighted by reach", {"alignment_steps": 2, "reach_weights": True}),
    Row("EAGLE-3 head", {"head": "eagle3"}),
    Row("EAGLE-3 head, 3 steps", {"head": "eagle3", "alignment_steps": 3}),
    Row("EAGLE-3 head, 3 steps, normed states", {"head": "eagle3", "alignment_steps": 3, "fc_norm": True}),
    Row("draft vocabulary 4k", {"draft_vocab": 4096}),
    Row("draft vocabulary 16k", {"draft_vocab": 16384}),
    Row("draft vocabulary full", {"draft_vocab": 10**6}),
    Row("given text", data="given"),
    Row("answers of all temperatures", data="mixed"),
    Row("greedy answers", data="greedy"),
    Row("answers at temperature 1", data="sampled"),
    Row("random start", {"initialisation": "random"}),
    Row("teacher's first choice only", {"teacher_top": 1}),
    Row("data 2x", times=2),
    Row("data 4x", times=4),
    Row("feature noise 0.2", {"feature_noise": 0.2}),
    Row("acceptance loss (LK) after half", {"lk_after": 0.5}),
    Row("rejected drafts count double", {"rejected_weight": 2.0}),
    Row("Markov bias, rank 64", {"markov_rank": 64}),
    Row("two layers", {"layers": 2}),
    Row("reads low, middle and high layers", {"context_layers": "2,15,27"}),
    Row("q/k norms", sizes={"qk_norm": lambda _: True}),
    Row("MLP twice as wide", sizes={"intermediate_size": lambda usual: 2 * usual.intermediate_size}),
    Row("no feature loss", {"feature_weight": 0.0}),
    Row("average of weights", {"ema": 0.99}),
    Row("fp32 products", {"mixed_precision": "no"}),
    Row("AdamW", {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.01}),
)


class Bench:
    """The target and the prompts, to measure heads on."""

    def __init__(self, target: Target, prompts: list[str], tokens: int) -> None:
        self.target, encoder = target, Haast(target, VanillaDrafter())
        self._prompts, self._tokens, self._eos = [encoder.encode(p) for p in prompts], tokens, encoder.eos_ids()
        self._initial: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def start(self, sizes: HeadConfig, examples: list[Example]) -> dict[str, Tensor]:
        """Initial weights from the target's last layer, computed once per choice of data."""
        choice = tuple(map(id, examples))
        if choice not in self._initial:
            self._initial[choice] = last_layer_weights(self.target, sizes, examples)
        return self._initial[choice]

    def run(self, drafter: Drafter, limit: int | None = None, temperature: float = 0.0) -> Stats:
        """Decode the prompts."""
        stats, params = Stats(), SamplingParams(temperature=temperature)
        for prompt in self._prompts[:limit]:
            Engine(self.target, drafter).complete([prompt], params, StopParams(self._tokens, self._eos), stats)
        return stats

    def measure(self, head: Head) -> dict[str, Any]:
        """Per tree size: tau, the costs c (of a draft level), v and o in target forwards, and the speed-up."""
        measured: dict[str, Any] = {}
        for name, (nodes, limit, temperature) in _TREES.items():
            shape = shape_for(nodes)
            drafter = EagleDrafter(self.target, copy.deepcopy(head), shape)
            vanilla, own = self.run(VanillaDrafter(), _VANILLA_PROMPTS), self.run(drafter, limit, temperature)
            one = vanilla.ms_decode / vanilla.target_forwards
            steps = own.target_forwards
            measured[name] = {
                "nodes": nodes,
                "depth": shape.depth,
                "tau": own.tau,
                "c": own.ms_draft / steps / shape.depth / one,
                "v": own.ms_verify / steps / one,
                "o": own.ms_overhead / steps / one,
                "speedup": own.tau * one * steps / own.ms_decode,
                "alpha_by_depth": own.alpha_by_depth,
            }
        return measured


@torch.no_grad()
def grown(start: dict[str, Tensor], sizes: HeadConfig, drafted: int) -> dict[str, Tensor]:
    """Weights of a larger head that computes what `start` does: what is added writes zeros (but for q/k norms)."""
    weights = dict[str, Tensor]()
    for name, value in build_module(sizes, drafted).state_dict().items():
        known = start.get(name.replace("layers.1.", "layers.0."))
        if known is not None and value.dim() == 2 and not name.endswith("fc.weight"):
            value.normal_(std=float(known.std()))
        if name.endswith(("o_proj.weight", "down_proj.weight", "markov.rows.weight", "context.weight")):
            value.zero_()
        if name in start:
            value[tuple(map(slice, start[name].shape))] = start[name]
        weights[name] = value
    return weights


def train_row(
    row: Row, base: TrainConfig, bench: Bench, data: dict[str, list[Example]], seconds: float
) -> dict[str, Any]:
    """Train and measure one row."""
    config = replace(base, **row.settings)
    size = len(data["own"]) * row.times
    examples = (data["own"] + data["more"])[:size] if row.data == "own" else data[row.data]
    plain, frozen = head_config(config, bench.target), TargetWeights.of(bench.target)
    assert isinstance(plain, HeadConfig), "every row trains an EAGLE head"
    sizes, start = replace(plain, **{name: change(plain) for name, change in row.sizes.items()}), None
    if config.head != "eagle3" and config.initialisation != "random":
        one = FeatExtrapolatorConfig.for_target(bench.target.config, inputs=config.inputs)
        start = grown(bench.start(one, examples), sizes, min(config.draft_vocab, sizes.vocab_size))
    parts = (sizes, frozen, examples, data["valid"])
    with TemporaryDirectory() as folder:
        late = replace(config, views=10**9, align_after=0.0)
        rate = _speed(Trainer(late, *parts, Path(folder) / "late", start_from=start, quiet=True))
        if config.align_after:
            early = replace(late, alignment_steps=1)
            first = _speed(Trainer(early, *parts, Path(folder) / "early", start_from=start, quiet=True))
            rate = 1 / (config.align_after / first + (1 - config.align_after) / rate)
        views = max(int(rate * seconds), 1000)
        run = Trainer(replace(config, views=views), *parts, Path(folder) / "run", start_from=start, quiet=True)
        result = run.run()
        head = Head(run.plain_head().requires_grad_(False), run.draft_vocab, {})
    return {
        "row": row.name,
        "settings": row.settings | {name: getattr(sizes, name) for name in row.sizes},
        "data": {
            "kind": row.data,
            "sequences": len(examples),
            "supervised_tokens": _supervised(examples),
        },
        "views": views,
        "views_per_s": rate,
        "mixed_precision": run.config.mixed_precision,
        "seconds": result["seconds"],
        "parameters": sum(p.numel() for p in head.module.parameters()),
        **{name: value for name, value in result.items() if name.startswith("valid")},
        **bench.measure(head),
    }


def _speed(trainer: Trainer) -> float:
    """Supervised tokens per second, after two warm-up batches."""
    order = trainer._order.batches()
    with matmul_precision(trainer.config.matmul_precision):
        for _ in range(2):
            trainer._advance(order)
        begin, before = time.monotonic(), trainer._state.views
        while time.monotonic() - begin < _PROBE_SECONDS:
            trainer._advance(order)
    return (trainer._state.views - before) / (time.monotonic() - begin)


def main() -> None:
    """Run the rows that are not in the JSON yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--more-shards", type=Path)
    parser.add_argument("--given-shards", type=Path)
    parser.add_argument("--valid-prompts", type=Path, required=True)
    parser.add_argument("--valid-limit", type=int, default=20)
    parser.add_argument("--valid-tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", help="row names, separated by semicolons; default: all")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    base = TrainConfig(
        batch_tokens=3072, alignment_steps=1, feature_noise=0.0, evaluate_every=10**9,
        log_every=10**9, checkpoint_every=10**9,
    )  # fmt: skip
    target = load_target(arguments.model)
    bench = Bench(
        target,
        [p.turns[0] for p in read_prompts(arguments.valid_prompts, arguments.valid_limit)],
        arguments.valid_tokens,
    )
    data = _data(arguments)
    done: dict[str, Any] = {"kind": "ablation", "rows": []}
    if arguments.json.exists():
        done |= json.loads(arguments.json.read_text())
    wanted = None if arguments.rows is None else arguments.rows.split(";")
    for row in ROWS:
        measured = {r["row"] for r in done["rows"]}
        if row.name in measured or (wanted is not None and row.name not in wanted) or not data[row.data]:
            continue
        if row.data == "own" and len(data["own"]) + len(data["more"]) < len(data["own"]) * row.times:
            print(
                f"{row.name}: skipped, because it needs {row.times} times the sequences of --shards: give --more-shards"
            )
            continue
        begin = time.monotonic()
        with Progress(row.name):
            done["rows"].append(train_row(row, base, bench, data, arguments.seconds))
        done |= {
            "environment": environment(
                target, arguments.model, arguments.valid_prompts, arguments.valid_limit, {"seconds": arguments.seconds}
            ),
            "base": {name: getattr(base, name) for name in base.__dataclass_fields__},
            "seconds_per_row": arguments.seconds,
            "measured_on": f"{arguments.valid_limit} validation prompts, {arguments.valid_tokens} new tokens; greedy "
            "except `sampled`",
        }
        write_json(done, str(arguments.json))
        print(_line(done["rows"][-1]), f"({time.monotonic() - begin:.0f} s)", flush=True)


def _data(arguments: argparse.Namespace) -> dict[str, list[Example]]:
    own, records = read_shards(arguments.shards)
    keys, more = {record_key(record) for record in records}, list[Example]()
    temperatures = {id(example): record.get("temperature") for example, record in zip(own, records, strict=True)}
    if arguments.more_shards is not None:
        pairs = [
            pair for pair in zip(*read_shards(arguments.more_shards), strict=True) if record_key(pair[1]) not in keys
        ]
        more = [example for example, _ in pairs]
        temperatures |= {id(example): record.get("temperature") for example, record in pairs}
    other = [] if arguments.given_shards is None else read_shards(arguments.given_shards)[0]
    for examples in (own, more, other):  # shards are sorted by length
        random.Random(0).shuffle(examples)
    valid = own[arguments.sequences : arguments.sequences + 150]
    free = [example for example in [*own, *more] if all(example is not each for each in valid)]
    by_temperature = {
        "mixed": free,
        "greedy": [example for example in free if temperatures[id(example)] == 0],
        "sampled": [example for example in free if temperatures[id(example)] == 1],
    }
    least = min(_supervised(each[: arguments.sequences]) for each in by_temperature.values())
    equal = {name: [_bare(example) for example in _first(each, least)] for name, each in by_temperature.items()}
    return {
        "own": own[: arguments.sequences],
        "more": more,
        "given": other[: arguments.sequences],
        "valid": valid,
        **equal,
    }


def _bare(example: Example) -> Example:
    """Without captured states, which not all shards have."""
    return replace(example, hidden=example.features[:, :0])


def _supervised(examples: list[Example]) -> int:
    return sum(int(example.supervised.sum()) for example in examples)


def _first(examples: list[Example], tokens: int) -> list[Example]:
    """The first examples that have `tokens` supervised tokens together."""
    count, found = 0, 0
    while found < tokens:
        found += int(examples[count].supervised.sum())
        count += 1
    return examples[:count]


def _line(row: dict[str, Any]) -> str:
    small, large = row["small"], row["large"]
    return (
        f"{row['row']:40s} tokens {row['views'] / 1e3:5.0f}k  ce {row['valid_ce']:.3f}  tau {small['tau']:.3f} / "
        f"{large['tau']:.3f}  c {small['c']:.3f}  speed-up {small['speedup']:.2f}"
    )


if __name__ == "__main__":
    main()
