"""Accept trees as HTML: the answer with its drafted tokens marked, and every step's tree as inline SVG.

Owns the layout: a column per depth, a line per leaf, a parent beside the middle of its children. Needs neither
matplotlib nor scripts; the page's script only shows one step at a time. Knows the "haast-trace-1" document.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from haast.bench.steps import StepView, counted, percent, quoted, visible

_LINE, _HEIGHT, _LETTER, _PAD, _GAP = 32, 24, 7.9, 8, 34  # pixels: line, box, letter, inside a box, between columns
_SMALL = 6.9  # a letter of a percentage
_PROMPT = 48  # letters of a prompt in its heading
_SIGNS = {"accepted": "\u2713 ", "cut": "\u2713 ", "rejected": "\u2717 ", "own": "+ "}


@dataclass
class _Box:
    """A node to draw."""

    parent: int | None  # a key of the layout
    depth: int
    kind: str  # a fate, or "own" for the target's own token
    label: str
    chance: str
    why: str
    y: float = 0.0

    @property
    def text_width(self) -> float:
        return _LETTER * _columns(self.label) + 2 * _PAD

    @property
    def width(self) -> float:
        return self.text_width + (6 + _SMALL * len(self.chance) if self.chance else 0)


def trace_section(document: Mapping[str, Any], number: int, most_steps: int | None = None, opened: bool = True) -> str:
    """One trace as a `<details class="trace">`.

    Args:
        document: "haast-trace-1".
        number: of this trace on its page; its ids begin with it.
        most_steps: later trees are left out, and the page says so.
        opened: whether it is unfolded without a click.
    """
    steps = document["steps"][:most_steps]
    views = [StepView(step) for step in steps]
    liveliest = max(range(len(views)), key=lambda at: views[at].kept, default=0)
    drawn = [_step(view, f"t{number}s{at}", at, len(views), at == liveliest) for at, view in enumerate(views)]
    tau = f", tau {document['tau']:.2f}" if document["target_forwards"] else ""
    counts = f"{counted(document['tokens'], 'token')} in {counted(document['target_forwards'], 'target forward')}{tau}"
    words = " ".join(document["prompt"].split())
    words = words if len(words) <= _PROMPT else f"{words[: _PROMPT - 1]}\u2026"
    head = f"<b>{escape(document['decoder'])}</b>, \u201c{escape(words)}\u201d: {counts}"
    left = len(document["steps"]) - len(steps)
    note = f'<p class="quiet">The trees of the last {left} steps are in the JSON only.</p>' if left else ""
    return (
        f'<details class="trace" id="t{number}"{" open" if opened else ""}><summary>{head}</summary>\n'
        f'<p class="prompt">{escape(document["prompt"])}</p>\n{_answer(document, number, len(steps))}\n{_LEGEND}\n'
        f"{_stepper(len(drawn)) if drawn else ''}\n" + "\n".join(drawn) + f"\n{note}</details>"
    )


_LEGEND = (
    '<p class="legend"><span class="yes">\u2713 underlined: drafted and accepted</span>'
    '<span class="own">+ bold: the target\u2019s own token</span><span>\u2717 rejected</span>'
    "<span>dashed: never reached, or a probe</span><span>%: the target\u2019s probability there</span></p>"
)


def _stepper(count: int) -> str:
    return (
        '<div class="stepper"><button type="button" aria-label="Step before">\u2039</button>'
        f'<input type="range" min="1" max="{count}" value="1" aria-label="Step">'
        '<button type="button" aria-label="Next step">\u203a</button></div>'
    )


def _answer(document: Mapping[str, Any], number: int, drawn: int) -> str:
    """The text, each step's stretch a link to its tree."""
    parts = [f'<span class="own">{escape(document["prefill"].get("text", ""))}</span>']
    for at, step in enumerate(document["steps"]):
        words = "".join(
            f'<span class="{"yes" if token["drafted"] else "own"}">{escape(token["text"])}</span>'
            for token in step["emitted"]
            if token["text"]
        )
        parts.append(f'<a href="#t{number}s{at}">{words}</a>' if at < drawn and words else words)
    return f'<p class="answer" tabindex="0" role="group" aria-label="The answer">{"".join(parts)}</p>'


