"""Long prompts: tau, prefill time, tokens per second and memory of decoders by prompt length.

    python benchmarks/long_context.py --json results/long-context.json

A prompt is the text of README.md and docs/, each time from another position on, or with --prompts the concatenated
texts of a file, followed by a question. Every decoder and length runs in a separate process, because memory is the
process's peak (VmHWM, after loading). All decoders run one length before the next, so that a machine that slows down
slows all of them equally. `plain` decoders run the stock modules instead of packed native code, and `hf` is
`model.generate`; both are measured for memory only, on one prompt. Takes six minutes on two cores; run nothing else
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from haast.api import Haast, find_head
from haast.bench.decoders import Decoder, EngineDecoder, StockDecoder
from haast.bench.report import environment
from haast.bench.runner import peak_rss_mb, reset_peak_rss
from haast.cli.loading import OWN_PROMPTS
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.ngram import PromptLookupDrafter
from haast.drafters.tree_shape import CPU_NODES, shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Stats
from haast.errors import LongContextWarning
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import DEFAULT_MODEL, load_stock, load_target
from haast.target.target import Target

_LENGTHS = (512, 1024, 2048, 4096, 7000)
_WINDOWS = (64, 256)
_FOR_MEMORY = ("plain-vanilla", "plain-eagle", "hf")
_LIMIT = 1.3  # allowed memory, as a multiple of vanilla's


def long_prompts(texts: Sequence[str], encode: Callable[[str], list[int]], length: int, count: int) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens: start of the chat template, text, a question, end of the template."""
    first, second = encode("a"), encode("b")
    template = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)  # tokens before the text
    prompts = []
    for number in range(count):
        begin = number * len(texts) // count
        rotated = [*texts[begin:], *texts[:begin]]
        letters, content = 0, list[str]()
        for text in rotated:
            content.append(text)
            letters += len(text)
            if letters > 8 * length:  # enough text: a token has about four letters
                break
        ids = encode("\n\n".join([*content, OWN_PROMPTS[number % len(OWN_PROMPTS)]]))
        if len(ids) < length:
            raise ValueError(f"all texts together have {len(ids)} tokens, but {length} are needed: give --prompts FILE")
        prompts.append([*ids[:template], *ids[len(ids) - length + template :]])
    return prompts


def own_texts() -> list[str]:
    """The paragraphs of README.md and docs/, without tables."""
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    parts = [part.strip() for page in pages for part in page.read_text(encoding="utf-8").split("\n\n")]
    return [part for part in parts if part and not part.startswith(("|", "<", "!["))]


def _arm(name: str, target: Target | None) -> Decoder:
    """A decoder by name: vanilla, eagle, eagle-64 (with a draft window), lookup, plain-..., or hf."""
    base = name.removeprefix("plain-")
    if target is None:
        return StockDecoder(load_stock(DEFAULT_MODEL)[0], ())
    drafters: dict[str, Callable[[], Drafter]] = {
        "vanilla": VanillaDrafter,
        "lookup": lambda: PromptLookupDrafter(CPU_NODES),
    }
    return EngineDecoder(target, drafters.get(base, lambda: _eagle(base, target))(), SamplingParams(), ())


def _eagle(name: str, target: Target) -> EagleDrafter:
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    window = int(name.partition("-")[2]) if "-" in name else None
    return EagleDrafter(target, load_head(folder), shape_for(CPU_NODES), window)


def work(name: str, prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    """Answer the prompts with one decoder and measure it. Runs in a child process."""
    warnings.simplefilter("ignore", LongContextWarning)
    target = None if name == "hf" else load_target(packing="off" if name.startswith("plain-") else "auto")
    arm = _arm(name, target)
    arm.run(prompts[0][:64], 8)
    loading_peak = peak_rss_mb()
    reset_peak_rss()
    runs = [arm.run(prompt, tokens) for prompt in prompts]
    total = Stats()
    for stats in (run.stats for run in runs):
        if stats is not None:
            total.decoded_tokens += stats.decoded_tokens
            total.target_forwards += stats.target_forwards
    decoded = sum(len(run.tokens) - 1 for run in runs)
    return {
        "tau": total.tau or None,
        "prefill_ms": median(run.ms_prefill for run in runs),
        "tokens_per_s": 1e3 * decoded / sum(run.ms_decode for run in runs),
        "peak_rss_mb": peak_rss_mb(),
        "peak_rss_mb_loading": loading_peak,
        "texts": [list(run.tokens) for run in runs],
    }


def _run_child(name: str, prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    """`work` in a child process."""
    command = [sys.executable, __file__, "--work", name, "--max-new-tokens", str(tokens)]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(names: Sequence[str], prompts: dict[int, list[list[int]]], tokens: int, at: int) -> list[dict[str, Any]]:
    """A result per decoder and length, and the memory of others at length `at`; texts are compared with vanilla's."""
    points, expected = list[dict[str, Any]](), dict[int, list[list[int]]]()
    turns = [(length, name) for length in prompts for name in (*names, *(_FOR_MEMORY if length == at else ()))]
    with Progress("long prompts", "points", len(turns)) as progress:
        for length, name in turns:
            own, for_memory = prompts[length], name in _FOR_MEMORY
            result = _run_child(name, own[:1] if for_memory else own, min(tokens, 16) if for_memory else tokens)
            texts = result.pop("texts")
            same = None if for_memory else texts == expected.setdefault(length, texts)
            points.append({"decoder": name, "length": length, "memory_alone": for_memory, "same_text": same, **result})
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
            progress.step()
    return points


def memory(points: Sequence[dict[str, Any]], at: int) -> dict[str, Any]:
    """Peak memory at one length, as a multiple of vanilla's with the same modules."""
    peaks = {point["decoder"]: point["peak_rss_mb"] for point in points if point["length"] == at}
    pairs = {name: "plain-vanilla" if name.startswith("plain-") or name == "hf" else "vanilla" for name in peaks}
    times = {name: peaks[name] / peaks[base] for name, base in pairs.items()}
    return {"length": at, "times_vanilla": times, "limit": _LIMIT, "within": max(times.values()) <= _LIMIT}


def main() -> None:
    """Measure and write the JSON; in a child process, run `work`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--lengths", default=",".join(map(str, _LENGTHS)))
    parser.add_argument("--windows", default=",".join(map(str, _WINDOWS)))
    parser.add_argument("--texts", type=int, default=2, help="number of prompts per length")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--memory-length", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        print(json.dumps(work(arguments.work, json.loads(sys.stdin.read()), arguments.max_new_tokens)))
        return
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    texts = (
        own_texts()
        if arguments.prompts is None
        else [turn for p in read_prompts(arguments.prompts) for turn in p.turns]
    )
    lengths = [int(length) for length in arguments.lengths.split(",")]
    prompts = {length: long_prompts(texts, encoder.encode, length, arguments.texts) for length in lengths}
    settings = {"texts": arguments.texts, "max_new_tokens": arguments.max_new_tokens, "nodes": CPU_NODES}
    where = environment(target, DEFAULT_MODEL, arguments.prompts, arguments.texts, settings)
    names = ("vanilla", "eagle", *(f"eagle-{w}" for w in arguments.windows.split(",") if w), "lookup")
    points = measure(names, prompts, arguments.max_new_tokens, arguments.memory_length)
    document: dict[str, Any] = {"kind": "long-context", "lengths": points, "environment": where}
    if arguments.memory_length in lengths:
        document["memory"] = memory(points, arguments.memory_length)
        print(json.dumps(document["memory"], indent=1))
    if arguments.json is not None:
        write_json(document, str(arguments.json))


if __name__ == "__main__":
    main()
