"""The frozen ends of a target that train a head: embedding and LM head; and what its answers count.

Owns copies of the two matrices, the draft vocabulary, and the bigrams. Knows nothing of the trainable part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haast.errors import HeadMismatchError
from haast.heads.config import HeadSizes
from haast.target.target import Target
from haast.training.batches import Example


@dataclass(frozen=True)
class Frozen:
    """What of the target trains a head: its two ends, in the training dtype on the CPU."""

    embeddings: Tensor  # (vocab, hidden)
    head: Tensor  # (vocab, hidden)
    bias: Tensor | None  # (vocab,)
    eos_ids: tuple[int, ...]
    final_gain: Tensor | None = None  # (hidden,) gain of the norm under the LM head; None where it is no RMS norm

    @staticmethod
    def of(target: Target) -> Frozen:
        """Read a target's embedding and LM head."""
        ids = torch.arange(target.vocab_size, device=target.device)
        bias = target.head_bias(ids)
        decoder: nn.Module = target.model.get_decoder()  # type: ignore[no-untyped-call]
        final = dict(decoder.named_children()).get("norm")
        return Frozen(
            target.embed(ids).float().cpu().clone(),
            target.head_rows(ids).detach().float().cpu().clone(),
            None if bias is None else bias.detach().float().cpu().clone(),
            target.end_ids,
            None if final is None else rms_gain(final),
        )


@torch.no_grad()
def rms_gain(norm: nn.Module) -> Tensor | None:
    """The (hidden,) gain of an RMS norm, however the module stores it: what it makes of ones. None for other norms.

    An RMS norm keeps signs; one that takes the mean away makes nothing of ones, or only its bias.
    """
    weight = next(norm.parameters(), None)
    if weight is None or weight.ndim != 1:
        return None
    ones = torch.ones(1, len(weight), dtype=weight.dtype, device=weight.device)
    gain, negative = norm(ones)[0].float(), norm(-ones)[0].float()
    if not torch.allclose(negative, -gain, atol=1e-4) or not bool((gain.abs() > 1e-4).any()):
        return None
    found: Tensor = gain.detach().cpu()
    return found


def choose_draft_vocab(examples: Sequence[Example], vocab: int, size: int, always: Sequence[int] = ()) -> Tensor:
    """The `size` tokens with most teacher mass on supervised positions, `always` among them; (size,) int64, sorted."""
    mass = torch.zeros(vocab, dtype=torch.float64)
    for example in examples:
        mask = example.supervised.bool()
        mass.index_add_(0, example.topk_ids[mask].long().flatten(), example.topk_probs[mask].double().flatten())
    mass[[token for token in always if token < vocab]] = torch.inf
    return mass.topk(min(size, vocab)).indices.sort().values


def draft_places(draft_vocab: Tensor, vocab: int) -> Tensor:
    """(vocab,) int64: each token's place in the draft vocabulary, -1 where it is not drafted."""
    return torch.full((vocab,), -1).index_put((draft_vocab,), torch.arange(len(draft_vocab)))


def check_sizes(config: HeadSizes, frozen: Frozen, example: Example) -> None:
    """Refuse a head, a target and features that differ in hidden size or vocabulary.

    Raises:
        HeadMismatchError: they differ; the message has both values.
    """
    vocab, hidden = frozen.head.shape
    if (config.vocab_size, config.hidden_size) != (vocab, hidden):
        raise HeadMismatchError(
            f"the head is for vocabulary {config.vocab_size} and hidden size {config.hidden_size}, the target has "
            f"{vocab} and {hidden}: derive the head's configuration from this target"
        )
    if example.features.shape[1] != hidden:
        raise HeadMismatchError(
            f"the features have hidden size {example.features.shape[1]}, the target {hidden}: extract them "
            "with this target"
        )


def bigram_directions(examples: Sequence[Example], vocab: int, draft_vocab: Tensor, rank: int) -> Tensor:
    """What a Markov bias of the previous token starts from (DSpark, arXiv 2607.05147): bigrams of the answers.

    A head already reads the previous token, so a whole bigram table on top of it would count the same evidence twice:
    only the token's side starts from the counts, as the strongest directions of their positive pointwise mutual
    information, and training finds how much of each is still wanted.

    Args:
        examples: bigrams are counted where both tokens are the assistant's.
        vocab: of the target.
        draft_vocab: (drafted,) ascending target ids; other followers are left out.
        rank: columns.

    Returns:
        (vocab, rank) of unit rms over the tokens that were seen; zeros for others, and where directions are fewer.
    """
    place = draft_places(draft_vocab, vocab)
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
