"""Twenty prompts that begin with one system prompt of 800 tokens: target and head compute its keys and values once.

The texts are those of an empty pool. Counted on a tiny model; the time to the first token on the real one (slow).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import pytest
from fakes import random_head, tiny_target
from test_session import eagle3

from haast.api import Haast
from haast.core import Accepted
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.head_runner import HeadForward
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.target.kv_pool import BLOCK
from haast.target.target import Target

SYSTEM, OWN, PROMPTS = 800, 12, 20
DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "vanilla": lambda target: VanillaDrafter(),
    "eagle": lambda target: EagleDrafter(target, random_head(target), DraftShape(nodes=6)),
    "eagle3": lambda target: EagleDrafter(target, eagle3(target), DraftShape(nodes=6)),
    "eagle+suffix": lambda target: HybridDrafter(EagleDrafter(target, random_head(target), DraftShape(nodes=6))),
}


def prompts(vocab: int = 32) -> list[list[int]]:
    rng = random.Random(1)
    system = rng.choices(range(vocab), k=SYSTEM)
    return [[*system, *rng.choices(range(vocab), k=OWN)] for _ in range(PROMPTS)]


class Positions:
    """Positions that prompts took, in the target and in the head."""

    def __init__(self) -> None:
        self.target = self.head = 0


@contextmanager
def counted(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Positions]:
    count, forward, run, observe = Positions(), target.forward, HeadForward.run, EagleDrafter.observe
    of_a_prompt = False

    def counting(tree: Any, cache: Any, *, last_only: bool = False, **more: Any) -> Any:
        count.target += last_only * tree.rows * tree.nodes
        return forward(tree, cache, last_only=last_only, **more)

    def running(self: HeadForward, cache: Any, embeddings: Any, states: Any, flight: Any) -> Any:
        count.head += of_a_prompt * states.shape[0] * states.shape[1]
        return run(self, cache, embeddings, states, flight)

    def observing(self: EagleDrafter, states: Any, accepted: Accepted) -> None:
        nonlocal of_a_prompt
        of_a_prompt = accepted.verdict is None
        observe(self, states, accepted)
        of_a_prompt = False

    with monkeypatch.context() as patch:
        patch.setattr(target, "forward", counting)
        patch.setattr(HeadForward, "run", running)
        patch.setattr(EagleDrafter, "observe", observing)
        yield count


@pytest.mark.parametrize(("temperature", "together"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_shared_beginning_is_computed_once(
    name: str, temperature: float, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target(context=2048)
    haast, asked = Haast(target, DRAFTERS[name](target)), prompts()
    how: Any = {"max_new_tokens": 6, "temperature": temperature, "seed": 5}
    with counted(target, monkeypatch) as count:
        said = haast.generate(asked, **how) if together else [haast.generate(prompt, **how) for prompt in asked]
    most = SYSTEM + OWN + (PROMPTS - 1) * (OWN + BLOCK)
    assert SYSTEM + PROMPTS * OWN <= count.target <= most
    assert said[0].stats.recalled_tokens == 0
    for each in said[1:]:
        computed = each.stats.prompt_tokens - each.stats.recalled_tokens
        assert computed <= OWN + BLOCK < 0.15 * (SYSTEM + OWN)
    if haast.drafter.caches:
        assert SYSTEM + PROMPTS * OWN <= count.head <= most
    for prompt, each in list(zip(asked, said, strict=True))[::5]:
        target.pool.clear()
        cold = haast.generate(prompt, **how)
        assert cold.stats.recalled_tokens == 0 and cold.tokens == each.tokens
    plain = Haast(tiny_target(context=2048), VanillaDrafter()).generate(asked, **how)
    assert [each.tokens for each in said] == [each.tokens for each in plain]


def test_what_was_used_longest_ago_goes_first() -> None:
    target = tiny_target(context=2048)
    target.use_pool(1024, retain=272)
    haast, rng = Haast(target, VanillaDrafter()), random.Random(2)
    first, second, third = (rng.choices(range(32), k=100) for _ in range(3))
    asked = ((first, False), (second, False), (first, True), (third, False), (first, True), (second, False))
    for prompt, kept in asked:
        recalled = haast.generate(prompt, max_new_tokens=1).stats.recalled_tokens
        assert recalled == 99 if kept else recalled < 48, "the last blocks of a text go first"
        assert target.pool.cached_blocks <= 272 // BLOCK


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::haast.errors.LongContextWarning")
def test_the_time_to_the_first_token_falls_below_15_percent() -> None:
    haast = Haast.from_pretrained()
    rules = [f"Rule {number}: answer question {number} in {number} words." for number in range(60)]
    system = {"role": "system", "content": " ".join(rules)}
    waited, texts = [], []

    def ask(number: int, clear: bool) -> tuple[float, str]:
        if clear:
            haast.target.pool.clear()
        begin = perf_counter()
        pieces = haast.stream([system, {"role": "user", "content": f"Name {number + 2} colours."}], max_new_tokens=8)
        first = next(pieces)
        return perf_counter() - begin, first.text + "".join(piece.text for piece in pieces)

    assert SYSTEM <= len(haast.encode([system])) <= 1.5 * SYSTEM
    ask(0, clear=True)  # warm-up
    for number in range(PROMPTS):
        took, text = ask(number, clear=number == 0)
        waited.append(took)
        texts.append(text)
    assert median(waited[1:]) < 0.15 * waited[0], waited
    assert texts[::5] == [ask(number, clear=True)[1] for number in range(0, PROMPTS, 5)]
