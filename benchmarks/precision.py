"""What a head loses when its target is held in another precision than the one that it was trained on: tau of each.

    python benchmarks/precision.py --prompts valid.jsonl --json results/precision.json

The shipped head drafts trees of 8 nodes for its target held in every precision that this machine can run; each answers
the same prompts, greedily. tau is tokens per decoding target forward, the bonus token included, prefill excluded; it
does not depend on the machine's load. `agrees` is how much of the text is that of the first precision, up to the first
difference: quantised, a model is another model.
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
    ("float32", "off"),
    ("bfloat16", "off"),
    ("float32", "int8"),
    ("float32", "torchao-int8"),
    ("float32", "torchao-int4"),
)


def measure(dtype: str, packing: str, texts: list[str], tokens: int) -> tuple[dict[str, Any], list[list[int]]]:
    """One precision's counts, and what it said."""
    target = load_target(dtype=dtype, packing=packing)
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)  # its effect is what is measured
        drafter = EagleDrafter(target, load_head(folder), shape_for(8))
    encoder, stats, said = Haast(target, VanillaDrafter()), Stats(), list[list[int]]()
    with Progress(f"{dtype}, {packing}", "texts", len(texts)) as progress:
        for text in texts:
            stop = StopParams(tokens, target.end_ids)
            said += Engine(target, drafter).complete([encoder.encode(text)], SamplingParams(), stop, stats)
            progress.step()
    row = {
        "precision": target.precision,
        "dtype": dtype,
        "packing": packing,
        "tau": stats.tau,
        "decoded_tokens": stats.decoded_tokens,
        "target_forwards": stats.target_forwards,
    }
    return row, said


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of the first text's tokens before the two texts part."""
    return sum(map(common_length, one, other)) / sum(map(len, one))


def main() -> None:
    """Measure and write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--prompts", type=Path, required=True)
    words.add_argument("--limit", type=int, default=30)
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--json", type=Path, required=True)
    given = words.parse_args()
    texts = [prompt.turns[0] for prompt in read_prompt_file(given.prompts, given.limit)]
    rows, first = list[dict[str, Any]](), list[list[int]]()
    for dtype, packing in _KINDS:
        row, said = measure(dtype, packing, texts, given.max_new_tokens)
        first = first or said
        rows.append({**row, "agrees": agreement(first, said)})
    settings = {"max_new_tokens": given.max_new_tokens, "nodes": 8, "trained_on": rows[0]["precision"]}
    where = environment(load_target(), DEFAULT_MODEL, given.prompts, len(texts), settings)
    write_json({"kind": "precision", "precisions": rows, "environment": where}, str(given.json))


if __name__ == "__main__":
    main()
