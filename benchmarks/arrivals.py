"""Poisson arrivals: throughput and latency of the engine, with drafting and with vanilla decoding.

    python benchmarks/arrivals.py --prompts mt_bench.jsonl --rates 0.5,1,2 --json results/arrivals.json

Vanilla and the drafter serve the same arrivals (times, prompts, order) in turn. Measured per rate: tokens per second
from the first arrival to the last token, time to the first token, and time between tokens (p50 and p99; the tokens of
one step arrive together, so most are 0). Greedy; every text is compared with vanilla's. Run nothing else on the machine
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from haast.api import Haast
from haast.bench.report import machine
from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.files import write_json


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times of the requests, in seconds after the start."""
    draw, at = random.Random(seed), 0.0
    return [at := at + draw.expovariate(rate) for _ in range(count)]


def serve(
    model: Haast, drafter: Drafter, prompts: Sequence[list[int]], times: Sequence[float], stop: StopParams
) -> Any:
    """Serve all requests, each submitted at its time. Returns tokens, the time of every token, and total seconds."""
    engine = Engine(model.target, drafter)
    model.target.pool.clear()
    requests: list[Request] = []
    token_times: list[list[float]] = [[] for _ in prompts]
    begin = time.perf_counter()
    while True:
        now = time.perf_counter() - begin
        while len(requests) < len(prompts) and times[len(requests)] <= now:
            requests.append(engine.submit(prompts[len(requests)], SamplingParams(), stop))
        if engine.scheduler.running + engine.scheduler.waiting:
            engine.scheduler.step()
        elif len(requests) == len(prompts):
            break
        else:
            time.sleep(min(0.001, max(0.0, times[len(requests)] - now)))
        now = time.perf_counter() - begin
        for number, request in enumerate(requests):
            while request.emissions:
                token_times[number] += [now] * len(request.emissions.popleft().tokens)
    return [request.new_tokens for request in requests], token_times, time.perf_counter() - begin


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rates", default="0.5,1,2", help="requests per second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("results/arrivals.json"))
    arguments = parser.parse_args()
    model = Haast.from_pretrained()
    lines = [json.loads(line) for line in arguments.prompts.read_text().splitlines()][: arguments.limit]
    prompts = [model.encode(line["turns"][0] if "turns" in line else line["prompt"]) for line in lines]
    stop = StopParams(arguments.max_new_tokens, model.eos_ids())
    arms: dict[str, Drafter] = {"vanilla": VanillaDrafter(), "drafted": model.drafter}
    rows = []
    for rate in map(float, arguments.rates.split(",")):
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        same = True
        for turn in range(arguments.rounds):
            texts = {}
            for name, drafter in arms.items() if turn % 2 == 0 else reversed(list(arms.items())):
                times = arrivals(len(prompts), rate, seed=turn)
                texts[name], token_times, seconds = serve(model, drafter, prompts, times, stop)
                first = [own[0] - at for own, at in zip(token_times, times, strict=True)]
                between = [b - a for own in token_times for a, b in pairwise(own)]
                measured[name].append({
                    "tokens_per_s": sum(map(len, token_times)) / (seconds - times[0]),
                    "first_token_p50": quantile(first, 0.5), "first_token_p99": quantile(first, 0.99),
                    "between_p50": quantile(between, 0.5), "between_p99": quantile(between, 0.99),
                    "request_p50": quantile([own[-1] - at for own, at in zip(token_times, times, strict=True)], 0.5),
                })  # fmt: skip
                print(f"rate {rate:g}, {name}: {measured[name][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
            same = same and texts["vanilla"] == texts["drafted"]
        row: dict[str, Any] = {"rate": rate, "same_texts": same}
        for name, own in measured.items():
            row[name] = {key: median(each[key] for each in own) for key in own[0]}
        row["drafted_over_vanilla"] = row["drafted"]["tokens_per_s"] / row["vanilla"]["tokens_per_s"]
        rows.append(row)
    document = {"kind": "arrivals", "drafter": model.drafter.name, "rows": rows, "requests": len(prompts), **machine()}
    document |= {"max_new_tokens": arguments.max_new_tokens, "rounds": arguments.rounds}
    write_json(document, str(arguments.json))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
