"""Searches the fastest settings of the decoders without an EAGLE head, on validation prompts.

Every setting is a separate decoder in one interleaved run with vanilla. A bench then compares EAGLE with the best of
each family, not with its defaults. Run nothing else on the machine meanwhile.

    python benchmarks/baselines.py --prompts valid.jsonl --medusa-head my-medusa --json results/baselines.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from haast.api import Haast
from haast.bench.aggregate import build_rows
from haast.bench.decoders import Decoder, EngineDecoder
from haast.bench.report import environment
from haast.bench.runner import BenchConfig, BenchPrompt, Suite, run_suite
from haast.cli.loading import load_medusa, read_prompt_file
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.drafters.vanilla import VanillaDrafter
from haast.files import write_json
from haast.progress import Progress
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target

# Window, n-gram, guesses: from the smallest possible to the authors' choice for a 7B model (15, 5, 15).
_LOOKAHEAD = (
    (1, 2, 1), (1, 2, 3), (2, 2, 3), (2, 3, 2), (3, 3, 3), (2, 4, 2), (4, 4, 4), (5, 3, 5), (7, 5, 7), (15, 5, 15),
)  # fmt: skip
_NODES = (4, 6, 8, 12)
_MEDUSA_NODES = (3, 4, 6, 8, 12, 16, 24)

Settings = dict[str, int]


def families(target: Target, medusa: Path | None) -> dict[str, list[tuple[Settings, Callable[[], Drafter]]]]:
    """Per family: its settings, each with a function that makes the drafter."""
    lookahead = [{"window": w, "ngram": n, "guesses": g} for w, n, g in _LOOKAHEAD]
    lookup = [{"nodes": nodes, "ngram": ngram} for nodes in _NODES for ngram in (2, 3)]
    suffix = [{"nodes": nodes, "least": least} for nodes in _NODES for least in (1, 2)]
    makers: dict[str, tuple[list[Settings], Callable[..., Drafter]]] = {
        "lookahead": (lookahead, partial(LookaheadDrafter, target.vocab_size)),
        "lookup": (lookup, PromptLookupDrafter),
        "suffix": (suffix, SuffixDrafter),
    }
    if medusa is not None:
        sizes = [{"nodes": nodes} for nodes in _MEDUSA_NODES]
        makers["medusa"] = (sizes, partial(load_medusa, medusa, target, DEFAULT_MODEL))
    return {name: [(each, partial(make, **each)) for each in all_] for name, (all_, make) in makers.items()}


class _Named(EngineDecoder):
    """A decoder that is named after its settings."""

    def __init__(self, name: str, target: Target, drafter: Drafter) -> None:
        super().__init__(target, drafter, SamplingParams(), target.end_ids)
        self.name = name


def search(target: Target, prompts: list[BenchPrompt], medusa: Path | None, config: BenchConfig) -> dict[str, Any]:
    """Tokens per second and tau of every setting, and the fastest of each family."""
    arms: list[Decoder] = [_Named("vanilla", target, VanillaDrafter())]
    settings_of: dict[str, tuple[str, Settings]] = {}
    for family, settings in families(target, medusa).items():
        for each, make in settings:
            name = f"{family} {' '.join(f'{key}={value}' for key, value in each.items())}"
            settings_of[name] = (family, each)
            arms.append(_Named(name, target, make()))
    with Progress("settings", "answers", len(arms) * len(prompts) * config.rounds) as progress:
        suites = {"": Suite("", "", tuple(prompts))}
        (records,) = run_suite(
            {config.sampling.temperature: arms}, suites, config, {}, lambda *answer: progress.step()
        ).values()
    points = [
        {
            "family": settings_of[row["decoder"]][0],
            "settings": settings_of[row["decoder"]][1],
            **{key: row[key] for key in ("tokens_per_s", "tau", "speedup_vs_vanilla", "ms_draft", "ms_verify")},
        }
        for row in build_rows(records, prompts)
        if row["decoder"] in settings_of
    ]
    best = {
        family: max((p for p in points if p["family"] == family), key=lambda p: p["tokens_per_s"])["settings"]
        for family in dict.fromkeys(point["family"] for point in points)
    }
    return {"kind": "baselines", "baselines": points, "best": best}


def main() -> None:
    """Search and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--medusa-head", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    chosen = read_prompt_file(arguments.prompts, arguments.limit)
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    prompts = [BenchPrompt(p.id, p.category, tuple(encoder.encode(p.turns[0]))) for p in chosen]
    config = BenchConfig(arguments.max_new_tokens, arguments.rounds)
    result = search(target, prompts, arguments.medusa_head, config)
    settings = {"rounds": arguments.rounds, "max_new_tokens": arguments.max_new_tokens}
    result["environment"] = environment(target, DEFAULT_MODEL, arguments.prompts, len(prompts), settings)
    write_json(result, str(arguments.json))


if __name__ == "__main__":
    main()
