"""Which arguments of `generate` Haast honours, the refusal by name of those that it does not, and checks of the inputs.

What would change the text or the output is refused; so is what a newer transformers adds, until somebody has looked at
it. docs/drop-in.md lists all arguments with remarks; a test holds the two together. Inputs are checked twice: as the
user gave them, since transformers would stumble over some without a reason, and as `generate` has prepared them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, __version__
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteria

from haast import compat
from haast.errors import PromptError, UnsupportedArgumentError
from haast.target.device_map import execution_device
from haast.target.kv_cache import CACHE_NAMES
from haast.target.support import prepared_inputs
from haast.text import stop_strings

# Settings of a GenerationConfig that `generate` turns into processors and criteria, or that Haast reads.
HONOURED_SETTINGS = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "max_time", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "renormalize_logits", "num_return_sequences", "min_length", "min_new_tokens", "repetition_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "remove_invalid_values", "watermarking_config", "return_dict_in_generate",
    "output_scores", "output_logits",
})  # fmt: skip
# Settings that change nothing of greedy and sampled text, in stock `generate` either.
IDLE_SETTINGS = frozenset({
    "early_stopping", "length_penalty", "diversity_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "decoder_start_token_id", "disable_compile", "use_cache",
})  # fmt: skip
# Parameters of `generate` itself that it turns into what a decoding method gets, or that Haast refuses by itself.
PARAMETERS = frozenset({
    "self", "kwargs", "inputs", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "streamer", "negative_prompt_ids",
    "negative_prompt_attention_mask", "custom_generate",
})  # fmt: skip

_BEAMS = "Haast decodes one continuation a row; leave it out, or use stock generate"
_ASSISTED = "Haast drafts by itself; leave it out (a small model: SmallModelDrafter)"
_CACHE = "Haast keeps its own cache, whose rows it gathers by tree path; leave it out"
_FORWARD = "the forward over a tree computes none of them for the emitted tokens alone; use stock generate"

# Name -> why not. A GenerationConfig's value that is None, False or in `_OFF` asks for nothing.
REFUSED_SETTINGS: dict[str, str] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "constraints", "force_words_ids"), _BEAMS),
    "penalty_alpha": "contrastive search ranks by hidden states of candidates; leave it out, or use stock generate",
    "low_memory": "it belongs to contrastive search; leave it out",
    "dola_layers": "DoLa contrasts logits of several layers; leave it out, or use stock generate",
    "guidance_scale": "classifier-free guidance runs the model on a second text; use stock generate",
    **dict.fromkeys(("use_mtp", "assistant_early_exit", "speculation_type"), _ASSISTED),
    "prompt_lookup_num_tokens": "Haast drafts by itself; for prompt lookup pass Decoder(drafter='lookup')",
    "is_assistant": "Haast does not draft for transformers' assisted generation; leave it out",
    "token_healing": "it rewrites the prompt by another generation; heal the prompt first",
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len"), _CACHE),
    "compile_config": "Haast's forward is not compiled; leave it out",
    "prefill_chunk_size": "Haast prefills in chunks of its own; leave it out",
    "continuous_batching_config": "Haast runs the batch that it is given; leave it out",
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _FORWARD),
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
    **dict.fromkeys(("assistant_model", "assistant_tokenizer"), _ASSISTED),
    "synced_gpus": "a sharded model must run in step on all processes, and acceptance differs; use stock generate",
    "inputs_embeds": "drafts continue tokens, and embeddings have none; pass input_ids",
    **dict.fromkeys(CACHE_NAMES, _CACHE),
}
# What else the model's forward may be given. `use_cache` comes from the model's own config more often than from a user,
# and says how stock computes a text, not which: Haast always keeps its cache.
_TAKEN = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")


def refuse_settings(config: GenerationConfig) -> None:
    """Refuse by name what Haast does not honour of a GenerationConfig, or does not know. Raises
    UnsupportedArgumentError.
    """
    unknown = f"transformers {__version__} has it, and this Haast does not know it; leave it out"
    for name, usual in {**dict.fromkeys(REFUSED_SETTINGS), **unknown_settings()}.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value != usual and value not in _OFF.get(name, ()):
            raise UnsupportedArgumentError(f"{name}={value!r}", REFUSED_SETTINGS.get(name, unknown))


@functools.cache
def unknown_settings() -> dict[str, Any]:
    """Settings of the installed transformers that no table of Haast holds, with their defaults."""
    known = {*REFUSED_SETTINGS, *HONOURED_SETTINGS, *IDLE_SETTINGS, "transformers_version"}
    every = compat.default_generation_settings().items()
    return {name: usual for name, usual in every if not name.startswith("_") and name not in known}


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Refuse by name arguments of `generate`, and of the model's forward, that Haast does not honour.

    Raises UnsupportedArgumentError for one of `REFUSED_ARGUMENTS`, and for an input that the model takes beside tokens.
    """
    for name, value in given.items():
        if value is None or value is False or name in _TAKEN or (isinstance(value, dict) and not value):
            continue  # `generate` gives models of images and sounds an empty dict of what they have encoded
        why = "Haast passes the model nothing but tokens; leave it out, or use stock generate"
        raise UnsupportedArgumentError(name, REFUSED_ARGUMENTS.get(name, why))


