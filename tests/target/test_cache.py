"""The KV cache: what `commit` keeps is what a fresh prefill would hold; rows are independent, blocks lie anywhere."""

from __future__ import annotations

import copy
import random
from functools import cache as cached

import pytest
import torch
from fakes import VOCAB, commit, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from haast.errors import UnsupportedModelError
from haast.target.kv_cache import KVCache, cache_name
from haast.target.kv_pool import BLOCK, KVPool, PoolFullError
from haast.target.target import Target
from haast.tree import DraftTree

CLOSE = 1e-5  # stock norms compute in fp32


@cached
def target() -> Target:
    return tiny_target()


def held(cache: KVCache, row: int) -> list[tuple[Tensor, Tensor]]:
    """A row's committed keys and values per layer."""
    slots = cache.physical(torch.arange(cache.lengths[row]).expand(cache.rows, -1))[row]
    stores = cache.stores.by_layer()
    assert stores is not None
    return [(keys[:, slots].clone(), values[:, slots].clone()) for keys, values in stores]


def prefill(tokens: list[int]) -> KVCache:
    cache = target().new_cache()
    target().forward(DraftTree.chain(torch.tensor([tokens])), cache)
    commit(cache, [range(len(tokens))])
    return cache


def assert_holds(cache: KVCache, row: int, tokens: list[int]) -> None:
    assert cache.lengths[row] == len(tokens)
    for mine, theirs in zip(held(cache, row), held(prefill(tokens), 0), strict=True):
        assert torch.allclose(mine[0], theirs[0], rtol=0, atol=CLOSE)
        assert torch.allclose(mine[1], theirs[1], rtol=0, atol=CLOSE)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3), steps=st.integers(1, 4))
def test_random_commits_equal_a_fresh_prefill(seed: int, rows: int, steps: int) -> None:
    rng = random.Random(seed)
    texts: list[list[int]] = [[] for _ in range(rows)]
    cache = target().new_cache(rows)
    for _ in range(steps):
        nodes = rng.randint(1, 9)
        parents = [[-1] + [rng.randrange(n) for n in range(1, nodes)] for _ in range(rows)]
        tokens = [rng.choices(range(VOCAB), k=nodes) for _ in range(rows)]
        target().forward(DraftTree.from_parents(torch.tensor(tokens), torch.tensor(parents)), cache)
        paths: list[list[int] | None] = []
        for row in range(rows):
            if rng.random() < 0.2:
                paths.append(None)
                continue
            path = [rng.randrange(nodes)]
            while parents[row][path[0]] >= 0:
                path.insert(0, parents[row][path[0]])
            paths.append(path)
            texts[row].extend(tokens[row][node] for node in path)
        commit(cache, paths)
    for row, text in enumerate(texts):
        if text:
            assert_holds(cache, row, text)
        else:
            assert cache.lengths[row] == 0
    following = [row + 1 for row in range(rows)]
    output = target().forward(DraftTree.roots(torch.tensor(following)), cache)
    for row, text in enumerate(texts):
        whole = DraftTree.chain(torch.tensor([[*text, following[row]]]))
        fresh = target().forward(whole, target().new_cache())
        assert torch.allclose(output.logits[row, 0], fresh.logits[0, -1], rtol=0, atol=CLOSE)


def numbered(rows: int, nodes: int, begin: int) -> Tensor:
    """(rows, 1 head, nodes, 2): every slot says its row and its number."""
    numbers = torch.arange(begin, begin + nodes).double()
    return torch.stack([torch.stack([torch.full_like(numbers, row), numbers], -1) for row in range(rows)]).unsqueeze(1)


def empty(layers: int, rows: int, tokens: int = 1024, scattered: bool = False) -> KVCache:
    """Rows of a pool; with `scattered` blocks no two of a row lie side by side."""
    pool = KVPool(2 * tokens if scattered else tokens)
    if scattered:
        taken = pool.take(pool.blocks)
        for block in taken[::2]:
            pool.free(block)
    return KVCache(pool, layers, torch.device("cpu")).bind([pool.sequence() for _ in range(rows)])


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_growth_keeps_content(rows: int, scattered: bool) -> None:
    cache = empty(2, rows, 2048, scattered)
    where = [0]
    for begin in range(0, 1000, 100):
        cache.begin(100)
        for layer in range(2):
            keys, values = cache.update(numbered(rows, 100, begin), -numbered(rows, 100, begin), layer)
            assert torch.equal(keys, numbered(rows, begin + 100, 0))
            assert torch.equal(values, -numbered(rows, begin + 100, 0))
        stores = cache.stores.by_layer()
        assert stores is not None
        where.append(stores[0][0].data_ptr())
        commit(cache, [range(100)] * rows)
    assert len(set(where[1:])) == 1, "addresses never change"


def test_a_head_lies_one_slot_further_in_the_same_blocks() -> None:
    cache = empty(1, 2)
    cache.begin(20)
    cache.update(numbered(2, 20, 0), numbered(2, 20, 0), 0)
    commit(cache, [range(20), range(18)])
    head = cache.for_head(1, torch.device("cpu"))
    head.bind(cache.sequences, [15, 0]).begin(5)
    keys, _ = head.update(numbered(2, 5, 50), numbered(2, 5, 50), 0)
    assert keys[0, 0, 15:, 1].tolist() == keys[1, 0, :5, 1].tolist() == [50, 51, 52, 53, 54]
    assert head.all_slots()[0][0].tolist() == (cache.physical(torch.arange(16, 21).expand(2, -1))[0]).tolist()
    head.advance([5, 2])
    assert head.lengths == [20, 2] and cache.lengths == [20, 18], "a head's progress is its own"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_what_is_read(dtype: torch.dtype) -> None:
    pool = KVPool(64)
    cache = KVCache(pool, 1, torch.device("cpu"), dtype=dtype).bind([pool.sequence()])
    states = torch.randn(1, 1, 3, 8)
    cache.begin(3)
    keys, values = cache.update(states, -states, 0)
    assert keys.dtype is torch.float32
    assert torch.equal(keys, states.to(dtype).float()) and torch.equal(values, -states.to(dtype).float())
    assert cache.bytes_per_token == 2 * 8 * 2


