"""What the model's own forward takes with a prompt besides its tokens: images, or embeddings in place of the tokens'.

It is passed once, with the whole prompt, as stock `generate` passes it to its first forward: a prefill needs no tree,
and the model makes its masks and positions itself. Later tokens see it in keys and values only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from haast.errors import UnsupportedArgumentError
from haast.target.kv_cache import CACHE_NAMES
from haast.target.support import prepared_inputs

_TYPES = ("token_type_ids", "mm_token_type_ids")  # of the prompt's tokens; those of later tokens are 0
# Arguments of a forward that models read in the first forward of a text only.
# `generate` encodes images before it calls a decoding method, in newer transformers: `mm_encoder_outputs`.
_OF_IMAGES = (
    *("pixel_values", "mm_encoder_outputs", "pixel_attention_mask", "image_sizes", "image_grid_thw"),
    *_TYPES,
)
_OF_EACH_TOKEN = ("attention_mask", "position_ids", *_TYPES)  # (..., tokens)
_NOT_PASSED = {"input_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}


def carried(model: PreTrainedModel, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what is given that the model's own forward may take with a prompt, and only then."""
    images = _OF_IMAGES if "pixel_values" in inspect.signature(model.forward).parameters else ()
    return tuple(name for name in ("inputs_embeds", *images) if given.get(name) is not None and len(given[name]))


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """Arguments of the forward over a whole prompt, of one row.

    `shift` is what the positions after the prompt differ by from the number of tokens before them: a model with
    sections of positions (M-RoPE) counts an image by its sides, not by its patches.
    """

    arguments: Mapping[str, Any]
    shift: int = 0

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokens: Tensor, given: Mapping[str, Any], padding: int = 0
    ) -> PromptInputs | None:
        """From a prompt (1, tokens) and all that `generate` would pass on with it; None if that is no more than text.

        The first `padding` tokens are left out, and what is given of them.

        Raises:
            UnsupportedArgumentError: what is given would be needed after the prompt too.
        """
        if not carried(model, given):
            return None
        name = "pixel_values" if given.get("inputs_embeds") is None else "inputs_embeds"
        _refuse(model, tokens, given, name)
        tokens, given = tokens[:, padding:], _without(padding, given)
        prepared = prepared_inputs(model, tokens, **given)
        passed = {key: value for key, value in prepared.items() if value is not None and key not in _NOT_PASSED}
        return cls(passed, _shift(model, tokens, passed.get("position_ids"), name))


def _without(padding: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, without that of the first `padding` tokens."""
    cut = {name: given[name][..., padding:] for name in _OF_EACH_TOKEN if given.get(name) is not None}
    if (embeddings := given.get("inputs_embeds")) is not None:
        cut["inputs_embeds"] = embeddings[:, padding:]
    return {**given, **cut}


def _refuse(model: PreTrainedModel, tokens: Tensor, given: Mapping[str, Any], name: str) -> None:
    kind, config = type(model).__name__, model.config.get_text_config()
    if len(tokens) != 1:
        raise UnsupportedArgumentError(name, f"with {len(tokens)} rows; call generate for each prompt alone")
    if getattr(config, "cross_attention_layers", None):
        raise UnsupportedArgumentError(name, f"{kind} attends to it at every token; use stock generate")
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedArgumentError(
            name, f"{kind} caps its scores, which needs Haast's own masks; use stock generate"
        )
    for each in _TYPES:
        types = given.get(each)
        if types is not None and bool((types[..., -1] != 0).any()):
            raise UnsupportedArgumentError(each, "it must be 0 at the prompt's last token; use stock generate")
    embeddings = given.get("inputs_embeds")
    if embeddings is not None and embeddings.shape[:2] != tokens.shape:
        why = f"its shape is {tuple(embeddings.shape)}: drafters need a token id for each embedding; pass input_ids too"
        raise UnsupportedArgumentError("inputs_embeds", why)


def _shift(model: PreTrainedModel, tokens: Tensor, positions: Tensor | None, name: str) -> int:
    """From the prompt's positions, (1, tokens) or, for each section, (sections, 1, tokens)."""
    if positions is None:
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            raise UnsupportedArgumentError(name, "the installed transformers gives no positions; use stock generate")
        return 0
    last = positions.reshape(-1, tokens.shape[1])[:, -1]
    # The first of four sections is that of the text, which counts tokens.
    sections = last[1:] if len(last) == 4 else last
    if not torch.equal(sections, sections[:1].expand_as(sections)):
        raise UnsupportedArgumentError(name, "the prompt ends with an image; end it with text, or use stock generate")
    return int(sections[0]) + 1 - tokens.shape[1]
