"""The drafter contract: observe what was accepted, propose a tree. Prefill and step look the same.

target ran on      root   a      b            tokens[i] is the token that FOLLOWS
features           f_root f_a    f_b          the position that gave features[i]
Accepted.tokens    a      b      bonus
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from haast.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """What one target forward settled, ragged rows padded to the longest. Filled by the engine."""

    tokens: Tensor  # (rows, longest) int64: the token following each kept position
    features: Tensor  # (rows, longest, width): at the kept positions, what the drafter asked for (`target_layers`)
    counts: tuple[int, ...]  # kept positions per row; 0 for a row that has ended
    # (rows, nodes) int64: the target's likeliest token at every node of the last proposal, for drafters that want it
    # (`wants_choices`); None otherwise and behind a prompt.
    choices: Tensor | None = None


class Drafter(ABC):
    """Proposes one tree per step, of at most `nodes` nodes. Owns its own state; `start` forgets it."""

    name: str
    # HF `hidden_states` indices that `Accepted.features` lays side by side; empty: the features (the LM head's input).
    target_layers: tuple[int, ...] = ()
    wants_choices: bool = False  # whether `Accepted.choices` is filled
    lock: threading.RLock  # held by the run that takes a step
    owner: object = None  # the run whose text this drafter follows; set by the engine, which checks it every step

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Every drafter has a lock, whatever its constructor does."""
        made = super().__new__(cls)
        made.lock = threading.RLock()
        return made

    @property
    @abstractmethod
    def nodes(self) -> int:
        """The most nodes that a proposed tree has, root included; most drafters always propose so many."""

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a batch of texts; `prompts` are token ids per row, for drafters that look things up."""

    def memory(self) -> object:
        """What `recall` needs of the present run besides its text; None where the text is enough."""
        return None

    def recall(self, memory: object, following: Sequence[int]) -> None:
        """Go on behind positions that are known already, in a run of one row; comes between `start` and `observe`.

        Args:
            memory: what `memory` gave in a run whose text began the same.
            following: the token after each of those positions, 1 or more. `observe` begins at the position behind.
        """
        return

    @abstractmethod
    def keep(self, order: Sequence[int]) -> None:
        """Rows have ended and leave: row i is from now on what row `order[i]` was, see `TreeCache.keep`."""

    @abstractmethod
    def observe(self, accepted: Accepted) -> None:
        """Take in kept positions (the whole prompt at first): their features, and the tokens that follow them."""

    @abstractmethod
    def propose(self) -> DraftTree:
        """The next tree, rooted at each row's last observed token."""


def last_tokens(accepted: Accepted, before: Tensor | None) -> Tensor:
    """Each row's newest token (rows,): the next root. Rows that kept nothing stay at `before`."""
    return last_kept(accepted.tokens, accepted.counts, before)


def last_kept(values: Tensor, counts: Sequence[int], before: Tensor | None) -> Tensor:
    """What stands at each row's last kept position, (rows, ...) of (rows, longest, ...); `before` where none was."""
    newest = torch.stack([values[row, max(count, 1) - 1] for row, count in enumerate(counts)])
    if before is None or all(counts):
        return newest
    kept = torch.tensor(counts, device=newest.device) > 0
    return torch.where(kept.view(-1, *[1] * (newest.ndim - 1)), newest, before)