def test_a_block_is_copied_in_all_layers() -> None:
    cache = empty(2, 2)
    cache.begin(BLOCK)
    for layer in range(2):
        cache.update(numbered(2, BLOCK, 10 * layer), numbered(2, BLOCK, 10 * layer), layer)
    commit(cache, [range(BLOCK)] * 2)
    first, second = (int(sequence.table[0]) for sequence in cache.sequences)
    cache.stores.copy_block(first, second)
    for mine, theirs in zip(held(cache, 0), held(cache, 1), strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_a_full_pool_gives_nothing() -> None:
    cache = empty(1, 2, 4 * BLOCK)
    cache.begin(BLOCK)
    assert cache.pool.available == 2
    with pytest.raises(PoolFullError):
        cache.begin(3 * BLOCK)


def test_other_positions_than_the_forwards_are_refused() -> None:
    cache = empty(1, 1)
    cache.begin(2)
    with pytest.raises(UnsupportedModelError, match="stores 3 positions where the forward has 2"):
        cache.update(numbered(1, 3, 0), numbered(1, 3, 0), 0)


def test_ragged_rows_append_behind_their_own_length() -> None:
    cache = empty(1, 2)
    cache.begin(4)
    cache.update(numbered(2, 4, 0), numbered(2, 4, 0), 0)
    commit(cache, [[0, 1, 2, 3], [0, 2]])
    assert cache.lengths == [4, 2] and cache.longest == 4
    assert cache.begin(2) == 6
    keys, _ = cache.update(numbered(2, 2, 10), numbered(2, 2, 10), 0)
    assert keys.shape[2] == 6
    assert keys[0, 0, :, 1].tolist() == [0, 1, 2, 3, 10, 11]
    assert keys[1, 0, :4, 1].tolist() == [0, 2, 10, 11]


def test_a_path_may_skip_and_the_next_append_overwrites_what_was_rejected() -> None:
    cache = empty(1, 1)
    cache.begin(6)
    cache.update(numbered(1, 6, 0), numbered(1, 6, 0), 0)
    commit(cache, [[0, 3, 5]])
    cache.begin(1)
    keys, values = cache.update(numbered(1, 1, 9), numbered(1, 1, 9), 0)
    assert keys[0, 0, :, 1].tolist() == values[0, 0, :, 1].tolist() == [0, 3, 5, 9]


def test_layers_of_other_shapes_get_room_of_their_own() -> None:
    cache = empty(2, 1)
    cache.begin(2)
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 6), 0)
    keys, values = cache.update(2 * torch.ones(1, 3, 2, 4), 2 * torch.ones(1, 3, 2, 4), 1)
    assert keys.shape == (1, 3, 2, 4) and bool((keys == 2).all()) and bool((values == 2).all())
    commit(cache, [[1]])
    cache.begin(1)
    keys, values = cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 6), 0)
    assert keys[0, 0, :, 0].tolist() == [1, 0] and values.shape == (1, 1, 2, 6)


def test_what_does_not_fit_is_refused() -> None:
    cache = empty(1, 2)
    cache.begin(3)
    cache.update(numbered(2, 3, 0), numbered(2, 3, 0), 0)
    with pytest.raises(ValueError, match="2 rows, 1 paths"):
        commit(cache, [[0]])
    with pytest.raises(ValueError, match=r"row 1: path \[0, 3\] does not fit the 3 nodes"):
        commit(cache, [[0], [0, 3]])
    with pytest.raises(ValueError, match=r"path \[-1\]"):
        commit(cache, [None, [-1]])


def test_a_refused_commit_changes_nothing() -> None:
    cache = empty(1, 2)
    cache.begin(3)
    cache.update(numbered(2, 3, 0), numbered(2, 3, 0), 0)
    with pytest.raises(ValueError, match="does not fit"):
        commit(cache, [[0, 2], [0, 3]])
    assert cache.lengths == [0, 0]
    commit(cache, [[0, 2], [0, 1]])
    assert cache.lengths == [2, 2]


def test_a_forward_is_committed_once() -> None:
    cache = empty(1, 1)
    cache.begin(2)
    cache.update(numbered(1, 2, 0), numbered(1, 2, 0), 0)
    commit(cache, [[0, 1]])
    with pytest.raises(ValueError, match="does not fit the 0 nodes"):
        commit(cache, [[0]])


def test_a_copy_is_refused() -> None:
    with pytest.raises(TypeError, match="belongs to one pool"):
        copy.deepcopy(empty(1, 1))


# ------------------------------------------------------------------ its name


def test_a_cache_goes_by_the_name_that_a_forward_gives_it() -> None:
    """Code that a model brings along may know another name than the installed transformers; a wrapper knows none."""

    def newer(hidden: Tensor, cache: object = None) -> None: ...
    def older(hidden: Tensor, past_key_values: object = None, **more: object) -> None: ...
    def wrapper(*args: object, **kwargs: object) -> None: ...

    assert cache_name(newer) == "cache"
    assert cache_name(older) == "past_key_values"
    assert cache_name(wrapper) == cache_name(LlamaForCausalLM.forward) == cache_name(LlamaDecoderLayer.forward)
