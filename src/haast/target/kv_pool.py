"""KV pool and prefix cache of a target: allocates blocks of token slots and keeps those of finished requests.

Owns accounting only: block numbers, not tensors (`kv_cache.KVCache` has those, one for the target and one for each
head; all use the same block tables). A request's `Sequence` takes blocks as its text grows and frees them when it ends.
Freed blocks stay cached as prefixes, evicted least recently used first when the pool needs room.

    text     A B C D | E F G H | I J          blocks of 4 here (16 in the code); the table maps a text's slot i
    blocks     7         2        9           to slot table[i // 4] * 4 + i % 4 of every layer

    another text that begins A B C D E F X: shares block 7, copies E of block 2 into a new block and prefills from F.
    The last common position is run again because drafters need its features, which are not cached.

Block 0 is never allocated: it is for padding. Sources: PagedAttention (arXiv 2309.06180), RadixAttention
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
from haast.target.snapshots import Snapshots, State

BLOCK = 16  # token slots per block
_GAP = 4  # free blocks before and after a new text, for it to grow contiguously: views are faster than gathers


class PoolFullError(Exception):
    """The pool has no free block now, so a request has to wait. The engine handles it."""


@dataclass(eq=False)
class _PrefixBlock:
    """A node of the prefix tree: one block. Its text is that of its ancestors, then its own tokens."""

    tokens: tuple[int, ...]  # BLOCK tokens; fewer if a text ended in the block, which then has no children
    block: int
    parent: _PrefixBlock | None
    head_kv_from: int  # first slot of the text from which the head's keys and values are cached too
    users: int = 0  # number of sequences that hold it
    children: dict[int, list[_PrefixBlock]] = field(default_factory=dict)  # by first token

    def covers(self, tokens: tuple[int, ...], head_kv_from: int) -> bool:
        """Whether a block with these tokens would add nothing to this one."""
        if self.tokens == tokens:
            return True
        return self.tokens[: len(tokens)] == tokens and self.head_kv_from <= head_kv_from


class KVPool:
    """Allocates blocks for `tokens` token slots in total.

    Args:
        tokens: budget, 1 or more; rounded up to whole blocks.
        retain: token slots of finished requests that are kept as prefixes; None: all of the pool, 0: none.
        snapshots: of models with recurrent states, which continue a text only where a state was kept.

    Raises:
        KVPoolError: a budget below 1, or a negative `retain`.
    """

    def __init__(self, tokens: int, retain: int | None = None, snapshots: Snapshots | None = None) -> None:
        if tokens < 1:
            raise KVPoolError(f"a KV pool of {tokens} tokens is not allowed: give 1 or more")
        if retain is not None and retain < 0:
            raise KVPoolError(f"retain={retain} is not allowed: give 0 (keep no prefixes) or more tokens")
        self.blocks = -(-tokens // BLOCK)
        self.retain = self.blocks if retain is None else retain // BLOCK
        self.snapshots = snapshots
        self._free = bytearray(b"\x00" + b"\x01" * self.blocks)  # [block]: 1 if free
        self.free_blocks = self.blocks
        self._roots: dict[object, _PrefixBlock] = {}  # by the key of the head whose KV is cached too; None: no head
        # Blocks that no sequence holds, in the order in which they were freed; a parent comes after its children.
        self._idle: OrderedDict[_PrefixBlock, None] = OrderedDict()

    @property
    def slots(self) -> int:
        """Number of slots of the tensors: all blocks, and the one for padding."""
        return (self.blocks + 1) * BLOCK

    @property
    def tokens(self) -> int:
        """Number of token slots that can be allocated."""
        return self.blocks * BLOCK

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free ones, and prefixes that no sequence holds."""
        return self.free_blocks + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Blocks of finished requests that are kept as prefixes."""
        return len(self._idle)

    def sequence(self) -> Sequence:
        """A new sequence without blocks."""
        return Sequence(self)

    def take(self, count: int, after: int = 0, run: int = 0) -> list[int]:
        """Allocate `count` blocks: preferably those after block `after`, or from `run` contiguous free blocks.

        Raises:
            PoolFullError: fewer are available; none was allocated.
        """
        if self.free_blocks < count:
            if self.available < count:
                raise PoolFullError(f"{count} blocks are needed, {self.available} of {self.blocks} are free")
            for _ in range(count - self.free_blocks):
                self._evict()
        allocated: list[int] = []
        block = after + 1
        if run:  # leave a gap before it, so that the text before can grow contiguously too
            block = self._free.find(b"\x01" * (run + _GAP), 1)
            block += _GAP * (block > 1)
        for _ in range(count):
            if not 0 < block <= self.blocks or not self._free[block]:
                block = self._free.find(1, 1)
            self._free[block] = 0
            allocated.append(block)
            block += 1
        self.free_blocks -= count
        return allocated

    def free(self, block: int) -> None:
        """Free a block that no sequence or prefix holds any more."""
        self._free[block] = 1
        self.free_blocks += 1

    def _evict(self) -> None:
        self._drop(next(iter(self._idle)))

    def _drop(self, prefix: _PrefixBlock) -> None:
        """Remove a prefix block without users and children, and free its block."""
        del self._idle[prefix]
        assert prefix.parent is not None, "a root is never idle"
        siblings = prefix.parent.children[prefix.tokens[0]]
        siblings.remove(prefix)
        if not siblings:
            del prefix.parent.children[prefix.tokens[0]]
        if self.snapshots is not None:
            self.snapshots.forget(prefix)
        self.free(prefix.block)

    def clear(self) -> None:
        """Drop all cached prefixes, e.g. because the model's weights have changed. Sequences keep their blocks."""
        while self._idle:
            self._evict()
        self._roots.clear()

    def common(self, text: Tokens[int], key: object = None) -> int:
        """Number of leading tokens of `text` whose keys and values of the target are cached, a head's or not."""
        return sum(count for _, count in self._walk(text, key))

    def usable(self, text: Tokens[int], key: object, reach: int | None, headless: bool) -> int:
        """Number of leading tokens of `text` that are cached and can be reused; arguments as for `Sequence.reuse`."""
        return sum(count for _, count in self._usable(text, key, reach, headless)[0])

    def _usable(
        self, text: Tokens[int], key: object, reach: int | None, headless: bool
    ) -> tuple[list[tuple[_PrefixBlock, int]], bool, State | None]:
        """The prefix blocks that can be reused, whether without the head's, and the recurrent state to continue from.

        With recurrent states, the prefix ends one token after the last one that was kept.
        """
        prefixes = list(self._walk(text, key))
        complete = _complete_blocks(prefixes, reach)
        headless = headless and len(prefixes) > complete
        if not headless:
            del prefixes[complete:]
        if self.snapshots is None:
            return prefixes, headless, None
        tokens = sum(count for _, count in prefixes)
        state = self.snapshots.before([prefix for prefix, _ in prefixes], tokens - 1, BLOCK)
        used = 0 if state is None else state.length + 1
        cut = [(prefix, min(count, used - i * BLOCK)) for i, (prefix, count) in enumerate(prefixes) if i * BLOCK < used]
        if not headless and _complete_blocks(cut, reach) < len(cut):
            return [], False, None
        return cut, headless, state

    def blocks_of(self, text: Tokens[int], key: object = None) -> list[int]:
        """Cached blocks whose tokens all belong to a prefix of `text`, first to last."""
        return [prefix.block for prefix, count in self._walk(text, key) if count == len(prefix.tokens)]

    def forget(self, text: Tokens[int], key: object = None) -> None:
        """Drop the cached prefixes of `text`, except blocks that a sequence holds or another text continues."""
        for prefix, count in reversed(list(self._walk(text, key))):
            if count < len(prefix.tokens):
                continue  # belongs to another text
            if prefix.users or prefix.children:
                return
            self._drop(prefix)

    def _walk(self, text: Tokens[int], key: object) -> Iterator[tuple[_PrefixBlock, int]]:
        """The prefix blocks along `text` from its start, each with the number of tokens that it shares with it."""
        parent, begin = self._roots.get(key), 0
        while parent is not None and begin < len(text):
            best, shared = None, 0
            for each in parent.children.get(text[begin], ()):
                count = common_length(each.tokens, text[begin : begin + BLOCK])
                if count > shared:
                    best, shared = each, count
            if best is None:
                return
            yield best, shared
            if shared < BLOCK:
                return
            parent, begin = best, begin + BLOCK


