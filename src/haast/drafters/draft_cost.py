"""What drafting costs here: a drafter's first level and its further ones, after a short made-up text.

Owns the rehearsal. Times count observing two accepted tokens and proposing, as in a decode step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

import torch

from haast.core import Accepted, RowVerdict, Verdict
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.latency import DraftCost, timed

_COMMITTED, _ROUNDS, _SECONDS = 24, 6, 0.5
_WIDTHS, _DEEP, _TOP_K = (1, 8), 5, 8


def eagle_cost(target: Target, drafter: EagleDrafter) -> DraftCost:
    """Of an EAGLE head; the drafter keeps its shape."""
    before = drafter.shape, drafter.pace, drafter.ways
    try:
        drafter.reshape(DraftShape("dynamic", 1, _TOP_K, 1, 2))
        first = draft_ms(target, drafter)
        levels = {}
        for width in _WIDTHS:
            drafter.reshape(DraftShape("dynamic", _DEEP, _TOP_K, width, _DEEP + 1))
            levels[width] = max((draft_ms(target, drafter) - first) / (_DEEP - 1), 1e-3)
    finally:
        drafter.reshape(*before)
    return first, levels


def small_model_cost(target: Target, drafter: SmallModelDrafter, small: Target) -> DraftCost:
    """Of a smaller model's chain."""
    first, all_levels = (draft_ms(target, drafter, budget, (small,)) for budget in (2, None))
    return first, {1: max((all_levels - first) / max(drafter.nodes - 2, 1), 1e-3)}


def draft_ms(target: Target, drafter: Drafter, budget: int | None = None, beside: Sequence[Target] = ()) -> float:
    """Ms of observing two tokens and proposing within a budget, the least of a few times.

    The drafter serves no request meanwhile; `beside` are further models that it runs.
    """
    prefix = _COMMITTED if target.context_length is None else min(_COMMITTED, max(target.context_length // 4, 3))
    room = prefix + 2 * _ROUNDS + drafter.nodes + drafter.room + 2
    with ExitStack() as stack:
        for each in (target, *beside):
            stack.enter_context(each.scratch_pool(4 * room + 256))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(target.step_threads())
        return _rehearse(target, drafter, budget, prefix, room)


def _rehearse(target: Target, drafter: Drafter, budget: int | None, prefix: int, room: int) -> float:
    tokens = torch.arange(prefix, device=target.device).unsqueeze(0) % target.vocab_size
    kv = target.pool.sequence()
    kv.reserve(room)
    layers = drafter.target_layers
    output = target.forward(DraftTree.chain(tokens), target.cache.bind([kv]), hidden_layers=layers)
    target.cache.advance([prefix])
    features = torch.cat([output.hidden[i] for i in layers], dim=-1) if layers else output.features
    said = tokens.roll(-1, 1)
    state = drafter.begin(tokens[0].tolist(), kv, 0)
    counts = torch.tensor([prefix], device=target.device)
    drafter.observe([state], Accepted(said, features, counts, known=said.tolist()))
    row = RowVerdict((0, 1), tuple(said[0, :2].tolist()), (True,))
    choices = output.logits.argmax(-1) if drafter.wants_choices else None
    two, verdict = torch.tensor([2], device=target.device), Verdict.of_rows([row], target.device)
    step = Accepted(said[:, :2], features[:, :2], two, choices, verdict)

    def once() -> None:
        drafter.observe([state], step)
        drafter.propose([state], budget)

    begun, least = perf_counter(), float("inf")
    for turn in range(_ROUNDS):
        if turn > 1 and perf_counter() - begun > _SECONDS:
            break
        least = min(least, timed(target, once))
    drafter.end(state)
    kv.release()
    return least
