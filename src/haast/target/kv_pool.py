"""The KV pool of a target: blocks of token slots, who holds them, and which prefixes can be used again.

Owns accounting only: block numbers, not tensors (`cache.KVCache` has those, one for the target and one for each head,
and all of them use the same block tables). A request's `Sequence` takes blocks as its text grows and gives them back
when it ends. What it gives back stays as a prefix until somebody needs the room, the least recently used first.

    text     A B C D | E F G H | I J          blocks of 4 here (16 in truth); the table maps a text's slot i
    blocks     7         2        9           to slot table[i // 4] * 4 + i % 4 of every layer

    another text that begins A B C D E F X: shares block 7, copies E of block 2 into a block of its own and goes on
    from F: the last common position is run again, since drafters want its features, which no cache holds.

Block 0 is never given out: padding goes there. Sources: PagedAttention (arXiv 2309.06180), RadixAttention
(arXiv 2312.07104).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from haast.errors import KVPoolError

BLOCK = 16  # token slots of a block
_ROOM = 4  # free blocks before and after a new text: views of one stretch are faster than gathers


class PoolFullError(Exception):
    """There is no free block now; somebody has to wait. The engine handles it."""


@dataclass(eq=False)
class _Prefix:
    """A block of the prefix tree: the text up to its end is that of its ancestors, then its own tokens."""

    tokens: tuple[int, ...]  # BLOCK, or fewer where a text ended in it: then nothing follows
    block: int
    parent: _Prefix | None
    complete_from: int  # the text's slot from which on the head's keys and values are there too
    users: int = 0  # sequences that hold it
    following: dict[int, list[_Prefix]] = field(default_factory=dict)  # by first token

    def covers(self, tokens: tuple[int, ...], complete_from: int) -> bool:
        """Whether a block of these tokens has nothing beside what this one has."""
        if self.tokens == tokens:
            return True
        return self.tokens[: len(tokens)] == tokens and self.complete_from <= complete_from


class KVPool:
    """Blocks for `tokens` token slots in all.

    Args:
        tokens: budget, 1 or more; rounded up to whole blocks.
        retain: token slots of ended texts that are kept as prefixes; all of the pool if None, 0 for none.

    Raises:
        KVPoolError: a budget below 1, or a negative `retain`.
    """

    def __init__(self, tokens: int, retain: int | None = None) -> None:
        if tokens < 1:
            raise KVPoolError(f"a KV pool of {tokens} tokens is not allowed: give 1 or more")
        if retain is not None and retain < 0:
            raise KVPoolError(f"retain={retain} is not allowed: give 0 (keep no prefixes) or more tokens")
        self.blocks = -(-tokens // BLOCK)
        self.retain = self.blocks if retain is None else retain // BLOCK
        self._free = bytearray(b"\x00" + b"\x01" * self.blocks)  # [block]: 1 if free
        self.free_blocks = self.blocks
        self._roots: dict[object, _Prefix] = {}  # by what is cached beside the target: a head, or nothing
        # Held by no sequence, in the order in which they were given back; a parent always comes after its children.
        self._idle: OrderedDict[_Prefix, None] = OrderedDict()

    @property
    def slots(self) -> int:
        """Slots that storage needs: all blocks, and the one for padding."""
        return (self.blocks + 1) * BLOCK

    @property
    def tokens(self) -> int:
        """Token slots that can be given out."""
        return self.blocks * BLOCK

    @property
    def available(self) -> int:
        """Blocks that can be given out now: free ones, and prefixes that nobody uses."""
        return self.free_blocks + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Blocks of ended texts that are kept as prefixes."""
        return len(self._idle)

    def sequence(self) -> Sequence:
        """A text without any block yet."""
        return Sequence(self)

    def take(self, count: int, after: int = 0, run: int = 0) -> list[int]:
        """Give out `count` blocks, the one behind block `after` first, or from a free stretch of `run` blocks.

        Raises:
            PoolFullError: there are not so many; nothing was given out.
        """
        if self.free_blocks < count:
            if self.available < count:
                raise PoolFullError(f"{count} blocks are wanted, {self.available} of {self.blocks} are free")
            for _ in range(count - self.free_blocks):
                self._evict()
        taken: list[int] = []
        place = after + 1
        if run:  # a stretch of its own, with room before it for the neighbour to grow
            place = self._free.find(b"\x01" * (run + _ROOM), 1)
            place += _ROOM * (place > 1)
        for _ in range(count):
            if not 0 < place <= self.blocks or not self._free[place]:
                place = self._free.find(1, 1)
            self._free[place] = 0
            taken.append(place)
            place += 1
        self.free_blocks -= count
        return taken

    def give_back(self, block: int) -> None:
        """A block that nobody holds any more."""
        self._free[block] = 1
        self.free_blocks += 1

    def _evict(self) -> None:
        self._forget(next(iter(self._idle)))

    def _forget(self, prefix: _Prefix) -> None:
        """Drop a prefix that nobody uses and that nothing follows."""
        del self._idle[prefix]
        assert prefix.parent is not None, "a root is never idle"
        siblings = prefix.parent.following[prefix.tokens[0]]
        siblings.remove(prefix)
        if not siblings:
            del prefix.parent.following[prefix.tokens[0]]
        self.give_back(prefix.block)

    def clear(self) -> None:
        """Drop all prefixes, for one: the model's weights have changed. What sequences hold stays theirs."""
        while self._idle:
            self._evict()
        self._roots.clear()

    def common(self, text: Tokens[int], key: object = None) -> int:
        """Tokens of `text` whose keys and values are there as a prefix, a head's or not."""
        return sum(count for _, count in self._walk(text, key))

    def usable(self, text: Tokens[int], key: object, reach: int | None, headless: bool) -> int:
        """Tokens of `text` that a sequence would begin with, see `Sequence.reuse`."""
        found, complete = self._usable(text, key, reach)
        return sum(count for _, count in (found if headless else found[:complete]))

    def _usable(self, text: Tokens[int], key: object, reach: int | None) -> tuple[list[tuple[_Prefix, int]], int]:
        """The prefixes along `text`, and after how many of the first all is there that a head needs to go on."""
        found = list(self._walk(text, key))
        complete = len(found)
        while complete and not _complete(found[:complete], reach):
            complete -= 1
        return found, complete

    def blocks_of(self, text: Tokens[int], key: object = None) -> list[int]:
        """Blocks that hold nothing but prefixes of `text`, first to last."""
        return [prefix.block for prefix, count in self._walk(text, key) if count == len(prefix.tokens)]

    def forget(self, text: Tokens[int], key: object = None) -> None:
        """Free what is kept of `text`, but for what a sequence holds or another text goes on from."""
        for prefix, count in reversed(list(self._walk(text, key))):
            if count < len(prefix.tokens):
                continue  # another text's
            if prefix.users or prefix.following:
                return
            self._forget(prefix)

    def _walk(self, text: Tokens[int], key: object) -> Iterator[tuple[_Prefix, int]]:
        """The prefixes along `text` from its beginning, and how many tokens each shares with it."""
        at, begin = self._roots.get(key), 0
        while at is not None and begin < len(text):
            best, shared = None, 0
            for each in at.following.get(text[begin], ()):
                count = common_length(each.tokens, text[begin : begin + BLOCK])
                if count > shared:
                    best, shared = each, count
            if best is None:
                return
            yield best, shared
            if shared < BLOCK:
                return
            at, begin = best, begin + BLOCK


