"""Three speed measurements: linear layers against the roofline, speed by context length, and speed-up by tau.

    python benchmarks/speed.py roofline --json results/roofline.json
    python benchmarks/speed.py context --json results/context.json
    python benchmarks/speed.py oracle --json results/oracle.json

`oracle` replaces the drafts by tokens that are right with a given probability (the text is known), while the head still
runs: this is the speed of a better head of the same cost on this machine. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from haast import native
from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.cli.loading import OWN_PROMPTS
from haast.core import Accepted, SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.candidates import Candidates
from haast.drafters.eagle import EagleDrafter
from haast.drafters.pending_features import EagleState
from haast.drafters.tree_shape import DraftShape, shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.packing import PackedLinear
from haast.target.target import Target
from haast.tree import DraftTree

_ROWS = (1, 2, 4, 6, 8, 12, 16, 24)
_CONTEXTS = (128, 512, 2048, 4096)
_CHANCES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _seconds(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of `work`, after one warm-up."""
    work()
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        work()
        times.append(perf_counter() - begin)
    return median(times)


def roofline(target: Target, rounds: int) -> dict[str, Any]:
    """Time of all linear layers by rows, minus the time of the same number of tiny layers."""
    linears = [module for module in target.model.modules() if isinstance(module, PackedLinear)]
    size = sum(linear.packed.nbytes for linear in linears)
    parameters = sum(linear.in_features * linear.out_features for linear in linears)
    empty = PackedLinear(torch.zeros(16, 16))
    measured: dict[int, list[float]] = {rows: [] for rows in _ROWS}
    bandwidths, peaks = list[float](), list[float]()
    with target.step_threads():
        calls = _seconds(lambda: [empty(torch.zeros(1, 16)) for _ in linears], 50)
        for _ in range(rounds):
            bandwidths.append(native.read_bandwidth(256, 3))
            peaks.append(native.multiply_peak(3))
            for rows in _ROWS:
                inputs = {linear.in_features: torch.randn(rows, linear.in_features) for linear in linears}

                def work(inputs: dict[int, torch.Tensor] = inputs) -> None:
                    for linear in linears:
                        linear(inputs[linear.in_features])

                measured[rows].append(_seconds(work, 3) - calls)
    bandwidth, peak = median(bandwidths), median(peaks)
    points = []
    for rows, seconds in measured.items():
        least = max(size / bandwidth, 2 * parameters * rows / peak)
        points.append({"rows": rows, "ms": 1e3 * median(seconds), "roofline_ms": 1e3 * least})
        points[-1]["times"] = points[-1]["ms"] / points[-1]["roofline_ms"]
    return {"bandwidth": bandwidth, "peak": peak, "weight_bytes": size, "calls_ms": 1e3 * calls, "linears": points}


def _decode(target: Target, drafter: Drafter, prompts: Sequence[Sequence[int]], tokens: int) -> Stats:
    stats = Stats()
    for prompt in prompts:
        Engine(target, drafter).complete([prompt], SamplingParams(), StopParams(tokens), stats)
    return stats


def context(target: Target, drafter: EagleDrafter, encode: Callable[[str], list[int]], rounds: int) -> dict[str, Any]:
    """Tokens per second by context length, with the time to read keys and values."""
    text = [token for _ in range(40) for prompt in OWN_PROMPTS for token in encode(prompt)]
    config = target.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * 4 * target.layers * config.num_key_value_heads * dim  # per cached token, fp32
    measured: dict[int, dict[str, list[float]]] = {length: {} for length in _CONTEXTS}
    for _ in range(rounds):
        for length in _CONTEXTS:
            for name, own in (("vanilla", VanillaDrafter()), ("eagle", drafter)):
                stats = _decode(target, own, [text[:length]], 64)
                measured[length].setdefault(f"{name}_ms_verify", []).append(stats.ms_verify / stats.target_forwards)
                measured[length].setdefault(f"{name}_tokens_per_s", []).append(stats.tokens_per_s)
                measured[length].setdefault(f"{name}_tau", []).append(stats.tau)
    bandwidth = native.read_bandwidth()
    return {
        "bandwidth": bandwidth,
        "contexts": [
            {"context": length, **{name: median(values) for name, values in each.items()},
             "kv_read_ms": 1e3 * kv_bytes * (length + 32) / bandwidth}
            for length, each in measured.items()
        ],
    }  # fmt: skip


