"""The KV pool: no block is lost or given out twice, and what is shared is what was computed for the same tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haast.errors import KVPoolError
from haast.target.kv_pool import BLOCK, KVPool, PoolFullError, Sequence, _complete_blocks, _PrefixBlock


class Text:
    """A text in a pool that notes, slot by slot, what was written where; reads must give back its own tokens."""

    def __init__(self, pool: KVPool, memory: dict[int, tuple[int, ...]], tokens: list[int], key: object) -> None:
        self.kv, self.memory, self.tokens, self.key = pool.sequence(), memory, tokens, key
        reused, source, copy = self.kv.reuse(tokens, key)
        if source:
            for slot in range(BLOCK):
                if source * BLOCK + slot in memory:
                    memory[copy * BLOCK + slot] = memory[source * BLOCK + slot]
        try:
            self.write(reused, len(tokens))
        except PoolFullError:
            self.kv.release()
            raise

    def write(self, begin: int, end: int) -> None:
        """The contents of a slot stand for what a model computes: they depend on all tokens up to it."""
        self.kv.reserve(end)
        for at in range(begin, end):
            self.memory[self.slot(at)] = tuple(self.tokens[: at + 1])
        self.kv.length = end

    def slot(self, at: int) -> int:
        return int(self.kv.table[at // BLOCK]) * BLOCK + at % BLOCK

    def check(self) -> None:
        for at in range(len(self.tokens)):
            assert self.memory[self.slot(at)] == tuple(self.tokens[: at + 1]), "a slot holds another text's"

    def grow(self, token: int) -> None:
        self.tokens.append(token)
        self.write(len(self.tokens) - 1, len(self.tokens))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.integers(8, 40), retain=st.sampled_from([None, 0, 64]))
def test_texts_share_what_is_theirs_and_nothing_else(seed: int, blocks: int, retain: int | None) -> None:
    rng = random.Random(seed)
    pool, memory = KVPool(blocks * BLOCK, retain), dict[int, tuple[int, ...]]()
    texts: list[Text] = []
    for _ in range(60):
        doing = rng.random()
        try:
            if doing < 0.4:
                tokens = [0] * rng.randrange(1, 40) + rng.choices(range(3), k=rng.randrange(1, 30))
                texts.append(Text(pool, memory, tokens, rng.choice(["a", None])))
            elif texts and doing < 0.7:
                rng.choice(texts).grow(rng.randrange(3))
            elif texts and doing < 0.8:
                text = rng.choice(texts)
                text.kv.publish(text.tokens, len(text.tokens), text.key)
            elif texts:
                text = texts.pop(rng.randrange(len(texts)))
                text.kv.release(text.tokens, rng.choice([0, len(text.tokens)]), text.key)
        except PoolFullError:
            if texts:
                text = texts.pop()
                text.kv.release()
        for text in texts:
            if len(text.tokens) > text.kv.length:  # it found no room to grow
                text.tokens.pop()
            text.check()
    for text in texts:
        text.kv.release()
    assert pool.available == pool.blocks, "every block is free or a prefix that can be evicted"
    pool.clear()
    assert pool.free_blocks == pool.blocks and not pool.cached_blocks


def finished(pool: KVPool, tokens: list[int], key: object = None) -> None:
    kv = pool.sequence()
    kv.reuse(tokens, key)
    kv.reserve(len(tokens))
    kv.length = len(tokens)
    kv.release(tokens, len(tokens), key)


@pytest.mark.parametrize("common", [1, 2, 15, 16, 17, 31, 32, 33, 50])
def test_all_but_the_last_common_position_is_reused(common: int) -> None:
    """Drafters want the last one's features, which no cache holds."""
    pool = KVPool(40 * BLOCK)
    finished(pool, list(range(50)))
    kv = pool.sequence()
    reused, source, copy = kv.reuse([*range(common), *range(900, 960)])
    assert reused == common - 1 == kv.length
    assert bool(source) == bool(reused % BLOCK) and (not source or copy == kv.table[-1] or len(kv.table) > 1)


