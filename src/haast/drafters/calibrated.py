"""Finds and applies saved calibrations, and measures a drafter's cost for targets without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from haast.core import Accepted, RowVerdict, Verdict
from haast.drafters.base import Drafter
from haast.drafters.batch_policy import DraftConfig, default_configs, nodes_for
from haast.drafters.eagle import EagleDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.calibration import Batch, Calibration
from haast.tuning.latency import DraftCost, file_for, target_identity, timed

_COMMITTED, _ROUNDS, _SECONDS = 24, 6, 0.5
_WIDTHS, _DEEP, _TOP_K = (1, 8), 5, 8


def identity(target: Target, drafter: EagleDrafter) -> dict[str, Any]:
    """What a calibration is valid for: this machine, model, head and settings."""
    head = hashlib.sha256()
    for name, tensor in sorted(drafter.tensors().items()):
        head.update(name.encode())
        head.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {**target_identity(target), "head": head.hexdigest()[:16]}


def default_path(identity: dict[str, Any]) -> Path:
    """The file that holds the calibration for an identity."""
    return file_for(identity, "calibration")


def find_calibration(target: Target, drafter: EagleDrafter, wanted: str | Path = "auto") -> Calibration | None:
    """The calibration to use: "auto" loads the saved one if there is one, "off" is None, else the path of a file.

    Raises ValueError if the file is missing, is not a calibration, or is of another machine, model or head.
    """
    if wanted == "off":
        return None
    here = identity(target, drafter)
    if wanted != "auto":
        return Calibration.load(Path(wanted), here)
    path = default_path(here)
    with suppress(ValueError):  # written by an older Haast: `haast calibrate` replaces it
        return Calibration.load(path, here) if path.is_file() else None
    return None


def apply_calibration(drafter: EagleDrafter, calibration: Calibration) -> bool:
    """Set the drafter to the calibration's best shapes. False, without a change, if drafting does not pay."""
    if not calibration.pays:
        return False
    batches = {rows: _draft_config(batch) for rows, batch in calibration.batches.items()}
    first = replace(_draft_config(calibration), nodes=calibration.expected["nodes"])
    assert first.shape is not None, "a calibration that pays has a shape"
    drafter.reshape(
        first.shape, first.pace, {**(batches or default_configs(first.shape, drafter.device.type)), 1: first}
    )
    return True


def _draft_config(costs: Batch | Calibration) -> DraftConfig:
    if not costs.shape:
        return DraftConfig(None, costs.pace)
    gain = costs.expected["tau"] - 1
    return DraftConfig(DraftShape(**costs.shape), costs.pace, nodes_for(gain), gain)


@contextmanager
def restoring(drafter: EagleDrafter) -> Iterator[None]:
    """Restores the drafter's shape and policy afterwards. Within, it has no policy and may be reshaped."""
    before, policy = (drafter.shape, drafter.pace, drafter.configs), drafter.policy
    drafter.policy = None
    try:
        yield
    finally:
        drafter.reshape(*before)
        drafter.policy = policy


def level_costs(drafter: EagleDrafter, measure: Callable[[], float], widths: Sequence[int] = _WIDTHS) -> DraftCost:
    """Ms of an EAGLE head's first draft level, and of each further one by its width, timed by `measure`.

    The drafter's shape is restored.
    """
    with restoring(drafter):
        drafter.reshape(DraftShape("dynamic", 1, _TOP_K, 1, 2))
        first = measure()
        levels = {}
        for width in widths:
            drafter.reshape(DraftShape("dynamic", _DEEP, _TOP_K, width, _DEEP + 1))
            levels[width] = max((measure() - first) / (_DEEP - 1), 1e-3)
    return first, levels


def eagle_cost(target: Target, drafter: EagleDrafter) -> DraftCost:
    """Draft cost of an EAGLE head. The drafter must not serve requests meanwhile."""
    return level_costs(drafter, lambda: draft_ms(target, drafter))


def small_model_cost(target: Target, drafter: SmallModelDrafter, small: Target) -> DraftCost:
    """Draft cost of a small model's chain."""
    first, all_levels = (draft_ms(target, drafter, budget, (small,)) for budget in (2, None))
    return first, {1: max((all_levels - first) / max(drafter.nodes - 2, 1), 1e-3)}


def draft_ms(target: Target, drafter: Drafter, budget: int | None = None, others: Sequence[Target] = ()) -> float:
    """Ms of observing two tokens and proposing within a budget, the minimum of a few runs.

    The drafter must not serve requests meanwhile; `others` are further models that it runs.
    """
    prefix = _COMMITTED if target.context_length is None else min(_COMMITTED, max(target.context_length // 4, 3))
    room = prefix + 2 * _ROUNDS + drafter.nodes + drafter.room + 2
    with ExitStack() as stack:
        for each in (target, *others):
            stack.enter_context(each.scratch_pool(4 * room + 256))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(target.step_threads())
        return _time_drafts(target, drafter, budget, prefix, room)


def _time_drafts(target: Target, drafter: Drafter, budget: int | None, prefix: int, room: int) -> float:
    tokens = torch.arange(prefix, device=target.device).unsqueeze(0) % target.vocab_size
    kv = target.pool.sequence()
    kv.reserve(room)
    layers = drafter.target_layers
    output = target.forward(DraftTree.chain(tokens), target.cache.bind([kv]), hidden_layers=layers)
    target.cache.advance([prefix])
    features = torch.cat([output.hidden[i] for i in layers], dim=-1) if layers else output.features
    following = tokens.roll(-1, 1)
    state = drafter.begin(tokens[0].tolist(), kv, 0)
    counts = torch.tensor([prefix], device=target.device)
    drafter.observe([state], Accepted(following, features, counts, tokens_on_host=following.tolist()))
    row = RowVerdict((0, 1), tuple(following[0, :2].tolist()), (True,))
    choices = output.logits.argmax(-1) if drafter.wants_choices else None
    two, verdict = torch.tensor([2], device=target.device), Verdict.of_rows([row], target.device)
    step = Accepted(following[:, :2], features[:, :2], two, choices, verdict)

    def once() -> None:
        drafter.observe([state], step)
        drafter.propose([state], budget)

    start, minimum = perf_counter(), float("inf")
    for turn in range(_ROUNDS):
        if turn > 1 and perf_counter() - start > _SECONDS:
            break
        minimum = min(minimum, timed(target, once))
    drafter.end(state)
    kv.release()
    return minimum
