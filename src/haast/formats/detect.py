"""Detects the kind of a head by the names and shapes of its tensors, which are more reliable than config.json.

Refuses kinds that Haast has no drafter for, by name, and files that hold no head.
"""

from __future__ import annotations

import re

from torch import Tensor

from haast.errors import HeadMismatchError

KINDS = ("eagle", "eagle3", "p-eagle", "medusa", "mtp", "dflash", "dspark")
_MEDUSA = re.compile(r"(medusa_head\.)?\d{1,4}\.\d{1,4}\.(linear\.)?(weight|bias)")
_MATRIX = re.compile(r"(medusa_head\.)?\d+\.\d+\.(linear\.)?weight|(fusion_)?fc\.weight")
# Tensor name prefixes of heads that Haast has no drafter for. Order matters: some heads have several of them.
_REFUSED = (
    ("candidate_selector.", "a DFlash2 head"),
    ("refiner_head.", "an XPress head"),
    ("prefix_gru.", "a Domino head"),
    ("logit_head.prefix_gru.", "a Domino head"),
    ("layer_fusion_weights", "a DFlare head"),
    ("markov_head.joint_proj.", "a DSpark head with a recurrent Markov head"),
    ("parallel_draft_heads.", "an EAGLE head with additional Medusa heads (ModelOpt's EagleMedusa)"),
)
_MARKOV = ("markov_head.", "markov_w1")
_PREFIXES = ("module.", "draft_model.", "eagle_module.", "model.")


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that wrappers add to every name; the first layer is always `layers.0`."""
    for prefix in _PREFIXES:
        inside = [name for name in tensors if name.startswith(prefix)]
        # In some files the LM head and the vocabulary maps are outside of the wrapped model.
        if inside and all(name in inside or name.split(".")[0] in ("lm_head", "d2t", "t2d") for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in tensors.items()}


def kind_of(tensors: dict[str, Tensor], source: str) -> str:
    """The kind of head, one of `KINDS`, from tensors under their `plain_names`.

    Raises HeadMismatchError, its message starting with `source`, for kinds without a drafter and for other tensors.
    """
    flat = [name for name, tensor in tensors.items() if tensor.dim() != 2 and _MATRIX.fullmatch(name)]
    if flat:
        raise HeadMismatchError(
            f"{source}: {flat[0]} is {tuple(tensors[flat[0]].shape)}, expected a matrix; fetch the head again"
        )
    if all(_MEDUSA.fullmatch(name) for name in tensors):
        return "medusa"
    if "inputs.0.eh_proj.weight" in tensors:  # as `formats.mtp` renames them
        return "mtp"
    for prefix, kind in _REFUSED:
        if any(name.startswith(prefix) for name in tensors):
            raise HeadMismatchError(
                f"{source}: this is {kind}, which Haast has no drafter for; use an EAGLE, EAGLE-3, P-EAGLE, DFlash, "
                f"DSpark or Medusa head for this target, or --drafter suffix"
            )
    query, fc = tensors.get("layers.0.self_attn.q_proj.weight"), tensors.get("fc.weight")
    if fc is None and "fusion_fc.weight" in tensors:  # speculators' first EAGLE heads
        return "eagle"
    output = tensors.get("layers.0.self_attn.o_proj.weight")
    if query is None or output is None or query.dim() != 2 or output.dim() != 2:
        first = ", ".join(sorted(tensors)[:5])
        raise HeadMismatchError(
            f"{source}: these tensors are no head that Haast knows ({len(tensors)} tensors: {first}, ...); expected an "
            f"EAGLE (fc, layers.0), EAGLE-3 (fc, midlayer or layers.0), P-EAGLE (mask_hidden), DFlash (hidden_norm) or "
            f"Medusa (0.0.linear) head"
        )
    hidden = output.shape[0]
    if query.shape[1] == 2 * hidden:
        return "p-eagle" if "mask_hidden" in tensors else "eagle3"
    if "hidden_norm.weight" in tensors:
        return "dspark" if any(name.startswith(_MARKOV) for name in tensors) else "dflash"
    if fc is not None and tuple(fc.shape) == (hidden, 2 * hidden) and query.shape[1] == hidden:
        return "eagle"
    if fc is None:
        raise HeadMismatchError(f"{source}: the tensor fc.weight is missing; fetch the head again")
    raise HeadMismatchError(
        f"{source}: layers.0.self_attn.q_proj.weight is {tuple(query.shape)} and fc.weight is {tuple(fc.shape)}: an "
        f"EAGLE head's q_proj takes {hidden} inputs and its fc {2 * hidden}, an EAGLE-3 head's q_proj takes "
        f"{2 * hidden}; fetch the head again, or report which trainer wrote it"
    )