class Sequence:
    """The blocks of one text, first to last, and the number of filled slots."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.length = 0  # filled slots
        self.headless = False  # whether the reused slots lack keys and values of the head
        self.position_shift = 0  # position minus slot of tokens after a prompt with images, see `PromptInputs`
        self._blocks = 0
        self._table: npt.NDArray[np.int32] = np.zeros(8, dtype=np.int32)
        self._shared: list[_PrefixBlock] = []  # the text's blocks that are in the prefix tree, from the first on
        # Of models with recurrent states: those after `length` tokens (None: zero), before the last step, and in the
        # prompt on borders of blocks; and where the prompt ends (None: all is prompt).
        self.state: State | None = None
        self.earlier: State | None = None
        self._marks: list[State] = []
        self.decoded_from: int | None = None

    @property
    def table(self) -> npt.NDArray[np.int32]:
        """Block numbers (int32), a view."""
        return self._table[: self._blocks]

    def reserve(self, slots: int) -> None:
        """Allocate blocks until there are `slots` slots.

        Raises:
            PoolFullError: the pool has no room now; nothing was allocated.
        """
        missing = -(-slots // BLOCK) - self._blocks
        if missing <= 0:
            return
        if self._blocks:
            self._extend(self.pool.take(missing, after=int(self._table[self._blocks - 1])))
        else:
            self._extend(self.pool.take(missing, run=missing + _GAP))

    def _extend(self, blocks: Tokens[int]) -> None:
        needed = self._blocks + len(blocks)
        if needed > len(self._table):
            self._table = np.concatenate([self._table, np.zeros(max(needed, len(self._table)), dtype=np.int32)])
        self._table[self._blocks : needed] = blocks
        self._blocks = needed

    def enter(self, state: State) -> None:
        """Set the recurrent state after new tokens; those of a prompt on borders of blocks are kept."""
        self.earlier, self.state = self.state, state
        snapshots, prompt = self.pool.snapshots, self.decoded_from is None or state.length <= self.decoded_from
        if prompt and snapshots is not None and state.length % BLOCK == 0:
            self._marks.append(state)
            if sum(each.nbytes for each in self._marks) > snapshots.limit:
                del self._marks[-2::-2]  # every other one, the newest stays

    def reuse(
        self, text: Tokens[int], key: object = None, reach: int | None = None, headless: bool = False
    ) -> tuple[int, int, int]:
        """Fill an empty sequence with the cached prefix of `text`.

        Args:
            text: the tokens to come, 1 or more.
            key: of the head whose keys and values are cached too; None for no head.
            reach: number of slots before the end of the prefix for which the head needs its own keys and values; None
                is all.
            headless: accept a longer prefix that lacks the head's keys and values. `self.headless` is then whether it
                was used; the head starts with the next block.

        Returns:
            (filled slots, block to copy from, block to copy to). The blocks are 0, 0 unless the last block is shared
            in part; the caller must copy it before any other allocation.
        """
        prefixes, self.headless, self.state = self.pool._usable(text, key, reach, headless)
        reused = max(sum(count for _, count in prefixes) - 1, 0)
        whole, rest = divmod(reused, BLOCK)
        for prefix, _ in prefixes[:whole]:
            prefix.users += 1
            self.pool._idle.pop(prefix, None)
        self._shared = [prefix for prefix, _ in prefixes[:whole]]
        self._extend([prefix.block for prefix in self._shared])
        self.length, copied = whole * BLOCK, (0, 0)
        if rest or self.state is not None:  # a head also reads the slot after the reused ones
            source = prefixes[whole][0]
            source.users += 1  # so that it is not evicted for its own copy
            idle = source in self.pool._idle
            if idle:
                del self.pool._idle[source]
            try:
                self.reserve(reused + 1)
                copied, self.length = (source.block, int(self._table[whole])), reused
            except PoolFullError:
                pass  # the rest of the block is prefilled again
            source.users -= 1
            if idle:
                self.pool._idle[source] = None
        if self.state is not None and self.length != self.state.length:
            self.release()  # nor is there a state for the rest
            self.headless = False
        return (self.length, *copied)

    def publish(self, text: Tokens[int], filled: int, key: object = None, head_kv_from: int = 0) -> None:
        """Add the whole blocks of the first `filled` slots, which hold `text`, to the prefix tree.

        Keys and values of the head `key` are in them from slot `head_kv_from` on.
        """
        for number in range(len(self._shared), filled // BLOCK):
            tokens = tuple(text[number * BLOCK : (number + 1) * BLOCK])
            self._publish(tokens, number, key, head_kv_from)
        self._publish_states(self._marks)
        self._marks = []

    def _publish_states(self, states: Tokens[State]) -> None:
        """Keep recurrent states with the text's blocks in the prefix tree, for those that are there."""
        for state in states:
            number = (state.length - 1) // BLOCK
            offset = state.length - number * BLOCK
            snapshots = self.pool.snapshots
            if snapshots is not None and number < len(self._shared) and offset <= len(self._shared[number].tokens):
                snapshots.put(self._shared[number], offset, state)

    def _publish(self, tokens: tuple[int, ...], number: int, key: object, head_kv_from: int) -> None:
        root = self.pool._roots.setdefault(key, _PrefixBlock((), 0, None, 0))
        parent = self._shared[-1] if self._shared else root
        siblings = parent.children.setdefault(tokens[0], [])
        block = int(self._table[number])
        prefix = next((each for each in siblings if each.covers(tokens, head_kv_from)), None)
        if prefix is None:
            prefix = _PrefixBlock(tokens, block, parent, head_kv_from)
            siblings.append(prefix)
            for each in siblings[:-1]:
                if not each.users and prefix.covers(each.tokens, each.head_kv_from):  # e.g. an earlier turn's end
                    if self.pool.snapshots is not None:
                        self.pool.snapshots.move(each, prefix)
                    self.pool._drop(each)
        elif head_kv_from < prefix.head_kv_from and not prefix.users:
            self.pool.free(prefix.block)
            prefix.block, prefix.head_kv_from = block, head_kv_from
        self.pool._idle.pop(prefix, None)
        prefix.users += 1
        self._shared.append(prefix)

    def release(self, text: Tokens[int] = (), filled: int = 0, key: object = None, head_kv_from: int = 0) -> None:
        """Release all blocks; the first `filled` slots, which hold `text`, stay cached as prefixes."""
        pool = self.pool
        if filled and pool.retain:
            self.publish(text, filled, key, head_kv_from)
            number, rest = divmod(filled, BLOCK)
            if rest and number == len(self._shared) and number < self._blocks:
                tokens = tuple(text[number * BLOCK : filled])
                self._publish(tokens, number, key, head_kv_from)
            if self.earlier is not None and pool.snapshots is not None and pool.snapshots.of_decoded:
                self._publish_states([self.earlier])  # a text can't be taken up at its end, whose features are needed
        for number in range(self._blocks - 1, -1, -1):
            prefix = self._shared[number] if number < len(self._shared) else None
            if prefix is None or prefix.block != self._table[number]:
                pool.free(int(self._table[number]))
            if prefix is not None:
                prefix.users -= 1
                if not prefix.users:
                    pool._idle[prefix] = None
        self._shared, self._blocks, self.length = [], 0, 0
        self.state, self.earlier, self._marks = None, None, []
        while len(pool._idle) > pool.retain:
            pool._evict()


def _complete_blocks(prefixes: Tokens[tuple[_PrefixBlock, int]], reach: int | None) -> int:
    """The most leading blocks whose last `reach` slots (None: all) have keys and values of the head."""
    complete, incomplete = 0, -1  # blocks; the last block that lacks some
    for number, (prefix, count) in enumerate(prefixes):
        begin = number * BLOCK
        if begin < prefix.head_kv_from:
            incomplete = number
        needed = 0 if reach is None else max(0, begin + count - reach - 1)  # the first slot that a head looks at
        first = needed // BLOCK
        if incomplete <= first and needed >= prefixes[first][0].head_kv_from:
            complete = number + 1
    return complete


def common_length(one: Tokens[int], other: Tokens[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
