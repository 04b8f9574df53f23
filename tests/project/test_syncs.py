"""A step reads from the device once, and its device part runs where nothing can be read: on torch's meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fakes import random_head, tiny_llama, tiny_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from haast.core import Accepted, RowVerdict, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.engine.scheduler import Scheduler
from haast.engine.verify import verify
from haast.sampling import Sampler
from haast.target.target import Target
from haast.tree import DraftTree

# What makes the host wait for the device, or has a shape that only the device knows.
READS = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "unique_dim_consecutive", "equal", "is_nonzero", "allclose", "repeat_interleave",
}  # fmt: skip
HOST = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts operators that read from the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in READS and not (name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], int)):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[Live]:
    """All reads: operators, and methods of tensors that give Python values (`tolist` on the CPU is no operator)."""
    mode, before = Reads(), {name: getattr(Tensor, name) for name in HOST}
    inside = [False]

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            outer, inside[0] = inside[0], True
            seen = Counter(mode.seen)
            try:
                return method(self, *args, **kwargs)
            finally:
                inside[0] = outer
                if not outer:  # one read, whatever it is made of
                    mode.seen = seen
                    mode.seen[name] += 1

        return call

    for name, method in before.items():
        setattr(Tensor, name, counted(name, method))
    try:
        with mode:
            yield Live(mode)
    finally:
        for name, method in before.items():
            setattr(Tensor, name, method)


class Live:
    """The mode's counts as they are when they are asked for."""

    def __init__(self, mode: Reads) -> None:
        self._mode = mode

    def total(self) -> int:
        return sum(self._mode.seen.values())

    def __repr__(self) -> str:
        return repr(self._mode.seen)


SAMPLING = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.9, seed=1),
    "top-k": SamplingParams(temperature=0.9, top_k=7, seed=2),
    "top-p": SamplingParams(temperature=0.9, top_p=0.8, seed=3),
    "min-p": SamplingParams(temperature=0.9, min_p=0.05, seed=4),
    "all": SamplingParams(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, seed=5),
}
SHAPES = {
    "dynamic": DraftShape(depth=3, top_k=3, width=3, nodes=10),
    "static": DraftShape("static", depth=3, top_k=3, width=3, nodes=10),
    "chain": DraftShape("chain", depth=3),
}


def drafters(target: Target) -> dict[str, Drafter]:
    eagles: dict[str, Drafter] = {
        name: EagleDrafter(target, random_head(target), shape) for name, shape in SHAPES.items()
    }
    return {"vanilla": VanillaDrafter(), **eagles}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", ["vanilla", *SHAPES])
@pytest.mark.parametrize("law", SAMPLING)
@pytest.mark.one_of_each
def test_a_step_reads_once(rows: int, name: str, law: str) -> None:
    target = tiny_target()
    engine = Engine(target, drafters(target)[name])
    prompts = [[1 + row, *range(2, 3 + 2 * row)] for row in range(rows)]
    for prompt in prompts:
        engine.submit(prompt, SAMPLING[law], StopParams(40))
    scheduler = Scheduler.of(target)
    scheduler.step()  # prefill
    for _ in range(4):
        with reads() as seen:
            scheduler.step()
        assert seen.total() == 1, f"a step read {seen}"


def test_a_prompt_is_read_once() -> None:
    target = tiny_target()
    Engine(target, drafters(target)["dynamic"]).submit(list(range(20)), SAMPLING["all"], StopParams(40))
    with reads() as seen:
        Scheduler.of(target).step()
    assert seen.total() <= 2, f"its first token, and the step after it: {seen}"


def test_one_more_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    target = tiny_target()
    drafter = VanillaDrafter()
    propose = drafter.propose

    def curious(states: Any, budget: int | None = None) -> DraftTree:
        tree = propose(states, budget)
        assert int(tree.tokens.max()) < 32
        return tree

    monkeypatch.setattr(drafter, "propose", curious)
    Engine(target, drafter).submit([1, 2, 3], SamplingParams(), StopParams(40))
    Scheduler.of(target).step()
    with reads() as seen:
        Scheduler.of(target).step()
    assert seen.total() == 2


# ------------------------------------------------------------------------------------------------- the meta device


def on_meta(target: Target, drafter: EagleDrafter) -> None:
    """Move all weights there; what was made on the CPU since raises where it meets them."""
    model: Any = target.model
    model.to("meta")
    drafter._module.to("meta")
    target.refresh()  # as every request does when it begins
    drafter._built = (target.device, target.dtype)


def meta_step(sampling: SamplingParams, shape: DraftShape, spoil: Callable[[DraftTree], Any] | None = None) -> None:
    """Propose, forward, verify, keep and observe for two ragged rows, without a value of any tensor."""
    model: Any = tiny_llama()
    target = Target(model.float())
    drafter = EagleDrafter(target, random_head(target), shape)
    on_meta(target, drafter)
    meta = torch.device("meta")
    cache, pool = target.cache, target.pool
    texts, lengths = [[1, 2, 3, 4, 5], [6, 7, 8]], [4, 2]
    states, sequences = [], []
    for text, length in zip(texts, lengths, strict=True):
        kv = pool.sequence()
        kv.reserve(length + drafter.nodes + drafter.room + 2)
        kv.length = length
        sequences.append(kv)
        states.append(drafter.begin(text, kv, 0))
    width = target.hidden_size
    following = torch.zeros(2, 4, dtype=torch.long, device=meta)
    features = torch.zeros(2, 4, width, device=meta)
    counts = torch.zeros(2, dtype=torch.long, device=meta)
    drafter.observe(states, Accepted(following, features, counts, tokens_on_host=[text[1:] for text in texts]))
    for _ in range(2):
        tree = drafter.propose(states)
        assert tree.tokens.device == meta
        if spoil is not None:
            spoil(tree)
        output = target.forward(tree, cache.bind(sequences))
        verdict = verify(tree, output.logits, [Sampler(sampling), Sampler(sampling, 1)], texts)
        cache.keep(verdict.path, verdict.counts)
        kept = output.features.gather(1, verdict.path.unsqueeze(2).expand(-1, -1, width))
        # The one read of the step, which meta can't give: one draft of the first row was kept, none of the other's.
        verdict._rows = (RowVerdict((0, 1), (1, 2), (True,)), RowVerdict((0,), (3,), (False,)))
        drafter.observe(states, Accepted(verdict.tokens, kept, verdict.counts, verdict=verdict))
        cache.advance([2, 1])
        texts = [[*texts[0], 1, 2], [*texts[1], 3]]


@pytest.mark.parametrize("law", SAMPLING)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.one_of_each
def test_the_device_part_of_a_step_runs_where_nothing_can_be_read(law: str, kind: str, no_autocast: None) -> None:
    meta_step(SAMPLING[law], SHAPES[kind])


def test_a_read_or_a_tensor_elsewhere_fails_there(no_autocast: None) -> None:
    """The controls."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        meta_step(SAMPLING["greedy"], SHAPES["dynamic"], lambda tree: tree.tokens[0, 0].item())
    with pytest.raises((RuntimeError, NotImplementedError)):
        meta_step(
            SAMPLING["greedy"], SHAPES["dynamic"], lambda tree: tree.tokens + torch.ones_like(tree.tokens, device="cpu")
        )
