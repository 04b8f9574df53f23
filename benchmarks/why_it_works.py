"""Ablation of the inputs of EAGLE heads: features, tokens, shifted tokens (arXiv 2401.15077, figure 4) on any target.

    python benchmarks/why_it_works.py --shards features/ --valid-prompts valid.jsonl --json results/why-it-works.json

Trains four heads that differ in their inputs, from the same random weights and on the same number of supervised tokens.
Measures held-out agreement with the target when n of the states that a head reads are its own (n-alpha), and tau of the
engine on chains. Also measures how predictable feature and token sequences are: the share of variance that a ridge
regression on the last k positions explains.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ablation import Bench
from torch import Tensor

from haast.bench.report import environment
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.heads import INPUTS
from haast.heads.checkpoint import Head
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import load_target
from haast.training.batches import Example
from haast.training.config import TrainConfig
from haast.training.run import head_config
from haast.training.shards import read_shards
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

_PASTS = (1, 2, 4)
_SEQUENCES = 800  # of the regressions, including held-out ones: about 100,000 positions, at most 1 GB
_DEPTH = 5  # of the chains for tau


def compressibility(examples: list[Example], embeddings: Tensor, held_out: int) -> dict[str, Any]:
    """Share of held-out variance explained, per prediction task and past; dimensions are standardised.

    Args:
        examples: sequences; the last `held_out` test the fit.
        embeddings: (vocab, hidden) of the target.
        held_out: number of test sequences.
    """
    features = [e.features[:-1][e.supervised[:-1].bool()].float() for e in examples]
    tokens = [embeddings[e.tokens[:-1][e.supervised[:-1].bool()].long()] for e in examples]
    features, tokens = _standard(features), _standard(tokens)
    kinds = ("feature from features", "feature from features and its token", "token from tokens")
    explained: dict[str, Any] = {kind: {} for kind in kinds}
    for past in _PASTS:
        for kind in kinds:
            pairs = []
            for feature, token in zip(features, tokens, strict=True):
                own = token if kind == kinds[2] else feature
                x, y = _lagged(own, own, past)
                pairs.append((torch.cat([x, token[past:]], 1) if kind == kinds[1] else x, y))
            explained[kind][str(past)] = _explained(pairs[:-held_out], pairs[-held_out:])
    return explained


def _standard(parts: list[Tensor]) -> list[Tensor]:
    joined = torch.cat(parts)
    mean, deviation = joined.mean(0), joined.std(0).clamp_min(1e-6)
    return [(part - mean) / deviation for part in parts]


def _lagged(source: Tensor, predicted: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Regression pairs: `past` consecutive positions of the source, and the position after them."""
    count = max(len(source) - past, 0)
    return torch.cat([source[i : i + count] for i in range(past)], 1), predicted[past:]


def _explained(fit: list[tuple[Tensor, Tensor]], test: list[tuple[Tensor, Tensor]]) -> float:
    x, y = (torch.cat(parts) for parts in zip(*fit, strict=True))
    square = x.T @ x + 0.02 * len(x) * torch.eye(x.shape[1])
    solved = torch.linalg.solve(square.double(), (x.T @ y).double()).float()
    x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
    return float(1 - (y - x @ solved).square().sum() / (y - y.mean(0)).square().sum())


def draw(document: dict[str, Any], path: Path) -> None:
    """Plot agreement by depth, tau and explained variance into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(INPUTS)}
    for row in document["inputs"]:
        alphas = row["valid_alpha"]
        left.plot(range(len(alphas)), alphas, marker="o", label=row["inputs"], color=colours[row["inputs"]])
    left.set(xlabel="number of own states that the head reads (n)", ylabel="agreement with the target (n-alpha)")
    left.set_xticks(range(5))
    left.legend(fontsize=8)
    rows = document["inputs"]
    middle.barh([r["inputs"] for r in rows], [r["tau"] for r in rows], color=[colours[r["inputs"]] for r in rows])
    middle.bar_label(middle.containers[0], fmt="%.2f", padding=3)
    middle.set(xlabel=f"tau, chains of {_DEPTH} drafts", xlim=(1, max(r["tau"] for r in rows) * 1.15))
    middle.invert_yaxis()
    for name, values in document["explained_variance"].items():
        right.plot([int(p) for p in values], list(values.values()), marker="o", label=name)
    right.set(xlabel="past positions", ylabel="variance explained (held out)", ylim=(0, 1))
    right.set_xticks(_PASTS)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Train the four heads, fit the regressions, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--valid-prompts", type=Path, required=True)
    parser.add_argument("--valid-limit", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=3000)
    parser.add_argument("--views", type=int, default=400_000)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    target = load_target(arguments.model)
    prompts = [p.turns[0] for p in read_prompts(arguments.valid_prompts, arguments.valid_limit)]
    bench, frozen = Bench(target, prompts, 64), TargetWeights.of(target)
    examples = read_shards(arguments.shards)[0]
    random.Random(0).shuffle(examples)  # shards are sorted by length
    examples = examples[: arguments.sequences + 150]
    settings = {"views": arguments.views, "sequences": arguments.sequences}
    base = TrainConfig(
        views=arguments.views, initialisation="random", learning_rate=1e-3, alignment_steps=1, feature_noise=0.0,
        batch_tokens=3072, evaluate_every=10**9, log_every=10**9, checkpoint_every=10**9,
    )  # fmt: skip
    rows = []
    for inputs in INPUTS:
        config = replace(base, inputs=inputs)
        parts = (head_config(config, target), frozen, examples[: arguments.sequences], examples[arguments.sequences :])
        with TemporaryDirectory() as folder:
            run = Trainer(config, *parts, Path(folder), quiet=True)
            with Progress(inputs):
                result = run.run()
            head = Head(run.plain_head().requires_grad_(False), run.draft_vocab, {})
        drafter = EagleDrafter(target, head, DraftShape("chain", depth=_DEPTH))
        stats = bench.run(drafter)
        rows.append({"inputs": inputs, "tau": stats.tau, "alpha_by_depth": stats.alpha_by_depth, **result})
        print(f"{inputs:24s} tau {stats.tau:.3f}  n-alpha {result['valid_alpha']}", flush=True)
    with Progress("regressions"):
        explained = compressibility(examples[-_SEQUENCES:], frozen.embeddings, 150)
    document = {
        "kind": "why-it-works",
        "inputs": rows,
        "explained_variance": explained,
        "shape": f"chain of {_DEPTH}",
        "environment": environment(target, arguments.model, arguments.valid_prompts, len(prompts), settings),
    }
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, arguments.png or arguments.json.with_suffix(".png"))
    print(json.dumps(document["explained_variance"], indent=1))


if __name__ == "__main__":
    main()
