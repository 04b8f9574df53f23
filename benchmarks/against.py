"""Compares this checkout with another checkout of Haast in one run on one machine, prompt by prompt in turn.

    git worktree add ../before 9df6831 && (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/against.py --other ../before --prompts mt_bench.jsonl --regenerate valid.jsonl \
        --json results/against.json

Two processes load the default model, one per checkout, and only one of them works at a time. Both pack it to 16 bits,
so that the texts can be compared; `--packing auto` takes what each checkout has as its default. Decoding: batch 1,
greedy, vanilla, eagle and eagle+suffix with the same tree; speeds are decoded tokens over decode time. With
`--regenerate`, both also answer prompts 96 at a time. Texts are compared. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

ARMS = ("vanilla", "eagle", "eagle+suffix")
BATCH = 96


class Worker:
    """A process that runs one checkout."""

    def __init__(self, source: Path, packing: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(source / "src")}
        command = [sys.executable, __file__, "--work", "--packing", packing]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.commit = str(self.ask({"hello": True})["source"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None, "they are pipes"
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"the process of {self.commit} ended")

    def end(self) -> None:
        self._process.terminate()


def work(packing: str) -> None:
    """Answer requests from standard input; handles the module names of older checkouts too."""
    import haast
    from haast.api import find_head
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.hybrid import HybridDrafter
    from haast.drafters.vanilla import VanillaDrafter
    from haast.heads.checkpoint import load_head

    engine, load = module("engine.engine", "engine"), module("target.load", "models")
    stop = getattr(engine, "StopParams", None) or engine.StopConfig
    sampling = getattr(engine, "SamplingParams", None) or sys.modules["haast.sampling"].SamplingConfig
    target, folder = load.load_target(load.DEFAULT_MODEL, packing=packing), find_head("default", load.DEFAULT_MODEL)
    assert folder is not None, "it is shipped"
    shape = module("drafters.tree_shape", "drafters.shape").shape_for(6)
    eagle = EagleDrafter(target, load_head(folder), shape)
    drafters: dict[str, Any] = {"vanilla": VanillaDrafter(), "eagle": eagle, "eagle+suffix": HybridDrafter(eagle)}
    eos = target.model.generation_config.eos_token_id
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    for line in sys.stdin:
        request = json.loads(line)
        if "hello" in request:
            answer: dict[str, Any] = {"source": str(Path(haast.__file__).parents[2].name)}
        elif "regenerate" in request:
            answer = answers(target, request)
        else:
            encoded: Any = target.tokenizer.apply_chat_template(
                [{"role": "user", "content": request["prompt"]}], add_generation_prompt=True, return_dict=True
            )
            stats = engine.Stats()
            rules = stop(request["tokens"], ends)
            (tokens,) = engine.Engine(target, drafters[request["arm"]]).complete(
                [encoded["input_ids"]], sampling(), rules, stats
            )
            answer = {"tokens": tokens, "decoded": stats.decoded_tokens, "ms": stats.ms_decode, "tau": stats.tau}
        print(json.dumps(answer), flush=True)


def module(*names: str) -> Any:
    """The first of these modules that this checkout has."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(f"haast.{name}")
    raise ModuleNotFoundError(f"none of {', '.join(names)}")


def answers(target: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Let the target answer prompts, `BATCH` at a time."""
    from time import perf_counter

    from haast.prompts import Prompt

    regenerate: Any = module("training.regenerate").regenerate

    prompts = [Prompt(id=str(i), turns=(text,)) for i, text in enumerate(request["regenerate"])]
    queue = module("training.generation_queue", "training.asking")  # both of these import the settings
    config = queue.RegenerateConfig(batch=BATCH, max_new_tokens=request["tokens"])
    with tempfile.TemporaryDirectory() as folder:
        begin, out = perf_counter(), Path(folder, "answers.jsonl")
        if "run" in signature(regenerate).parameters:
            outcome = regenerate(target, queue.AnswerRun(target.tokenizer, prompts, out, config, quiet=True))
        else:  # an older checkout
            outcome = regenerate(target, target.tokenizer, prompts, out, config, quiet=True)
        seconds = perf_counter() - begin
        records = [json.loads(line) for line in out.read_text().splitlines() if "response_ids" in line]
    return {
        "seconds": seconds,
        "tokens": outcome.tokens,
        "answers": sorted((r["id"], r["response_ids"]) for r in records),
    }


def read(path: Path, limit: int) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()][:limit]
    return [row["turns"][0] if "turns" in row else row["prompt"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--other", type=Path, help="another checkout, with its native library built in place")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--packing", default="f16", help="of the target, in both")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--regenerate", type=Path, help="prompts to answer 96 at a time")
    parser.add_argument("--regenerate-limit", type=int, default=96)
    parser.add_argument("--json", type=Path, default=Path("results/against.json"))
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.packing)
    if arguments.other is None or arguments.prompts is None:
        parser.error("give --other, a checkout, and --prompts, a file of JSON lines")
    from haast.bench.report import machine
    from haast.files import write_json

    here = Path(__file__).resolve().parents[1]
    workers = {"before": Worker(arguments.other.resolve(), arguments.packing), "now": Worker(here, arguments.packing)}
    speeds: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in workers} for arm in ARMS}
    taus: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in workers} for arm in ARMS}
    different = 0
    prompts = read(arguments.prompts, arguments.limit)
    for name in workers:  # warm up
        for arm in ARMS:
            workers[name].ask({"arm": arm, "prompt": "Name three birds.", "tokens": 16})
    for turn in range(arguments.rounds):
        for number, prompt in enumerate(prompts):
            for arm in ARMS:
                tokens = {}
                order = list(workers) if (turn + number) % 2 else list(workers)[::-1]
                for name in order:
                    answer = workers[name].ask({"arm": arm, "prompt": prompt, "tokens": arguments.max_new_tokens})
                    tokens[name] = answer["tokens"]
                    speeds[arm][name].append(1e3 * answer["decoded"] / max(answer["ms"], 1e-9))
                    taus[arm][name].append(answer["tau"])
                different += tokens["before"] != tokens["now"]
            print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    rows = {
        arm: {
            **{f"tokens_per_s_{name}": median(own) for name, own in speeds[arm].items()},
            **{f"tau_{name}": sum(own) / len(own) for name, own in taus[arm].items()},
            "now_over_before": median(n / b for n, b in zip(speeds[arm]["now"], speeds[arm]["before"], strict=True)),
        }
        for arm in ARMS
    }
    document = {"kind": "against", "rows": rows, "texts_that_differ": different, "prompts": len(prompts), **machine()}
    document |= {"max_new_tokens": arguments.max_new_tokens, "rounds": arguments.rounds, "packing": arguments.packing}
    if arguments.regenerate is not None:
        request = {
            "regenerate": read(arguments.regenerate, arguments.regenerate_limit),
            "tokens": arguments.max_new_tokens,
        }
        runs = [{name: worker.ask(request) for name, worker in workers.items()} for _ in range(2)]
        speed = {name: median(run[name]["tokens"] / run[name]["seconds"] for run in runs) for name in workers}
        same = all(run["now"]["answers"] == run["before"]["answers"] for run in runs)
        document["regenerate"] = {
            **{f"tokens_per_s_{name}": value for name, value in speed.items()},
            "now_over_before": speed["now"] / speed["before"],
            "batch": BATCH,
            "same_answers": same,
        }
    for worker in workers.values():
        worker.end()
    write_json(document, str(arguments.json))
    print(json.dumps(document | {"command": ""}, indent=1))
    return None


if __name__ == "__main__":
    main()
