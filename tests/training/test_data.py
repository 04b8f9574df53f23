"""What of a conversation is supervised: five families' chat templates, own answers and given text, and bad data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import MISTRAL, QWEN3, SMOLLM2, bytes_tokenizer, family, pieces_tokenizer
from transformers import PreTrainedTokenizerBase

from haast.errors import HeadMismatchError
from haast.training.answers import AnswersFile, read_answers
from haast.training.chat import check_template, encode_prompt, end_of_turn, tokenizer_hash
from haast.training.data import TokenSequence, encode_answer, encode_answers

ENDS = {
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
HEADERS = {
    "smollm2": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen3": "<|im_start|>assistant\n",
    "gemma": "<start_of_turn>model\n",
    "mistral": " [/INST]",
}
# What a family's template puts before the words of an answer and leaves to the model.
LEAD = {"mistral": " "}


def supervised(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> list[str]:
    """The supervised stretches as text."""
    stretches: list[list[int]] = []
    before = False
    for token, mine in zip(sequence.tokens, sequence.supervised, strict=True):
        if mine and not before:
            stretches.append([])
        if mine:
            stretches[-1].append(token)
        before = mine
    return [str(tokenizer.decode(stretch)) for stretch in stretches]


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"id": "a", "messages": first + messages}


def own(encoder: PreTrainedTokenizerBase, prompt: str, answer: str, **more: Any) -> dict[str, Any]:
    ids = encoder.encode(answer, add_special_tokens=False)
    return {"id": "a", "prompt": prompt, "response": answer, "response_ids": ids, **more}


# Five families


@pytest.mark.parametrize("name", ENDS)
def test_own_answers_are_supervised_whole_and_alone(name: str) -> None:
    tokenizer, end = family(name), ENDS[name]
    sequence = encode_answer(tokenizer, own(tokenizer, "say one", f"one two{end}"))
    assert supervised(tokenizer, sequence) == [f"one two{end}"]
    prompt = str(tokenizer.decode(sequence.tokens[: -sum(sequence.supervised)]))
    assert prompt.endswith(HEADERS[name]) and "say one" in prompt
    later = encode_answer(tokenizer, own(tokenizer, "more", f"two{end}", history=["say one", "one"]))
    assert supervised(tokenizer, later) == [f"two{end}"]
    text = str(tokenizer.decode(later.tokens))
    assert text.index("say one") < text.index("more") < text.rindex("two")
    assert text.endswith(f"{HEADERS[name]}two{end}")


@pytest.mark.parametrize("name", [name for name in ENDS if name != "qwen3"])
def test_given_text_is_masked_like_an_answer(name: str) -> None:
    tokenizer, end, lead = family(name), ENDS[name], LEAD.get(name, "")
    for record in (chat("say one", "one two"), {"id": "a", "prompt": "say one", "response": "one two"}):
        sequence = encode_answer(tokenizer, record)
        assert supervised(tokenizer, sequence) == [f"{lead}one two{end}"]
        prompt = encode_prompt(tokenizer, ["say one"])
        assert sequence.tokens[: len(prompt)] == prompt, "supervision begins where the model begins to write"
        assert sequence.supervised[: len(prompt) + 1] == [False] * len(prompt) + [True]
    several = encode_answer(tokenizer, chat("say one", "one", "one", "two two", "one", "one"))
    assert supervised(tokenizer, several) == [f"{lead}one{end}", f"{lead}two two{end}", f"{lead}one{end}"]
    with_history = {"id": "a", "history": ["say one", "one"], "prompt": "one", "response": "two"}
    assert supervised(tokenizer, encode_answer(tokenizer, with_history)) == [f"{lead}one{end}", f"{lead}two{end}"]


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("thinking", "turns", "wanted"),
    [
        (None, ["say", "one"], [f"{EMPTY}one"]),
        (True, ["say", "one"], [f"{EMPTY}one"]),
        (False, ["say", "one"], ["one"]),  # the generation prompt holds the empty thought
        (None, ["say", "one", "more", "two"], ["one", f"{EMPTY}two"]),
        (False, ["say", "one", "more", "two"], ["one", "two"]),
        (False, ["say", "one", "more", "two", "more", "six"], ["one", "two", "six"]),
        (None, ["say", "<think>\nhm\n</think>\n\none"], ["<think>\nhm\n</think>\n\none"]),
        (None, ["say", "<think>\nhm\n</think>\n\none", "a", "<think>\nso\n</think>\n\ntwo"],
         ["one", "<think>\nso\n</think>\n\ntwo"]),  # earlier thoughts are not rendered, so nothing of them is learnt
        (None, ["say", f"{EMPTY}one", "say", f"{EMPTY}one"], ["one", f"{EMPTY}one"]),
        (None, ["say", "", "a", "two"], ["", f"{EMPTY}two"]),
    ],
)  # fmt: skip
def test_qwen3_is_supervised_as_it_thinks(thinking: bool | None, turns: list[str], wanted: list[str]) -> None:
    tokenizer = family("qwen3")
    record = chat(*turns) | ({} if thinking is None else {"thinking": thinking})
    sequence = encode_answer(tokenizer, record)
    assert supervised(tokenizer, sequence) == [f"{words}<|im_end|>" for words in wanted]
    prompt = encode_prompt(tokenizer, ["say"], thinking)
    if len(turns) == 2:
        assert sequence.tokens[: len(prompt)] == prompt and sequence.supervised.index(True) == len(prompt)


def test_qwen3_answers_itself_with_and_without_thinking() -> None:
    tokenizer = family("qwen3")
    thought = "<think>\nhm\n</think>\n\none<|im_end|>"
    assert supervised(tokenizer, encode_answer(tokenizer, own(tokenizer, "say", thought))) == [thought]
    quick = encode_answer(tokenizer, own(tokenizer, "say", "one<|im_end|>", thinking=False))
    assert supervised(tokenizer, quick) == ["one<|im_end|>"]
    assert str(tokenizer.decode(quick.tokens)).endswith(f"assistant\n{EMPTY}one<|im_end|>")
    history = ["say", "<think>\nhm\n</think>\n\none"]
    later = encode_answer(tokenizer, own(tokenizer, "more", "two<|im_end|>", history=history))
    assert "hm" not in str(tokenizer.decode(later.tokens))  # as the model itself would read it


def test_smollm2_has_its_default_system_prompt_or_the_given_one() -> None:
    tokenizer = family("smollm2")
    kind = encode_answer(tokenizer, chat("say", "one"))
    assert str(tokenizer.decode(kind.tokens)).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nsay"
    )
    rude = encode_answer(tokenizer, chat("say", "one", system="Be rude."))
    assert "Be kind" not in str(tokenizer.decode(rude.tokens))
    assert supervised(tokenizer, rude) == ["one<|im_end|>"]


@pytest.mark.parametrize("special", [[], ["[INST]", "[/INST]"]])
def test_mistral_moves_the_system_prompt_and_is_masked_still(special: list[str]) -> None:
    tokenizer = pieces_tokenizer(MISTRAL, "</s>", special, bos_token="<s>")
    sequence = encode_answer(tokenizer, chat("one", "one two", "one two", "two", system="Be kind."))
    text = str(tokenizer.decode(sequence.tokens))
    assert text.index("Be kind.") > text.index("one two")  # so the first turn's prompt is no prefix of the whole
    assert [words.strip() for words in supervised(tokenizer, sequence)] == ["one two</s>", "two</s>"]


def test_gemma_refuses_a_system_prompt_by_name() -> None:
    with pytest.raises(ValueError, match=r"answer a: .*System role not supported"):
        encode_answer(family("gemma"), chat("say", "one", system="Be kind."))


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_turn_is_the_templates(name: str) -> None:
    tokenizer = family(name)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer) or -1) == ENDS[name]


# Templates and tokenizers of other kinds


def test_a_thought_that_only_the_generation_prompt_opens_is_not_looked_for() -> None:
    """DeepSeek-R1's way: the prompt ends with <think>, renders have neither it nor the thought."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
        "<|Assistant|>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    )
    tokenizer = bytes_tokenizer(template, "<eos>", ["<|User|>", "<|Assistant|>"], plain=("<think>", "</think>"))
    check_template(tokenizer)
    given = encode_answer(tokenizer, chat("one", "hm</think>one", "one", "so</think>two"))
    assert supervised(tokenizer, given) == ["one<eos>", "two<eos>"]
    itself = encode_answer(tokenizer, own(tokenizer, "say", "hm</think>one<eos>"))
    assert supervised(tokenizer, itself) == ["hm</think>one<eos>"]
    assert "<think>\nhm" in str(tokenizer.decode(itself.tokens))


