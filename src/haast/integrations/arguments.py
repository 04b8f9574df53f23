"""Which arguments of `generate` Haast does not honour, and the checks of those that it does.

Owns refusals: every argument that would change the text or the output, and that Haast does not honour, is refused by
its name. docs/drop-in.md lists them; a test holds the two together. Knows no decoding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, __version__
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteria

from haast import compat
from haast.errors import PromptError, UnsupportedArgumentError, UnsupportedModelError
from haast.integrations.supported_args import HONOURED_SETTINGS, IDLE_SETTINGS
from haast.target.device_map import execution_device
from haast.target.kv_cache import CACHE_NAMES

_BEAMS = "Haast decodes one continuation a row; leave it out, or use stock generate"
_ASSISTED = "Haast drafts by itself; leave it out (a small model: SmallModelDrafter)"
_CACHE = "Haast keeps its own cache, whose rows it gathers by tree path; leave it out"
_FORWARD = "the forward over a tree computes none of them for the emitted tokens alone; use stock generate"

# Name -> why not. A GenerationConfig's value that is None, False or in `_OFF` asks for nothing.
REFUSED_SETTINGS: dict[str, str] = {
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "penalty_alpha": "contrastive search ranks by hidden states of candidates; leave it out, or use stock generate",
    "low_memory": "it belongs to contrastive search; leave it out",
    "dola_layers": "DoLa contrasts logits of several layers; leave it out, or use stock generate",
    "guidance_scale": "classifier-free guidance runs the model on a second text; use stock generate",
    "use_mtp": _ASSISTED,
    "prompt_lookup_num_tokens": "Haast drafts by itself; for prompt lookup pass Decoder(drafter='lookup')",
    "assistant_early_exit": _ASSISTED,
    "speculation_type": _ASSISTED,
    "is_assistant": "Haast does not draft for transformers' assisted generation; leave it out",
    "token_healing": "it rewrites the prompt by another generation; heal the prompt first",
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "compile_config": "Haast's forward is not compiled; leave it out",
    "prefill_chunk_size": "Haast prefills in chunks of its own; leave it out",
    "continuous_batching_config": "Haast runs the batch that it is given; leave it out",
    "output_attentions": _FORWARD,
    "output_hidden_states": _FORWARD,
}
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (0, 1),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "cache_implementation": ("dynamic",),
}

# Arguments of `generate` itself, and of the model's forward.
REFUSED_ARGUMENTS: dict[str, str] = {
    "assistant_model": _ASSISTED,
    "assistant_tokenizer": _ASSISTED,
    "synced_gpus": "a sharded model must run in step on all processes, and acceptance differs; use stock generate",
    "inputs_embeds": "drafts continue tokens, and embeddings have none; pass input_ids",
    **dict.fromkeys(CACHE_NAMES, _CACHE),
}
# What else the model's forward may be given. `use_cache` comes from the model's own config more often than from a user,
# and says how stock computes a text, not which: Haast always keeps its cache.
_TAKEN = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")


def refuse_settings(config: GenerationConfig) -> None:
    """Refuse what Haast does not honour of a GenerationConfig, or does not know, by name.

    Raises:
        UnsupportedArgumentError: a setting of `REFUSED_SETTINGS`, or one that only a newer transformers has.
    """
    for name, why in REFUSED_SETTINGS.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value not in _OFF.get(name, ()):
            raise UnsupportedArgumentError(f"{name}={value!r}", why)
    for name, usual in unknown_settings().items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value != usual:
            why = f"transformers {__version__} has it, and this Haast does not know it; leave it out"
            raise UnsupportedArgumentError(f"{name}={value!r}", why)


@functools.cache
def unknown_settings() -> dict[str, Any]:
    """Settings of the installed transformers that no table of Haast holds, with their defaults."""
    known = {*REFUSED_SETTINGS, *HONOURED_SETTINGS, *IDLE_SETTINGS, "transformers_version"}
    every = compat.usual_settings().items()
    return {name: usual for name, usual in every if not name.startswith("_") and name not in known}


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments that Haast does not honour: of `generate`, and for the model's forward, by name.

    Raises:
        UnsupportedArgumentError: one of `REFUSED_ARGUMENTS`, or an input that the model takes beside tokens.
    """
    for name, value in given.items():
        if value is None or value is False or name in _TAKEN or (isinstance(value, dict) and not value):
            continue  # `generate` gives models of images and sounds an empty dict of what they have encoded
        why = "Haast passes the model nothing but tokens; leave it out, or use stock generate"
        raise UnsupportedArgumentError(name, REFUSED_ARGUMENTS.get(name, why))


