"""What the draft LM head is over: a reduced vocabulary, that and the text's tokens, all tokens, or a low rank of all.

    python benchmarks/draft_vocab.py --shards features/ --prompts valid.jsonl --json results/draft-vocab.json

The shipped head drafts with different LM heads, all measured in one run, on validation prompts:

    rows of the target's LM head      for the draft vocabulary, for that and the text's tokens (the default),
                                      or for all tokens
    rank r                            U D of the target's whole LM head: U (vocabulary, r), D (r, hidden), as in
                                      SlimSpec (arXiv 2605.10453). At first the closed form with the least squared error
                                      of the logits on the target's features
    rank r, trained                   then `--seconds` of distillation from the target's best tokens on these features

Costs are those of the drafter without the one-call path, which reads rows of the target's LM head only.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haast.api import Haast, find_head
from haast.bench.report import environment
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import shape_for
from haast.engine.engine import Engine, Stats, StopParams
from haast.files import write_json
from haast.heads.checkpoint import Head, load_head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.losses import teacher_loss
from haast.training.shards import read_shards

NODES = (6, 12, 60)
_BATCH = 1024  # positions per step of the distillation
_LEARNING_RATE = 1e-3


class WithRows(FeatExtrapolator):
    """The shipped head, drafting over the target's rows: a class of its own, so that the one-call path is not used."""


class LowRank(FeatExtrapolator):
    """The shipped head with an LM head U D over the whole vocabulary."""

    own_lm_head = True

    def __init__(self, config: FeatExtrapolatorConfig, up: Tensor, down: Tensor) -> None:
        super().__init__(config)
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def lm_rows(self, target_rows: Tensor) -> Tensor:
        return self.up.to(target_rows.dtype)

    def lm_input(self, states: Tensor, tokens: Tensor) -> Tensor:
        return super().lm_input(states, tokens) @ self.down.T


def features_of(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, hidden) at all supervised positions, and the target's best tokens and their probabilities (n, k)."""
    chosen = [example.supervised[:-1].bool() for example in examples]
    pairs = list(zip(examples, chosen, strict=True))
    return (
        torch.cat([e.features[:-1][mask] for e, mask in pairs]).float(),
        torch.cat([e.topk_ids[:-1][mask] for e, mask in pairs]).long(),
        torch.cat([e.topk_probs[:-1][mask] for e, mask in pairs]).float(),
    )


