"""Are stored features this target's? Sizes and vocabulary cannot tell a model from its fine-tuned sibling.

Owns the comparison of a few stored features with fresh ones. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from haast.errors import HeadMismatchError
from haast.prompts import evenly
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.data import TokenSequence
from haast.training.features import stream_examples

_EXAMPLES, _TOKENS = 8, 32
_LEAST_COSINE = 0.95  # another precision or a quantised copy of the same weights stays above


@torch.inference_mode()
def check_features(target: Target, examples: Sequence[Example], where: str) -> None:
    """Recompute the beginnings of a few examples, spread over all, and compare.

    Args:
        target: whose features they should be.
        examples: stored ones, at least three tokens each.
        where: names them in the message.

    Raises:
        HeadMismatchError: they are another model's, or of another layer.
    """
    some = evenly(examples, _EXAMPLES)
    sequences = []
    for example in some:
        tokens = example.tokens[:_TOKENS].tolist()
        sequences.append(TokenSequence(tokens, [False] * len(tokens)))
    for index, fresh in stream_examples(target, sequences, topk=1):
        rows = len(fresh.tokens) - 1  # the last stored row may be unknown
        stored = some[index].features[:rows].float()
        alike = functional.cosine_similarity(stored, fresh.features[:rows].float(), dim=-1).median().item()
        if alike < _LEAST_COSINE:
            raise HeadMismatchError(
                f"{where}: the stored features are not this target's (median cosine {alike:.2f} with its own): extract "
                f"them again with this target, into another folder"
            )
