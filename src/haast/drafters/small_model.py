"""Drafting with a smaller model of the same tokenizer (Leviathan et al., arXiv 2211.17192; here as a chain, greedy).

Owns the small model's cache. The small model is a `Target` like any other, so it may be packed. Its likeliest tokens
are drafted; the target's own choices decide, so the text is the target's for any small model.

    observed   tokens up to the root are in the small model's cache, the root itself is not
    propose    run the root, take its likeliest token, run that, ... depth forwards
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haast.cache import TreeCache
from haast.drafters.base import Accepted, Drafter, last_tokens
from haast.errors import HeadMismatchError
from haast.target import Target
from haast.tree import DraftTree


class SmallModelDrafter(Drafter):
    """A chain of a small model's greedy choices.

    Args:
        target: the model that is drafted for.
        small: a smaller one with the same vocabulary.
        depth: tokens drafted a step, 1 or more.

    Raises:
        HeadMismatchError: another vocabulary or device.
    """

    name = "small-model"

    def __init__(self, target: Target, small: Target, depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} is not allowed: give 1 or more")
        if small.vocab_size != target.vocab_size:
            raise HeadMismatchError(
                f"the small model has a vocabulary of {small.vocab_size} tokens, the target one of "
                f"{target.vocab_size}: take a smaller model of the same tokenizer"
            )
        if small.device != target.device:
            raise HeadMismatchError(f"the small model is on {small.device}, the target on {target.device}: move one")
        self._small, self._depth = small, depth
        self._cache: TreeCache | None = None

    @property
    def nodes(self) -> int:
        return self._depth + 1

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._cache = self._small.new_cache(len(prompts), max(len(prompt) for prompt in prompts) + 256)
        self._root: Tensor | None = None
        self._first = torch.tensor([prompt[0] for prompt in prompts], device=self._small.device)

    def memory(self) -> object:
        return self._cache

    def recall(self, memory: object, following: Sequence[int]) -> None:
        assert isinstance(memory, TreeCache), "the cache of an earlier run"
        memory.truncate(0, len(following))
        self._cache = memory
        self._first = torch.tensor([following[-1]], device=self._small.device)

    @torch.inference_mode()
    def observe(self, accepted: Accepted) -> None:
        assert self._cache is not None, "start comes before observe"
        start = self._first if self._root is None else self._root
        kept = torch.cat([start.unsqueeze(1), accepted.tokens[:, :-1]], dim=1)  # the tokens at the kept positions
        counts = torch.tensor(accepted.counts, device=kept.device).unsqueeze(1)
        live = torch.arange(kept.shape[1], device=kept.device) < counts
        self._small.forward(DraftTree.chain(kept, live), self._cache, last_only=True)
        self._cache.commit([range(count) for count in accepted.counts])
        self._root = last_tokens(accepted, self._root)

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        cache, root = self._cache, self._root
        assert cache is not None and root is not None, "observe the prompt before the first proposal"
        committed, chain = list(cache.lengths), [root]
        limit = self._small.context_length
        for _ in range(self._depth):
            if limit is not None and max(cache.lengths) >= limit:
                chain.append(chain[-1])  # behind its context the small model has nothing to say
                continue
            logits = self._small.forward(DraftTree.roots(chain[-1]), cache).logits[:, 0]
            cache.commit([range(1)] * len(root))
            chain.append(logits.argmax(-1))
        for row, length in enumerate(committed):
            cache.truncate(row, length)
        return DraftTree.chain(torch.stack(chain, 1))