class Sequence:
    """One text's blocks, first to last, and how many of its slots are filled. Not for two texts at once."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.length = 0  # filled slots
        self.headless = False  # whether a head's keys and values are missing in the slots that it began with
        self._blocks = 0
        self._table: npt.NDArray[np.int32] = np.zeros(8, dtype=np.int32)
        self._shared: list[_Prefix] = []  # prefixes that the text runs through, from its first block on

    @property
    def table(self) -> npt.NDArray[np.int32]:
        """Block numbers, a view."""
        return self._table[: self._blocks]

    def reserve(self, slots: int) -> None:
        """Take blocks until there are `slots` slots.

        Raises:
            PoolFullError: the pool has no room now; nothing was taken.
        """
        wanted = -(-slots // BLOCK) - self._blocks
        if wanted <= 0:
            return
        if self._blocks:
            self._extend(self.pool.take(wanted, after=int(self._table[self._blocks - 1])))
        else:
            self._extend(self.pool.take(wanted, run=wanted + _ROOM))

    def _extend(self, blocks: Tokens[int]) -> None:
        needed = self._blocks + len(blocks)
        if needed > len(self._table):
            self._table = np.concatenate([self._table, np.zeros(max(needed, len(self._table)), dtype=np.int32)])
        self._table[self._blocks : needed] = blocks
        self._blocks = needed

    def reuse(
        self, text: Tokens[int], key: object = None, reach: int | None = None, headless: bool = False
    ) -> tuple[int, int, int]:
        """Begin with what is there of `text`, which has 1 token or more; the sequence is empty.

        Args:
            text: the tokens to come.
            key: what is cached beside the target.
            reach: slots back from its end that a head needs to be complete; None is all.
            headless: whether more of the text is worth more than a head that has seen it: then `self.headless` says
                whether that is so, and whole blocks alone are used, after which the head begins.

        Returns:
            how many slots are filled now; and a block to copy from and its copy, where the last of them is shared in
            part (0, 0 where not). The caller copies before anything else takes blocks.
        """
        found, complete = self.pool._usable(text, key, reach)
        self.headless = headless and len(found) > complete
        if not self.headless:
            del found[complete:]
        reused = max(sum(count for _, count in found) - 1, 0)
        whole, rest = divmod(reused, BLOCK)
        if self.headless:
            rest = 0
        for prefix, _ in found[:whole]:
            prefix.users += 1
            self.pool._idle.pop(prefix, None)
        self._shared = [prefix for prefix, _ in found[:whole]]
        self._extend([prefix.block for prefix in self._shared])
        self.length, copied = whole * BLOCK, (0, 0)
        if rest:
            source = found[whole][0]
            source.users += 1  # so that it is not evicted for its own copy
            idle = source in self.pool._idle
            if idle:
                del self.pool._idle[source]
            try:
                self.reserve(reused + 1)
                copied, self.length = (source.block, int(self._table[whole])), reused
            except PoolFullError:
                pass  # the rest of the block is computed anew
            source.users -= 1
            if idle:
                self.pool._idle[source] = None
        return (self.length, *copied)

    def publish(self, text: Tokens[int], filled: int, key: object = None, complete_from: int = 0) -> None:
        """Let others share the whole blocks among the first `filled` slots, which hold `text`.

        What is cached beside the target under `key` is there from slot `complete_from` on.
        """
        for number in range(len(self._shared), filled // BLOCK):
            tokens = tuple(text[number * BLOCK : (number + 1) * BLOCK])
            self._publish(tokens, number, key, complete_from)

    def _publish(self, tokens: tuple[int, ...], number: int, key: object, complete_from: int) -> None:
        root = self.pool._roots.setdefault(key, _Prefix((), 0, None, 0))
        parent = self._shared[-1] if self._shared else root
        siblings = parent.following.setdefault(tokens[0], [])
        block = int(self._table[number])
        made = next((each for each in siblings if each.covers(tokens, complete_from)), None)
        if made is None:
            made = _Prefix(tokens, block, parent, complete_from)
            siblings.append(made)
            for each in siblings[:-1]:
                if not each.users and made.covers(each.tokens, each.complete_from):  # the end of an earlier turn, say
                    self.pool._forget(each)
        elif complete_from < made.complete_from and not made.users:
            self.pool.give_back(made.block)
            made.block, made.complete_from = block, complete_from
        self.pool._idle.pop(made, None)
        made.users += 1
        self._shared.append(made)

    def release(self, text: Tokens[int] = (), filled: int = 0, key: object = None, complete_from: int = 0) -> None:
        """Give all blocks back; the first `filled` slots, which hold `text`, may be used again as prefixes."""
        pool = self.pool
        if filled and pool.retain:
            self.publish(text, filled, key, complete_from)
            number, rest = divmod(filled, BLOCK)
            if rest and number == len(self._shared) and number < self._blocks:
                tokens = tuple(text[number * BLOCK : filled])
                self._publish(tokens, number, key, complete_from)
        for number in range(self._blocks - 1, -1, -1):
            prefix = self._shared[number] if number < len(self._shared) else None
            if prefix is None or prefix.block != self._table[number]:
                pool.give_back(int(self._table[number]))
            if prefix is not None:
                prefix.users -= 1
                if not prefix.users:
                    pool._idle[prefix] = None
        self._shared, self._blocks, self.length = [], 0, 0
        while len(pool._idle) > pool.retain:
            pool._evict()


def _complete(found: Tokens[tuple[_Prefix, int]], reach: int | None) -> bool:
    """Whether what a head needs to go on after these prefixes is there."""
    needed = 0 if reach is None else max(0, sum(count for _, count in found) - reach - 1)
    for number, (prefix, count) in enumerate(found):
        begin = number * BLOCK
        if begin + count > needed and max(begin, needed) < prefix.complete_from:
            return False
    return True


def common_length(one: Tokens[int], other: Tokens[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
