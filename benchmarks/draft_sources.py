"""Acceptance of each source of drafts: calibration curves, and what each source adds to tau at equal numbers of nodes.

    python benchmarks/draft_sources.py --fit valid.jsonl --json curves.json --png docs/calibration-curves.png --save

Answers validation prompts, greedily and at temperature 1, and records at every position what the head and the text
offer. The curves are fitted to half of the prompts and shown on the other half: predicted against observed acceptance.
The same record gives tau of every set of sources, since whether a draft would have been accepted is known without
verifying it. Token recycling (arXiv 2408.08696) is a further source there: the target's own 8 likeliest next tokens
after each token, as it had them when it last saw that token, in this text or in all texts so far.

--save writes the curves next to the head, where drafting reads them. Never give evaluation prompts.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from haast.api import Haast
from haast.bench.report import environment
from haast.core import SamplingParams, StopParams
from haast.drafters.candidates import Candidates
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import find_head
from haast.drafters.suffix_index import SuffixIndex
from haast.drafters.tree_builder import Growth
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Step
from haast.errors import HeadWarning
from haast.files import write_json
from haast.heads.acceptance import Acceptance, Curve, Source, fit, save
from haast.heads.checkpoint import load_head
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.tree import DraftTree

NODES = (4, 6, 8, 12, 24, 60)
_KEPT = 256  # the head's best candidates of a position
_COPIES, _BRANCHES = 24, 4  # nodes and branches that the text offers
_LIKELY, _RECYCLED_DEPTH = 8, 6  # of token recycling
_LEAST = -6.5  # log-scores below this are left out of the fits
_BINS = 10  # of the curves that are shown


@dataclass
class Position:
    """What the sources offer after one token of an answer, and the target's likeliest next tokens there."""

    head: Candidates
    text: Candidates
    likely: list[int]


@dataclass
class Answer:
    """One answer: tokens, and per token but the last what was offered after it."""

    tokens: list[int]
    positions: list[Position]


class Recorder(EagleDrafter):
    """Records the head's candidates at every position, and drafts nothing."""

    offered: list[Candidates]

    def _draft(self, states: Any, prepared: Any, others: Any = None) -> DraftTree:
        return super()._draft(states, replace(prepared, one_call=None), others)

    def _grow(
        self, prepared: Any, cache: Any, past: Any, roots: Any, extrapolated: Any, setting: Sequence[Any]
    ) -> Growth:
        plain = [(0.0, 0.0) for _ in setting]  # without the correction by earlier steps
        grown = super()._grow(prepared, cache, past, roots, extrapolated, plain)
        tokens, scores, parents = (part[0].tolist() for part in grown.listed())
        self.offered.append(Candidates(tokens, parents, scores).best(_KEPT))
        return grown

    def propose(self, states: Any, budget: int | None = None, others: Any = None) -> DraftTree:
        return DraftTree.roots(super().propose(states, None, others).tokens[:, 0])


def record(target: Target, drafter: Recorder, prompts: Sequence[list[int]], sampling: SamplingParams, new: int,
           eos: tuple[int, ...]) -> Iterator[Answer]:  # fmt: skip
    """Answer the prompts one by one; `drafter` has uncalibrated curves."""
    for prompt in prompts:
        likely, tokens = list[list[int]](), list[int]()
        drafter.offered = []

        def watch(step: Step, into: list[list[int]] = likely) -> None:
            into.append(step.logits[0, 0].topk(_LIKELY).indices.tolist())

        stop = StopParams(new, eos)
        for emission in Engine(target, drafter).run([prompt], sampling, stop, watch=watch):
            tokens += emission.tokens
        index, positions = SuffixIndex(1, _BRANCHES), list[Position]()
        index.extend(prompt)
        for token, head, best in zip(tokens[:-1], drafter.offered, likely, strict=False):
            index.extend([token], answer=True)
            positions.append(Position(head, index.candidates(_COPIES), best))
        yield Answer(tokens, positions)


