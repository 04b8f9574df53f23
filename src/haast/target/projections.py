"""The linear layers at both ends of a recurrent mixer, computed for all nodes of a forward at once.

A mixer is called once per depth of a tree, but its first linear layers read each node alone, and its last one writes
the output of each node alone. They hold nearly all of its weights, which would be read again for every depth. So they
run once: calls of the mixer are given the results of the first layers, and their outputs lack the last layer, which
follows for all nodes together. Which layers these are is measured (`find_ends`). Knows nothing of states and trees.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haast import compat
from haast.target.packing import PackedLinear


@dataclass(frozen=True)
class Ends:
    """The linear layers at the ends of a mixer, by their names within it.

    Attributes:
        first: those whose input is the mixer's, times a factor.
        last: that whose output is part `part` of the mixer's, which may be a tuple; empty if there is none.
    """

    first: Mapping[str, float]
    last: str = ""
    part: int = 0


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, this thread's calls of a module run `forward`. The user may run it in another thread."""
    before: Any = vars(module).get("forward")  # accelerate sets one
    own: Any = module.forward
    thread = threading.get_ident()

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (forward if threading.get_ident() == thread else own)(*args, **kwargs)

    module.forward = functools.wraps(own)(choose)
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


def find_ends(module: nn.Module, hidden: Tensor, call: Callable[[], Any]) -> Ends:
    """Watch one `call` of a mixer over `hidden` (1, nodes, width): which linear layers are at its ends."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    linears = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear | PackedLinear)}
    hooks = [
        each.register_forward_hook(
            lambda _module, args, output, name=name: seen.setdefault(name, []).append((args[0], output))
        )
        for name, each in linears.items()
    ]
    try:
        output = call()
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: calls[0] for name, calls in seen.items() if len(calls) == 1}
    factors = {name: _factor(states, hidden) for name, (states, _) in once.items()}
    first = {name: factor for name, factor in factors.items() if factor is not None}
    parts: Sequence[Any] = output if isinstance(output, tuple) else (output,)
    for name, (states, result) in once.items():
        for part, each in enumerate(parts):
            if each is result and name not in first and states.shape[:2] == hidden.shape[:2]:
                return Ends(first, name, part)
    return Ends(first)


def _factor(states: Tensor, hidden: Tensor) -> float | None:
    """The factor by which `states` are `hidden`, up to rounding; None if they are something else."""
    if states.shape != hidden.shape:
        return None
    if torch.equal(states, hidden):
        return 1.0
    largest = hidden.abs().argmax()
    factor = float(states.flatten()[largest].double() / hidden.flatten()[largest].double())
    tolerance = 4 * torch.finfo(hidden.dtype).eps
    return factor if torch.allclose(states, hidden * factor, rtol=tolerance, atol=0.0) else None


class SharedEnds:
    """The ends of a mixer in one forward.

    Args:
        module: the mixer.
        ends: its ends.
        hidden: (rows, nodes, width), the input for all nodes.
    """

    def __init__(self, module: nn.Module, ends: Ends, hidden: Tensor) -> None:
        self.index: Tensor | None = None  # (n, m) nodes of the running call, as row * nodes + node
        self._ends, self._hidden = ends, hidden
        self._first = {name: module.get_submodule(name) for name in ends.first}
        self._last = module.get_submodule(ends.last) if ends.last else None
        all_ends = [*self._first.values(), *([] if self._last is None else [self._last])]
        if compat.foreign_hooks(all_ends):  # they would see other inputs and outputs
            self._first, self._last = {}, None
        self._finish: Any = None if self._last is None else self._last.forward

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside the block, the mixer's calls get the first layers' results, and leave out the last layer."""
        with ExitStack() as stack:
            for name, module in self._first.items():
                stack.enter_context(replaced(module, self._given(module, self._ends.first[name])))
            if self._last is not None:
                stack.enter_context(replaced(self._last, lambda states: states))
            yield

    def finish(self, output: Any) -> Any:
        """The mixer's output for all nodes, from that of its calls without the last layer."""
        if self._last is None:
            return output
        if not isinstance(output, tuple):
            return self._finish(output)
        part = self._ends.part
        return (*output[:part], self._finish(output[part]), *output[part + 1 :])

    def _given(self, module: nn.Module, factor: float) -> Callable[[Tensor], Tensor]:
        hidden = self._hidden if factor == 1.0 else self._hidden * factor
        results: Tensor = module.forward(hidden).flatten(0, 1)

        def given(_states: Tensor) -> Tensor:
            assert self.index is not None, "set before each call"
            return results[self.index.to(results.device)]

        return given
