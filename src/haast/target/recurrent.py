"""Recurrent layers over trees: each node from the state of its own parent, with the model's own modules.

Attention gathers a node's past by a mask. A recurrent layer (linear attention, convolution, state-space) has folded it
into a state instead, which can't be taken back. So while a tree is forwarded, a mixer is called once per depth, with
the nodes of that depth as rows, each from a copy of its parent's state; what is then committed is the state of the last
accepted node. Nothing is computed twice, rejected branches leave no trace, and siblings do not see each other.

    tree        0        call 1: node 0         from the committed state
               / \\       call 2: nodes 1, 2     both from the state after node 0
              1   2      call 3: node 3         from the state after node 1
              |
              3          accepted 0, 1, 3: the state after node 3 is committed

A chunk of a prompt is a chain of which only the last state is kept: one call from the zero state, and from another one
if the mixer allows it. Padding is left out, so it never enters a state. Knows neither drafters nor acceptance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from haast.errors import UnsupportedModelError
from haast.target.mixers import Caller, Layout, States
from haast.target.projections import SharedEnds, replaced
from haast.tree import DraftTree


@dataclass(frozen=True)
class TextState:
    """The recurrent states of one text after its first `length` tokens. Its tensors are never written to."""

    length: int
    states: tuple[States, ...]  # by mixer; without the dimension of rows

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for states in self.states for each in states.values())


@dataclass(frozen=True)
class _Span:
    """Nodes that a mixer computes together: the next m nodes of n texts."""

    index: Tensor  # (n, m) int64: row * nodes + node
    begun: tuple[TextState, ...] = ()  # the n committed states before them; empty: zero, or those of another span
    before: int | None = None  # number of the span that computes the states before them
    parents: Tensor | None = None  # (n,) int64: index of each in that span; None: the same order
    together: bool = True  # the m nodes may be computed in one call


@dataclass
class _Plan:
    """The spans of a forward, and where the state after each node is: span and index in it."""

    spans: list[_Span] = field(default_factory=list)
    where: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # by (row, node)


class Recurrence:
    """The recurrent mixers of a model.

    Args:
        model: its modules.
        layout: from `find_layout`, of this model.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        self.layout = layout
        self._callers = [
            Caller(model.get_submodule(mixer.name), mixer.layer, mixer.shapes, layout.cache_class)
            for mixer in layout.mixers
        ]

    def begin(self, tree: DraftTree, begun: Sequence[TextState | None], prompts: Sequence[int] | None) -> Run:
        """Prepare a forward over `tree` (rows, nodes), whose structure is read from the device once.

        Args:
            tree: the nodes.
            begun: the committed state per row; None for the zero state.
            prompts: for a chunk of prompts, of which only the state after each row's last live node is kept: the first
                nodes of each row that may be computed together. The others were decoded before, one by one.
        """
        for state in begun:
            if state is not None:
                self._check(state)
        if prompts is not None and self.layout.consistent:
            prompts = [tree.nodes] * tree.rows
        return Run(self.layout, self._callers, _plan(tree, begun, prompts), tree.tokens.shape)

    def _check(self, state: TextState) -> None:
        """Raise UnsupportedModelError for states that the mixers do not have."""
        for mixer, states in zip(self.layout.mixers, state.states, strict=True):
            for name, shape in mixer.shapes.items():
                given = states[name]
                if given.dtype is not mixer.dtypes[name] or given.shape != shape:
                    raise UnsupportedModelError(
                        f"{mixer.name} was given a {name[0]} state of {tuple(given.shape)} in {given.dtype}, and has "
                        f"one of {tuple(shape)} in {mixer.dtypes[name]}: make a new Target after changing a model"
                    )


