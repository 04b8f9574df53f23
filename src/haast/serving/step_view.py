"""Draws one step of a "haast-trace-1" document as an HTML fragment for the chat page, with the report's template.

The step comes over the network and is not trusted: only a checked copy of it is drawn. Knows nothing of HTTP.
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
MOST_DEPTH = 96  # the template recurses once per level
_MAX_TEXT = 1000  # characters of a token's text
_MAX_INTEGER = 2**53  # JavaScript has no exact integers beyond it
_PARTS = ("ms_draft", "ms_verify", "ms_overhead")


def step_html(step: Mapping[str, Any]) -> str:
    """Draw one step as an HTML fragment without scripts and style attributes; all texts are escaped.

    Args:
        step: of a "haast-trace-1" document. Its `number`, if any, counts from 0 and goes into the title. Other keys are
            ignored.

    Raises:
        ValueError: not a valid step, or larger than the limits.
    """
    view = StepView(_checked(step))
    number = view.step["number"]
    title = "Step" if number is None else f"Step {number + 1}"  # the report counts from 1
    return str(getattr(_template().module, "step")(view, "step", title, level=2))  # noqa: B009 - made by Jinja


@cache
def _template() -> Template:
    environment = templates()
    environment.filters |= {"percent": percent, "quoted": quoted, "visible": visible, "counted": counted}
    return environment.get_template("step.html")


def _checked(step: Any) -> dict[str, Any]:
    """A copy of the fields that the template reads. Raises ValueError for wrong ones."""
    fields = _object(step, "the step")
    emitted = [
        {"drafted": _boolean(_object(each, f"emitted[{place}]"), "drafted")}
        for place, each in enumerate(_list(fields, "emitted", MOST_NODES + 1))
    ]
    nodes = [_node(each, f"nodes[{place}]") for place, each in enumerate(_list(fields, "nodes", MOST_NODES))]
    _check_tree(nodes)
    visited = [node for node in nodes if node["live"] and node["choice"] is not None]
    if emitted and not emitted[-1]["drafted"] and not visited:
        raise ValueError("emitted ends in the target's own token, but no node has a choice")
    number = None if fields.get("number") is None else _integer(fields, "number")
    return {"number": number, "emitted": emitted, "nodes": nodes} | {part: _number(fields, part) for part in _PARTS}


def _check_tree(nodes: list[dict[str, Any]]) -> None:
    """Check for one root and no cycle: each live node is one level below a live parent. Raises ValueError."""
    live = {node["id"]: node for node in nodes if node["live"]}
    if len({node["id"] for node in nodes}) < len(nodes):
        raise ValueError("nodes has an id twice")
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
        "id": _integer(node, "id"),
        "parent": _integer(node, "parent", least=-1),
        "depth": _integer(node, "depth"),
        "token": _integer(node, "token", least=-_MAX_INTEGER),  # dead nodes and probes may hold no token
        "text": _text(node, "text"),
        **{key: _boolean(node, key) for key in ("accepted", "probe", "live")},
        "target_prob": None if node.get("target_prob") is None else _probability(node, "target_prob"),
        "choice": None
        if chosen is None
        else {"token": _integer(chosen, "token"), "text": _text(chosen, "text"), "prob": _probability(chosen, "prob")},
    }


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is not an object")
    return value


def _list(fields: Mapping[str, Any], key: str, most: int) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    if len(value) > most:
        raise ValueError(f"{key} has more than {most} items")
    return value


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a string")
    if len(value) > _MAX_TEXT:
        raise ValueError(f"{key} is longer than {_MAX_TEXT} characters")
    return value


def _boolean(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is neither true nor false")
    return value


def _integer(fields: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_INTEGER:
        raise ValueError(f"{key} is not an integer of at least {least}")
    return value


def _number(fields: Mapping[str, Any], key: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_INTEGER:
        raise ValueError(f"{key} is not a number of at least 0")
    return float(value)


def _probability(fields: Mapping[str, Any], key: str) -> float:
    value = _number(fields, key)
    if not math.isfinite(value) or value > 1.001:  # float sums may be slightly above 1
        raise ValueError(f"{key} is not a probability")
    return value
