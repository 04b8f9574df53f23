"""Which arguments of `generate` Haast honours, and the refusal by name of those that it does not.

What would change the text or the output is refused; so is what a newer transformers adds, until somebody has looked at
it. docs/drop-in.md lists all arguments with remarks; a test holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, __version__
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteria

from haast import compat
from haast.errors import PromptError, UnsupportedArgumentError
from haast.target.device_map import execution_device
from haast.target.kv_cache import CACHE_NAMES

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
    every = compat.usual_settings().items()
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
