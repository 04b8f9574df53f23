"""tau of the shipped head by the precision of its target: the loss from a precision that it was not trained on.

    python benchmarks/precision.py --prompts valid.jsonl --json results/precision.json

The shipped head drafts trees of 8 nodes for its target in every precision that this machine can run, on the same
prompts, greedily. tau is tokens per decoding target forward, the bonus token included, prefill excluded; it does not
depend on the machine's load. `agrees` is the share of the text up to the first difference from the first precision: a
quantised model generates other texts. `ratio` is the 95 % interval of tau's ratio to the first precision's, from
resampled prompts.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.cli.loading import read_prompt_file
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.errors import PrecisionWarning
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.target.kv_pool import common_length
from haast.target.load import DEFAULT_MODEL, load_target

_KINDS = {  # dtype, packing
    "f16": ("float32", "f16"),
    "gguf": ("float32", "gguf"),
    "float32": ("float32", "off"),
    "bfloat16": ("bfloat16", "off"),
    "int8": ("float32", "int8"),
    "torchao-int8": ("float32", "torchao-int8"),
    "torchao-int4": ("float32", "torchao-int4"),
}


# Decoded tokens and target forwards of each text.
Counts = list[tuple[int, int]]


def measure(dtype: str, packing: str, texts: list[str], tokens: int) -> tuple[dict[str, Any], list[list[int]], Counts]:
    """The row of one precision, the tokens that it generated, and its counts."""
    target = load_target(dtype=dtype, packing=packing)
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)  # measured here
        drafter = EagleDrafter(target, load_head(folder), shape_for(8))
    encoder, stats, answers, counts = Haast(target, VanillaDrafter()), Stats(), list[list[int]](), Counts()
    with Progress(f"{dtype}, {packing}", "texts", len(texts)) as progress:
        for text in texts:
            stop, before = StopParams(tokens, target.end_ids), (stats.decoded_tokens, stats.target_forwards)
            answers += Engine(target, drafter).complete([encoder.encode(text)], SamplingParams(), stop, stats)
            counts.append((stats.decoded_tokens - before[0], stats.target_forwards - before[1]))
            progress.step()
    row = {
        "precision": target.precision,
        "dtype": dtype,
        "packing": packing,
        "tau": stats.tau,
        "decoded_tokens": stats.decoded_tokens,
        "target_forwards": stats.target_forwards,
    }
    return row, answers, counts


def interval(first: Counts, other: Counts) -> list[float]:
    """95 % interval of tau's ratio to the first precision's: the same texts are drawn again and again for both."""
    counts = np.array([first, other])  # (2, texts, 2)
    drawn = counts[:, np.random.default_rng(0).integers(len(first), size=(4000, len(first)))].sum(2)
    tau = drawn[..., 0] / drawn[..., 1]
    return [float(each) for each in np.quantile(tau[1] / tau[0], (0.025, 0.975))]


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of the first texts' tokens before their first difference from the second."""
    return sum(map(common_length, one, other)) / sum(map(len, one))


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precisions", default=",".join(_KINDS), help="by default all; the first is the reference")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    names = arguments.precisions.split(",")
    if unknown := set(names) - set(_KINDS):
        parser.error(f"unknown precisions {sorted(unknown)}: choose some of {', '.join(_KINDS)}")
    texts = [prompt.turns[0] for prompt in read_prompt_file(arguments.prompts, arguments.limit)]
    rows, first, reference = list[dict[str, Any]](), list[list[int]](), Counts()
    for name in names:
        row, answers, counts = measure(*_KINDS[name], texts, arguments.max_new_tokens)
        first, reference = first or answers, reference or counts
        rows.append({**row, "agrees": agreement(first, answers), "ratio": interval(reference, counts)})
    settings = {"max_new_tokens": arguments.max_new_tokens, "nodes": 8, "trained_on": rows[0]["precision"]}
    where = environment(load_target(), DEFAULT_MODEL, arguments.prompts, len(texts), settings)
    write_json({"kind": "precision", "precisions": rows, "environment": where}, str(arguments.json))


if __name__ == "__main__":
    main()
