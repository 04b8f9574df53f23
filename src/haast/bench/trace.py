"""Traces: the draft tree of every step of an answer and the fate of its nodes ("haast-trace-1"), and a view of a step.

Owns the recording, the schema, and the wording that the terminal and the page share. Knows neither the terminal nor
HTML (see `cli.trace` and `page`).

A node's `target_prob` is the target's probability of its token given the path to its parent, in the processed
distribution that is sampled from. Greedy decoding has a one-hot distribution, which is not informative; there it is the
softmax of the processed scores.
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
Node = Mapping[str, Any]
FATES = ("root", "accepted", "cut", "rejected", "unreached", "probe")
_WHY = {
    "root": "root {token}: the last token of the text so far",
    "accepted": "drafted {token} (target {chance}): accepted, the target chose it too",
    "cut": "drafted {token} (target {chance}): accepted, but the text ended before it",
    "rejected": "drafted {token} (target {chance}): rejected, the target chose {choice} ({likely})",
    "twin": "drafted {token} (target {chance}): the same token as an accepted branch",
    "unreached": "drafted {token} (target {chance}): not reached, a token before it was not accepted",
    "probe": "probe {token}: run to collect n-grams for later steps, never accepted",
}
_MARKS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
_MAX_SHOWN = 24  # characters of a token


def record_trace(
    target: Target,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    stop: StopParams,
    prompt_text: str,
    environment: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer one prompt and record the tree of every step and the fate of its nodes.

    Args:
        target: must have a tokenizer.
        drafter: proposes the trees.
        prompt_ids: the token ids of the prompt.
        sampling: leave out stateful logits processors: a trace calls them more than once per token.
        stop: when the answer ends.
        prompt_text: the prompt as readers see it.
        environment: of the machine and the model; None: this machine, without the model.

    Raises:
        ValueError: the target has no tokenizer.
        PromptError: as for `Engine.run`.
    """
    if target.tokenizer is None:
        raise ValueError("a trace shows text, but this target was loaded without a tokenizer: give it one")
    recorder, stats = TraceRecorder(target.tokenizer, prompt_ids, Sampler(sampling)), Stats()
    for emission in Engine(target, drafter).run([list(prompt_ids)], sampling, stop, stats, watch=recorder.watch):
        if not recorder.prefill:
            recorder.begin(emission.tokens[0])
    recorder.end()
    return {
        "kind": "trace",
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


class TraceRecorder:
    """Builds the document of each step of one request; pass `watch` to the engine.

    Args:
        tokenizer: decodes tokens for readers.
        prompt: token ids.
        sampler: its processed distribution is shown; None shows the model's, for requests with stateful processors.
        row: the request's number, see `Step.rows`.

    Attributes:
        steps: the documents so far.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], sampler: Sampler | None, row: int = 0
    ) -> None:
        self._tokenizer, self._sampler, self._history = tokenizer, sampler, list(prompt)
        self._row = row
        self.stream = TextStream(tokenizer)
        self.prefill: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self._step_of: dict[int, int] = {}

    def step_of(self, position: int) -> int | None:
        """The number of the step that emitted the token at a position; None for the token of the prefill."""
        return self._step_of.get(position)

    def begin(self, token: int) -> None:
        """Record the first token, which prefill emits."""
        self.prefill = self._emitted(token)

    def end(self) -> None:
        """Add the text of an incomplete last character."""
        last = self.steps[-1]["emitted"][-1] if self.steps else self.prefill
        last["text"] += self.stream.finish()

    def watch(self, step: Step) -> None:
        """Record a step. Its logits are read here and not kept."""
        place = step.rows.index(self._row)
        verdict, emission = step.verdict.rows[place], step.emissions[place]
        if verdict is None:  # the request has failed
            return
        if not self.prefill:
            self.begin(int(step.tree.tokens[place, 0]))
        number = len(self.steps)
        document: dict[str, Any] = {"number": number, "position": len(self._history)}
        document |= {part: getattr(step, part) for part in ("ms_draft", "ms_verify", "ms_overhead")}
        nodes = self._nodes(step, place, dict(zip(verdict.path, verdict.tokens, strict=True)))
        self._step_of |= dict.fromkeys(range(document["position"], document["position"] + len(emission.tokens)), number)
        document["emitted"] = [
            self._emitted(token) | {"drafted": index < emission.drafted} for index, token in enumerate(emission.tokens)
        ]
        self.steps.append(document | {"nodes": nodes})

    def _emitted(self, token: int) -> dict[str, Any]:
        """An emitted token; `text` is the text that it completes, so that all texts joined are the answer."""
        self._history.append(token)
        return {"token": token, "text": self.stream.push(token)}

    def _nodes(self, step: Step, place: int, chosen: Mapping[int, int]) -> list[dict[str, Any]]:
        """The nodes of the tree; `chosen` maps each visited node to the token that the target chose after it."""
        tree, cache = step.tree, dict[int, Tensor]()  # cache: node -> target probabilities after it (vocab,)
        fields = (tree.tokens, tree.parents, tree.live, tree.depths)
        tokens, parents, live, depths = (each[place].tolist() for each in fields)
        probes = [False] * tree.nodes if tree.placeholder is None else tree.placeholder[place].tolist()

        def prob(node: int, token: int) -> float:
            if node not in cache:
                path = tree.tokens[place, 1:][tree.ancestors[place, node, 1:]].tolist()
                cache[node] = self._probs([*self._history, *path], step.logits[place, node])
            return float(cache[node][token])

        nodes = []
        for node, token in enumerate(tokens):
            candidate, choice = live[node] and parents[node] >= 0 and not probes[node], chosen.get(node)
            nodes.append(
                {
                    "id": node,
                    "parent": parents[node],
                    "depth": depths[node],
                    **self._named(token),
                    "accepted": node > 0 and choice is not None,
                    "probe": probes[node],
                    "live": live[node],
                    "target_prob": prob(parents[node], token) if candidate else None,
                    "choice": None if choice is None else {**self._named(choice), "prob": prob(node, choice)},
                }
            )
        return nodes

    def _probs(self, history: Sequence[int], logits: Tensor) -> Tensor:
        if self._sampler is None:
            return logits.double().softmax(-1)
        if self._sampler.greedy:
            return self._sampler.scores(history, logits).double().softmax(-1)
        return self._sampler.probs(history, logits)

    def _named(self, token: int) -> dict[str, Any]:
        return {"token": token, "text": token_text(self._tokenizer, token)}


class StepView:
    """One step of a trace document, without the dead nodes, which are padding."""

    def __init__(self, step: Mapping[str, Any]) -> None:
        self.step = step
        self.nodes: dict[int, Node] = {node["id"]: node for node in step["nodes"] if node["live"]}
        self.children: dict[int, list[int]] = {node: [] for node in self.nodes}
        for number, node in self.nodes.items():
            if number:
                self.children[node["parent"]].append(number)

    @property
    def drafted(self) -> int:
        """Number of nodes that could have been accepted."""
        return sum(self.fate(number) not in ("root", "probe") for number in self.nodes)

    @property
    def kept(self) -> int:
        """Number of drafted tokens that were emitted."""
        return sum(token["drafted"] for token in self.step["emitted"])

    def fate(self, number: int) -> str:
        """The fate of a node, one of `FATES`."""
        node = self.nodes[number]
        if number == 0:
            return "root"
        if node["accepted"]:
            return "accepted" if node["depth"] <= len(self.step["emitted"]) else "cut"
        if node["probe"]:
            return "probe"
        return "rejected" if self.nodes[node["parent"]]["choice"] is not None else "unreached"

    def why(self, number: int, sentences: Mapping[str, str] = _WHY) -> str:
        """The sentence that explains a node's fate, with the target's probabilities; empty if `sentences` has none.

        A "twin" is a rejected node whose token the target did choose, in another branch.
        """
        node, fate = self.nodes[number], self.fate(number)
        choice = self.nodes[node["parent"]]["choice"] if number else None
        words = {"token": quoted(node["text"]), "chance": percent(node["target_prob"] or 0.0)}
        if choice is not None:
            words |= {"choice": quoted(choice["text"]), "likely": percent(choice["prob"])}
            if fate == "rejected" and choice["token"] == node["token"]:
                fate = "twin"
        return sentences.get(fate, "").format(**words)

    def bonus(self) -> tuple[int, Mapping[str, Any]] | None:
        """The bonus token and the node that it follows; None if the text ended before it."""
        emitted = self.step["emitted"]
        if not emitted or emitted[-1]["drafted"]:
            return None
        visited = [number for number, node in self.nodes.items() if node["choice"] is not None]
        last = max(visited, key=lambda number: self.nodes[number]["depth"])
        return last, self.nodes[last]["choice"]

    def summary(self) -> str:
        """A one-line summary of the step."""
        ms = sum(self.step[part] for part in ("ms_draft", "ms_verify", "ms_overhead"))
        words = f"{self.kept} of {self.drafted} drafted accepted" if self.drafted else "nothing drafted"
        probes = sum(self.fate(number) == "probe" for number in self.nodes)
        words += f", {counted(probes, 'probe')}" if probes else ""
        words += f", {counted(len(self.step['emitted']), 'token')}"
        return (
            f"{words}; {ms:.1f} ms: draft {self.step['ms_draft']:.1f}, verify {self.step['ms_verify']:.1f}, "
            f"rest {self.step['ms_overhead']:.1f}"
        )


def percent(chance: float) -> str:
    """A probability in percent with about two digits, never rounded to 0 or 100."""
    value = 100 * chance
    if value < 0.1:
        return "<0.1 %"
    if value < 1:
        return f"{value:.1f} %"
    return f"{value:.0f} %" if value < 99.5 else ">99 %"


def counted(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def visible(text: str) -> str:
    """A token's text with visible blanks and control characters, cut if it is long."""
    shown = "".join(_MARKS.get(letter) or (letter if letter.isprintable() else ascii(letter)[1:-1]) for letter in text)
    if len(shown) > _MAX_SHOWN:
        shown = shown[: _MAX_SHOWN - 1] + "\u2026"
    return shown or "\u2205"


def quoted(text: str) -> str:
    """A token's text in quotation marks, for a sentence."""
    return f"\u201c{visible(text)}\u201d"
