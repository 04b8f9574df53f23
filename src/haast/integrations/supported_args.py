"""Names of the arguments of `generate` that Haast supports.

Owns names. docs/drop-in.md lists them with remarks, and a test holds the two together. What a newer transformers adds
is in none of these sets, and is refused until somebody has looked at it (`arguments.refuse_settings`,
`compat.hand_over`).
"""

from __future__ import annotations

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