def outcomes(answers: Sequence[Answer], source: str) -> tuple[list[float], list[bool]]:
    """Log-scores of all nodes of a source that the answers decide, and whether each was right."""
    scores, right = list[float](), list[bool]()
    for answer in answers:
        for place, position in enumerate(answer.positions, start=1):
            nodes: Candidates = getattr(position, source)
            paths = list[tuple[int, bool]]()  # depth, right
            for token, parent, score in zip(nodes.tokens, nodes.parents, nodes.scores, strict=True):
                depth, above = (0, True) if parent < 0 else paths[parent]
                at = place + depth
                known = at < len(answer.tokens)
                paths.append((depth + 1, above and known and answer.tokens[at] == token))
                if known and score > _LEAST:
                    scores.append(score)
                    right.append(paths[-1][1])
    return scores, right


def shown(scores: Sequence[float], right: Sequence[bool], curve: Curve) -> list[dict[str, float]]:
    """Bins of predicted probability: nodes, mean prediction before and after calibration, and observed acceptance."""
    bins = defaultdict[int, list[tuple[float, float, bool]]](list)
    for score, ok in zip(scores, right, strict=True):
        chance = math.exp(curve(score))
        bins[min(int(chance * _BINS), _BINS - 1)].append((math.exp(score), chance, ok))
    return [
        {"nodes": len(part), "score": _mean(p for p, _, _ in part), "predicted": _mean(c for _, c, _ in part),
         "observed": _mean(ok for _, _, ok in part)}
        for _, part in sorted(bins.items())
    ]  # fmt: skip


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


class Recycled:
    """Token recycling: the target's likeliest next tokens per token, and how often each rank was right."""

    def __init__(self) -> None:
        self.table: dict[int, list[int]] = {}
        self._tried, self._right = [1.0] * _LIKELY, [0.3 / (1 + rank) for rank in range(_LIKELY)]

    def learn(self, token: int, following: int, likely: list[int]) -> None:
        """The target saw `token`, chose `following`, and thought these likely after it."""
        for rank, guess in enumerate(self.table.get(token, ())):
            self._tried[rank] += 1
            self._right[rank] += guess == following
        self.table[token] = likely

    def candidates(self, root: int) -> Candidates:
        """A tree below the root by the measured acceptance of each rank."""
        found, open_nodes = Candidates(), [(-1, root, 0.0, 0)]
        while open_nodes:
            parent, token, score, depth = open_nodes.pop()
            for rank, guess in enumerate(self.table.get(token, ())):
                below = score + math.log(self._right[rank] / self._tried[rank])
                if below > math.log(0.02) and depth < _RECYCLED_DEPTH:
                    open_nodes.append((found.add(guess, parent, min(below, score)), guess, below, depth + 1))
        return found.best(len(found))


def tau(answers: Sequence[Answer], curves: Acceptance, sources: Sequence[str], nodes: int) -> float:
    """Tokens per step if the best `nodes` - 1 nodes of these sources are verified at every step."""
    steps = emitted = 0
    recycled = Recycled()
    for answer in answers:
        recycled = recycled if "recycled, all texts" in sources else Recycled()
        at, last = 0, len(answer.positions)
        while at < last:
            offered = _offered(answer.positions[at], answer.tokens[at], curves, sources, recycled)
            accepted = _accepted(offered.best(nodes - 1), answer.tokens[at + 1 :])
            new = min(accepted + 1, last - at)
            for place in range(at, at + new):
                recycled.learn(answer.tokens[place], answer.tokens[place + 1], answer.positions[place].likely)
            at, steps, emitted = at + new, steps + 1, emitted + new
    return emitted / steps


