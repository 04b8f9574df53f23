"""The target's embedding and LM head for training, and the statistics of its answers: draft vocabulary and bigrams.

Owns copies of the two matrices, the choice of the draft vocabulary, and the bigram counts. Does not know the head's
module.
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
class TargetWeights:
    """The target's embedding and LM head, in the training dtype on the CPU; they are not trained.

    `layers` are the weights of its last layers by name, for heads that start from them; see `initialise.last_layers`.
    """

    embeddings: Tensor  # (vocab, hidden)
    lm_head: Tensor  # (vocab, hidden)
    lm_head_bias: Tensor | None  # (vocab,)
    eos_ids: tuple[int, ...]
    final_gain: Tensor | None = None  # (hidden,) gain of the norm before the LM head; None if it is not an RMS norm
    layers: tuple[dict[str, Tensor], ...] = ()

    @staticmethod
    def of(target: Target) -> TargetWeights:
        """Copy a target's embedding and LM head."""
        ids = torch.arange(target.vocab_size, device=target.device)
        bias = target.head_bias(ids)
        decoder: nn.Module = target.model.get_decoder()  # type: ignore[no-untyped-call]
        final = dict(decoder.named_children()).get("norm")
        return TargetWeights(
            target.embed(ids).float().cpu().clone(),
            target.head_rows(ids).detach().float().cpu().clone(),
            None if bias is None else bias.detach().float().cpu().clone(),
            target.end_ids,
            None if final is None else rms_gain(final),
        )


@torch.no_grad()
def rms_gain(norm: nn.Module) -> Tensor | None:
    """The (hidden,) gain of an RMS norm, measured as its output for ones. None for other norms.

    The measurement does not depend on how the module stores its gain. An RMS norm is odd; a norm that subtracts the
    mean maps ones to zero, or to its bias.
    """
    weight = next(norm.parameters(), None)
    if weight is None or weight.ndim != 1:
        return None
    ones = torch.ones(1, len(weight), dtype=weight.dtype, device=weight.device)
    gain, negative = norm(ones)[0].float(), norm(-ones)[0].float()
    if not torch.allclose(negative, -gain, atol=1e-4) or not bool((gain.abs() > 1e-4).any()):
        return None
    result: Tensor = gain.detach().cpu()
    return result


def choose_draft_vocab(examples: Sequence[Example], vocab: int, size: int, always: Sequence[int] = ()) -> Tensor:
    """The tokens with the most teacher probability at supervised positions.

    Args:
        examples: their teacher's top tokens are counted.
        vocab: of the target.
        size: of the draft vocabulary.
        always: tokens to include in any case.

    Returns:
        (size,) int64, sorted.
    """
    mass = torch.zeros(vocab, dtype=torch.float64)
    for example in examples:
        mask = example.supervised.bool()
        mass.index_add_(0, example.topk_ids[mask].long().flatten(), example.topk_probs[mask].double().flatten())
    mass[[token for token in always if token < vocab]] = torch.inf
    return mass.topk(min(size, vocab)).indices.sort().values


def draft_indices(draft_vocab: Tensor, vocab: int) -> Tensor:
    """(vocab,) int64: each token's index in the draft vocabulary, -1 if it is not in there."""
    return torch.full((vocab,), -1).index_put((draft_vocab,), torch.arange(len(draft_vocab)))


def check_sizes(config: HeadSizes, target_weights: TargetWeights, example: Example) -> None:
    """Check that head, target and features have the same hidden size and vocabulary.

    Raises:
        HeadMismatchError: they differ; the message has both values.
    """
    vocab, hidden = target_weights.lm_head.shape
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
    """Initial token embeddings of a Markov bias (DSpark, arXiv 2607.05147), from bigrams of the answers.

    A head already reads the previous token, so a full bigram table would count the same evidence twice. Only the
    embedding of the previous token is initialised, with the strongest directions of the bigrams' positive pointwise
    mutual information; training learns the weight of each direction.

    Args:
        examples: bigrams are counted where both tokens are assistant tokens.
        vocab: of the target.
        draft_vocab: (drafted,) ascending target ids; bigrams that end in other tokens are left out.
        rank: number of columns.

    Returns:
        (vocab, rank) with unit RMS over the tokens in the bigrams; zeros for other tokens and for columns beyond the
        number of directions.
    """
    index_of = draft_indices(draft_vocab, vocab)
    pairs = []
    for example in examples:
        both = example.supervised[:-1].bool() & example.supervised[1:].bool()
        before, after = example.tokens[:-1][both].long(), index_of[example.tokens[1:][both].long()]
        pairs.append(torch.stack([before, after])[:, after >= 0])
    counts = torch.ones(sum(part.shape[1] for part in pairs))
    shape = (vocab, len(draft_vocab))
    counted = torch.sparse_coo_tensor(torch.cat(pairs, dim=1), counts, shape, check_invariants=True).coalesce()
    (rows, columns), counts = counted.indices(), counted.values()
    of_row = torch.zeros(vocab).index_add_(0, rows, counts)
    of_column = torch.zeros(len(draft_vocab)).index_add_(0, columns, counts)
    information = (counts * counts.sum() / (of_row[rows] * of_column[columns])).log().clamp_min(0)
    directions_found = min(rank, *counted.shape)
    matrix = torch.sparse_coo_tensor(counted.indices(), information, shape, check_invariants=True)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(0)
        left, strengths, _ = torch.svd_lowrank(matrix, q=directions_found)
    directions = torch.zeros(vocab, rank)
    directions[:, :directions_found] = left * strengths.sqrt()
    occurs = of_row > 0
    rms = directions[occurs].square().mean().sqrt() if bool(occurs.any()) else torch.ones(())
    return directions / rms.clamp_min(1e-9)
