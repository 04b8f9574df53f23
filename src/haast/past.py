"""What one run leaves for the next: the cache of a text, so that a text that begins the same is not prefilled anew.

Owns which positions may be used again. Of a text whose first c tokens are those of the text before, c - 1 positions
are: the last common one is run again, because drafters want its features, which no cache holds.

    text before     A B C D E F          cache holds A .. E (the root F is never in it)
    text now        A B C X Y            common: A B C, recalled: A B, prefilled: C X Y
"""

from __future__ import annotations

from collections.abc import Sequence

from haast import seams
from haast.cache import TreeCache
from haast.drafters.base import Drafter
from haast.target import Target
from haast.tokens import common_length

_Owners = tuple[Target, Drafter, bool, list[tuple[int, int]], int]


class Past:
    """A text's cache, in the hands of whoever continues it. One row; belongs to one target and one drafter."""

    def __init__(self) -> None:
        self._cache: TreeCache | None = None
        self._text: list[int] = []
        self._owners: _Owners | None = None
        self._drafted: object = None

    @property
    def tokens(self) -> list[int]:
        """The tokens whose keys and values are held."""
        return [] if self._cache is None else self._text[: self._cache.lengths[0]]

    @property
    def nbytes(self) -> int:
        """Memory of the target's cache and the drafter's."""
        caches = [each for each in (self._cache, self._drafted) if isinstance(each, TreeCache)]
        return sum(cache.nbytes for cache in caches)

    def hold(self, target: Target, drafter: Drafter, cache: TreeCache, text: list[int]) -> None:
        """A run begins: from here on this is its cache and its growing text."""
        self._cache, self._text, self._owners = cache, text, _owners(target, drafter)
        self._drafted = drafter.memory()

    def forget(self) -> None:
        """Free the memory; the next run prefills everything."""
        self._cache = self._owners = self._drafted = None
        self._text = []

    def recall(self, target: Target, drafter: Drafter, prompt: Sequence[int]) -> TreeCache | None:
        """The cache, cut to the positions of `prompt` that it holds; None where there are none, or of another model.

        The drafter must have been started with the prompt; it recalls the same positions.
        """
        if self._cache is None or self._owners != _owners(target, drafter):
            return None
        held = self.tokens
        common = common_length(held, prompt)
        if common < 2:
            return None
        self._cache.truncate(0, common - 1)
        drafter.recall(self._drafted, prompt[1:common])
        return self._cache

    def copy(self) -> Past:
        """The same text with memory of its own, so that both may go on differently."""
        made = Past()
        if self._cache is not None:
            made._cache, made._text, made._owners = _copy(self._cache), list(self._text), self._owners
            made._drafted = _copy(self._drafted) if isinstance(self._drafted, TreeCache) else None
        return made


def _owners(target: Target, drafter: Drafter) -> _Owners:
    """Whose caches they are; a model whose weights have changed, or that has other hooks, is another one."""
    hooks = seams.foreign_hooks(target.model.modules())
    return target, drafter, target.one_call, seams.weights_state(target.model), hooks


def _copy(cache: TreeCache) -> TreeCache:
    made = TreeCache(len(cache.layers), 1, max(cache.lengths[0], 1))
    made.copy_row(cache, 0, 0)
    return made
