"""The LM head that drafts go through: its rows, its form, and the ids that it may draft.

Owns nothing but how these are made of a target and of what a head brings. Source: EAGLE (arXiv 2401.15077), section 3,
where the target's own embedding and LM head draft; FR-Spec (arXiv 2502.14856) for a reduced draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haast.errors import HeadMismatchError
from haast.heads.module import DraftModule
from haast.target.packing import PackedLinear
from haast.target.target import Target

# On a packed target the draft's LM head is held in 8 bits: a draft need not be exact, and reading those weights at
# every level is most of its time. On 60 validation prompts it cost 0.003 of a tau of 2.42 (6 nodes), and a fifth of the
# draft's time went; 8 bits for the decoder layer too cost 0.05.
DRAFT_LM_FORM = "int8"


def checked_vocab(ids: Tensor, target: Target) -> Tensor:
    """The draft vocabulary as the drafter and native code read it: int64, contiguous, within the target's."""
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
        raise HeadMismatchError(f"the draft vocabulary has shape {tuple(ids.shape)} of {ids.dtype}: give a list of ids")
    if int(ids.min()) < 0 or int(ids.max()) >= target.vocab_size:
        raise HeadMismatchError(
            f"the draft vocabulary holds ids {int(ids.min())} to {int(ids.max())}, the target's are 0 to "
            f"{target.vocab_size - 1}: this head was made for another tokenizer"
        )
    return ids.to(device=target.device, dtype=torch.int64).contiguous()


def draft_lm_head(target: Target, module: DraftModule, vocab: Tensor | None, packed: bool) -> nn.Module:
    """The LM head over the draft vocabulary: the target's own rows, the head's own, or the target's whole head."""
    ids = torch.arange(target.vocab_size, device=target.device) if vocab is None else vocab
    theirs = target.head_rows(ids)
    rows = module.lm_rows(theirs)
    if vocab is None and rows is theirs and target.logit_scale == 1.0:
        return target.borrowed(target.lm_head)
    rows, bias = rows.detach(), None if module.own_lm_head else target.head_bias(ids)
    if packed:
        return PackedLinear(rows, bias, form=DRAFT_LM_FORM)
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias is not None, device=rows.device, dtype=rows.dtype)
    linear.weight = nn.Parameter(rows, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
