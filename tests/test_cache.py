"""The cache: what `commit` keeps is what a fresh prefill would hold; growth loses nothing; rows are independent."""

from __future__ import annotations

import copy
import random
from functools import cache as cached

import pytest
import torch
from fakes import VOCAB, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from haast.cache import TreeCache, cache_name
from haast.target import Target
from haast.tree import DraftTree

CLOSE = 1e-5  # stock norms compute in fp32


@cached
def target() -> Target:
    return tiny_target()


def held(cache: TreeCache, row: int) -> list[tuple[Tensor, Tensor]]:
    """A row's committed keys and values per layer, read by appending one node of zeros."""
    read = TreeCache(len(cache.layers), 1)
    read.copy_row(cache, row, 0)
    read.begin(1)
    found = []
    for layer in range(len(cache.layers)):
        keys, values = read.update(torch.zeros(1, 2, 1, 8).double(), torch.zeros(1, 2, 1, 8).double(), layer)
        found.append((keys[0, :, :-1].clone(), values[0, :, :-1].clone()))
    return found


def prefill(tokens: list[int]) -> TreeCache:
    cache = target().new_cache()
    target().forward(DraftTree.chain(torch.tensor([tokens])), cache)
    cache.commit([range(len(tokens))])
    return cache


def assert_holds(cache: TreeCache, row: int, tokens: list[int]) -> None:
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
        cache.commit(paths)
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


def test_growth_keeps_content() -> None:
    cache = TreeCache(2, 2, capacity=1)
    assert cache.capacity == 256
    for begin in range(0, 1000, 100):
        cache.begin(100)
        for layer in range(2):
            keys, values = cache.update(numbered(2, 100, begin), -numbered(2, 100, begin), layer)
            assert torch.equal(keys, numbered(2, begin + 100, 0))
            assert torch.equal(values, -numbered(2, begin + 100, 0))
        cache.commit([range(100)] * 2)
    assert cache.capacity >= 1000 and cache.capacity % 256 == 0


def test_ragged_rows_append_behind_their_own_length() -> None:
    cache = TreeCache(1, 2)
    cache.begin(4)
    cache.update(numbered(2, 4, 0), numbered(2, 4, 0), 0)
    cache.commit([[0, 1, 2, 3], [0, 2]])
    assert cache.lengths == [4, 2] and cache.longest == 4
    assert cache.begin(2) == 6
    keys, _ = cache.update(numbered(2, 2, 10), numbered(2, 2, 10), 0)
    assert keys.shape[2] == 6
    assert keys[0, 0, :, 1].tolist() == [0, 1, 2, 3, 10, 11]
    assert keys[1, 0, :4, 1].tolist() == [0, 2, 10, 11]


def test_a_path_may_skip_and_the_next_append_overwrites_what_was_rejected() -> None:
    cache = TreeCache(1, 1)
    cache.begin(6)
    cache.update(numbered(1, 6, 0), numbered(1, 6, 0), 0)
    cache.commit([[0, 3, 5]])
    cache.begin(1)
    keys, values = cache.update(numbered(1, 1, 9), numbered(1, 1, 9), 0)
    assert keys[0, 0, :, 1].tolist() == values[0, 0, :, 1].tolist() == [0, 3, 5, 9]


def test_truncate_and_copy_row() -> None:
    cache = TreeCache(2, 2)
    cache.begin(5)
    for layer in range(2):
        cache.update(numbered(2, 5, 10 * layer), numbered(2, 5, 10 * layer), layer)
    cache.commit([range(5), range(3)])
    cache.truncate(0, 2)
    assert cache.lengths == [2, 3]
    other = TreeCache(2, 3)
    other.copy_row(cache, 1, 2)
    assert other.lengths == [0, 0, 3]
    other.begin(1)
    for layer in range(2):
        keys, _ = other.update(numbered(3, 1, 99), numbered(3, 1, 99), layer)
        assert keys[2, 0, :, 0].tolist() == [1, 1, 1, 2]
        assert keys[2, 0, :, 1].tolist() == [10 * layer, 10 * layer + 1, 10 * layer + 2, 99]


def test_a_long_row_is_copied_into_a_small_cache() -> None:
    long = TreeCache(1, 1)
    long.begin(700)
    long.update(numbered(1, 700, 0), numbered(1, 700, 0), 0)
    long.commit([range(700)])
    small = TreeCache(1, 2)
    small.copy_row(long, 0, 1)
    assert small.lengths == [0, 700] and small.capacity >= 700


def test_layers_of_other_shapes_get_room_of_their_own() -> None:
    cache = TreeCache(2, 1)
    cache.begin(2)
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 6), 0)
    keys, values = cache.update(2 * torch.ones(1, 3, 2, 4), 2 * torch.ones(1, 3, 2, 4), 1)
    assert keys.shape == (1, 3, 2, 4) and bool((keys == 2).all()) and bool((values == 2).all())
    cache.commit([[1]])
    cache.begin(1)
    keys, values = cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 6), 0)
    assert keys[0, 0, :, 0].tolist() == [1, 0] and values.shape == (1, 1, 2, 6)


def test_what_does_not_fit_is_refused() -> None:
    cache = TreeCache(1, 2)
    cache.begin(3)
    cache.update(numbered(2, 3, 0), numbered(2, 3, 0), 0)
    with pytest.raises(ValueError, match="2 rows, 1 paths"):
        cache.commit([[0]])
    with pytest.raises(ValueError, match=r"row 1: path \[0, 3\] does not fit the 3 nodes"):
        cache.commit([[0], [0, 3]])
    with pytest.raises(ValueError, match=r"path \[-1\]"):
        cache.commit([None, [-1]])
    with pytest.raises(ValueError, match="can't be cut to 9"):
        cache.truncate(0, 9)
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match=">= 1"):
            TreeCache(*wrong)


def test_a_refused_commit_changes_nothing() -> None:
    cache = TreeCache(1, 2)
    cache.begin(3)
    cache.update(numbered(2, 3, 0), numbered(2, 3, 0), 0)
    with pytest.raises(ValueError, match="does not fit"):
        cache.commit([[0, 2], [0, 3]])
    assert cache.lengths == [0, 0]
    cache.commit([[0, 2], [0, 1]])
    assert cache.lengths == [2, 2]


def test_a_forward_is_committed_once() -> None:
    cache = TreeCache(1, 1)
    cache.begin(2)
    cache.update(numbered(1, 2, 0), numbered(1, 2, 0), 0)
    cache.commit([[0, 1]])
    with pytest.raises(ValueError, match="does not fit the 0 nodes"):
        cache.commit([[0]])


def test_a_deep_copy_goes_its_own_way() -> None:
    cache = TreeCache(1, 1)
    cache.begin(3)
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    other = copy.deepcopy(cache)
    other.commit([range(2)])
    cache.commit([range(3)])
    assert (cache.get_seq_length(), other.get_seq_length()) == (3, 2)
    del cache
    assert other.get_seq_length() == 2


# ------------------------------------------------------------------ its name


def test_a_cache_goes_by_the_name_that_a_forward_gives_it() -> None:
    """Code that a model brings along may know another name than the installed transformers; a wrapper knows none."""

    def newer(hidden: Tensor, cache: object = None) -> None: ...
    def older(hidden: Tensor, past_key_values: object = None, **more: object) -> None: ...
    def wrapper(*args: object, **kwargs: object) -> None: ...

    assert cache_name(newer) == "cache"
    assert cache_name(older) == "past_key_values"
    assert cache_name(wrapper) == cache_name(LlamaForCausalLM.forward) == cache_name(LlamaDecoderLayer.forward)
