"""The drafter contract: begin a request, observe what was accepted, propose a tree.

A drafter serves many requests at once and keeps what it must remember of each in a state of its own making, which the
engine holds for it: `begin` makes it, `observe` and `propose` get the states of the rows of one batch. Batches change
from step to step, so nothing is kept by row. `haast.core.Accepted` draws which token belongs to which features.
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
        name: what it is called everywhere.
        target_layers: HF `hidden_states` indices that `Accepted.features` lays side by side; empty: the features
            themselves (the LM head's input).
        wants_choices: whether `Accepted.choices` is filled.
        prefix_key: which prefixes of the KV pool have all that it needs; None: those of the target alone.
        reach: slots back that it needs of a prefix; None is all.
        caches: keys and values of its own, in the target's blocks.
        room: slots after a text's committed ones that `observe` and `propose` write there.
        policy: how much is drafted, by what pays; None drafts all that the drafter can.
        resting: whether so many requests run that nothing is going to be drafted for a new one, see `loaded`.
    """

    name: str
    target_layers: tuple[int, ...] = ()
    wants_choices: bool = False
    prefix_key: object = None
    reach: int | None = None
    caches: tuple[KVCache, ...] = ()
    room: int = 0
    policy: DraftPolicy | None = None
    resting: bool = False

    @property
    @abstractmethod
    def nodes(self) -> int:
        """The most nodes that a proposed tree has, root included."""

    @abstractmethod
    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> Any:
        """The state of a request that begins.

        Args:
            prompt: its tokens, all of those so far.
            kv: its blocks, for drafters with keys and values of their own beside the target's.
            reused: positions, from the first, that are there already and will not be observed.
        """

    def loaded(self, requests: int) -> None:
        """So many requests run; told before every step. Where drafts do not pay, nobody need get ready to draft."""
        self.resting = self.policy is not None and self.policy.rests(requests)

    def drawn_by(self, state: Any, chooser: TokenChooser) -> None:  # noqa: B027  # most draw nothing
        """Who draws the request's tokens, told after `begin`: a drafter that draws too does so by its seed and choice.

        Requests of different seeds or choices would otherwise share their drafts; under acceptance rules that let
        drafts show in the text, they would not be independent.
        """

    def foresee(self, state: Any, text: Sequence[int]) -> None:  # noqa: B027  # most read no text
        """Text that may come again, told after `begin`, with the positions that were reused after it."""

    def end(self, state: Any) -> None:  # noqa: B027  # most have nothing to give back
        """A request leaves; its state is not used again."""

    def filled(self, state: Any, length: int) -> int:
        """Of the first `length` slots of the request, how many hold all that a later request can use of them."""
        return length

    def complete_from(self, state: Any) -> int:
        """The first slot of the request from which on all is there that a later request needs."""
        return 0

    @abstractmethod
    def observe(self, states: Sequence[Any], accepted: Accepted) -> None:
        """Take in kept positions (the prompt, chunk by chunk, at first): features, and the tokens that follow them."""

    @abstractmethod
    def propose(self, states: Sequence[Any], budget: int | None = None) -> DraftTree:
        """The next tree of every row, rooted at its last observed token.

        Args:
            states: of the rows.
            budget: most nodes per row, root included; 1 drafts nothing. None is up to the drafter.
        """


class DraftPolicy(Protocol):
    """Decides how much is drafted. Decisions rest on counts and calibrated costs, never on the clock or on draws."""

    def budget(self, requests: Sequence[Request]) -> int | None:
        """Most nodes per row of the next step, root included; None is up to the drafter."""

    def rests(self, rows: int) -> bool:
        """Whether nothing is drafted for requests that nothing is known of, where so many rows are decoded together."""

    def observed(self, request: Request, kept: RowVerdict, nodes: int) -> None:
        """A step over `nodes` nodes a row kept this of the request."""


def last_kept(values: Tensor, counts: Tensor) -> Tensor:
    """What stands at each row's last kept position, (rows, ...) of (rows, longest, ...); counts are 1 or more."""
    index = (counts - 1).clamp_min(0).view(-1, *[1] * (values.ndim - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def last_tokens(accepted: Accepted) -> Tensor:
    """Each row's newest token (rows,): the next root."""
    return last_kept(accepted.tokens, accepted.counts)


def stacked(states: Sequence[Any], name: str) -> Tensor:
    """A tensor that every state holds, (rows, ...)."""
    if len(states) == 1:
        alone: Tensor = getattr(states[0], name).unsqueeze(0)
        return alone
    return torch.stack([getattr(state, name) for state in states])