def padding(input_ids: Tensor, given: Mapping[str, Any]) -> list[int]:
    """How many padding tokens stand before each row, from what `generate` prepared.

    Args:
        input_ids: (rows, width).
        given: `attention_mask` (rows, width) or None where nothing is masked, and `position_ids`, as prepared.

    Raises:
        PromptError: no tokens, a mask or positions of another shape, padding elsewhere than on the left, an empty row.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise PromptError(f"input_ids has shape {tuple(input_ids.shape)}: give (rows, tokens), at least one of each")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    for name, tensor in (("attention_mask", mask), ("position_ids", positions)):
        shapes = (input_ids.shape, (1, input_ids.shape[1]))[: 1 if name == "attention_mask" else 2]
        if tensor is not None and tuple(tensor.shape) not in map(tuple, shapes):
            raise PromptError(
                f"attention_mask (or position_ids) does not fit the prompt: {tuple(tensor.shape)} beside input_ids of "
                f"{tuple(input_ids.shape)}: give one entry a token"
            )
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device) != 0
    begins = [_row_begins(row, kept[row].tolist()) for row in range(len(kept))]
    if positions is not None:
        _check_positions(positions.to(input_ids.device), kept)
    return begins


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids that are no tokens, those of the padding too: processors look at them. Raises PromptError."""
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise PromptError(
            f"row {row} holds the token id {int(input_ids[row, place])}, which is outside 0..{vocab_size - 1}: is the "
            f"tokenizer another model's?"
        )


def check_prepared(model: PreTrainedModel, input_ids: Tensor, given: Mapping[str, Any]) -> None:
    """Refuse a model that gives its forward something else than the text's tokens.

    Adapters of virtual tokens (prompt or prefix tuning) do, by a `prepare_inputs_for_generation` of their own; Haast
    calls the forward itself, and would leave them out without a word.

    Raises:
        UnsupportedModelError: it prepares other ids, embeddings, or a cache that is filled already.
    """
    own: Any = model.prepare_inputs_for_generation
    if getattr(own, "__func__", None) is GenerationMixin.prepare_inputs_for_generation:
        return
    more: dict[str, Any] = {}
    if "cache_position" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        more["cache_position"] = torch.arange(input_ids.shape[1], device=input_ids.device)  # older transformers need it
    prepared = own(input_ids, is_first_iteration=True, **more, **given)
    ids, caches = prepared.get("input_ids"), {name: prepared.get(name) for name in CACHE_NAMES}
    changed = {
        "input_ids": ids is None or not torch.equal(ids, input_ids),
        "inputs_embeds": prepared.get("inputs_embeds") is not None,
        **{name: cache is not None and cache.get_seq_length() > 0 for name, cache in caches.items()},
    }
    for name, different in changed.items():
        if different:
            raise UnsupportedModelError(
                f"{type(model).__name__} prepares {name} of its own for its forward (as prompt tuning does), and "
                f"Haast gives it nothing but the text's tokens: merge the adapter, or use stock generate"
            )


def _row_begins(row: int, kept: Sequence[bool]) -> int:
    if not any(kept):
        raise PromptError(f"row {row} of the batch is empty: its attention_mask is 0 everywhere; leave the row out")
    first = list(kept).index(True)
    if not all(kept[first:]):
        raise PromptError(
            f"row {row}: attention_mask is 0 after the row's first token; pad on the left "
            f"(tokenizer.padding_side='left') and mask nothing else; where none is given, transformers masks every "
            f"token that equals pad_token_id"
        )
    return first


def _check_positions(positions: Tensor, kept: Tensor) -> None:
    usual = kept.long().cumsum(-1) - 1
    if not bool(((positions == usual) | ~kept).all()):
        raise UnsupportedArgumentError("position_ids", "Haast counts each row's tokens from 0; leave it out")


def new_tokens_allowed(criteria: Sequence[StoppingCriteria], width: int, begins: Sequence[int], model: Any) -> int:
    """Tokens that `max_length` leaves: 1 at least, as `generate` looks only after a token.

    Args:
        criteria: as prepared.
        width: of the padded prompts.
        begins: padding per row.
        model: for its context.

    Raises:
        ValueError: no length limit is among the criteria, or it lies beyond the context.
    """
    limits = [each.max_length for each in criteria if isinstance(each, MaxLengthCriteria)]
    if not limits:
        raise ValueError("generation has no length limit: give max_new_tokens or max_length")
    limit = ceil(min(limits))  # `generate` goes on while the length is below a limit, which may be no whole number
    allowed, context = max(1, limit - width), model.context_length
    longest = width - min(begins)
    if context is not None and longest + allowed > context:
        raise PromptError(
            f"the prompt of {longest} tokens and {allowed} new ones do not fit the model's context of {context}: "
            f"set max_new_tokens to {max(context - longest, 0)} or less, or shorten the prompt"
        )
    return allowed


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model as it stands now: one that would not answer the same twice, or can't answer at all.

    Raises:
        ValueError: it is in training mode, or autocast changes its dtypes.
    """
    place = execution_device(model.get_input_embeddings())
    if place is not None and place.type == "cpu" and torch.is_autocast_enabled("cpu"):
        raise ValueError(
            "torch.autocast is on for the CPU, where Haast's attention takes one dtype: leave the autocast, and load "
            "the model with dtype=torch.bfloat16 if that is wanted"
        )
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where dropout may answer a drafted token otherwise than a "
            f"plain one: call model.eval() first"
        )