def new_tokens_allowed(criteria: Sequence[StoppingCriteria], width: int, begins: Sequence[int], model: Any) -> int:
    """Tokens that `max_length` leaves after prompts padded to `width`: 1 at least, as `generate` looks only after a
    token.

    Raises ValueError where no length limit is among the criteria, PromptError where it lies beyond the model's context.
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
    """Refuse a model as it stands now: in training mode, or with autocast on the CPU. Raises ValueError."""
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


def validate_inputs(given: Mapping[str, Any]) -> None:
    """Refuse prompts, masks and stop strings, given to `generate` by name, that are none. Raises ValueError,
    PromptError.
    """
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    mask = given.get("attention_mask")
    if ids is not None:
        source = "as a tokenizer makes with return_tensors='pt'; what it returns is passed on as generate(**inputs)"
        _check_form("input_ids", ids, source, "at least one of each")
        if ids.dtype not in (torch.int64, torch.int32):
            raise PromptError(f"input_ids is of {ids.dtype}: give token ids as torch.int64")
    if mask is not None:
        entries = "one entry a token; Haast makes the masks of its trees by itself"
        _check_form("attention_mask", mask, "as the tokenizer's", entries)
        # After a cache the mask is longer, and the cache is refused by its name.
        if ids is not None and not any(given.get(name) is not None for name in CACHE_NAMES):
            _check_fit("attention_mask", mask, ids, shared=True)
        odd = mask[(mask != 0) & (mask != 1)]
        if odd.numel():
            raise PromptError(
                f"attention_mask holds {odd[0].item()}: give 1 for a token and 0 for padding; biases of attention "
                f"scores are no mask"
            )
    if given.get("stop_strings") is not None and not stop_strings(given["stop_strings"], "stop_strings"):
        raise ValueError("stop_strings is an empty list: leave it out, or give at least one string")


def padding(input_ids: Tensor, given: Mapping[str, Any]) -> list[int]:
    """How many padding tokens stand before each row of `input_ids` (rows, width), by the masks that `generate`
    prepared.

    Raises PromptError for no tokens, a mask or positions of another shape, padding elsewhere than on the left, or an
    empty row; UnsupportedArgumentError for positions that do not count each row's tokens from 0.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise PromptError(f"input_ids has shape {tuple(input_ids.shape)}: give (rows, tokens), at least one of each")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        _check_fit("attention_mask", mask, input_ids)
        kept = mask.to(input_ids.device) != 0
    begins = [_row_begins(row, seen) for row, seen in enumerate(kept.tolist())]
    if positions is not None:
        _check_fit("position_ids", positions, input_ids, shared=True)
        usual = kept.long().cumsum(-1) - 1
        if not bool(((positions.to(input_ids.device) == usual) | ~kept).all()):
            raise UnsupportedArgumentError("position_ids", "Haast counts each row's tokens from 0; leave it out")
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


def check_own_inputs(model: PreTrainedModel, input_ids: Tensor, given: Mapping[str, Any]) -> None:
    """Refuse a model whose own `prepare_inputs_for_generation` gives its forward something else than the text's tokens.

    Adapters of virtual tokens have one, and may have come after the model was probed. Raises UnsupportedModelError.
    """
    own: Any = model.prepare_inputs_for_generation
    if getattr(own, "__func__", None) is not GenerationMixin.prepare_inputs_for_generation:
        prepared_inputs(model, input_ids, **given)


def _check_form(name: str, tensor: Any, source: str, entries: str) -> None:
    if not isinstance(tensor, Tensor):
        raise PromptError(f"{name} is a {type(tensor).__name__}: give a tensor (rows, tokens), {source}")
    if tensor.ndim != 2:
        raise PromptError(f"{name} has shape {tuple(tensor.shape)}: give (rows, tokens), {entries}")
    if tensor.device.type == "meta":
        raise PromptError(f"{name} is on the meta device, where tensors hold nothing: move it to the model's")


def _check_fit(name: str, tensor: Tensor, ids: Tensor, shared: bool = False) -> None:
    """Refuse what is not of the ids' shape; `shared`: one row may stand for all."""
    if tensor.shape[1:] != ids.shape[1:] or len(tensor) not in (len(ids), *([1] if shared else [])):
        raise PromptError(
            f"{name} does not fit the prompt: {tuple(tensor.shape)} beside input_ids of {tuple(ids.shape)}: give one "
            f"entry a token"
        )


def _row_begins(row: int, kept: Sequence[bool]) -> int:
    if not any(kept):
        raise PromptError(f"row {row} of the batch is empty: its attention_mask is 0 everywhere; leave the row out")
    first = kept.index(True)
    if not all(kept[first:]):
        raise PromptError(
            f"row {row}: attention_mask is 0 after the row's first token; pad on the left "
            f"(tokenizer.padding_side='left') and mask nothing else; where none is given, transformers masks every "
            f"token that equals pad_token_id"
        )
    return first