def test_without_special_tokens_the_answers_own_words_are_supervised() -> None:
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = bytes_tokenizer(template, "<eos>", [])
    assert end_of_turn(tokenizer) is None
    assert supervised(tokenizer, encode_answer(tokenizer, chat("one", "one", "one", "two"))) == [" one", "two"]


def test_an_end_behind_the_last_turn_only_is_not_the_answers() -> None:
    template = SMOLLM2.replace("{% if add", "{% if not add_generation_prompt %}<eos>{% endif %}{% if add")
    tokenizer = bytes_tokenizer(template, "<eos>", ["<|im_start|>", "<|im_end|>"])
    assert supervised(tokenizer, encode_answer(tokenizer, chat("a", "one"))) == ["one<|im_end|>"]


def test_plain_text_for_one_turn_without_a_template() -> None:
    tokenizer = bytes_tokenizer(None, "<eos>", [])
    sequence = encode_answer(tokenizer, {"id": "a", "prompt": "say ", "response": "one"})
    assert supervised(tokenizer, sequence) == ["one<eos>"]
    assert str(tokenizer.decode(sequence.tokens)) == "say one<eos>"
    with pytest.raises(ValueError, match=r"no chat template.*tokenizer\.chat_template"):
        encode_answer(tokenizer, chat("a", "b", "c", "d"))


