"""Drafting with a smaller model of the same tokenizer (Leviathan et al., arXiv 2211.17192), as a chain.

Owns the small model's cache. The small model is a `Target` like any other, so it may be packed. It drafts its
likeliest tokens, or draws them from its own law and says what that was (`DraftTree.draft_probs`), which the rules of
`haast.acceptance` read. With sample-and-match the text is the target's for any small model and either way of drafting,
since the target's own draws are of another stream.

    observed   tokens up to the root are in the small model's cache, the root itself is not
    propose    run the root, take a token, run that, ... depth forwards
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from haast.cache import TreeCache
from haast.drafters.base import Accepted, Drafter, last_tokens
from haast.errors import HeadMismatchError
from haast.sampling import DRAFT, Sampler, SamplingConfig, inverse_cdf, keyed_uniform
from haast.target import Target
from haast.tree import DraftTree


class SmallModelDrafter(Drafter):
    """A chain of a small model's choices.

    Args:
        target: the model that is drafted for.
        small: a smaller one of the same tokenizer. Their embeddings may be padded to different sizes if both carry it.
        depth: tokens drafted a step, 1 or more.
        sampling: draw the drafts under these settings (the target's own serve best) instead of taking the likeliest.
            Its `processors` are left out: they belong to the target's text, and may count their calls.

    Raises:
        HeadMismatchError: another vocabulary or device.
        ValueError: a depth below 1.
    """

    name = "small-model"

    def __init__(self, target: Target, small: Target, depth: int = 4, sampling: SamplingConfig | None = None) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} is not allowed: give 1 or more")
        _check_vocabularies(target, small)
        if small.ranks is not None:
            raise HeadMismatchError("the small model is sharded over processes, and one process drafts: load it whole")
        if small.device != target.device:
            raise HeadMismatchError(f"the small model is on {small.device}, the target on {target.device}: move one")
        self._small, self._depth, self._vocab = small, depth, target.vocab_size
        self._sampler = None if sampling is None else Sampler(replace(sampling, processors=()))
        self._cache: TreeCache | None = None

    @property
    def nodes(self) -> int:
        return self._depth + 1

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._cache = self._small.new_cache(len(prompts), max(len(prompt) for prompt in prompts) + 256)
        self._root: Tensor | None = None
        self._first = torch.tensor([prompt[0] for prompt in prompts], device=self._small.device)
        self._histories = [[int(prompt[0])] for prompt in prompts]  # up to and including the root
        self._numbers = list(range(len(prompts)))  # that key the draws

    def memory(self) -> object:
        return self._cache

    def recall(self, memory: object, following: Sequence[int]) -> None:
        assert isinstance(memory, TreeCache), "the cache of an earlier run"
        memory.truncate(0, len(following))
        self._cache = memory
        self._first = torch.tensor([following[-1]], device=self._small.device)
        self._histories[0].extend(map(int, following))  # draws are keyed by its length: never the same ones again

    def keep(self, order: Sequence[int]) -> None:
        assert self._cache is not None and self._root is not None, "no row ends before its prompt is observed"
        self._cache.keep(order)
        self._root = self._root[list(order)]
        self._histories = [self._histories[row] for row in order]
        self._numbers = [self._numbers[row] for row in order]

    @torch.inference_mode()
    def observe(self, accepted: Accepted) -> None:
        assert self._cache is not None, "start comes before observe"
        start = self._first if self._root is None else self._root
        kept = torch.cat([start.unsqueeze(1), accepted.tokens[:, :-1]], dim=1)  # the tokens at the kept positions
        counts = torch.tensor(accepted.counts, device=kept.device).unsqueeze(1)
        live = torch.arange(kept.shape[1], device=kept.device) < counts
        self._small.forward(DraftTree.chain(self._known(kept), live), self._cache, last_only=True)
        self._cache.commit([range(count) for count in accepted.counts])
        self._root = last_tokens(accepted, self._root)
        for history, tokens, count in zip(self._histories, accepted.tokens.tolist(), accepted.counts, strict=True):
            history.extend(tokens[:count])

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        cache, root = self._cache, self._root
        assert cache is not None and root is not None, "observe the prompt before the first proposal"
        committed, chain, laws = list(cache.lengths), [root], list[Tensor]()
        limit = self._small.context_length
        for depth in range(self._depth):
            if limit is not None and max(cache.lengths) >= limit:
                chain.append(chain[-1])  # behind its context the small model has nothing to say
                laws.append(_points(chain[-1], self._vocab))
                continue
            logits = self._small.forward(DraftTree.roots(self._known(chain[-1])), cache).logits[:, 0, : self._vocab]
            cache.commit([range(1)] * len(root))
            if self._sampler is None:
                chain.append(logits.argmax(-1))
            else:
                laws.append(self._laws(self._sampler, chain, logits))
                chain.append(self._drawn(self._sampler, laws[-1], depth))
        for row, length in enumerate(committed):
            cache.truncate(row, length)
        tree = DraftTree.chain(torch.stack(chain, 1))
        if self._sampler is None:
            return tree
        # The root was not drawn here; its place holds its point mass.
        return replace(tree, draft_probs=torch.stack([_points(root, self._vocab), *laws], 1))

    def _laws(self, sampler: Sampler, chain: Sequence[Tensor], logits: Tensor) -> Tensor:
        """The processed law (rows, vocab) float64 of each row's next draft, behind its text and `chain`."""
        drafted = torch.stack(list(chain), 1)[:, 1:].tolist()
        rows = zip(self._histories, drafted, logits, strict=True)
        # A token that the small model does not know was never drafted here: the penalty may leave it out.
        known = self._small.vocab_size
        laws = [
            sampler.probs([token for token in (*history, *own) if token < known], scores)
            for history, own, scores in rows
        ]
        return pad(torch.stack(laws), (0, self._vocab - laws[0].shape[0]))

    def _drawn(self, sampler: Sampler, laws: Tensor, depth: int) -> Tensor:
        """One draft per row, (rows,). Keyed by the root's position: every step draws anew, see `haast.acceptance`."""
        tokens = [
            inverse_cdf(law, keyed_uniform(sampler.config.seed, number, len(history), DRAFT, depth))
            for number, history, law in zip(self._numbers, self._histories, laws, strict=True)
        ]
        return torch.tensor(tokens, device=laws.device)

    def _known(self, tokens: Tensor) -> Tensor:
        """Tokens of the target's padding, which no text holds, as the last token that the small model has."""
        return tokens.clamp_max(self._small.vocab_size - 1)


def _check_vocabularies(target: Target, small: Target) -> None:
    """Refuse another tokenizer's model. Without tokenizers, equal sizes are all that can be asked for."""
    if target.tokenizer is not None and small.tokenizer is not None:
        if target.tokenizer.get_vocab() != small.tokenizer.get_vocab():
            raise HeadMismatchError(
                "the small model has another tokenizer than the target, so its drafts would mean other words: take a "
                "smaller model of the same tokenizer"
            )
    elif small.vocab_size != target.vocab_size:
        raise HeadMismatchError(
            f"the small model has a vocabulary of {small.vocab_size} tokens, the target one of {target.vocab_size}: "
            "take a smaller model of the same tokenizer (and load both with it, if only the padding differs)"
        )


def _points(tokens: Tensor, vocab: int) -> Tensor:
    """Point masses (rows, vocab) float64 at `tokens` (rows,)."""
    return one_hot(tokens, vocab).double()
