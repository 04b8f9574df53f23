"""Arguments of `generate`: tables of those that Haast supports or refuses, and checks of the inputs.

Haast refuses by name each unsupported argument that would change the text or the output, and each argument of a newer
transformers that these tables do not list. docs/drop-in.md lists all arguments with remarks; a test compares the two.
Inputs are checked twice: as the user passed them, since transformers raises unclear errors for some, and as `generate`
has prepared them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
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
# Settings that do not affect greedy and sampled text, in stock `generate` either.
IDLE_SETTINGS = frozenset({
    "early_stopping", "length_penalty", "diversity_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "decoder_start_token_id", "disable_compile", "use_cache",
})  # fmt: skip
# Parameters of `generate` itself: it converts them before it calls a decoding method, or Haast refuses them.
PARAMETERS = frozenset({
    "self", "kwargs", "inputs", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "streamer", "negative_prompt_ids",
    "negative_prompt_attention_mask", "custom_generate",
})  # fmt: skip

_BEAMS = "Haast decodes one continuation per row; leave it out, or use stock generate"
_ASSISTED = "Haast has its own drafters; leave it out (for a small model use SmallModelDrafter)"
_CACHE = "Haast needs its own KV cache, which it reorders by tree path; leave it out"
_FORWARD = "a forward over a tree does not compute them for the emitted tokens alone; use stock generate"

# Name -> reason and remedy. A setting that is None, False or in `_OFF_VALUES` is off.
REFUSED_SETTINGS: dict[str, str] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "constraints", "force_words_ids"), _BEAMS),
    "penalty_alpha": "contrastive search ranks by hidden states of candidates; leave it out, or use stock generate",
    "low_memory": "it is an option of contrastive search; leave it out",
    "dola_layers": "DoLa contrasts logits of several layers; leave it out, or use stock generate",
    "guidance_scale": "classifier-free guidance runs the model on a second text; use stock generate",
    **dict.fromkeys(("use_mtp", "assistant_early_exit", "speculation_type"), _ASSISTED),
    "prompt_lookup_num_tokens": "Haast has its own drafters; for prompt lookup use Decoder(drafter='lookup')",
    "is_assistant": "Haast does not draft for transformers' assisted generation; leave it out",
    "token_healing": "it rewrites the prompt with another generation; heal the prompt first",
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len"), _CACHE),
    "compile_config": "Haast's forward is not compiled; leave it out",
    "prefill_chunk_size": "Haast has its own prefill chunks; leave it out",
    "continuous_batching_config": "Haast has its own scheduler; leave it out",
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _FORWARD),
}
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
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
    "inputs_embeds": "drafters need a token id for each embedding; pass input_ids too",
    **dict.fromkeys(CACHE_NAMES, _CACHE),
}
# Other arguments of the model's forward. `use_cache` mostly comes from the model's config rather than from a user, and
# does not change the text; Haast always uses its cache.
_ALLOWED_FORWARD_ARGUMENTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")


def refuse_settings(config: GenerationConfig) -> None:
    """Refuse by name settings of a GenerationConfig that Haast does not support or does not know.

    Raises UnsupportedArgumentError.
    """
    unknown = f"transformers {__version__} has it, and this Haast does not know it; leave it out"
    for name, default in {**dict.fromkeys(REFUSED_SETTINGS), **unknown_settings()}.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value != default and value not in _OFF_VALUES.get(name, ()):
            raise UnsupportedArgumentError(f"{name}={value!r}", REFUSED_SETTINGS.get(name, unknown))


@functools.cache
def unknown_settings() -> dict[str, Any]:
    """Settings of the installed transformers that are in none of the tables, with their defaults."""
    listed = {*REFUSED_SETTINGS, *HONOURED_SETTINGS, *IDLE_SETTINGS, "transformers_version"}
    defaults = compat.default_generation_settings().items()
    return {name: default for name, default in defaults if not name.startswith("_") and name not in listed}


def refuse_arguments(arguments: Mapping[str, Any], carried: Collection[str] = ()) -> None:
    """Refuse by name arguments of `generate`, and of the model's forward, that Haast does not support.

    `carried` are names of inputs that are passed with the prompt. Raises UnsupportedArgumentError for one of
    `REFUSED_ARGUMENTS`, and for a model input other than tokens.
    """
    for name, value in arguments.items():
        if value is None or value is False or name in _ALLOWED_FORWARD_ARGUMENTS or name in carried:
            continue
        if isinstance(value, dict) and not value:
            continue  # `generate` passes an empty dict of encoder outputs to models of images and audio
        reason = "Haast passes only tokens and images to the model; leave it out, or use stock generate"
        raise UnsupportedArgumentError(name, REFUSED_ARGUMENTS.get(name, reason))


def new_tokens_allowed(
    criteria: Sequence[StoppingCriteria], width: int, left_padding: Sequence[int], model: Any
) -> int:
    """Maximum number of new tokens after prompts padded to `width`, from the length limit among `criteria`.

    At least 1, since stock `generate` checks the limit only after a token. Raises ValueError without a length limit,
    PromptError if the longest prompt and its new tokens exceed the model's context.
    """
    limits = [each.max_length for each in criteria if isinstance(each, MaxLengthCriteria)]
    if not limits:
        raise ValueError("generation has no length limit: give max_new_tokens or max_length")
    limit = ceil(min(limits))  # `generate` continues while the length is below the limit, which may be a fraction
    allowed, context = max(1, limit - width), model.context_length
    longest = width - min(left_padding)
    if context is not None and longest + allowed > context:
        raise PromptError(
            f"the prompt of {longest} tokens and {allowed} new tokens exceed the model's context of {context}: "
            f"set max_new_tokens to {max(context - longest, 0)} or less, or shorten the prompt"
        )
    return allowed


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model in training mode, or on the CPU under autocast. Raises ValueError."""
    device = execution_device(model.get_input_embeddings())
    if device is not None and device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        raise ValueError(
            "torch.autocast is on for the CPU, where Haast's attention needs one dtype: turn autocast off, and load "
            "the model with dtype=torch.bfloat16 for bf16"
        )
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where dropout changes the logits from forward to forward: "
            f"call model.eval() first"
        )


