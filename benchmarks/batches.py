"""Tokens per second by batch size, vanilla and EAGLE interleaved, for batches of different prompts.

    python benchmarks/batches.py --prompts prompts.jsonl --calibration calibration.json --json results/batches.json

The prompts of a file are split into batches of each size, so every size answers the same prompts. A finished row leaves
its batch. EAGLE drafts as the calibration recommends for the number of rows ("as pays"), or trees of one fixed size.
Run `haast calibrate --out calibration.json` on the same machine before, and nothing else on it meanwhile.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.cli.loading import read_prompt_file
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.calibrated import apply_calibration, find_calibration
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, Step, StopParams
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.tuning.calibration import Calibration

_SIZES = (1, 2, 4, 8, 16, 32)
_TREES = (3, 4, 6)  # nodes; a node costs more in larger batches


class Arm:
    """One decoder and its measurements, by batch size."""

    def __init__(self, name: str, drafter: Drafter) -> None:
        self.name, self.drafter = name, drafter
        self.speeds: dict[int, list[float]] = {}
        self.taus: dict[int, float] = {}
        self.undrafted: dict[int, float] = {}  # share of steps without a draft

    def measure(self, target: Target, prompts: list[list[int]], size: int, tokens: int) -> None:
        """Answer all prompts, `size` at a time, and add up times and counts."""
        total, steps = Stats(), list[bool]()

        def watch(step: Step) -> None:
            steps.append(step.tree.nodes == 1)

        for begin in range(0, len(prompts), size):
            stats, stop = Stats(), StopParams(tokens, target.end_ids)
            batch = prompts[begin : begin + size]
            for _ in Engine(target, self.drafter).run(batch, SamplingParams(), stop, stats, watch=watch):
                continue
            for name in ("decoded_tokens", "target_forwards", "ms_draft", "ms_verify", "ms_overhead"):
                setattr(total, name, getattr(total, name) + getattr(stats, name))
        self.speeds.setdefault(size, []).append(total.tokens_per_s)
        self.taus[size], self.undrafted[size] = total.tau, sum(steps) / max(len(steps), 1)

    def point(self, size: int) -> dict[str, Any]:
        """The result of one batch size, with the median speed over rounds."""
        return {
            "decoder": self.name,
            "batch": size,
            "tokens_per_s": median(self.speeds[size]),
            "tau": self.taus[size],
            "undrafted": self.undrafted[size],
        }


def arms(target: Target, calibration: Calibration) -> list[Arm]:
    """Vanilla, EAGLE as pays, and fixed trees. Each loads a head, because a drafter owns its head."""
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"

    def eagle(nodes: int = 0) -> EagleDrafter:
        drafter = EagleDrafter(target, load_head(folder), shape_for(nodes or 6))
        if not nodes and not apply_calibration(drafter, calibration):
            raise ValueError("the calibration found that drafting is not faster here even for one row")
        return drafter

    return [
        Arm("vanilla", VanillaDrafter()),
        Arm("eagle, as pays", eagle()),
        Arm("eagle+suffix, as pays", HybridDrafter(eagle())),
        *(Arm(f"eagle, {nodes} nodes", eagle(nodes)) for nodes in _TREES),
    ]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    chosen = read_prompt_file(arguments.prompts, arguments.limit)
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    prompts = [encoder.encode(prompt.turns[0]) for prompt in chosen]
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    calibration = find_calibration(target, EagleDrafter(target, load_head(folder)), arguments.calibration)
    assert calibration is not None, "--calibration names a file"
    decoders = arms(target, calibration)
    decoders[0].measure(target, prompts[:2], 2, 16)  # warm-up
    decoders[0].speeds.clear()
    with Progress("batches", "measurements", arguments.rounds * len(_SIZES) * len(decoders)) as progress:
        for _ in range(arguments.rounds):
            for size in _SIZES:
                for arm in decoders:
                    arm.measure(target, prompts, size, arguments.max_new_tokens)
                    progress.step()
    result: dict[str, Any] = {"kind": "batches", "batches": [arm.point(size) for arm in decoders for size in _SIZES]}
    result["chosen"] = {
        rows: {"shape": batch.shape, "expected": batch.expected} for rows, batch in calibration.batches.items()
    }
    settings = {"rounds": arguments.rounds, "max_new_tokens": arguments.max_new_tokens}
    result["environment"] = environment(target, DEFAULT_MODEL, arguments.prompts, len(prompts), settings)
    write_json(result, str(arguments.json))


if __name__ == "__main__":
    main()