def test_a_text_that_is_running_is_shared_up_to_what_it_published() -> None:
    pool = KVPool(40 * BLOCK)
    first, second = pool.sequence(), pool.sequence()
    text = list(range(40))
    first.reserve(40)
    first.length = 40
    first.publish(text, 40)
    assert second.reuse(text)[0] == 31 and second.table[0] == first.table[0]
    first.release()
    assert pool.available < pool.blocks, "the other one still holds what they share"
    second.release()
    assert pool.available == pool.blocks


def test_what_one_head_cached_is_not_anothers() -> None:
    pool = KVPool(40 * BLOCK)
    finished(pool, list(range(50)), "one head")
    assert pool.common(list(range(50)), "one head") == 50
    assert pool.common(list(range(50)), "another") == pool.common(list(range(50))) == 0


def test_what_a_window_left_out_is_not_reused_where_it_is_needed() -> None:
    pool = KVPool(40 * BLOCK)
    kv, text = pool.sequence(), list(range(100))
    kv.reserve(100)
    kv.length = 100
    kv.release(text, 100, "head", head_kv_from=64)
    whole, near, far = pool.sequence(), pool.sequence(), pool.sequence()
    assert whole.reuse(text, "head")[0] == 0
    assert near.reuse(text, "head", reach=8)[0] == 99
    assert far.reuse(text[:70], "head", reach=40)[0] == 0


def test_the_least_recently_used_prefix_leaves_first_and_the_bound_is_kept() -> None:
    pool = KVPool(40 * BLOCK, retain=6 * BLOCK)
    texts = [[number] * 2 * BLOCK for number in range(3)]
    for text in texts:
        finished(pool, text)
    assert pool.cached_blocks == 6
    finished(pool, texts[0])  # used again
    finished(pool, [9] * 2 * BLOCK)
    held = [pool.common(text) for text in texts]
    assert held == [32, 0, 32] and pool.cached_blocks == 6


def test_forgetting_frees_a_text() -> None:
    pool = KVPool(40 * BLOCK)
    finished(pool, list(range(50)))
    other = [*range(32), *range(800, 820)]
    finished(pool, other)
    pool.forget(list(range(50)))
    assert pool.common(list(range(50))) == 32, "what another text shares stays"
    pool.forget(other)
    assert not pool.cached_blocks and pool.free_blocks == pool.blocks


def test_blocks_of_one_text_lie_side_by_side_where_they_can() -> None:
    pool = KVPool(100 * BLOCK)
    texts = [pool.sequence() for _ in range(4)]
    for text in texts:
        text.reserve(20)
    for length in range(20, 80):
        for text in texts:
            text.reserve(length)
    for text in texts:
        assert list(text.table) == list(range(text.table[0], text.table[0] + 5))


@pytest.mark.parametrize(("tokens", "retain"), [(0, None), (-5, None), (10, -1)])
def test_impossible_budgets_are_refused(tokens: int, retain: int | None) -> None:
    with pytest.raises(KVPoolError, match="not allowed"):
        KVPool(tokens, retain)


def test_a_refused_reservation_takes_nothing() -> None:
    pool = KVPool(3 * BLOCK)
    kv: Sequence = pool.sequence()
    kv.reserve(20)
    with pytest.raises(PoolFullError):
        kv.reserve(100)
    assert len(kv.table) == 2 and pool.available == 1


@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(1, BLOCK), st.none() | st.integers(0, 70))
def test_what_is_complete_is_by_its_definition(begins: list[int], last: int, reach: int | None) -> None:
    """The most blocks of which each slot that a head looks back to is complete, slot by slot."""
    prefixes = [(_PrefixBlock((0,) * BLOCK, n, None, begin), BLOCK) for n, begin in enumerate(begins)]
    prefixes[-1] = prefixes[-1][0], last

    def complete(blocks: int) -> bool:
        slots = sum(count for _, count in prefixes[:blocks])
        needed = range(0 if reach is None else max(0, slots - reach - 1), slots)
        return all(slot >= begins[slot // BLOCK] for slot in needed)

    assert _complete_blocks(prefixes, reach) == max(blocks for blocks in range(len(begins) + 1) if complete(blocks))
