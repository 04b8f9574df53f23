"""A drafter of your own, which repeats the last token, next to those of Haast on five of your prompts.

python examples/own_drafter.py prompts.jsonl; a drafter cannot change the text: a bad one costs time only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from haast import Haast
from haast.bench.decoders import EngineDecoder
from haast.core import Accepted, SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.prompts import read_prompts
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree


class RepeatDrafter(Drafter):
    """Proposes a chain of `drafts` copies of each row's last token."""

    name = "repeat"

    def __init__(self, drafts: int = 3) -> None:
        self._nodes = 1 + drafts

    @property
    def nodes(self) -> int:
        return self._nodes

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> list[int]:
        return [prompt[reused]]  # a request's state: its last token, set by `observe`

    def observe(self, states: Sequence[list[int]], accepted: Accepted) -> None:
        for state, tokens in zip(states, accepted.host_tokens(), strict=True):
            state[:] = tokens[-1:] or state

    def propose(self, states: Sequence[list[int]], budget: int | None = None) -> DraftTree:
        nodes = self.nodes if budget is None else min(budget, self.nodes)
        return DraftTree.chain(torch.tensor([state * nodes for state in states]))  # (rows, nodes), root first


def main(path: str) -> None:
    haast = Haast.from_pretrained()
    prompts = [haast.encode(prompt.turns[0]) for prompt in read_prompts(path, 5)]
    for drafter in (VanillaDrafter(), RepeatDrafter(), haast.drafter):
        decoder = EngineDecoder(haast.target, drafter, SamplingParams(), haast.target.end_ids)
        runs = [decoder.run(prompt, max_new_tokens=64) for prompt in prompts]
        tokens, ms = sum(len(run.tokens) for run in runs), sum(run.ms_decode for run in runs)
        forwards = sum(run.stats.target_forwards for run in runs if run.stats)
        print(f"{drafter.name:14} tau {(tokens - len(runs)) / forwards:.2f}  {1e3 * tokens / ms:6.1f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:2])
