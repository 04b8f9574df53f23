"""Which kind of head some tensors are. Decided by their names and shapes; configurations say less, and other things.

Owns the signs. A kind that Haast has no drafter for is refused by its name, and so are files that hold no head.
"""

from __future__ import annotations

import re

from torch import Tensor

from haast.errors import HeadMismatchError

KINDS = ("eagle", "eagle3", "p-eagle", "medusa")
_MEDUSA = re.compile(r"(medusa_head\.)?\d{1,4}\.\d{1,4}\.(linear\.)?(weight|bias)")
_MATRIX = re.compile(r"(medusa_head\.)?\d+\.\d+\.(linear\.)?weight|(fusion_)?fc\.weight")
# Signs of heads that draft a block in one pass, those first that the others have too.
_BLOCKS = (
    ("candidate_selector.", "a DFlash2 head"),
    ("refiner_head.", "an XPress head"),
    ("prefix_gru.", "a Domino head"),
    ("logit_head.prefix_gru.", "a Domino head"),
    ("layer_fusion_weights", "a DFlare head"),
    ("markov_head.", "a DSpark head"),
    ("markov_w1", "a DSpark head"),
    ("parallel_draft_heads.", "an EAGLE head with Medusa heads beside it (ModelOpt's EagleMedusa)"),
)
_PREFIXES = ("module.", "draft_model.", "eagle_module.", "model.")


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that wrappers add to every name, and with one name for the first layer."""
    for prefix in _PREFIXES:
        inside = [name for name in tensors if name.startswith(prefix)]
        # The LM head and the vocabulary's maps stand beside a wrapped model in some files.
        if inside and all(name in inside or name.split(".")[0] in ("lm_head", "d2t", "t2d") for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in tensors.items()}


def kind_of(tensors: dict[str, Tensor], source: str) -> str:
    """One of `KINDS`, of `plain_names`.

    Raises HeadMismatchError, beginning with `source`, for kinds that have no drafter here, and for what is no head.
    """
    flat = [name for name, tensor in tensors.items() if tensor.dim() != 2 and _MATRIX.fullmatch(name)]
    if flat:
        raise HeadMismatchError(
            f"{source}: {flat[0]} is {tuple(tensors[flat[0]].shape)}, no matrix; fetch the head again"
        )
    if all(_MEDUSA.fullmatch(name) for name in tensors):
        return "medusa"
    for sign, what in _BLOCKS:
        if any(name.startswith(sign) for name in tensors):
            raise _undrafted(source, what)
    query, fc = tensors.get("layers.0.self_attn.q_proj.weight"), tensors.get("fc.weight")
    if fc is None and "fusion_fc.weight" in tensors:  # speculators' first EAGLE heads
        return "eagle"
    output = tensors.get("layers.0.self_attn.o_proj.weight")
    if query is None or output is None or query.dim() != 2 or output.dim() != 2:
        some = ", ".join(sorted(tensors)[:5])
        raise HeadMismatchError(
            f"{source}: these tensors are no head that Haast knows ({len(tensors)}, {some} first); expected an EAGLE "
            f"(fc, layers.0), EAGLE-3 (fc, midlayer or layers.0), P-EAGLE (mask_hidden) or Medusa (0.0.linear) head"
        )
    hidden = output.shape[0]
    if query.shape[1] == 2 * hidden:
        return "p-eagle" if "mask_hidden" in tensors else "eagle3"
    if "hidden_norm.weight" in tensors:
        raise _undrafted(source, "a DFlash head")
    if fc is not None and tuple(fc.shape) == (hidden, 2 * hidden) and query.shape[1] == hidden:
        return "eagle"
    if fc is None:
        raise HeadMismatchError(f"{source}: the tensor fc.weight is missing; fetch the head again")
    raise HeadMismatchError(
        f"{source}: layers.0.self_attn.q_proj.weight is {tuple(query.shape)} beside fc.weight {tuple(fc.shape)}: an "
        f"EAGLE head's q_proj reads {hidden} numbers and its fc {2 * hidden}, an EAGLE-3 head's q_proj reads "
        f"{2 * hidden}; fetch the head again, or say which trainer wrote it"
    )


def _undrafted(source: str, what: str) -> HeadMismatchError:
    return HeadMismatchError(
        f"{source}: this is {what}, which drafts a block in one pass; Haast has no drafter for it yet; use an EAGLE, "
        f"EAGLE-3, P-EAGLE or Medusa head for this target, or --drafter suffix"
    )
