"""What fields mean, which are refused by name, and what a conversation becomes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Json, tiny_service, tokenizer

from haast.errors import PromptError
from haast.serving import plan as planning
from haast.serving.api_errors import ApiError, problem_of
from haast.serving.conversation import ChatTemplate
from haast.serving.plan import Plan, chat_plan, completion_plan
from haast.serving.reasoning import ReasoningMarks, ReasoningReader
from haast.serving.schema import REFUSED, ChatMessage, ChatRequest, CompletionRequest, Tool
from haast.serving.service import Service, prediction_counts

MESSAGES: list[Json] = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service()


def chat(service: Service, **fields: Any) -> Plan:
    return chat_plan(ChatRequest.model_validate({"messages": MESSAGES, **fields}), service.limits)


def refusal(service: Service, **fields: Any) -> ApiError:
    with pytest.raises((ApiError, ValueError)) as found:
        chat(service, **fields)
    return problem_of(found.value)


def test_defaults_are_openais(service: Service) -> None:
    plan = chat(service)
    assert (plan.sampling.temperature, plan.sampling.top_p, plan.n, plan.max_tokens) == (1.0, 1.0, 1, None)
    assert completion_plan(CompletionRequest(prompt="a"), service.limits).max_tokens == 16
    assert chat(service).sampling.seed != chat(service).sampling.seed, "without a seed every answer has its own"
    assert chat(service, seed=-1).sampling.seed == 2**63 - 1


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_offered_is_refused_by_name(service: Service, name: str) -> None:
    problem = refusal(service, **{name: ["x"]})
    assert (problem.status, problem.param) == (400, name) and name in problem.message
    chat(service, **{name: None})  # nothing is asked for


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"top_k": -2}, "top_k", "top_k=-2"),
        ({"min_p": 1.5}, "min_p", "min_p=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0"),
        ({"stop": ""}, None, "empty"),
        ({"stop": ["a"] * 17}, "stop", "17 strings"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids", "1000000000"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
        ({"n": 17}, "n", "n=17"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "min_tokens=5"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"haast": {"drafter": "magic"}}, "haast.drafter", "'magic'"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not use it"),
        ({"chat_template_kwargs": {"messages": []}}, None, "'messages'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"max_tokens": 5000}, "max_tokens", "5000"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "True"),
    ],
)  # fmt: skip
def test_wrong_values_name_the_field(service: Service, fields: Json, param: str | None, words: str) -> None:
    problem = refusal(service, **fields)
    assert problem.status == 400 and words in problem.message, problem.message
    assert param is None or problem.param == param


def test_a_prompt_at_the_contexts_edge(service: Service) -> None:
    most = service.limits.most
    fits = CompletionRequest(prompt=[5] * (most - 1), max_tokens=1)
    assert completion_plan(fits, service.limits).prompts == [[5] * (most - 1)]
    for length, new in ((most - 1, 2), (most, 1), (most + 50, 1)):
        with pytest.raises(ApiError) as found:
            completion_plan(CompletionRequest(prompt=[5] * length, max_tokens=new), service.limits)
        assert str(most) in found.value.message and str(length) in found.value.message


def test_unknown_fields_are_named_once(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    planning._logged_fields.clear()
    with caplog.at_level(logging.WARNING, logger="haast.serving"):
        chat(service, wibble=1)
        chat(service, wibble=2, user="me", metadata={"a": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "a client sends an unknown field, which is ignored: 'wibble'"
    ]


def test_parts_and_roles_become_a_prompt(service: Service) -> None:
    template = service.limits.template
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
    ]
    ids = template.render([ChatMessage.model_validate(each) for each in talk]).ids
    text = tokenizer().decode(ids)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text and "One\ntwo" in text
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(PromptError, match="image_url"):
        template.render([ChatMessage.model_validate(image)])


def test_tools_of_a_template_that_knows_none_are_told_in_words(service: Service) -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}})
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "blue"},
    ]
    made = service.limits.template.render([ChatMessage.model_validate(each) for each in talk], [tool])
    text = str(tokenizer().decode(made.ids))
    assert text.count("<|im_start|>system") == 1 and '"name": "look"' in text.split("<|im_start|>user")[0]
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>' in text
    assert "<tool_response>\nblue\n</tool_response>" in text
    with pytest.raises(PromptError, match="give a JSON object"):
        wrong = {**call, "function": {"name": "look", "arguments": "[1"}}
        service.limits.template.render([ChatMessage.model_validate({"role": "assistant", "tool_calls": [wrong]})])


def test_a_template_without_reasoning_has_no_marks() -> None:
    assert ChatTemplate(tokenizer()).marks is None


@given(st.text(alphabet="<>/think ab\n", max_size=40), st.booleans(), st.data())
def test_reasoning_is_read_alike_however_a_text_is_cut(text: str, opened: bool, data: st.DataObject) -> None:
    marks = ReasoningMarks("<think>", "</think>")
    whole = data.draw(st.sampled_from([text, f"<think>{text}</think>{text}", f"{text}</think>{text}"]))
    once, cut = ReasoningReader(marks, opened), ReasoningReader(marks, opened)
    parts = [once.push(whole), once.finish()]
    found, at = list[tuple[str, str]](), 0
    while at < len(whole):
        size = data.draw(st.integers(1, 9))
        found.append(cut.push(whole[at : at + size]))
        at += size
    found.append(cut.finish())
    for which in (0, 1):
        assert "".join(part[which] for part in found) == "".join(part[which] for part in parts)


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), max_size=30))
def test_predictions_are_counted(predicted: list[int], said: list[int]) -> None:
    accepted, rejected = prediction_counts(predicted, said)
    assert accepted + rejected == len(predicted) and 0 <= accepted <= len(said)
    assert prediction_counts(predicted, predicted) == (len(predicted), 0)


def test_a_prediction_is_followed_beyond_a_change() -> None:
    assert prediction_counts([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 0, 4, 5, 6, 7, 8, 9]) == (5, 4)
