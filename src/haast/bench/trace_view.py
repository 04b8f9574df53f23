"""A recorded step as a reader sees it: the tree, what became of every node, and why, in words.

Owns the words that the terminal and the page share. Knows the "haast-trace-1" document only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haast.bench.trace import TRACE_FORMAT

Node = Mapping[str, Any]
FATES = ("root", "accepted", "cut", "rejected", "unreached", "probe")
_WHY = {
    "root": "root {token}: the last token of the text so far",
    "accepted": "drafted {token} (target {chance}): accepted, the target chose it too",
    "cut": "drafted {token} (target {chance}): accepted, but the text ended before it",
    "rejected": "drafted {token} (target {chance}): rejected, the target said {choice} ({likely})",
    "twin": "drafted {token} (target {chance}): the same token as an accepted branch",
    "unreached": "drafted {token} (target {chance}): not reached, a token before it was not accepted",
    "probe": "probe {token}: run to learn what may follow later, never accepted",
}
_MARKS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
_LONGEST = 24  # characters of a token that are shown


class StepView:
    """One step of a trace document; dead nodes, which only pad, are left out."""

    def __init__(self, step: Mapping[str, Any]) -> None:
        self.step = step
        self.nodes: dict[int, Node] = {node["id"]: node for node in step["nodes"] if node["live"]}
        self.children: dict[int, list[int]] = {node: [] for node in self.nodes}
        for number, node in self.nodes.items():
            if number:
                self.children[node["parent"]].append(number)

    @property
    def drafted(self) -> int:
        """Nodes that could have been accepted."""
        return sum(self.fate(number) not in ("root", "probe") for number in self.nodes)

    @property
    def kept(self) -> int:
        """Drafted tokens that were emitted."""
        return sum(token["drafted"] for token in self.step["emitted"])

    def fate(self, number: int) -> str:
        """What became of a node, one of `FATES`."""
        node = self.nodes[number]
        if number == 0:
            return "root"
        if node["accepted"]:
            return "accepted" if node["depth"] <= len(self.step["emitted"]) else "cut"
        if node["probe"]:
            return "probe"
        return "rejected" if self.nodes[node["parent"]]["choice"] is not None else "unreached"

    def why(self, number: int) -> str:
        """A sentence on a node's fate, with the target's probabilities."""
        return self.told(number, _WHY)

    def told(self, number: int, sentences: Mapping[str, str]) -> str:
        """The sentence of a node's fate, or of a "twin", filled in; empty where there is none.

        A twin is rejected, but its token was chosen: in another branch.
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
        """The target's own last token and the node it follows; None where the text ended before it."""
        emitted = self.step["emitted"]
        if not emitted or emitted[-1]["drafted"]:
            return None
        visited = [number for number, node in self.nodes.items() if node["choice"] is not None]
        last = max(visited, key=lambda number: self.nodes[number]["depth"])
        return last, self.nodes[last]["choice"]

    def gist(self) -> str:
        """What stands under a tree until a node is picked."""
        bonus = self.bonus()
        if bonus is None:
            return "The text ends here. Pick a node to see why."
        own = f"The target\u2019s own token: {quoted(bonus[1]['text'])} ({percent(bonus[1]['prob'])})."
        return f"{own} Pick a node to see why." if self.drafted else own

    def summary(self) -> str:
        """The step in one line."""
        ms = sum(self.step[part] for part in ("ms_draft", "ms_verify", "ms_overhead"))
        words = f"{self.kept} of {self.drafted} drafted accepted" if self.drafted else "nothing drafted"
        probes = sum(self.fate(number) == "probe" for number in self.nodes)
        words += f", {counted(probes, 'probe')}" if probes else ""
        words += f", {counted(len(self.step['emitted']), 'token')}"
        return (
            f"{words}; {ms:.1f} ms: draft {self.step['ms_draft']:.1f}, verify {self.step['ms_verify']:.1f}, "
            f"rest {self.step['ms_overhead']:.1f}"
        )


def check_trace(document: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no trace."""
    if document.get("format") != TRACE_FORMAT:
        raise ValueError(
            f"format={document.get('format')!r} is not {TRACE_FORMAT!r}: give what `haast trace --json` wrote"
        )


def percent(chance: float) -> str:
    """A probability for a reader: two digits, never a false 0 or 100."""
    value = 100 * chance
    if value < 0.1:
        return "<0.1 %"
    if value < 1:
        return f"{value:.1f} %"
    return f"{value:.0f} %" if value < 99.5 else ">99 %"


def counted(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def visible(text: str) -> str:
    """A token with its blanks and controls made visible, cut where it is long."""
    shown = "".join(_MARKS.get(letter) or (letter if letter.isprintable() else ascii(letter)[1:-1]) for letter in text)
    if len(shown) > _LONGEST:
        shown = shown[: _LONGEST - 1] + "\u2026"
    return shown or "\u2205"


def quoted(text: str) -> str:
    """A token inside a sentence."""
    return f"\u201c{visible(text)}\u201d"
