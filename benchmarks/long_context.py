"""Long prompts: tau, time of the prompt, tokens a second and memory of decoders, by the prompt's length.

    python benchmarks/long_context.py --json results/long-context.json

A prompt is the project's own prose (README.md and docs/, each time from another place on) or, with --prompts, the
texts of a file one after the other, and a question at its end. Every decoder meets every length in a process of its
own, since memory is the process's peak (VmHWM, after loading); the processes take turns by length, so that a machine
that slows down slows all decoders alike. `plain` decoders run the stock modules instead of packed native code, `hf` is
`model.generate`; they are there for memory alone, on one prompt. Run nothing beside it: six minutes on two cores.
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
_LIMIT = 1.3  # of vanilla's memory


def long_prompts(texts: Sequence[str], encode: Callable[[str], list[int]], length: int, count: int) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens: the chat template's beginning, text, a question, its end."""
    first, second = encode("a"), encode("b")
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    made = []
    for number in range(count):
        begin = number * len(texts) // count
        turned = [*texts[begin:], *texts[:begin]]
        held, content = 0, list[str]()
        for text in turned:  # a token has at least a letter; four letters a token are usual
            content.append(text)
            held += len(text)
            if held > 8 * length:
                break
        ids = encode("\n\n".join([*content, OWN_PROMPTS[number % len(OWN_PROMPTS)]]))
        if len(ids) < length:
            raise ValueError(f"all texts together give {len(ids)} tokens, {length} were asked for: give --prompts FILE")
        made.append([*ids[:same], *ids[len(ids) - length + same :]])
    return made


def own_texts() -> list[str]:
    """The paragraphs of the project's own pages; tables are left out."""
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    parts = [part.strip() for page in pages for part in page.read_text(encoding="utf-8").split("\n\n")]
    return [part for part in parts if part and not part.startswith(("|", "<", "!["))]


def _arm(name: str, target: Target | None) -> Decoder:
    """A decoder by name: vanilla, eagle, eagle-64 (a window), lookup; plain-... and hf."""
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
    """Answer the prompts with one decoder, and say what it took. In a process of its own."""
    warnings.simplefilter("ignore", LongContextWarning)
    target = None if name == "hf" else load_target(packing="off" if name.startswith("plain-") else "auto")
    arm = _arm(name, target)
    arm.run(prompts[0][:64], 8)
    loading = peak_rss_mb()
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
        "peak_rss_mb_loading": loading,
        "texts": [list(run.tokens) for run in runs],
    }


def _spawned(name: str, prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", name, "--max-new-tokens", str(tokens)]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(names: Sequence[str], prompts: dict[int, list[list[int]]], tokens: int, at: int) -> list[dict[str, Any]]:
    """A point for each decoder and length, and for memory alone at length `at`; texts are compared with vanilla's."""
    points, expected = list[dict[str, Any]](), dict[int, list[list[int]]]()
    turns = [(length, name) for length in prompts for name in (*names, *(_FOR_MEMORY if length == at else ()))]
    with Progress("long prompts", "points", len(turns)) as progress:
        for length, name in turns:
            own, for_memory = prompts[length], name in _FOR_MEMORY
            found = _spawned(name, own[:1] if for_memory else own, min(tokens, 16) if for_memory else tokens)
            texts = found.pop("texts")
            same = None if for_memory else texts == expected.setdefault(length, texts)
            points.append({"decoder": name, "length": length, "memory_alone": for_memory, "same_text": same, **found})
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
            progress.step()
    return points


def memory(points: Sequence[dict[str, Any]], at: int) -> dict[str, Any]:
    """Peak memory at one length as a multiple of vanilla's on the same path."""
    peaks = {point["decoder"]: point["peak_rss_mb"] for point in points if point["length"] == at}
    pairs = {name: "plain-vanilla" if name.startswith("plain-") or name == "hf" else "vanilla" for name in peaks}
    times = {name: peaks[name] / peaks[base] for name, base in pairs.items()}
    return {"length": at, "times_vanilla": times, "limit": _LIMIT, "within": max(times.values()) <= _LIMIT}


def main() -> None:
    """Measure and write; or, in a child process, work."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--prompts", type=Path)
    words.add_argument("--lengths", default=",".join(map(str, _LENGTHS)))
    words.add_argument("--windows", default=",".join(map(str, _WINDOWS)))
    words.add_argument("--texts", type=int, default=2, help="prompts of each length")
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--memory-length", type=int, default=4096)
    words.add_argument("--json", type=Path)
    words.add_argument("--work", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.work is not None:
        print(json.dumps(work(given.work, json.loads(sys.stdin.read()), given.max_new_tokens)))
        return
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    texts = own_texts() if given.prompts is None else [turn for p in read_prompts(given.prompts) for turn in p.turns]
    lengths = [int(length) for length in given.lengths.split(",")]
    prompts = {length: long_prompts(texts, encoder.encode, length, given.texts) for length in lengths}
    settings = {"texts": given.texts, "max_new_tokens": given.max_new_tokens, "nodes": CPU_NODES}
    where = environment(target, DEFAULT_MODEL, given.prompts, given.texts, settings)
    names = ("vanilla", "eagle", *(f"eagle-{w}" for w in given.windows.split(",") if w), "lookup")
    points = measure(names, prompts, given.max_new_tokens, given.memory_length)
    found: dict[str, Any] = {"kind": "long-context", "lengths": points, "environment": where}
    if given.memory_length in lengths:
        found["memory"] = memory(points, given.memory_length)
        print(json.dumps(found["memory"], indent=1))
    if given.json is not None:
        write_json(found, str(given.json))


if __name__ == "__main__":
    main()