def validate_inputs(arguments: Mapping[str, Any]) -> None:
    """Check prompts, masks and stop strings as the user passed them to `generate`, by argument name.

    Raises ValueError, PromptError.
    """
    ids = arguments.get("inputs") if arguments.get("inputs") is not None else arguments.get("input_ids")
    mask = arguments.get("attention_mask")
    if ids is not None:
        source = "as a tokenizer returns with return_tensors='pt'; pass its whole output as generate(**inputs)"
        _check_tensor("input_ids", ids, source, "at least one of each")
        if ids.dtype not in (torch.int64, torch.int32):
            raise PromptError(f"input_ids has dtype {ids.dtype}: give token ids as torch.int64")
    if mask is not None:
        entries = "one entry per token; Haast builds its own tree masks"
        _check_tensor("attention_mask", mask, "as the tokenizer returns", entries)
        # With a cache the mask is longer than the ids; the cache itself is refused later.
        if ids is not None and not any(arguments.get(name) is not None for name in CACHE_NAMES):
            _check_shape("attention_mask", mask, ids, shared=True)
        invalid = mask[(mask != 0) & (mask != 1)]
        if invalid.numel():
            raise PromptError(
                f"attention_mask contains {invalid[0].item()}: give 1 for a token and 0 for padding; attention biases "
                f"are not supported"
            )
    if arguments.get("stop_strings") is not None and not stop_strings(arguments["stop_strings"], "stop_strings"):
        raise ValueError("stop_strings is an empty list: leave it out, or give at least one string")


def padding(input_ids: Tensor, forward_arguments: Mapping[str, Any], images: bool = False) -> list[int]:
    """Number of padding tokens before each row of `input_ids` (rows, width), from the mask that `generate` prepared.

    With `images` the positions are the model's own.

    Raises PromptError for no tokens, a mask or positions of another shape, padding that is not on the left, or an
    empty row; UnsupportedArgumentError for positions that do not count each row's tokens from 0.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise PromptError(f"input_ids has shape {tuple(input_ids.shape)}: give (rows, tokens), at least one of each")
    mask, positions = forward_arguments.get("attention_mask"), forward_arguments.get("position_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        _check_shape("attention_mask", mask, input_ids)
        kept = mask.to(input_ids.device) != 0
    left_padding = [_row_padding(row, row_mask) for row, row_mask in enumerate(kept.tolist())]
    if positions is not None and not images:
        expected = kept.long().cumsum(-1) - 1
        for section in positions if positions.ndim == 3 else [positions]:  # of M-RoPE, which are equal in a text
            _check_shape("position_ids", section, input_ids, shared=True)
            if not bool(((section.to(input_ids.device) == expected) | ~kept).all()):
                raise UnsupportedArgumentError("position_ids", "Haast counts each row's tokens from 0; leave it out")
    return left_padding


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary, also in the padding, which processors read. Raises PromptError."""
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise PromptError(
            f"row {row} has the token id {int(input_ids[row, column])}, which is outside 0..{vocab_size - 1}: use this "
            f"model's tokenizer"
        )


def check_prepared_inputs(model: PreTrainedModel, input_ids: Tensor, forward_arguments: Mapping[str, Any]) -> None:
    """Refuse a model whose own `prepare_inputs_for_generation` changes the token inputs of its forward.

    Adapters with virtual tokens do that, and may be added after the model was probed. Raises UnsupportedModelError.
    """
    prepare: Any = model.prepare_inputs_for_generation
    if getattr(prepare, "__func__", None) is not GenerationMixin.prepare_inputs_for_generation:
        prepared_inputs(model, input_ids, **forward_arguments)


def _check_tensor(name: str, tensor: Any, source: str, entries: str) -> None:
    if not isinstance(tensor, Tensor):
        raise PromptError(f"{name} is a {type(tensor).__name__}: give a tensor (rows, tokens), {source}")
    if tensor.ndim != 2:
        raise PromptError(f"{name} has shape {tuple(tensor.shape)}: give (rows, tokens), {entries}")
    if tensor.device.type == "meta":
        raise PromptError(f"{name} is on the meta device, which has no data: move it to the model's device")


def _check_shape(name: str, tensor: Tensor, ids: Tensor, shared: bool = False) -> None:
    """Refuse a tensor of another shape than `ids`; `shared`: one row for the whole batch is allowed."""
    if tensor.shape[1:] != ids.shape[1:] or len(tensor) not in (len(ids), *([1] if shared else [])):
        raise PromptError(
            f"{name} has shape {tuple(tensor.shape)}, which does not fit input_ids of shape {tuple(ids.shape)}: give "
            f"one entry per token"
        )


def _row_padding(row: int, kept: Sequence[bool]) -> int:
    if not any(kept):
        raise PromptError(f"row {row} of the batch is empty: its attention_mask is 0 everywhere; leave the row out")
    first = kept.index(True)
    if not all(kept[first:]):
        raise PromptError(
            f"row {row}: attention_mask is 0 after the row's first token; pad on the left "
            f"(tokenizer.padding_side='left') and mask nothing else; without a mask, transformers masks each token "
            f"that equals pad_token_id"
        )
    return first
