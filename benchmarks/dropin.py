"""Compares stock `generate` with `generate(custom_generate=haast.custom_generate)`: an fp32 model on the CPU, no head.

The requirement: never slower than stock, and faster on text that repeats itself. Both calls answer every prompt in
alternating order, greedy. Whole calls are timed, including prefill. Run nothing else on the machine meanwhile.

    python benchmarks/dropin.py --prompts mt_bench.jsonl --json results/dropin.json
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from haast import custom_generate
from haast.bench.report import machine
from haast.files import write_json
from haast.prompts import read_prompts
from haast.stats import loop_share
from haast.target.load import DEFAULT_MODEL, load_stock

_CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        return self.balance
"""
_LOG = "\n".join(
    f"2026-03-{day:02d} 08:00:00 INFO worker-{day % 3} started job {100 + day} in queue default" for day in range(1, 7)
)
_POEM = (
    "The river runs to the sea.\nThe sea runs to the shore.\nThe shore runs to the hill.\nThe hill runs to the door."
)
_TABLE = "id,name,city,country\n1,Anna,Berlin,Germany\n2,Paul,Paris,France\n3,Maria,Madrid,Spain\n4,John,London,England"
_MINUTES = (
    "On Monday the committee met in the small hall behind the library. Twelve members were present, three had sent "
    "their apologies. The chair opened the meeting at seven and read the minutes of the last one, which were accepted "
    "without change."
)
# Prompts whose answers repeat the prompt or themselves.
REPEATING = (
    f"Repeat the following paragraph word for word:\n\n{_MINUTES}",
    f"Write this poem three times:\n\n{_POEM}",
    f"Repeat this code exactly:\n\n```python\n{_CODE}```",
    f"Add a docstring to the class and print the whole code again:\n\n```python\n{_CODE}```",
    f"Continue this log for ten more days:\n\n{_LOG}",
    f"Turn this table into JSON records:\n\n{_TABLE}\n",
    "Write the lyrics of a song whose chorus, 'Row, row, row your boat, gently down the stream', is repeated after "
    "every verse. Write six verses.",
)
_WARMUP = 8  # tokens


@dataclass
class Answers:
    """The answers of one method to one prompt: tokens, and seconds per round."""

    tokens: list[int] = field(default_factory=list)  # of the first round
    seconds: list[float] = field(default_factory=list)


def answer(model: Any, ids: torch.Tensor, tokens: int, **settings: Any) -> tuple[list[int], float]:
    """New tokens of a greedy call, and its time in seconds."""
    begin = perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **settings
    )
    return output[0, ids.shape[1] :].tolist(), perf_counter() - begin


def measure(
    model: Any, prompts: Sequence[torch.Tensor], rounds: int, tokens: int, console: Console
) -> list[dict[str, Answers]]:
    """Run both methods on every prompt and in every round, one directly after the other."""
    methods: dict[str, dict[str, Any]] = {"stock": {}, "haast": {"custom_generate": custom_generate}}
    results = [{name: Answers() for name in methods} for _ in prompts]
    for settings in methods.values():  # warm-up; the first call of haast also measures the cost of forwards
        answer(model, prompts[0], _WARMUP, **settings)
    with Progress(console=console) as bar:
        task = bar.add_task("prompts", total=rounds * len(prompts))
        for turn in range(rounds):
            for place, ids in enumerate(prompts):
                for name in methods if (turn + place) % 2 == 0 else reversed(methods):
                    new_tokens, seconds = answer(model, ids, tokens, **methods[name])
                    results[place][name].seconds.append(seconds)
                    results[place][name].tokens = results[place][name].tokens or new_tokens
                bar.advance(task)
    return results


def summary(name: str, results: Sequence[dict[str, Answers]], prompts: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Tokens per second and speed-up of all prompts together and per prompt; times are medians over rounds."""

    def speed(method: str, some: Sequence[dict[str, Answers]]) -> float:
        return sum(len(each[method].tokens) for each in some) / sum(median(each[method].seconds) for each in some)

    rows = [
        {
            "prompt_tokens": ids.shape[1],
            "tokens": len(each["stock"].tokens),
            "stock_tokens_per_s": speed("stock", [each]),
            "haast_tokens_per_s": speed("haast", [each]),
            "speedup": speed("haast", [each]) / speed("stock", [each]),
            "same_text": each["stock"].tokens == each["haast"].tokens,
            "loop_share": loop_share(each["stock"].tokens),
        }
        for each, ids in zip(results, prompts, strict=True)
    ]
    speeds = {f"{method}_tokens_per_s": speed(method, results) for method in ("stock", "haast")}
    speedup = speeds["haast_tokens_per_s"] / speeds["stock_tokens_per_s"]
    slowest = min(float(row["speedup"]) for row in rows)
    return {"texts": name, **speeds, "speedup": speedup, "least_speedup": slowest, "prompts": rows}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=Path, required=True, help="ordinary prompts, JSON lines with `turns` or `prompt`"
    )
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    chosen = read_prompts(arguments.prompts, arguments.limit, spread=True)
    console = Console(stderr=True)
    model, tokenizer = load_stock(arguments.model, arguments.dtype)
    model.eval()  # type: ignore[no-untyped-call]

    def encoded(text: str) -> torch.Tensor:
        messages = [{"role": "user", "content": text}]
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return torch.tensor([ids["input_ids"]])

    texts = {"ordinary": [prompt.turns[0] for prompt in chosen], "repeating": list(REPEATING)}
    results = []
    for name, questions in texts.items():
        prompts = [encoded(text) for text in questions]
        results.append(
            summary(name, measure(model, prompts, arguments.rounds, arguments.max_new_tokens, console), prompts)
        )
        row = results[-1]
        console.print(
            f"{name}: stock {row['stock_tokens_per_s']:.1f} tokens/s, haast {row['haast_tokens_per_s']:.1f}: "
            f"{row['speedup']:.3f}x, least {row['least_speedup']:.3f}x"
        )
    where = machine() | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "packing": "off",
        "prompts_file": str(arguments.prompts),
        "prompts_sha256": hashlib.sha256(arguments.prompts.read_bytes()).hexdigest(),
        "prompts_count": len(chosen),
        "settings": {"rounds": arguments.rounds, "max_new_tokens": arguments.max_new_tokens},
    }
    write_json({"kind": "dropin", "dropin": results, "environment": where}, arguments.json)


if __name__ == "__main__":
    main()
