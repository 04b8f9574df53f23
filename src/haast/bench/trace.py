"""What one answer's drafts came to, step by step, as a document ("haast-trace-1").

Owns the recording and the document's schema. Knows neither terminal nor HTML (see `trace_view` and `cli.trace`).

A node's `target_prob` is the target's probability of its token after its own parent, of the processed distribution that
is sampled. Greedy decoding has a one-hot one, which tells nothing: there it is the softmax of the processed scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haast.bench.report import machine
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.engine.engine import Engine, Stats, Step, StopParams
from haast.sampling import Sampler
from haast.target.target import Target
from haast.text import TextStream, token_text

TRACE_FORMAT = "haast-trace-1"


def record_trace(
    target: Target,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    stop: StopParams,
    prompt_text: str,
    environment: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer one prompt and write down every step's tree and what became of it.

    Args:
        target: with its tokenizer, which makes tokens readable.
        prompt_ids: the prompt as the model reads it; `prompt_text` as a reader does.
        sampling: stateful logits processors are called more often here than once per token: leave them out.
        stop: when the answer ends.
        environment: what a reader should know of the machine and the model; None is this machine.

    Raises:
        ValueError: the target has no tokenizer; PromptError: as `Engine.run`.
    """
    if target.tokenizer is None:
        raise ValueError("a trace shows text, and this target was given without a tokenizer: give one")
    recorder, stats = _Recorder(target.tokenizer, prompt_ids, sampling), Stats()
    for emission in Engine(target, drafter).run([list(prompt_ids)], sampling, stop, stats, watch=recorder.watch):
        if not recorder.prefill:
            recorder.begin(emission.tokens[0])
    recorder.end()
    return {
        "format": TRACE_FORMAT,
        "decoder": drafter.name,
        "prompt": prompt_text,
        "text": recorder.stream.text,
        **{key: getattr(stats, key) for key in ("tau", "tokens", "target_forwards", "by_length")},
        "temperature": sampling.temperature,
        "probabilities": "softmax of the scores" if sampling.temperature == 0 else "the distribution that was sampled",
        "environment": machine() if environment is None else environment,
        "prefill": recorder.prefill,
        "steps": recorder.steps,
    }


class _Recorder:
    """Follows one row's text, and turns each step into its document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self._tokenizer, self._sampler, self._history = tokenizer, Sampler(sampling), list(prompt)
        self._greedy = sampling.temperature == 0
        self.stream = TextStream(tokenizer)
        self.prefill: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def begin(self, token: int) -> None:
        """Take in the prompt's own token, which no step drafted."""
        self.prefill = self._emitted(token)

    def end(self) -> None:
        """Give out the text of a character that was never completed."""
        last = self.steps[-1]["emitted"][-1] if self.steps else self.prefill
        last["text"] += self.stream.finish()

    def watch(self, step: Step) -> None:
        """Write down a step. Its logits are read here and not kept."""
        verdict, emission = step.verdict.rows[0], step.emissions[0]
        assert verdict is not None, "the one row of a trace runs until its end"
        told: dict[str, Any] = {"position": len(self._history)}
        told |= {part: getattr(step, part) for part in ("ms_draft", "ms_verify", "ms_overhead")}
        nodes = self._nodes(step, dict(zip(verdict.path, verdict.tokens, strict=True)))
        told["emitted"] = [
            self._emitted(token) | {"drafted": place < emission.drafted} for place, token in enumerate(emission.tokens)
        ]
        self.steps.append(told | {"nodes": nodes})

    def _emitted(self, token: int) -> dict[str, Any]:
        """A settled token; `text` is what became certain with it, so that all of them together are the answer."""
        self._history.append(token)
        return {"token": token, "text": self.stream.push(token)}

    def _nodes(self, step: Step, chosen: Mapping[int, int]) -> list[dict[str, Any]]:
        """The tree, and what the target chose after the nodes that verification visited."""
        tree, known = step.tree, dict[int, Tensor]()  # known: node -> target probabilities after it (vocab,)
        tokens, parents, live, depths = (x[0].tolist() for x in (tree.tokens, tree.parents, tree.live, tree.depths))
        probes = [False] * tree.nodes if tree.placeholder is None else tree.placeholder[0].tolist()

        def prob(node: int, token: int) -> float:
            if node not in known:
                known[node] = self._probs(step.logits[0, node], _way(node, parents, tokens))
            return float(known[node][token])

        nodes = []
        for node, token in enumerate(tokens):
            candidate, then = live[node] and parents[node] >= 0 and not probes[node], chosen.get(node)
            nodes.append(
                {
                    "id": node,
                    "parent": parents[node],
                    "depth": depths[node],
                    **self._named(token),
                    "accepted": node > 0 and then is not None,
                    "probe": probes[node],
                    "live": live[node],
                    "target_prob": prob(parents[node], token) if candidate else None,
                    "choice": None if then is None else {**self._named(then), "prob": prob(node, then)},
                }
            )
        return nodes

    def _probs(self, logits: Tensor, way: Sequence[int]) -> Tensor:
        """Target probabilities (vocab,) after `way`, the tokens below the root."""
        history = [*self._history, *way]
        if self._greedy:
            return self._sampler.scores(history, logits).double().softmax(-1)
        return self._sampler.probs(history, logits)

    def _named(self, token: int) -> dict[str, Any]:
        return {"token": token, "text": token_text(self._tokenizer, token)}


def _way(node: int, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The tokens from below the root to `node`."""
    way: list[int] = []
    while node > 0:
        way.append(tokens[node])
        node = parents[node]
    return way[::-1]
