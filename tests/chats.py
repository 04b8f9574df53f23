"""Tiny tokenizers with chat templates that behave like those of five families. No network."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Thoughts of turns before the last user's are dropped; an empty thought is put into the last turn that has none.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{% set said = '<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined"
    " and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system's words go into the last user turn, wherever that is, so that renders are no prefixes of one another.
MISTRAL = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.index0 == ns.last else '') + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)


def _fast(words: Tokenizer, template: str | None, end: str, special: list[str], **more: Any) -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast  # its constructor is untyped
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=words, eos_token=end, additional_special_tokens=special, **more
    )
    tokenizer.chat_template = template
    return tokenizer


def bytes_tokenizer(
    template: str | None, end: str, special: list[str], plain: tuple[str, ...] = (), **more: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that a token may hold a line end and what follows. `plain`: added words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("o", "n"), ("on", "e"), ("t", "w"), ("tw", "o"), ("Ġ", "one")]
    vocab = [*letters, *("".join(pair) for pair in merges)]
    words = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(vocab)}, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_tokens(list(plain))
    return _fast(words, template, end, special, **more)


def pieces_tokenizer(template: str | None, end: str, special: list[str], **more: Any) -> PreTrainedTokenizerFast:
    """BPE over characters with ▁ for spaces, in the manner of SentencePiece."""
    letters = ["<unk>", "▁", "\n", *(chr(code) for code in range(33, 127))]
    merges = [("▁", "o"), ("▁", "t"), ("n", "e"), ("▁o", "ne"), ("▁", "n"), ("▁t", "w"), ("▁tw", "o")]
    vocab = [*letters, *("".join(pair) for pair in merges)]
    words = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(vocab)}, merges=merges, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    words.decoder = decoders.Metaspace(prepend_scheme="never")
    return _fast(words, template, end, special, unk_token="<unk>", **more)


def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of `smollm2`, `llama3`, `qwen3`, `gemma` or `mistral`."""
    if name == "smollm2":
        return bytes_tokenizer(SMOLLM2, "<|im_end|>", ["<|im_start|>"])
    if name == "llama3":
        headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return bytes_tokenizer(LLAMA3, "<|end_of_text|>", headers, bos_token="<|begin_of_text|>")
    if name == "qwen3":
        return bytes_tokenizer(QWEN3, "<|im_end|>", ["<|im_start|>"], plain=("<think>", "</think>"))
    if name == "gemma":
        return pieces_tokenizer(GEMMA, "<eos>", ["<start_of_turn>", "<end_of_turn>"], bos_token="<bos>")
    assert name == "mistral", name
    return pieces_tokenizer(MISTRAL, "</s>", [], bos_token="<s>")