def closed_form(weight: Tensor, features: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (vocabulary, rank) and D (rank, hidden) with the least mean squared error of the logits on these features."""
    covariance = features.double().T @ features.double() / len(features)
    root = torch.linalg.cholesky(covariance + 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance)))
    whitened = weight.double() @ root  # its squared error is the logits'
    values, vectors = torch.linalg.eigh(whitened.T @ whitened)
    best = vectors[:, values.argsort(descending=True)[:rank]]
    # Any orthogonal mix of the columns is as good. One spreads their sizes, for 8-bit blocks and for equal steps.
    best = best @ torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0)).double())[0]
    return (whitened @ best).float(), torch.linalg.solve(root.T, best).T.float()


def distil(
    up: Tensor, down: Tensor, data: tuple[Tensor, Tensor, Tensor], seconds: float
) -> tuple[Tensor, Tensor, int, float]:
    """U and D after training for `seconds`, the number of positions seen, and the mean loss of the last tenth."""
    scale = float(up.square().mean().sqrt()), float(down.square().mean().sqrt())
    up, down = nn.Parameter(up.clone()), nn.Parameter(down.clone())
    optimizer = torch.optim.AdamW([{"params": [up]}, {"params": [down]}], _LEARNING_RATE, weight_decay=0.0)
    generator, begin, losses = torch.Generator().manual_seed(0), time.monotonic(), list[float]()
    while (share := (time.monotonic() - begin) / seconds) < 1:
        for group, size in zip(optimizer.param_groups, scale, strict=True):
            group["lr"] = _LEARNING_RATE * size * (1 - share)  # relative steps: the two differ in size
        picked = torch.randint(len(data[0]), (_BATCH,), generator=generator)
        features, ids, probs = (each[picked] for each in data)
        loss = teacher_loss(features @ down.T, up, ids, probs, frozen_columns=0).loss / _BATCH
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-max(len(losses) // 10, 1) :]
    return up.detach(), down.detach(), len(losses) * _BATCH, sum(last) / len(last)


def measure(target: Target, head: Head, prompts: list[list[int]], stop: StopParams, own_tokens: bool) -> dict[str, Any]:
    """tau, and the draft's time a step and a level, per number of nodes."""
    measured = dict[str, Any]()
    for nodes in NODES:
        shape, stats = shape_for(nodes), Stats()
        drafter = EagleDrafter(target, head, shape)
        if not own_tokens:
            drafter._text_vocab = None
        for prompt in prompts:
            Engine(target, drafter).complete([prompt], SamplingParams(), stop, stats)
        draft_ms = stats.ms_draft / stats.target_forwards
        measured[str(nodes)] = {"tau": stats.tau, "draft_ms": draft_ms, "level_ms": draft_ms / shape.depth}
    return measured


def main() -> None:
    """Measure all LM heads and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="validation prompts")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answers", type=int, default=1500, help="answers of the shards to use")
    parser.add_argument("--ranks", default="64,128,256")
    parser.add_argument("--seconds", type=float, default=60.0, help="of distillation per rank")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "it is shipped"
    shipped, target = load_head(folder), load_target(DEFAULT_MODEL)
    module = shipped.module
    assert isinstance(module, FeatExtrapolator) and shipped.draft_vocab is not None
    weights, haast = module.state_dict(), Haast(target, EagleDrafter(target, shipped, shape_for(6)))
    prompts = [haast.encode(p.turns[0]) for p in read_prompts(arguments.prompts, arguments.limit)]
    stop = StopParams(arguments.tokens, haast.eos_ids())
    examples = read_shards(arguments.shards)[0]
    random.Random(0).shuffle(examples)
    data = features_of(examples[: arguments.answers])
    whole = target.head_rows(torch.arange(target.vocab_size)).float()

    def row(
        name: str, head: FeatExtrapolator, vocab: Tensor | None, weights_read: int, own: bool = False, **more: Any
    ) -> None:
        head.load_state_dict(weights, strict=False)  # U and D are the head's own
        with Progress(name):
            found = measure(target, Head(head.eval(), vocab, {}), prompts, stop, own)
        rows.append({"lm_head": name, "weights": weights_read, **more, "by_nodes": found})
        taus = "  ".join(f"{nodes}: {each['tau']:.3f} ({each['level_ms']:.2f} ms)" for nodes, each in found.items())
        print(f"{name:28s} {taus}", flush=True)

    rows = list[dict[str, Any]]()
    config, hidden = module.config, module.config.hidden_size
    size = len(shipped.draft_vocab) * hidden
    row("draft vocabulary", WithRows(config), shipped.draft_vocab, size)
    row("with the text's tokens", WithRows(config), shipped.draft_vocab, size, own=True)
    row("all tokens", WithRows(config), None, whole.numel())
    for rank in map(int, arguments.ranks.split(",")):
        up, down = closed_form(whole, data[0], rank)
        size = up.numel() + down.numel()
        row(f"rank {rank}", LowRank(config, up, down), None, size)
        with Progress(f"training rank {rank}"):
            up, down, positions, loss = distil(up, down, data, arguments.seconds)
        row(f"rank {rank}, trained", LowRank(config, up, down), None, size, positions=positions, loss=loss)
    settings = {"limit": arguments.limit, "tokens": arguments.tokens, "seconds": arguments.seconds}
    found = environment(target, DEFAULT_MODEL, arguments.prompts, len(prompts), settings)
    write_json({"kind": "draft-vocab", "rows": rows, "environment": found}, str(arguments.json))


if __name__ == "__main__":
    main()