def _offered(
    position: Position, root: int, curves: Acceptance, sources: Sequence[str], recycled: Recycled
) -> Candidates:
    joined = Candidates()
    for source in sources:
        if source.startswith("recycled"):
            joined = joined.merged(recycled.candidates(root))
            continue
        nodes, curve = getattr(position, source), getattr(curves, source).greedy
        joined = joined.merged(replace(nodes, scores=list(map(curve, nodes.scores))))
    return joined


def _accepted(tree: Candidates, following: Sequence[int]) -> int:
    places = enumerate(zip(tree.parents, tree.tokens, strict=True))
    children = {key: place for place, key in places}
    node, accepted = -1, 0
    for token in following:
        below = children.get((node, token))
        if below is None:
            break
        node, accepted = below, accepted + 1
    return accepted


SETS = (
    ("head",), ("text",), ("head", "text"), ("head", "recycled, this text"), ("head", "text", "recycled, this text"),
    ("head", "text", "recycled, all texts"), ("text", "recycled, this text"), ("text", "recycled, all texts"),
)  # fmt: skip


def draw(document: dict[str, Any], path: Path) -> None:
    """Predicted against observed acceptance, one panel per kind of text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, (kind, sources) in zip(figure.subplots(1, 2), document["curves"].items(), strict=True):
        axis.plot([0, 1], [0, 1], ":", color="gray")
        for colour, (name, bins) in zip(("tab:blue", "tab:orange"), sources.items(), strict=True):
            observed = [each["observed"] for each in bins]
            axis.plot([each["predicted"] for each in bins], observed, "o-", color=colour, label=f"{name}, calibrated")
            axis.plot([each["score"] for each in bins], observed, "x--", color=colour, label=f"{name}, its own score")
        axis.set(title=f"{kind} texts", xlabel="predicted acceptance of a node", ylabel="observed")
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Record, fit, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True, help="validation prompts")
    parser.add_argument("--limit", type=int, default=80, help="prompts, evenly spread over the file")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--save", action="store_true", help="write the curves next to the default head")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", HeadWarning)  # nothing is drafted, so no draft is accepted
    target, folder = load_target(DEFAULT_MODEL), find_head("default", DEFAULT_MODEL)
    assert folder is not None, "the default model has a head"
    drafter = Recorder(target, replace(load_head(folder), acceptance=None), shape_for(60))
    encoder = Haast(target, VanillaDrafter())
    prompts = [encoder.encode(p.turns[0]) for p in read_prompts(arguments.fit, arguments.limit, spread=True)]
    answers = dict[str, list[Answer]]()
    with Progress("recording") as progress:
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            sampling = SamplingParams(temperature=temperature, seed=1)
            recording = record(target, drafter, prompts, sampling, arguments.tokens, encoder.eos_ids())
            answers[kind] = []
            for answer in recording:
                answers[kind].append(answer)
                progress.set_status(f"{kind}: {len(answers[kind])} of {len(prompts)} answers")
    settings = {"tokens": arguments.tokens}
    where = environment(target, DEFAULT_MODEL, arguments.fit, len(prompts), settings)
    fitted = {kind: each[::2] for kind, each in answers.items()}
    held_out = {kind: each[1::2] for kind, each in answers.items()}
    kinds = ("greedy", "sampled")
    sources = {name: Source(*(fit(*outcomes(fitted[kind], name)) for kind in kinds)) for name in ("head", "text")}
    curves = Acceptance(**sources, about={"prompts": len(prompts), "tokens": arguments.tokens})
    if arguments.save:
        print(save(curves, folder))
    document = {
        "kind": "calibration-curves",
        "curves": {
            kind: {
                name: shown(*outcomes(held_out[kind], name), getattr(source, kind)) for name, source in sources.items()
            }
            for kind in kinds
        },
        "tau": [
            {"sources": list(names), **{str(nodes): tau(held_out["greedy"], curves, names, nodes) for nodes in NODES}}
            for names in SETS
        ],
        "environment": where,
    }
    write_json(document, arguments.json, indent=1)
    draw(document, arguments.png or arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