def _step(view: StepView, name: str, at: int, count: int, first: bool) -> str:
    title = f"step {at + 1} of {count}"
    return (
        f'<section class="step" id="{name}"{" data-first" if first else ""}>'
        f"<h4>{title.capitalize()} <span>{escape(view.summary())}</span></h4>"
        f'<div class="scroll">{_svg(view, title)}</div><p class="why" aria-live="polite">{escape(_gist(view))}</p>'
        "</section>"
    )


def _gist(view: StepView) -> str:
    """What stands under a tree until a node is picked."""
    bonus = view.bonus()
    if bonus is None:
        return "The text ends here. Pick a node to see why."
    own = f"The target\u2019s own token: {quoted(bonus[1]['text'])} ({percent(bonus[1]['prob'])})."
    return f"{own} Pick a node to see why." if view.drafted else own


def _svg(view: StepView, title: str) -> str:
    boxes = _layout(view)
    columns = [0.0] * (max(box.depth for box in boxes.values()) + 1)
    for box in boxes.values():
        columns[box.depth] = max(columns[box.depth], box.width)
    lefts = [1 + sum(columns[:depth]) + _GAP * depth for depth in range(len(columns))]
    width, height = lefts[-1] + columns[-1] + 8, max(box.y for box in boxes.values()) + _HEIGHT + 6
    under = sorted(boxes.values(), key=lambda box: box.kind in ("accepted", "own"))  # the path taken is drawn last
    edges = "".join(_edge(boxes[box.parent], box, lefts) for box in under if box.parent is not None)
    nodes = "".join(_node(box, lefts[box.depth]) for box in boxes.values())
    return (
        f'<svg class="tree" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="group" aria-label="Accept tree, {title}">{edges}{nodes}</svg>'
    )


def _layout(view: StepView) -> dict[int, _Box]:
    """Boxes by node, in reading order; the target's own token is node -1."""
    boxes: dict[int, _Box] = {}
    bonus = view.bonus()
    lines = 0

    def place(number: int, parent: int | None) -> float:
        nonlocal lines
        node, fate = view.nodes[number], view.fate(number)
        chance = percent(node["target_prob"]) if node["target_prob"] is not None else ""
        label = _SIGNS.get(fate, "") + visible(node["text"])
        box = boxes[number] = _Box(parent, node["depth"], fate, label, chance, view.why(number))
        heights = [place(child, number) for child in view.children[number]]
        if bonus is not None and bonus[0] == number:
            choice = bonus[1]
            why = f"the target\u2019s own token {quoted(choice['text'])} ({percent(choice['prob'])}): no draft had it"
            own = _SIGNS["own"] + visible(choice["text"])
            boxes[-1] = _Box(number, node["depth"] + 1, "own", own, percent(choice["prob"]), why, 3 + _LINE * lines)
            heights.append(boxes[-1].y)
            lines += 1
        if not heights:
            heights = [3.0 + _LINE * lines]
            lines += 1
        box.y = (heights[0] + heights[-1]) / 2
        return box.y

    place(0, None)
    return boxes


def _edge(parent: _Box, box: _Box, lefts: list[float]) -> str:
    begin, end = lefts[parent.depth] + parent.width + 4, lefts[box.depth] - 2
    middle, half = lefts[box.depth] - _GAP / 2, _HEIGHT / 2
    way = f"M{begin:.0f} {parent.y + half:.0f}H{middle - 10:.0f}C{middle:.0f} {parent.y + half:.0f} {middle:.0f} "
    return f'<path class="{box.kind}" d="{way}{box.y + half:.0f} {end:.0f} {box.y + half:.0f}"/>'


def _node(box: _Box, left: float) -> str:
    top = box.y
    chance = f'<text class="p" x="{left + box.text_width + 5:.0f}" y="{top + 16:.0f}">{escape(box.chance)}</text>'
    return (
        f'<g class="{box.kind}" tabindex="0" role="img"><title>{escape(box.why)}</title>'
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{box.text_width:.0f}" height="{_HEIGHT}" rx="6"/>'
        f'<text x="{left + _PAD:.0f}" y="{top + 16.5:.1f}">{escape(box.label)}</text>{chance if box.chance else ""}</g>'
    )


def _columns(text: str) -> int:
    """Columns of a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
