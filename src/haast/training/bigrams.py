"""The Markov bias's start: what follows what in the target's own answers (DSpark, arXiv 2607.05147).

Owns the bigram counts and their low-rank factors. A head already reads the previous token, so a whole bigram table on
top of it would count the same evidence twice: only the token's side starts from the counts, the rows over the draft
vocabulary start at zero, and training finds how much of each direction is still wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haast.training.batches import Example


def bigram_directions(examples: Sequence[Example], vocab: int, draft_vocab: Tensor, rank: int) -> Tensor:
    """The `rank` strongest directions of positive pointwise mutual information, by previous token.

    Args:
        examples: bigrams are counted where both tokens are the assistant's.
        vocab: of the target.
        draft_vocab: (drafted,) ascending target ids; other followers are left out.
        rank: columns.

    Returns:
        (vocab, rank) of unit rms over the tokens that were seen; zeros for others, and where directions are fewer.
    """
    place = torch.full((vocab,), -1).index_put((draft_vocab,), torch.arange(len(draft_vocab)))
    pairs = []
    for example in examples:
        both = example.supervised[:-1].bool() & example.supervised[1:].bool()
        before, after = example.tokens[:-1][both].long(), place[example.tokens[1:][both].long()]
        pairs.append(torch.stack([before, after])[:, after >= 0])
    counts = torch.ones(sum(part.shape[1] for part in pairs))
    shape = (vocab, len(draft_vocab))
    counted = torch.sparse_coo_tensor(torch.cat(pairs, dim=1), counts, shape, check_invariants=True).coalesce()
    (rows, columns), counts = counted.indices(), counted.values()
    of_row = torch.zeros(vocab).index_add_(0, rows, counts)
    of_column = torch.zeros(len(draft_vocab)).index_add_(0, columns, counts)
    information = (counts * counts.sum() / (of_row[rows] * of_column[columns])).log().clamp_min(0)
    known = min(rank, *counted.shape)
    matrix = torch.sparse_coo_tensor(counted.indices(), information, shape, check_invariants=True)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(0)
        left, strengths, _ = torch.svd_lowrank(matrix, q=known)
    directions = torch.zeros(vocab, rank)
    directions[:, :known] = left * strengths.sqrt()
    seen = of_row > 0
    size = directions[seen].square().mean().sqrt() if bool(seen.any()) else torch.ones(())
    return directions / size.clamp_min(1e-9)
