"""Tests the warning about heads that do not fit (`haast.drafters.head_check`) on the default model.

The warning must appear for a wrong head and never for the right one. For the shipped head, the counts of the watch are
reset for every prompt, as in a new process. With --wrong, each simulated process answers prompts until the warning
appears, because a bad head drafts little and a short answer may end before.

    the shipped head     must never cause the warning
    noise                random weights of the same mean and spread: after how many drafted tokens the warning appears
    another fine-tune    the target, trained for a few minutes to answer in capitals, with the shipped head

    python benchmarks/head_check.py --prompts mt_bench.jsonl --answers answers.jsonl --json results/head-check.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import make_drafter
from haast.drafters.head_check import STEPS, HeadWatch, diagnose
from haast.drafters.hybrid import HybridDrafter
from haast.errors import HaastWarning, HeadWarning
from haast.files import write_json
from haast.heads.checkpoint import Head, load_head
from haast.progress import Progress
from haast.prompts import Prompt, read_json_lines, read_prompts
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target

TEMPERATURES = (0.0, 1.0)


def shipped() -> Head:
    """The default model's head."""
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "it is shipped"
    return load_head(folder)


def noise() -> Head:
    """The shipped head with random weights of the same mean and standard deviation."""
    head, generator = shipped(), torch.Generator().manual_seed(0)
    for parameter in head.module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn * parameter.data.std() + parameter.data.mean()
    return head


def in_capitals(answers: Path, steps: int, say: Callable[[str], None]) -> Target:
    """The default model after some training steps on answers in capitals."""
    target = load_target(DEFAULT_MODEL, packing="off")
    model, tokenizer = target.model, target.tokenizer
    assert tokenizer is not None, "a named model brings its tokenizer"
    texts = []
    for _, record in read_json_lines(answers):
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"].upper()},
        ]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    model.set_attn_implementation("sdpa")
    for step in range(steps):
        batch = tokenizer(
            texts[4 * step : 4 * step + 4], return_tensors="pt", padding=True, truncation=True, max_length=160
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say(f"fine-tuning, step {step + 1} of {steps}, loss {float(loss):.2f}")
    return Target(model, tokenizer)


def until_warned(
    target: Target, head: Head, prompts: list[Prompt], tokens: int, processes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The number of drafted tokens and texts before the warning, for processes that start at different prompts."""
    drafter = make_drafter("eagle+suffix", target, head)
    assert isinstance(drafter, HybridDrafter), "eagle+suffix is a hybrid"
    haast, results = Haast(target, drafter), dict[str, Any]()
    for temperature in TEMPERATURES:
        drafted, texts = list[int](), list[int]()
        for process in range(processes):
            drafter.eagle._watch = watch = Counting(head.about)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for number in range(len(prompts)):
                    prompt = prompts[(process * 7 + number) % len(prompts)]
                    haast.generate(prompt.turns[0], max_new_tokens=tokens, temperature=temperature, seed=number)
                    if watch.over:
                        break
            warned = watch.over and watch.steps < STEPS
            drafted += [watch.drafted] if warned else []
            texts += [number + 1] if warned else []
            say(f"T={temperature:g}: {process + 1} of {processes} processes, {len(drafted)} warnings")
        results[f"T={temperature:g}"] = {
            "prompts": processes,
            "told": len(drafted),
            "drafted_tokens_when_told": {"median": statistics.median(drafted), "most": max(drafted)}
            if drafted
            else None,
            "texts_when_told": max(texts, default=None),
            "first_drafts_accepted": {"mean": watch.accepted / watch.steps, "least": watch.accepted / watch.steps},
        }
    return results


def watched(
    target: Target, head: Head, prompts: list[Prompt], tokens: int, name: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Per temperature: for how many prompts the warning appeared, after how many drafted tokens, and acceptance."""
    drafter = make_drafter(name, target, head)
    eagle = drafter.eagle if isinstance(drafter, HybridDrafter) else drafter
    assert isinstance(eagle, EagleDrafter), "name is eagle or eagle+suffix"
    haast, results = Haast(target, drafter), dict[str, Any]()
    for temperature in TEMPERATURES:
        warned, drafted, rates = 0, list[int](), list[float]()
        for number, prompt in enumerate(prompts):
            eagle._watch = watch = Counting(head.about)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", HaastWarning)
                haast.generate(prompt.turns[0], max_new_tokens=tokens, temperature=temperature, seed=number)
            if any(each.category is HeadWarning for each in caught):
                warned += 1
                drafted.append(watch.drafted)
            rates.append(watch.accepted / watch.steps if watch.steps else 0.0)
            say(f"{name}, T={temperature:g}: {number + 1} of {len(prompts)} prompts, {warned} warnings")
        results[f"T={temperature:g}"] = {
            "prompts": len(prompts),
            "told": warned,
            "drafted_tokens_when_told": {"median": statistics.median(drafted), "most": max(drafted)}
            if drafted
            else None,
            "first_drafts_accepted": {"mean": statistics.fmean(rates), "least": min(rates)},
        }
    return results


class Counting(HeadWatch):
    """A watch that also counts drafted tokens."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__(about, list)
        self.drafted = 0

    def proposed(self, nodes: int) -> None:
        super().proposed(nodes)
        self.drafted += 0 if self.over else nodes - 1


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines with prompt and response")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the fine-tune; 0: no fine-tune")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--wrong", type=int, metavar="N", help="test only the wrong heads, with N processes each")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts, arguments.limit)
    with Progress("watching heads") as progress:
        target, say, tokens = load_target(DEFAULT_MODEL), progress.set_status, arguments.max_new_tokens
        rows, checks = dict[str, Any](), dict[str, Any]()
        if arguments.wrong is None:
            for drafter in ("eagle", "eagle+suffix"):
                rows[f"shipped, {drafter}"] = watched(target, shipped(), prompts, tokens, drafter, say)
            checks["shipped"] = diagnose(target, shipped(), DEFAULT_MODEL, say).document()
        else:
            wrong = [("noise", target, noise())]
            if arguments.steps:
                wrong.append(("another fine-tune", in_capitals(arguments.answers, arguments.steps, say), shipped()))
            for name, of, head in wrong:
                checks[name] = diagnose(of, copy.deepcopy(head), DEFAULT_MODEL, say).document()
                rows[name] = until_warned(of, head, prompts, tokens, arguments.wrong, say)
    for name, row in rows.items():
        print(name, {key: (value["told"], value["drafted_tokens_when_told"]) for key, value in row.items()})
    for name, check in checks.items():
        print(name, check["verdict"])
    settings = {"steps": arguments.steps, "max_new_tokens": arguments.max_new_tokens}
    where = environment(target, DEFAULT_MODEL, arguments.prompts, len(prompts), settings)
    write_json({"kind": "head-check", "watched": rows, "checks": checks, "environment": where}, arguments.json)


if __name__ == "__main__":
    main()