class Run:
    """One forward's calls of the mixers, and the states after its nodes."""

    def __init__(self, layout: Layout, callers: Sequence[Caller], plan: _Plan, shape: Sequence[int]) -> None:
        self._layout, self._callers, self._plan = layout, callers, plan
        self._shape = (int(shape[0]), int(shape[1]))
        self._states: list[dict[int, States]] = [{} for _ in plan.spans]  # by span, then by mixer

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside the block, this thread's calls of the mixers run as planned."""
        with ExitStack() as stack:
            for number, caller in enumerate(self._callers):
                planned = functools.partial(self._forward, number, caller.module.forward)
                stack.enter_context(replaced(caller.module, planned))
            yield

    def state(self, row: int, node: int, length: int) -> TextState:
        """The state of a row after `node`; `length` counts the text's tokens up to it.

        Raises:
            RuntimeError: no state was kept there.
        """
        span, index = self._plan.where.get((row, node), (None, 0))
        mixers = range(len(self._callers))
        if span is None or any(number not in self._states[span] for number in mixers):
            raise RuntimeError(f"there is no recurrent state after node {node} of row {row}: run a forward before")
        alone = len(self._plan.spans[span].index) == 1  # a copy of one of several frees the others' memory
        kept = [self._states[span][number] for number in mixers]
        copied = ({name: state[0] if alone else state[index].clone() for name, state in each.items()} for each in kept)
        return TextState(length, tuple(copied))

    def _forward(self, number: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        mixer, caller = self._layout.mixers[number], self._callers[number]
        arguments = caller.arguments(args, kwargs)
        if len(self._plan.spans) == 1 and self._size(self._plan.spans[0], number) == self._plan.spans[0].index.shape[1]:
            return self._call(number, own, arguments, None)
        ends = SharedEnds(caller.module, mixer.ends, arguments[mixer.hidden])
        with ends.shared():
            output = self._call(number, own, arguments, ends)
        return ends.finish(output)

    def _size(self, span: _Span, number: int) -> int:
        """Nodes of each text that a mixer computes in one call."""
        zero = span.before is None and not span.begun
        return span.index.shape[1] if span.together and (zero or self._layout.mixers[number].continues) else 1

    def _call(self, number: int, own: Any, arguments: dict[str, Any], ends: SharedEnds | None) -> Any:
        """Call a mixer for span after span; returns its output (rows, nodes, ...), which is zero at dead nodes."""
        whole: Any = None
        for span, states_of_span in zip(self._plan.spans, self._states, strict=True):
            states = self._before(span, number)
            for index in torch.split(span.index, self._size(span, number), dim=1):
                if ends is not None:
                    ends.index = index
                output, states = self._callers[number].call(own, arguments, self._shape, index, states)
                whole = _put(whole, output, index, self._shape)
            states_of_span[number] = states
        return _viewed(whole, self._shape)

    def _before(self, span: _Span, number: int) -> States:
        """The states (n, ...) that a span starts from; empty for zero."""
        if span.before is None:
            begun = [each.states[number] for each in span.begun]
            names = begun[0] if begun else ()
            return {name: torch.stack([each[name] for each in begun]) for name in names}
        states = self._states[span.before][number]
        if span.parents is None:
            return states
        return {name: state.index_select(0, span.parents.to(state.device)) for name, state in states.items()}


def _plan(tree: DraftTree, begun: Sequence[TextState | None], prompts: Sequence[int] | None) -> _Plan:
    """Group the live nodes of a tree into spans; texts with and without a state are never in one."""
    parents, depths, live = torch.stack([tree.parents, tree.depths, tree.live.long()]).tolist()
    plan = _Plan()
    for zero in (True, False):
        rows = [row for row, state in enumerate(begun) if (state is None) is zero]
        chain = all(p == max(i - 1, -1) for row in rows for i, p in enumerate(parents[row]) if live[row][i])
        if prompts is not None and chain:
            ends = {row: sum(live[row]) for row in rows}
            parts = {row: (min(prompts[row], ends[row]), ends[row]) for row in rows}
            for part in sorted(set(parts.values())):
                _add_chunks(plan, tree, [row for row in rows if parts[row] == part], begun, part)
        elif rows:
            _add_levels(plan, tree, rows, begun, (parents, depths, live))
    return plan


def _add_chunks(
    plan: _Plan, tree: DraftTree, rows: list[int], begun: Sequence[TextState | None], part: tuple[int, int]
) -> None:
    """Add the chains of `rows`: `part` = nodes that may be computed together, and all nodes."""
    together, end = part
    if together > 0:
        _add_span(plan, tree, [[(row, node) for node in range(together)] for row in rows], begun)
    if together < end:
        before = len(plan.spans) - 1 if together > 0 else None
        texts = [[(row, node) for node in range(max(together, 0), end)] for row in rows]
        _add_span(plan, tree, texts, begun, before=before, together=False)


def _add_span(
    plan: _Plan, tree: DraftTree, texts: list[list[tuple[int, int]]], begun: Sequence[TextState | None], **more: Any
) -> None:
    """Add a span: per text, its nodes as (row, node)."""
    number = len(plan.spans)
    index = torch.tensor([[row * tree.nodes + node for row, node in text] for text in texts])
    states = tuple(state for text in texts if (state := begun[text[0][0]]) is not None)
    if more.get("before") is not None:
        states = ()
    plan.spans.append(_Span(index.to(tree.tokens.device), states, **more))
    plan.where.update({text[-1]: (number, place) for place, text in enumerate(texts)})


def _add_levels(
    plan: _Plan, tree: DraftTree, rows: list[int], begun: Sequence[TextState | None], structure: Sequence[Any]
) -> None:
    """Add one span per depth."""
    parents, depths, live = structure
    levels: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        for node in range(tree.nodes):
            if live[row][node]:
                levels.setdefault(depths[row][node], []).append((row, node))
    for depth in sorted(levels):
        texts = [[each] for each in levels[depth]]
        more: dict[str, Any] = {}
        if depth:
            before = len(plan.spans) - 1
            above = [plan.where[row, parents[row][node]][1] for row, node in levels[depth]]
            same = above == list(range(len(levels[depth - 1])))
            more = {"before": before, "parents": None if same else torch.tensor(above)}
        _add_span(plan, tree, texts, begun, **more)


def _put(whole: Any, output: Any, index: Tensor, shape: tuple[int, int]) -> Any:
    """Put a call's output for the nodes `index` into that of all nodes (flat nodes first), which is zero elsewhere."""
    if isinstance(output, tuple):
        parts = whole or [None] * len(output)
        return [_put(part, each, index, shape) for part, each in zip(parts, output, strict=True)]
    if not isinstance(output, Tensor) or output.shape[:2] != index.shape:
        return None  # a state, which nothing reads
    if whole is None:
        whole = output.new_zeros(shape[0] * shape[1], *output.shape[2:])
    whole[index.to(output.device)] = output
    return whole


def _viewed(whole: Any, shape: tuple[int, int]) -> Any:
    if isinstance(whole, list):
        return tuple(_viewed(each, shape) for each in whole)
    return whole if whole is None else whole.view(*shape, *whole.shape[1:])
