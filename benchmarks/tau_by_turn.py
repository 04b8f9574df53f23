"""tau of the learned head alone by turn of a dialogue, length of the answer, tree size and temperature.

    python benchmarks/tau_by_turn.py --prompts mt_bench.jsonl --limit 40 --json results/tau-by-turn.json

The target answers the first turn, then again with a longer answer, and the second turn after the shorter one. The heads
of several folders are measured on the same prompts, in turn (`--heads`). Nothing is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import shape_for
from haast.engine.engine import Engine, Stats, StopParams
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.prompts import Prompt, read_prompts
from haast.stats import TAU_CONVENTION, loops
from haast.target.load import DEFAULT_MODEL, load_target

NODES = (6, 12, 60)


@dataclass
class Taus:
    """Decoded tokens and target forwards of some answers."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    looping: list[bool] = field(default_factory=list)

    def add(self, stats: Stats, answer: list[int]) -> None:
        """Add one answer."""
        self.steps.append((stats.decoded_tokens, stats.target_forwards))
        self.looping.append(loops(answer))

    def summary(self) -> dict[str, Any]:
        """tau, and tau without looping answers."""
        straight = [steps for steps, looping in zip(self.steps, self.looping, strict=True) if not looping]
        return {
            "tau": _ratio(self.steps),
            "tau_loop_filtered": _ratio(straight),
            "answers": len(self.steps),
            "looping": sum(self.looping),
        }


def _ratio(steps: list[tuple[int, int]]) -> float:
    return sum(tokens for tokens, _ in steps) / max(sum(forwards for _, forwards in steps), 1)


def measure(
    haast: Haast, engine: Engine, prompts: list[Prompt], tokens: int, longer: int, temperature: float
) -> dict[str, Any]:
    """The summaries of first turns, of second turns and of longer answers."""
    first, second, long = Taus(), Taus(), Taus()
    sampling = SamplingParams(temperature=temperature)
    short_stop, long_stop = (StopParams(count, haast.eos_ids()) for count in (tokens, longer))

    def answer(messages: list[dict[str, str]], stop: StopParams, into: Taus) -> str:
        stats = Stats()
        (ids,) = engine.complete([haast.encode(messages)], sampling, stop, stats)
        into.add(stats, ids)
        return str(haast.tokenizer.decode(ids, skip_special_tokens=True))

    with Progress("answers", "prompts", len(prompts)) as progress:
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt.turns[0]}]
            said = answer(messages, short_stop, first)
            if longer:
                answer(messages, long_stop, long)
            if len(prompt.turns) > 1:
                followed = {"role": "assistant", "content": said}, {"role": "user", "content": prompt.turns[1]}
                answer([*messages, *followed], short_stop, second)
            progress.step(1)
    found = {"first": first, "second": second, "long": long}
    return {name: taus.summary() for name, taus in found.items() if taus.steps}


def main() -> None:
    """Measure every head with every tree and temperature, and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--heads", default="default", help="folders, separated by commas; default: the shipped one")
    parser.add_argument("--nodes", default=",".join(map(str, NODES)))
    parser.add_argument("--depth", type=int, help="levels below the root; by --nodes if absent")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--longer", type=int, default=512, help="tokens of the longer answers; 0: none")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    target, rows = load_target(DEFAULT_MODEL), list[dict[str, Any]]()
    prompts = read_prompts(arguments.prompts, arguments.limit, spread=True)
    settings = {"tokens": arguments.tokens, "longer": arguments.longer}
    where = environment(target, DEFAULT_MODEL, arguments.prompts, len(prompts), settings)
    for temperature in map(float, arguments.temperatures.split(",")):
        for nodes in map(int, arguments.nodes.split(",")):
            for name in arguments.heads.split(","):
                folder = find_head(name, DEFAULT_MODEL)
                assert folder is not None, "a head is named"
                drafter = EagleDrafter(target, load_head(folder), shape_for(nodes, depth=arguments.depth))
                haast, engine = Haast(target, drafter), Engine(target, drafter)
                found = measure(haast, engine, prompts, arguments.tokens, arguments.longer, temperature)
                rows.append({"head": name, "nodes": nodes, "temperature": temperature, **found})
                print(
                    name, nodes, temperature, {turn: round(each["tau"], 3) for turn, each in found.items()}, flush=True
                )
                document = {"kind": "tau-by-turn", "tau": TAU_CONVENTION, "rows": rows, "environment": where}
                write_json(document, str(arguments.json))


if __name__ == "__main__":
    main()
