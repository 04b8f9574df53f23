"""Tokens a second by batch size: rows of unequal prompts decoded together, vanilla and EAGLE interleaved.

    python benchmarks/batches.py --prompts prompts.jsonl --json results/batches.json

The prompts of a file are cut into batches of each size, so every size answers the same prompts. A row leaves when it is
done. Run nothing beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.cli.boundary import write_json
from haast.cli.loading import read_prompt_file
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine import Engine, Stats, StopConfig
from haast.heads.checkpoint import load_head
from haast.models import DEFAULT_MODEL, load_target
from haast.sampling import SamplingConfig
from haast.target import Target
from haast.training.frozen import end_tokens

_SIZES = (1, 2, 4, 8)
_TREES = (3, 4, 6)  # nodes: the more rows, the dearer a node


def measure(target: Target, drafter: Drafter, prompts: list[list[int]], size: int, tokens: int) -> Stats:
    """All prompts, `size` at a time; times and counts added up."""
    total = Stats()
    for begin in range(0, len(prompts), size):
        stats, stop = Stats(), StopConfig(tokens, end_tokens(target))
        Engine(target, drafter).complete(prompts[begin : begin + size], SamplingConfig(), stop, stats)
        for name in ("decoded_tokens", "target_forwards", "ms_draft", "ms_verify", "ms_overhead"):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
    return total


def batches(target: Target, prompts: list[list[int]], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One point per decoder, tree and size: medians over rounds."""
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    eagle = EagleDrafter(target, load_head(folder), shape_for(_TREES[0]))
    speeds: dict[tuple[str, int, int], list[float]] = {}
    taus: dict[tuple[str, int, int], float] = {}
    for _ in range(rounds):
        for size in _SIZES:
            for nodes in (1, *_TREES):
                if nodes > 1:
                    eagle.reshape(shape_for(nodes))
                drafter: Drafter = VanillaDrafter() if nodes == 1 else eagle
                found = measure(target, drafter, prompts, size, tokens)
                speeds.setdefault((drafter.name, nodes, size), []).append(found.tokens_per_s)
                taus[drafter.name, nodes, size] = found.tau
    return [
        {"decoder": name, "nodes": nodes, "batch": size, "tokens_per_s": median(each), "tau": taus[name, nodes, size]}
        for (name, nodes, size), each in speeds.items()
    ]


def main() -> None:
    """Measure and write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--prompts", type=Path, required=True)
    words.add_argument("--limit", type=int, default=16)
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--rounds", type=int, default=2)
    words.add_argument("--json", type=Path, required=True)
    given = words.parse_args()
    chosen = read_prompt_file(given.prompts, given.limit)
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    prompts = [encoder.encode(prompt.turns[0]) for prompt in chosen]
    measure(target, VanillaDrafter(), prompts[:2], 2, 16)  # warm-up
    found: dict[str, Any] = {"batches": batches(target, prompts, given.max_new_tokens, given.rounds)}
    settings = {"rounds": given.rounds, "max_new_tokens": given.max_new_tokens}
    found["environment"] = environment(target, DEFAULT_MODEL, given.prompts, len(prompts), settings)
    write_json(found, str(given.json))


if __name__ == "__main__":
    main()
