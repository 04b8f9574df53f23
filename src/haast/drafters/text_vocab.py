"""Adds the tokens of the texts in progress to a reduced draft vocabulary: `TextVocab`.

A reduced draft vocabulary (FR-Spec, arXiv 2502.14856) leaves out the rare tokens of all texts. In one text some of them
are not rare: names, terms and identifiers of the prompt come again. Their rows of the target's LM head follow those of
the draft vocabulary, for as long as a request is drafted for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from haast.device import to_device
from haast.drafters.draft_lm import DRAFT_LM_FORM, frozen_linear
from haast.heads.block import BlockHead
from haast.heads.module import DraftModule
from haast.target.packing import PackedLinear, is_packed
from haast.target.precision import reads_rows
from haast.target.target import Target

MOST = 256  # added tokens over all rows of a step, the latest ones: 3 % of a draft vocabulary of 8,192
Rare = dict[int, None]  # a text's tokens outside the draft vocabulary, by their last place, the latest last


class TextVocab:
    """The draft LM head over the draft vocabulary and the tokens of the texts that are drafted for.

    Create with `of`.

    Args:
        target: gives the rows of its LM head.
        vocab: (n,) the draft vocabulary.
        lm_head: the LM head over it.
    """

    def __init__(self, target: Target, vocab: Tensor, lm_head: nn.Module) -> None:
        self._target, self._vocab, self._lm_head = target, vocab, lm_head
        self._known = frozenset(vocab.tolist())
        self._added: tuple[int, ...] = ()
        self._grown = lm_head, vocab

    @classmethod
    def of(cls, target: Target, module: DraftModule, vocab: Tensor | None, lm_head: nn.Module) -> TextVocab | None:
        """None if all tokens are drafted, or if the head drafts by rows that are not the target's."""
        if vocab is None or isinstance(module, BlockHead) or not reads_rows(target.lm_head):
            return None
        one = target.head_rows(vocab[:1])
        own = module.own_lm_head or module.config.markov_rank or module.lm_rows(one) is not one
        return None if own else cls(target, vocab, lm_head)

    def note(self, rare: Rare, tokens: Iterable[int]) -> None:
        """Add those of the next tokens of a text that are outside the draft vocabulary."""
        for token in tokens:
            if token not in self._known:
                rare.pop(token, None)
                rare[token] = None
                if len(rare) > MOST:
                    del rare[next(iter(rare))]

    def over(self, texts: Sequence[Rare]) -> tuple[nn.Module, Tensor]:
        """The LM head for these texts, and the ids of its outputs. Each text has an equal share of `MOST` tokens."""
        share = max(MOST // len(texts), 1)
        added = tuple(sorted({token for rare in texts for token in list(rare)[-share:]}))
        if added != self._added:
            self._added, self._grown = added, self._with(added)
        return self._grown

    def _with(self, added: Sequence[int]) -> tuple[nn.Module, Tensor]:
        if not added:
            return self._lm_head, self._vocab
        ids = to_device(torch.tensor(added), self._vocab.device)
        rows, bias = self._target.head_rows(ids).detach(), self._target.head_bias(ids)
        both: nn.Module
        if is_packed(self._lm_head):
            both = self._lm_head.followed_by(PackedLinear(rows, bias, form=DRAFT_LM_FORM))
        else:
            both = _Both(self._lm_head, frozen_linear(rows, bias, None))
        return both, torch.cat([self._vocab, ids])


class _Both(nn.Module):
    """The outputs of one layer, then those of another, for the same inputs."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=-1)