class Oracle(EagleDrafter):
    """An EAGLE drafter that knows the text: first drafts are right with probability `chance`. One request at a time."""

    chance: float
    text: list[int]  # prompt and answer
    _observed: int  # number of observed tokens, without the root

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> EagleState:
        self._observed = reused
        self._draws = random.Random(0)
        return super().begin(prompt, kv, reused)

    def observe(self, states: Sequence[EagleState], accepted: Accepted) -> None:
        super().observe(states, accepted)
        self._observed += len(accepted.host_tokens()[0])

    def propose(
        self, states: Sequence[EagleState], budget: int | None = None, others: Sequence[Candidates] | None = None
    ) -> DraftTree:
        tree = super().propose(states, budget, others)
        tokens, parents = tree.tokens.clone(), tree.parents[0].tolist()
        node, place, wrong = 0, self._observed + 1, (int(tokens[0, 0]) + 1) % 1000
        tokens[0, 1:] = wrong  # only the oracle's tokens can be right
        while place < len(self.text):
            child = next((i for i, parent in enumerate(parents) if parent == node), None)
            if child is None or self._draws.random() >= self.chance:
                break
            tokens[0, child] = self.text[place]
            node, place = child, place + 1
        return replace(tree, tokens=tokens)


def oracle(target: Target, prompts: Sequence[list[int]], shapes: Sequence[DraftShape], rounds: int) -> dict[str, Any]:
    """Speed-up of chains whose drafts are right with each of `_CHANCES`."""
    tokens, points = 96, list[dict[str, Any]]()
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    vanilla: list[float] = []
    texts: list[list[int]] = []
    for prompt in prompts:
        (answer,) = Engine(target, VanillaDrafter()).complete([prompt], SamplingParams(), StopParams(tokens))
        texts.append([*prompt, *answer])
    drafter = Oracle(target, load_head(folder))
    for shape in shapes:
        drafter.reshape(shape)
        for chance in _CHANCES:
            drafter.chance = chance
            speeds, stats = list[float](), Stats()
            for _ in range(rounds):
                vanilla.append(_decode(target, VanillaDrafter(), prompts[:1], tokens).tokens_per_s)
                stats = Stats()
                for prompt, text in zip(prompts, texts, strict=True):
                    drafter.text = text
                    Engine(target, drafter).complete([prompt], SamplingParams(), StopParams(tokens), stats)
                speeds.append(stats.tokens_per_s)
            points.append(
                {"depth": shape.depth, "nodes": shape.depth + 1, "chance": chance, "tau": stats.tau,
                 "tokens_per_s": median(speeds)}
            )  # fmt: skip
    one = median(vanilla)
    for point in points:
        point["speedup"] = point["tokens_per_s"] / one
    return {"vanilla_tokens_per_s": one, "oracle": points}


def main() -> None:
    """Run one of the three measurements and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("roofline", "context", "oracle"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    with Progress(arguments.what):
        if arguments.what == "roofline":
            result = roofline(target, arguments.rounds)
        elif arguments.what == "context":
            drafter = EagleDrafter(target, load_head(folder), shape_for(6))
            result = context(target, drafter, encoder.encode, arguments.rounds)
        else:
            shapes = [DraftShape("chain", depth) for depth in (3, 5, 7)]
            result = oracle(target, [encoder.encode(prompt) for prompt in OWN_PROMPTS[:4]], shapes, arguments.rounds)
    result = {"kind": arguments.what, **result}
    result["environment"] = environment(target, DEFAULT_MODEL, None, 0, {"rounds": arguments.rounds})
    write_json(result, str(arguments.json))
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