def test_a_tokenizer_without_offsets_is_asked_for_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = family("smollm2")
    record = chat("say one", "one two", "one", "two")
    wanted = encode_answer(tokenizer, record)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert encode_answer(tokenizer, record) == wanted
    turns = "{% for m in messages %}{{ m.role }}:o{{ m.content }};{% endfor %}"
    across = bytes_tokenizer(turns + "{% if add_generation_prompt %}assistant:o{% endif %}", "<eos>", [])
    with pytest.raises(ValueError, match="fast tokenizer"):
        encode_answer(across, chat("a", "ne"))
    monkeypatch.undo()
    assert supervised(across, encode_answer(across, chat("a", "ne"))) == ["ne"]
    assert supervised(across, encode_answer(across, chat("a", "nene", "a", "ne"))) == ["ne", "ne"]  # not "one" + "ne"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no marker of the assistant's turn"),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
         "ignores add_generation_prompt.*assistant"),
        ("{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}", "leaves out the assistant's text"),
        ("[{{ messages[-1].role }}]", "leaves out the user's text"),
    ],
)  # fmt: skip
def test_templates_without_a_place_for_answers_are_refused(template: str, message: str) -> None:
    tokenizer = bytes_tokenizer(template, "<|im_end|>", ["<|im_start|>"])
    with pytest.raises(ValueError, match=rf"{message}.*tokenizer\.chat_template"):
        check_template(tokenizer)
    with pytest.raises(ValueError, match=message):
        encode_answers(tokenizer, [own(tokenizer, "a", "b")])


def test_a_template_that_changes_answers_is_refused() -> None:
    shouting = bytes_tokenizer(SMOLLM2.replace("m.content", "m.content | upper"), "<|im_end|>", ["<|im_start|>"])
    with pytest.raises(ValueError, match="leaves out or changes assistant turn 1"):
        encode_answer(shouting, chat("a", "one"))


# Whose answers


def test_answers_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    tokenizer = family("smollm2")
    record = own(tokenizer, "say", "one<|im_end|>", tokenizer=tokenizer_hash(tokenizer))
    assert len(encode_answers(tokenizer, [record])) == 1
    other = bytes_tokenizer(QWEN3, "<|im_end|>", ["<|im_start|>"], plain=("<think>",))
    with pytest.raises(HeadMismatchError, match=r"answer a was made with tokenizer .*haast regenerate"):
        encode_answers(other, [record])
    with pytest.raises(ValueError, match="another target's"):
        encode_answers(tokenizer, [own(tokenizer, "say", "one", tokenizer=record["tokenizer"])], vocab_size=100)
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(HeadMismatchError, match=r"answers\.jsonl"), AnswersFile(path, "", tokenizer_hash(other)):
        pass
    with AnswersFile(path, "", record["tokenizer"]) as file:  # the refusal left no lock behind
        assert set(file.records) == {"a"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "a", "prompt": "b"}, "`prompt` and `response`"),
        ({"prompt": "b", "response": " "}, "empty"),
        ({"id": 3, "prompt": "b", "response": "c"}, "`id`"),
        ({"id": "a", "prompt": "b", "response": "c", "response_ids": []}, "response_ids"),
        ({"id": "a", "prompt": "b", "response": "c", "response_ids": [True]}, "response_ids"),
        ({"prompt": "b", "response": "c", "response_ids": [1]}, "needs its `id`"),
        ({"prompt": "b", "response": "c", "history": ["d"]}, "history"),
        ({"prompt": "b", "response": "c", "thinking": "yes"}, "thinking"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "b"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "begins with"),
    ],
)
def test_records_that_are_none_are_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "fine", "response": "yes"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        read_answers(path)


def test_given_records_without_an_id_are_known_by_their_words(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    given = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c"}, chat("a", "b") | {"id": "own"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in given))
    first, second, third = (record["id"] for record in read_answers(path))
    assert first != second and third == "own"
    assert read_answers(path)[0]["id"] == first
