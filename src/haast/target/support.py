"""Which models Haast can verify trees with, by their class and config alone, and how they are to attend.

Owns refusals that need no forward; what only a forward shows is `probe`'s. Nothing is patched: the attention
implementation is chosen through transformers' own switch.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from haast import compat
from haast.errors import UnsupportedModelError
from haast.target import attention
from haast.target.device_map import check_placement

_GATHERABLE = {"full_attention", "sliding_attention"}


def own_model(model: Any) -> PreTrainedModel:
    """The transformers model itself, where the user may hold what torch.compile made of it.

    Raises:
        UnsupportedModelError: it is none, or another wrapper, whose forward would be left out.
    """
    found = model
    if isinstance(model, nn.Module) and type(model).__name__ == "OptimizedModule":  # to import it takes seconds
        found = next(model.children())
    if not isinstance(found, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(found).__name__}: give the transformers model itself (of a PEFT model: "
            f"model.get_base_model(), which has its adapters)"
        )
    return found


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse what can't be drafted for, by class name and reason, before any work."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; Haast drafts for decoder-only causal LMs")
    if compat.carries_state(model):
        raise UnsupportedModelError(
            f"{name} carries a recurrent state (SSM or linear attention): the state of rejected tokens can't be "
            f"removed, so a tree can't be verified; use an attention-only model"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UnsupportedModelError(
            f"{name} has local attention layers that measure distance in cache slots, where a tree's nodes stand "
            f"beside one another; a model with global or sliding-window attention works"
        )
    text = config.get_text_config()
    missing = [each for each in ("num_hidden_layers", "hidden_size", "vocab_size") if getattr(text, each, None) is None]
    if missing:
        raise UnsupportedModelError(
            f"{name} is no single stack of decoder layers: its configuration has no {', '.join(missing)}; use a "
            f"decoder-only causal LM, or stock generate"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - _GATHERABLE
    if kinds:
        raise UnsupportedModelError(
            f"{name} has layers of kind {sorted(kinds)}, whose state can't be gathered by tree path; "
            f"supported kinds are {sorted(_GATHERABLE)}"
        )
    check_placement(model)
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(f"{name} has no LM head; load it with AutoModelForCausalLM")


def choose_attention(model: PreTrainedModel) -> None:
    """Switch to the attention implementation that takes a tree, by transformers' own switch."""
    # Models whose attention is more than scores and softmax (sinks, say) support only their own eager code.
    model.set_attn_implementation(attention.NAME if compat.takes_registered_attention(model) else "eager")
