"""The frozen ends of a target that train a head: embedding and LM head; and the draft vocabulary.

Owns copies of the two matrices and the frequency ranking. Knows nothing of the trainable part.
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
        return Frozen(
            target.embed(ids).float().cpu().clone(),
            target.head_rows(ids).detach().float().cpu().clone(),
            None if bias is None else bias.detach().float().cpu().clone(),
            end_tokens(target),
            _final_gain(target),
        )


def _final_gain(target: Target) -> Tensor | None:
    decoder: nn.Module = target.model.get_decoder()  # type: ignore[no-untyped-call]
    final = dict(decoder.named_children()).get("norm")
    return None if final is None else rms_gain(final)


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


def end_tokens(target: Target) -> tuple[int, ...]:
    """Tokens that end an answer, from the generation configuration, else the model's; empty where there are none."""
    generation = target.model.generation_config
    ends = None if generation is None else generation.eos_token_id
    ends = target.config.eos_token_id if ends is None else ends
    if ends is None:
        return ()
    return tuple(int(end) for end in ends) if isinstance(ends, list | tuple) else (int(ends),)


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
