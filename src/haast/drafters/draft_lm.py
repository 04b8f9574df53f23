"""Builds the LM head for drafting: its rows, its precision, and the draft vocabulary.

Sources: EAGLE (arXiv 2401.15077), section 3, where the target's own embedding and LM head are used for drafting;
FR-Spec (arXiv 2502.14856) for a reduced draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haast.errors import HeadMismatchError
from haast.heads.module import DraftModule
from haast.target.packing import PackedLinear, rounds_activations
from haast.target.target import Target

# On a packed target the draft LM head is packed to 8 bits: a draft need not be exact, and reading these weights at
# every level dominates draft time. On 60 validation prompts it cost 0.003 of a tau of 2.42 (6 nodes) and saved a fifth
# of the draft time; 8 bits for the decoder layer as well cost 0.05.
DRAFT_LM_FORM = "int8"


def draft_form(target: Target) -> str:
    """Form of a packed draft head's own layers: 16 bits, or 8 on a target whose layers are integer products too."""
    return "int8" if rounds_activations(target.lm_head) else "f16"


def checked_vocab(ids: Tensor, target: Target) -> Tensor:
    """The draft vocabulary (n,) as contiguous int64 on the target's device.

    Raises HeadMismatchError for another shape or dtype, or ids outside the target's vocabulary.
    """
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
        raise HeadMismatchError(f"the draft vocabulary has shape {tuple(ids.shape)} of {ids.dtype}: give a list of ids")
    if int(ids.min()) < 0 or int(ids.max()) >= target.vocab_size:
        raise HeadMismatchError(
            f"the draft vocabulary holds ids {int(ids.min())} to {int(ids.max())}, the target's are 0 to "
            f"{target.vocab_size - 1}: this head was trained for another tokenizer"
        )
    return ids.to(device=target.device, dtype=torch.int64).contiguous()


def draft_lm_head(target: Target, module: DraftModule, vocab: Tensor | None, packed: bool) -> nn.Module:
    """The LM head over the draft vocabulary: rows of the target's, the draft head's own, or all of the target's."""
    ids = torch.arange(target.vocab_size, device=target.device) if vocab is None else vocab
    target_rows = target.head_rows(ids)
    rows = module.lm_rows(target_rows)
    if vocab is None and rows is target_rows and target.logit_scale == 1.0:
        return target.borrowed(target.lm_head)
    rows, bias = rows.detach(), None if module.own_lm_head else target.head_bias(ids)
    return frozen_linear(rows, bias, DRAFT_LM_FORM if packed else None)


def frozen_linear(weight: Tensor, bias: Tensor | None, form: str | None) -> nn.Module:
    """A linear layer with these weights (out, in), packed in `form`; None leaves them as they are."""
    if form is not None:
        return PackedLinear(weight, bias, form=form)
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
