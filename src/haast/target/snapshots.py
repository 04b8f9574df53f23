"""Snapshots of recurrent states at positions of cached prefixes, so that later texts resume there.

Keys and values of a prefix can be shared up to any token; a recurrent state only where it was kept. Owns which states
are kept: up to a number of bytes, the least recently used are dropped first. Knows nothing of models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class State(Protocol):
    """The recurrent state of a text after its first `length` tokens."""

    @property
    def length(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Snapshots:
    """States by the prefix block and the number of its tokens after which they are.

    Args:
        limit: most bytes of all states together.
        of_decoded: whether states of decoded text are kept too. They are not those of the same text as a prompt if the
            model computes several tokens otherwise than one.
    """

    def __init__(self, limit: int, of_decoded: bool = True) -> None:
        self.limit, self.of_decoded = limit, of_decoded
        self.nbytes = 0
        self._states: OrderedDict[tuple[object, int], State] = OrderedDict()  # least recently used first
        self._offsets: dict[object, set[int]] = {}

    def __len__(self) -> int:
        return len(self._states)

    def put(self, block: object, offset: int, state: State) -> None:
        """Keep the state after the first `offset` tokens of a block; one that is larger than the limit is not kept."""
        self._drop(block, offset)
        self._states[block, offset] = state
        self._offsets.setdefault(block, set()).add(offset)
        self.nbytes += state.nbytes
        while self.nbytes > self.limit:
            self._drop(*next(iter(self._states)))

    def before(self, blocks: Sequence[object], most: int, size: int) -> State | None:
        """The last state along a text of `blocks`, `size` tokens each, after at most `most` tokens; None if none is."""
        for number in range(len(blocks) - 1, -1, -1):
            offsets = (each for each in self._offsets.get(blocks[number], ()) if each <= most - number * size)
            offset = max(offsets, default=None)
            if offset is not None:
                self._states.move_to_end((blocks[number], offset))
                return self._states[blocks[number], offset]
        return None

    def move(self, block: object, other: object) -> None:
        """Move a block's states to another block that begins with the same tokens."""
        for offset in sorted(self._offsets.get(block, ())):
            self.put(other, offset, self._states[block, offset])
        self.forget(block)

    def forget(self, block: object) -> None:
        """Drop the states of a block."""
        for offset in list(self._offsets.get(block, ())):
            self._drop(block, offset)

    def _drop(self, block: object, offset: int) -> None:
        state = self._states.pop((block, offset), None)
        if state is not None:
            self.nbytes -= state.nbytes
            self._offsets[block].discard(offset)
            if not self._offsets[block]:
                del self._offsets[block]
