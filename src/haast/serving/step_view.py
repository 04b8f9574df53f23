"""One step of a "haast-trace-1" document as a fragment of HTML: the report's own drawing, for the chat page.

The step comes over the network, so nothing in it is believed: a copy that holds only what was checked is drawn. Knows
nothing of requests and replies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Template

from haast.bench.tables import templates
from haast.bench.trace import StepView, counted, percent, quoted, visible

MOST_NODES = 512
MOST_DEPTH = 96  # the drawing calls itself once a level
_LONGEST = 1000  # characters of a token's text
_LARGEST = 2**53  # whole numbers beyond it are not whole in JavaScript
_PARTS = ("ms_draft", "ms_verify", "ms_overhead")


def step_html(step: Mapping[str, Any]) -> str:
    """Draw one step, as an HTML fragment without scripts and style attributes, all texts escaped.

    Args:
        step: of a "haast-trace-1" document; `number`, which counts from 0, names it where there is one. Other keys
            are not looked at.

    Raises:
        ValueError: it is no such step, or larger than any drafter makes them.
    """
    view = StepView(_checked(step))
    number = view.step["number"]
    title = "Step" if number is None else f"Step {number + 1}"  # as the report counts them
    return str(getattr(_template().module, "step")(view, "step", title, level=2))  # noqa: B009 - made by Jinja


@cache
def _template() -> Template:
    room = templates()
    room.filters |= {"percent": percent, "quoted": quoted, "visible": visible, "counted": counted}
    return room.get_template("step.html")


def _checked(step: Any) -> dict[str, Any]:
    """A copy of what the drawing reads. Raises ValueError."""
    told = _object(step, "the step")
    emitted = [
        {"drafted": _flag(_object(each, f"emitted[{place}]"), "drafted")}
        for place, each in enumerate(_list(told, "emitted", MOST_NODES + 1))
    ]
    nodes = [_node(each, f"nodes[{place}]") for place, each in enumerate(_list(told, "nodes", MOST_NODES))]
    _check_tree(nodes)
    visited = [node for node in nodes if node["live"] and node["choice"] is not None]
    if emitted and not emitted[-1]["drafted"] and not visited:
        raise ValueError("emitted ends in the target's own token, but no node has a choice")
    number = None if told.get("number") is None else _whole(told, "number")
    return {"number": number, "emitted": emitted, "nodes": nodes} | {part: _amount(told, part) for part in _PARTS}


def _check_tree(nodes: list[dict[str, Any]]) -> None:
    """One root and no circle: each live node is one deeper than a live parent. Raises ValueError."""
    live = {node["id"]: node for node in nodes if node["live"]}
    if len({node["id"] for node in nodes}) < len(nodes):
        raise ValueError("nodes: an id twice")
    if 0 not in live or live[0]["depth"] != 0 or live[0]["probe"]:
        raise ValueError("nodes: node 0 has to be the root, live and of depth 0")
    for number, node in live.items():
        parent = live.get(node["parent"])
        if number and (parent is None or node["depth"] != parent["depth"] + 1):
            raise ValueError(f"nodes: the parent of node {number} is not a live node one level above it")
        if node["depth"] > MOST_DEPTH:
            raise ValueError(f"nodes: node {number} is deeper than {MOST_DEPTH} levels")


def _node(value: Any, where: str) -> dict[str, Any]:
    node = _object(value, where)
    chosen = None if node.get("choice") is None else _object(node["choice"], f"{where}.choice")
    return {
        "id": _whole(node, "id"),
        "parent": _whole(node, "parent", least=-1),
        "depth": _whole(node, "depth"),
        "token": _whole(node, "token", least=-_LARGEST),  # dead nodes and probes may hold no token
        "text": _text(node, "text"),
        **{key: _flag(node, key) for key in ("accepted", "probe", "live")},
        "target_prob": None if node.get("target_prob") is None else _chance(node, "target_prob"),
        "choice": None
        if chosen is None
        else {"token": _whole(chosen, "token"), "text": _text(chosen, "text"), "prob": _chance(chosen, "prob")},
    }


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is not an object")
    return value


def _list(told: Mapping[str, Any], key: str, most: int) -> list[Any]:
    value = told.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    if len(value) > most:
        raise ValueError(f"{key} has more than {most} items")
    return value


def _text(told: Mapping[str, Any], key: str) -> str:
    value = told.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a text")
    if len(value) > _LONGEST:
        raise ValueError(f"{key} is longer than {_LONGEST} characters")
    return value


def _flag(told: Mapping[str, Any], key: str) -> bool:
    value = told.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is neither true nor false")
    return value


def _whole(told: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = told.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ValueError(f"{key} is not a whole number of {least} or more")
    return value


def _amount(told: Mapping[str, Any], key: str) -> float:
    value = told.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{key} is not a number of 0 or more")
    return float(value)


def _chance(told: Mapping[str, Any], key: str) -> float:
    value = _amount(told, key)
    if not math.isfinite(value) or value > 1.001:  # sums of floats may end a little above 1
        raise ValueError(f"{key} is not a probability")
    return value
