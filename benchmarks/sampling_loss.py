"""What sampling at temperature 1 loses, and what the head loses: tau by enumeration on logged steps.

    python benchmarks/sampling_loss.py --prompts valid.jsonl --json results/sampling-loss.json

Samples answers to validation prompts and keeps the draft tree of every step with the target's probabilities at its
nodes. Four taus per tree size:

    achieved      tokens per step in this run: one draw per node
    best rule     1 + the sum over all nodes of the target's probability of the node's path: the expectation of
                  sample-and-match. For trees that depend on the prefix only no lossless rule accepts more, because
                  under any of them the text goes through a node with that probability. The difference to `achieved`
                  is chance.
    oracle        the same sum if the tree of as many nodes had been chosen by the target's own probabilities: what
                  the head loses; what is then missing to a tree without end is lost to sampling
    greedy        tokens per step of the same head with the same nodes at temperature 0

The oracle's candidates are, at every node, the target's 64 likeliest tokens. A last row per size compares drafts ranked
by the head's own probabilities with drafts ranked by them at the request's temperature, 0.7.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haast.api import Haast
from haast.bench.report import environment
from haast.core import SamplingParams, StopParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import find_head
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Step
from haast.files import write_json
from haast.heads.checkpoint import load_head
from haast.path_tree import PathTree, pack_rows
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.stats import Stats
from haast.target.kv_cache import KVCache
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.tree import DraftTree

NODES = (12, 60)
TEMPERATURE, LOWER = 1.0, 0.7
_CHILDREN = 64  # of the oracle
Paths = dict[tuple[int, ...], float]  # tokens below the root -> log-probability


def expected_tokens(tree: DraftTree, logits: Tensor, temperature: float) -> float:
    """Expected tokens of a tree of one row under sample-and-match; `logits` are (1, nodes, vocab).

    The sum over all nodes of the probability that the text goes through them; the root's is 1.
    """
    probs = (logits[0].double() / temperature).softmax(-1)
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    reach = [1.0]
    for node in range(1, tree.nodes):
        reach.append(reach[parents[node]] * float(probs[parents[node], tokens[node]]))
    return sum(reach)


class Oracle:
    """The tree of `most` nodes with the most expected tokens, by the target's own probabilities.

    The best n - 1 nodes below a root are the most likely paths. A path's children are less likely than itself, so once
    all of the best n - 1 known paths have been expanded, no unknown path can be among them.
    """

    def __init__(self, target: Target, temperature: float, most: int) -> None:
        self._target, self._temperature, self._most = target, temperature, most

    def gain(self, text: Sequence[int]) -> float:
        """Expected tokens after `text` of the best tree."""
        room = len(text) + 4 * self._most + 64  # more paths are expanded than stay among the best
        with self._target.lock, torch.inference_mode(), self._target.step_threads():
            cache = self._target.new_cache(1, room)
            if len(text) > 1:
                self._target.forward(DraftTree.chain(torch.tensor([text[:-1]])), cache, last_only=True)
                cache.advance([len(text) - 1])
            known = Paths()
            expanded: Paths = {(): 0.0}
            self._expand(text[-1], expanded, [()], known, cache)
            while True:
                best = sorted(known, key=lambda path: (-known[path], len(path)))[: self._most - 1]
                new = [path for path in best if path not in expanded]
                if not new:
                    break
                expanded |= {path: known[path] for path in new}
                self._expand(text[-1], expanded, new, known, cache)
        return 1 + sum(math.exp(known[path]) for path in best)

    def _expand(self, root: int, expanded: Paths, new: Sequence[tuple[int, ...]], known: Paths, cache: KVCache) -> None:
        """Add the likeliest children of the new paths, by one forward over all expanded ones."""
        tree, node_of = PathTree(root, 1 + len(expanded)), dict[tuple[int, ...], int]({(): 0})
        for path in sorted(expanded, key=len):
            if path:
                node_of[path] = tree.child(node_of[path[:-1]], path[-1])
        logits = self._target.forward(pack_rows([tree], self._target.device), cache).logits
        scores = (logits[0, [node_of[path] for path in new]] / self._temperature).log_softmax(-1)
        best, tokens = (each.tolist() for each in scores.topk(_CHILDREN))
        for path, own, following in zip(new, best, tokens, strict=True):
            known |= {(*path, token): expanded[path] + score for token, score in zip(following, own, strict=True)}


class Warmer(EagleDrafter):
    """Ranks drafts by the head's probabilities at a temperature."""

    temperature = 1.0

    def _draft(self, states: Any, prepared: Any, others: Any = None) -> DraftTree:
        return super()._draft(states, replace(prepared, one_call=None), others)

    def _children(self, states: Tensor, before: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        lm_head = self._lm_head
        self._lm_head = Divided(lm_head, self.temperature)
        try:
            return super()._children(states, before, scores, top_k)
        finally:
            self._lm_head = lm_head


class Divided(nn.Module):
    """Logits of an LM head, divided by a temperature."""

    def __init__(self, lm_head: nn.Module, temperature: float) -> None:
        super().__init__()
        self._lm_head, self._temperature = lm_head, temperature

    def forward(self, states: Tensor) -> Tensor:
        """Logits (..., vocab) of states (..., hidden)."""
        logits: Tensor = self._lm_head(states)
        return logits / self._temperature


class Log:
    """The text before every step of one answer, and the expected tokens of the step's tree."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.steps: list[tuple[list[int], float]] = []
        self._prompt, self._text = prompt, list(prompt)

    def watch(self, step: Step) -> None:
        """Record a step; the first one's root is the token that the prefill chose."""
        if len(self._text) == len(self._prompt):
            self._text.append(int(step.tree.tokens[0, 0]))
        self.steps.append((list(self._text), expected_tokens(step.tree, step.logits, TEMPERATURE)))
        self._text += step.emissions[0].tokens


def measure(
    target: Target, drafter: Warmer, prompts: Sequence[list[int]], stop: StopParams, every: int
) -> dict[str, Any]:
    """The taus of the drafter's tree size; the oracle's and the best rule's next to it on every `every`-th step."""
    oracle, achieved, greedy = Oracle(target, TEMPERATURE, drafter.nodes), Stats(), Stats()
    expected, pairs = list[float](), list[tuple[float, float]]()
    for number, prompt in enumerate(prompts):
        log, engine = Log(prompt), Engine(target, drafter)
        sampling = SamplingParams(temperature=TEMPERATURE, seed=number)
        for _ in engine.run([prompt], sampling, stop, achieved, watch=log.watch):
            continue
        engine.complete([prompt], SamplingParams(), stop, greedy)
        expected += [tokens for _, tokens in log.steps]
        pairs += [(tokens, oracle.gain(text)) for text, tokens in log.steps[::every]]
    ranked = {}
    for name, drafter.temperature in (("head's own", 1.0), ("request's temperature", LOWER)):
        stats = Stats()
        for number, prompt in enumerate(prompts):
            params = SamplingParams(temperature=LOWER, seed=number)
            Engine(target, drafter).complete([prompt], params, stop, stats)
        ranked[name] = stats.tau
    drafter.temperature = 1.0
    return {
        "nodes": drafter.nodes,
        "steps": len(expected),
        "achieved": achieved.tau,
        "best_rule": sum(expected) / len(expected),
        "oracle_steps": len(pairs),
        "best_rule_there": sum(own for own, _ in pairs) / len(pairs),
        "oracle": sum(best for _, best in pairs) / len(pairs),
        "greedy": greedy.tau,
        "ranked_at_0.7": ranked,
    }


def main() -> None:
    """Measure all tree sizes, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="validation prompts")
    parser.add_argument("--limit", type=int, default=20, help="prompts, evenly spread over the file")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--every", type=int, default=8, help="the oracle looks at every n-th step")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    target, folder = load_target(DEFAULT_MODEL), find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    drafter, encoder = Warmer(target, load_head(folder)), Haast(target, VanillaDrafter())
    prompts = [encoder.encode(p.turns[0]) for p in read_prompts(arguments.prompts, arguments.limit, spread=True)]
    stop, rows = StopParams(arguments.tokens, encoder.eos_ids()), list[dict[str, Any]]()
    for nodes in NODES:
        with Progress(f"{nodes} nodes"):
            drafter.reshape(shape_for(nodes))
            rows.append(measure(target, drafter, prompts, stop, arguments.every))
        print(rows[-1], flush=True)
    settings = {"tokens": arguments.tokens, "every": arguments.every, "temperature": TEMPERATURE}
    where = environment(target, DEFAULT_MODEL, arguments.prompts, len(prompts), settings)
    write_json({"kind": "sampling-loss", "rows": rows, "environment": where}, arguments.json, indent=1)


if __name__ == "__main__":
    main()
