"""Which prompts are answered, and in which order: balanced by category, without near-duplicates.

Owns the choice. Does not know tokens or answers. Every beginning of the order has about the mix of the whole, so a run
that stops early, or that is asked for a number of answers, has it too; a category that runs out leaves its share to the
others. A prompt keeps its index in the file, which keys its random draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from haast.prompts import Prompt
from haast.sampling import keyed_uniform
from haast.training.config import RegenerateConfig
from haast.training.duplicates import NearDuplicates

_ORDER_POSITION = 2**40 + 2  # position key, beyond any text, of the random draw that orders prompts


@dataclass(frozen=True)
class Selection:
    """The chosen prompts as indices in the file, in the order of answering."""

    order: list[int]
    duplicates: int = 0  # prompts left out as near-duplicates of an earlier one


def select(prompts: Sequence[Prompt], config: RegenerateConfig) -> Selection:
    """Choose the prompts of a run.

    Args:
        prompts: of the whole file, in its order.
        config: `mix`, `near_duplicates`, `answers`, `turns` and `seed` decide.

    Returns:
        The same selection for the same arguments; with a larger `answers` one that begins with it.

    Raises:
        ValueError: the mix leaves out all prompts.
    """
    kept = list(range(len(prompts)))
    if config.near_duplicates == "drop":
        known = NearDuplicates()
        kept = [index for index in kept if known.add("\n".join(prompts[index].turns))]
    weights, order = config.weights(), list[int]()
    mixed = iter(kept) if weights is None else _mixed(prompts, kept, weights, config)
    left = float("inf") if config.answers is None else config.answers
    for index in mixed:
        if left <= 0:
            break
        order.append(index)
        left -= turns_of(prompts[index], config)
    if not order:
        raise ValueError(
            f"mix={config.mix!r} leaves out all {len(prompts)} prompts: give a weight to their categories, or to *"
        )
    return Selection(order, len(prompts) - len(kept))


def turns_of(prompt: Prompt, config: RegenerateConfig) -> int:
    """How many turns of a prompt are answered."""
    return min(config.turns, len(prompt.turns))


def category_of(prompt: Prompt, config: RegenerateConfig) -> str:
    """The name under which a prompt counts in the mix."""
    named = config.weights() or {}
    if turns_of(prompt, config) > 1 and "multi-turn" in named:
        return "multi-turn"
    return prompt.category


def _mixed(
    prompts: Sequence[Prompt], kept: Sequence[int], weights: dict[str, float], config: RegenerateConfig
) -> Iterator[int]:
    """All of `kept`: next is always the category with the fewest answers so far for its weight."""
    groups = dict[str, list[int]]()
    for index in sorted(kept, key=lambda index: keyed_uniform(config.seed, index, _ORDER_POSITION), reverse=True):
        groups.setdefault(category_of(prompts[index], config), []).append(index)
    waiting = [(0.0, name) for name in groups if weights.get(name, weights["*"]) > 0]
    heapify(waiting)
    while waiting:
        served, name = waiting[0]
        index = groups[name].pop()
        yield index
        if groups[name]:
            weight = weights.get(name, weights["*"])
            heapreplace(waiting, (served + turns_of(prompts[index], config) / weight, name))
        else:
            heappop(waiting)
