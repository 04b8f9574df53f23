"""The drafter interface: begin a request, observe accepted tokens, propose a draft tree.

A drafter serves many requests at once. `begin` creates a state per request, which the engine keeps; `observe` and
`propose` get the states of a batch's rows. Batches change from step to step, so a drafter keeps nothing per row.
`haast.core.Accepted` shows which token belongs to which features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from haast.core import Accepted, Request, RowVerdict, TokenChooser
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import Sequence as KVSequence
from haast.tree import DraftTree

__all__ = ["Accepted", "Drafter", "last_kept", "last_tokens"]


class Drafter(ABC):
    """Proposes one tree per step and row, of at most `nodes` nodes.

    Attributes:
        name: its name in options, statistics and results.
        target_layers: indices into HF `hidden_states` that `Accepted.features` concatenates; empty: the last hidden
            state (the LM head's input).
        wants_choices: whether the engine fills `Accepted.choices`.
        prefix_key: key of the KV pool's prefixes that hold the drafter's own keys and values too; None if it has none.
        reach: number of last slots of a prefix that it needs; None is all.
        caches: its own KV caches, in the target's blocks.
        room: slots after the committed ones that `observe` and `propose` write in `caches`.
        policy: decides how much is drafted per step; None drafts as much as the drafter can.
        drafting_off: whether the load is so high that new requests get no drafts, see `set_load`.
    """

    name: str
    target_layers: tuple[int, ...] = ()
    wants_choices: bool = False
    prefix_key: object = None
    reach: int | None = None
    caches: tuple[KVCache, ...] = ()
    room: int = 0
    policy: DraftPolicy | None = None
    drafting_off: bool = False

    @property
    @abstractmethod
    def nodes(self) -> int:
        """Maximum nodes of a proposed tree, root included."""

    @abstractmethod
    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> Any:
        """Create the state of a new request.

        Args:
            prompt: all of its tokens so far.
            kv: its blocks, for drafters with a KV cache of their own.
            reused: number of first positions taken from the prefix cache; they will not be observed.
        """

    def set_load(self, requests: int) -> None:
        """The number of running requests, set before every step. Lets a drafter skip work if drafting does not pay."""
        self.drafting_off = self.policy is not None and self.policy.drafting_off(requests)

    def set_chooser(self, state: Any, chooser: TokenChooser) -> None:  # noqa: B027  # most drafters do not sample
        """The request's sampler, set after `begin`. A drafter that samples keys its draws by the same seed and choice.

        Otherwise requests with different seeds or choices would share their drafts, and under acceptance rules whose
        text depends on the drafts they would not be independent.
        """

    def add_prediction(self, state: Any, text: Sequence[int]) -> None:  # noqa: B027  # most drafters read no text
        """Expected text, then the reused positions, as tokens; called after `begin`. See `DraftHints.prediction`."""

    def end(self, state: Any) -> None:  # noqa: B027  # most drafters hold no resources
        """The request has ended or was preempted; its state is not used again."""

    def filled(self, state: Any, length: int) -> int:
        """How many of the request's first `length` slots later requests may reuse."""
        return length

    def head_kv_from(self, state: Any) -> int:
        """The first slot of the request from which on the drafter's keys and values are complete."""
        return 0

    @abstractmethod
    def observe(self, states: Sequence[Any], accepted: Accepted) -> None:
        """Take committed positions (first the prompt, chunk by chunk): features, and the tokens that follow them."""

    @abstractmethod
    def propose(self, states: Sequence[Any], budget: int | None = None) -> DraftTree:
        """The next tree of every row, rooted at its last observed token.

        Args:
            states: one per row.
            budget: maximum nodes per row, root included; 1 drafts nothing. None leaves it to the drafter.
        """


class DraftPolicy(Protocol):
    """Decides how much is drafted, from counts and measured costs; never from a clock or random draws."""

    def budget(self, requests: Sequence[Request]) -> int | None:
        """Maximum nodes per row of the next step, root included; None leaves it to the drafter."""

    def drafting_off(self, rows: int) -> bool:
        """Whether drafting does not pay for a new request, without counts of its own, in a batch of `rows` rows."""

    def observed(self, request: Request, kept: RowVerdict, nodes: int) -> None:
        """Record the verdict of a request in a step with `nodes` nodes per row."""


def last_kept(values: Tensor, counts: Tensor) -> Tensor:
    """The values at each row's last committed position: (rows, longest, ...) -> (rows, ...); counts are 1 or more."""
    index = (counts - 1).clamp_min(0).view(-1, *[1] * (values.ndim - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def last_tokens(accepted: Accepted) -> Tensor:
    """Each row's newest token (rows,): the next root."""
    return last_kept(accepted.tokens, accepted.counts)


def stacked(states: Sequence[Any], name: str) -> Tensor:
    """The attribute `name` of all states, a tensor each, as (rows, ...)."""
    if len(states) == 1:
        single: Tensor = getattr(states[0], name).unsqueeze(0)
        return single
    return torch.stack([getattr(state, name) for state in states])
