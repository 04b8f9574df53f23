"""The settings at which decoders without an EAGLE head are fastest, searched on validation prompts.

Every setting is a decoder of its own in one interleaved run, vanilla among them. What a bench then compares EAGLE with
is each family at its best, not at its defaults. Run nothing beside it.

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

# Window, n-gram, guesses: from the smallest that is lookahead at all to the authors' own for a 7B model (15, 5, 15).
_LOOKAHEAD = (
    (1, 2, 1), (1, 2, 3), (2, 2, 3), (2, 3, 2), (3, 3, 3), (2, 4, 2), (4, 4, 4), (5, 3, 5), (7, 5, 7), (15, 5, 15),
)  # fmt: skip
_NODES = (4, 6, 8, 12)
_MEDUSA_NODES = (3, 4, 6, 8, 12, 16, 24)

Settings = dict[str, int]


def families(target: Target, medusa: Path | None) -> dict[str, list[tuple[Settings, Callable[[], Drafter]]]]:
    """Every family's settings and how to make a drafter of them."""
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
    """An arm under the name of its setting."""

    def __init__(self, name: str, target: Target, drafter: Drafter) -> None:
        super().__init__(target, drafter, SamplingParams(), target.end_ids)
        self.name = name


def search(target: Target, prompts: list[BenchPrompt], medusa: Path | None, config: BenchConfig) -> dict[str, Any]:
    """Tokens a second and tau of every setting, and each family's fastest."""
    arms: list[Decoder] = [_Named("vanilla", target, VanillaDrafter())]
    known: dict[str, tuple[str, Settings]] = {}
    for family, settings in families(target, medusa).items():
        for each, make in settings:
            name = f"{family} {' '.join(f'{key}={value}' for key, value in each.items())}"
            known[name] = (family, each)
            arms.append(_Named(name, target, make()))
    with Progress("settings", "answers", len(arms) * len(prompts) * config.rounds) as progress:
        suites = {"": Suite("", "", tuple(prompts))}
        (records,) = run_suite(
            {config.sampling.temperature: arms}, suites, config, {}, lambda *answer: progress.step()
        ).values()
    points = [
        {
            "family": known[row["decoder"]][0],
            "settings": known[row["decoder"]][1],
            **{key: row[key] for key in ("tokens_per_s", "tau", "speedup_vs_vanilla", "ms_draft", "ms_verify")},
        }
        for row in build_rows(records, prompts)
        if row["decoder"] in known
    ]
    best = {
        family: max((p for p in points if p["family"] == family), key=lambda p: p["tokens_per_s"])["settings"]
        for family in dict.fromkeys(point["family"] for point in points)
    }
    return {"kind": "baselines", "baselines": points, "best": best}


def main() -> None:
    """Search and write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--prompts", type=Path, required=True)
    words.add_argument("--limit", type=int, default=12)
    words.add_argument("--rounds", type=int, default=2)
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--medusa-head", type=Path)
    words.add_argument("--json", type=Path, required=True)
    given = words.parse_args()
    chosen = read_prompt_file(given.prompts, given.limit)
    target = load_target()
    encoder = Haast(target, VanillaDrafter())
    prompts = [BenchPrompt(p.id, p.category, tuple(encoder.encode(p.turns[0]))) for p in chosen]
    config = BenchConfig(given.max_new_tokens, given.rounds)
    found = search(target, prompts, given.medusa_head, config)
    settings = {"rounds": given.rounds, "max_new_tokens": given.max_new_tokens}
    found["environment"] = environment(target, DEFAULT_MODEL, given.prompts, len(prompts), settings)
    write_json(found, str(given.json))


if __name__ == "__main__":
    main()
