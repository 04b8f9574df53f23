"""tau of the shipped head by the precision of its target: the loss from a precision that it was not trained on.

    python benchmarks/precision.py --prompts valid.jsonl --json results/precision.json

The shipped head drafts trees of 8 nodes for its target in every precision that this machine can run, on the same
prompts, greedily. tau is tokens per decoding target forward, the bonus token included, prefill excluded; it does not
depend on the machine's load. `agrees` is the share of the text up to the first difference from the first precision: a
quantised model generates other texts.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

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

_KINDS = (  # dtype, packing
    ("float32", "f16"),
    ("float32", "gguf"),
    ("float32", "off"),
    ("bfloat16", "off"),
    ("float32", "int8"),
    ("float32", "torchao-int8"),
    ("float32", "torchao-int4"),
)


def measure(dtype: str, packing: str, texts: list[str], tokens: int) -> tuple[dict[str, Any], list[list[int]]]:
    """The row of one precision, and the tokens that it generated."""
    target = load_target(dtype=dtype, packing=packing)
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)  # measured here
        drafter = EagleDrafter(target, load_head(folder), shape_for(8))
    encoder, stats, answers = Haast(target, VanillaDrafter()), Stats(), list[list[int]]()
    with Progress(f"{dtype}, {packing}", "texts", len(texts)) as progress:
        for text in texts:
            stop = StopParams(tokens, target.end_ids)
            answers += Engine(target, drafter).complete([encoder.encode(text)], SamplingParams(), stop, stats)
            progress.step()
    row = {
        "precision": target.precision,
        "dtype": dtype,
        "packing": packing,
        "tau": stats.tau,
        "decoded_tokens": stats.decoded_tokens,
        "target_forwards": stats.target_forwards,
    }
    return row, answers


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of the first texts' tokens before their first difference from the second."""
    return sum(map(common_length, one, other)) / sum(map(len, one))


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    texts = [prompt.turns[0] for prompt in read_prompt_file(arguments.prompts, arguments.limit)]
    rows, first = list[dict[str, Any]](), list[list[int]]()
    for dtype, packing in _KINDS:
        row, answers = measure(dtype, packing, texts, arguments.max_new_tokens)
        first = first or answers
        rows.append({**row, "agrees": agreement(first, answers)})
    settings = {"max_new_tokens": arguments.max_new_tokens, "nodes": 8, "trained_on": rows[0]["precision"]}
    where = environment(load_target(), DEFAULT_MODEL, arguments.prompts, len(texts), settings)
    write_json({"kind": "precision", "precisions": rows, "environment": where}, str(arguments.json))


if __name__ == "__main__":
    main()
