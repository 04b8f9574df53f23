"""Checks of a model that need no forward (`probe` runs the others), and the choice of its attention implementation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from haast import compat
from haast.errors import UnsupportedModelError
from haast.target import attention
from haast.target.device_map import check_placement
from haast.target.kv_cache import CACHE_NAMES, is_empty
from haast.target.mixers import caches_recurrent_states

_GATHERABLE = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
_RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
_STATELESS = {"moe", "mlp"}  # layers of their own in models with recurrent layers


def has_recurrent_layers(model: PreTrainedModel) -> bool:
    """Whether a model has a recurrent state in addition to or instead of keys and values (Mamba, Qwen3-Next, ...)."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return compat.is_stateful(model) or not _RECURRENT.isdisjoint(kinds)


def last_layer_config(config: Any) -> Any:
    """A text configuration as its last layer has it, where layers differ in what `PreTrainedConfig` calls per-layer."""
    return config.per_layer_config[-1] if getattr(config, "is_heterogeneous", False) else config


def own_model(model: Any) -> PreTrainedModel:
    """The transformers model itself, unwrapped if `model` is the result of torch.compile.

    Raises UnsupportedModelError for other objects, and for other wrappers, whose forward Haast would skip.
    """
    unwrapped = model
    if isinstance(model, nn.Module) and type(model).__name__ == "OptimizedModule":  # importing the class takes seconds
        unwrapped = next(model.children())
    if not isinstance(unwrapped, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(unwrapped).__name__}: give the transformers model itself (of a PEFT model: "
            f"model.get_base_model(), which has its adapters)"
        )
    return unwrapped


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with class name and reason, if the model can't be drafted for."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; Haast drafts for decoder-only causal LMs")
    try:
        model.get_input_embeddings()
    except NotImplementedError as error:  # transformers raises it where a model has no embedding of tokens
        raise UnsupportedModelError(f"{name} has no embedding of tokens; use a decoder-only causal LM") from error
    if has_recurrent_layers(model) and not caches_recurrent_states():
        raise UnsupportedModelError(
            f"{name} carries a recurrent state, which this transformers keeps in a cache of the model's own, so the "
            f"state of rejected tokens can't be removed; use transformers 5.23 or newer, or an attention-only model"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UnsupportedModelError(
            f"{name} has local attention layers that measure distance in cache slots, which are not the positions of "
            f"a tree's nodes; use a model with global or sliding-window attention"
        )
    text = config.get_text_config()
    missing = [each for each in ("num_hidden_layers", "hidden_size", "vocab_size") if getattr(text, each, None) is None]
    if missing:
        raise UnsupportedModelError(
            f"{name} is no single stack of decoder layers: its configuration has no {', '.join(missing)}; use a "
            f"decoder-only causal LM or stock generate"
        )
    supported = _GATHERABLE | (_RECURRENT | _STATELESS if has_recurrent_layers(model) else set())
    kinds = set(getattr(text, "layer_types", None) or ()) - supported
    if kinds:
        raise UnsupportedModelError(
            f"{name} has layers of kind {sorted(kinds)}, whose state can't be gathered by tree path; "
            f"supported kinds are {sorted(supported)}"
        )
    if getattr(text, "use_bidirectional_attention", None) is True:  # another value: among an image's tokens alone
        raise UnsupportedModelError(
            f"{name} is not causal: with use_bidirectional_attention in its configuration a prompt's tokens attend to "
            f"later ones; use a causal LM, or stock generate"
        )
    check_placement(model)
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(f"{name} has no LM head; load it with AutoModelForCausalLM")


def choose_attention(model: PreTrainedModel) -> None:
    """Set the attention implementation to one that takes a tree mask, through transformers' own switch."""
    # Models whose attention is more than scores and softmax (e.g. sinks) support only their own eager code.
    model.set_attn_implementation(attention.NAME if compat.takes_registered_attention(model) else "eager")


def prepared_inputs(model: Any, tokens: Tensor, **more: Any) -> dict[str, Any]:
    """The forward's arguments that `prepare_inputs_for_generation` makes from a text's tokens (rows, tokens).

    Haast calls the forward itself, without the virtual tokens that an adapter may add. Raises UnsupportedModelError if
    the model prepares other ids, embeddings, or a cache that is not empty.
    """
    if "cache_position" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        more["cache_position"] = torch.arange(tokens.shape[1], device=tokens.device)  # older transformers need it
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(tokens, is_first_iteration=True, **more)
    ids, caches = prepared.get("input_ids"), {name: prepared.get(name) for name in CACHE_NAMES}
    embedded = more.get("inputs_embeds") is not None  # then the model takes these instead of ids
    changed = {
        "input_ids": not embedded and (ids is None or not torch.equal(ids, tokens)),
        "inputs_embeds": not embedded and prepared.get("inputs_embeds") is not None,
        **{name: cache is not None and not is_empty(cache) for name, cache in caches.items()},
    }
    for name, different in changed.items():
        if different:
            raise UnsupportedModelError(
                f"{type(model).__name__} prepares {name} of its own for its forward in `generate` (as prompt tuning "
                f"does), but Haast passes only the text's tokens: merge the adapter, or use stock generate"
            )
    return prepared
